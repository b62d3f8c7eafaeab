"""Compile, without a GPU, every kernel that a piece of the library launches.

`record` replaces the start of kernels: each is compiled for the given architecture with the types
of its arguments, and nothing runs. Outputs are zeros, so that code which reads them goes on.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchsparse._triton import launch
from torchsparse._triton.conv import product

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "an interpreted kernel is not compiled"

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """A kernel as compiled for one kind of arguments."""

    name: str
    constants: dict[str, Any]
    kernel: Any = field(repr=False)

    @cached_property
    def _binary(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
            file.write(self.kernel.asm["cubin"])
        return file.name

    def _tool(self, option: str) -> str:
        command = [str(TOOLS / "cuobjdump"), option, self._binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @cached_property
    def code(self) -> str:
        """Machine code."""
        return self._tool("-sass")

    def count(self, instruction: str) -> int:
        """Number of instructions that match a regular expression."""
        return len(re.findall(instruction, self.code))

    @cached_property
    def stack(self) -> int:
        """Bytes of registers spilled per thread."""
        return max(map(int, re.findall(r"STACK:(\d+)", self._tool("-res-usage"))))

    @property
    def in_flight(self) -> int:
        """Asynchronous copies that may be under way while the loop computes."""
        found = re.findall(r"async_wait[^{]*\{num = (\d+)", self.kernel.asm["ttgir"])
        return max(map(int, found), default=0)


def _kind(value: Any) -> tuple[Any, bool]:
    """Type in a signature, and whether it is divisible by 16."""
    if type(value) is launch.Blocks:
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype][1:]}[{block}]>", False
    if isinstance(value, tuple):
        return tuple(_kind(entry)[0] for entry in value), False
    if isinstance(value, Tensor):
        return TYPES[value.dtype], True
    if value is None or value is True or value is False:
        return "constexpr", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64"), value % 16 == 0
    return "fp32", False


def compile_launch(
    kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int
) -> Compiled:
    """Compile a kernel for the arguments of one launch."""
    options = dict(options)
    names = ("num_warps", "num_stages", "maxnreg")
    tuned = {k: options.pop(k) for k in names if k in options}
    names = kernel.arg_names
    values = {**dict(zip(names, args)), **options}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        kind, aligned = _kind(values[name]) if name not in options else ("constexpr", False)
        if name in fixed and isinstance(kind, str):
            kind, aligned = "i32", False
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = values[name]
        elif aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=tuned)
    return Compiled(kernel.fn.__name__, constants, compiled)


@contextmanager
def record(arch: int = 90) -> Iterator[list[Compiled]]:
    """Compile instead of launching; the list fills with one entry per kind of launch."""
    done: dict[Any, Compiled] = {}
    found: list[Compiled] = []

    def start(kernel: Any, grid: Any, device: Any, args: Any, options: Any) -> None:
        fixed = {p.name for p in kernel.params if p.do_not_specialize}
        kinds = tuple(
            "i32" if name in fixed and isinstance(arg, int) else _kind(arg)
            for name, arg in zip(kernel.arg_names, args)
        )
        key = (kernel, kinds, tuple(options.items()))
        if key not in done:
            done[key] = compile_launch(kernel, args, options, arch)
            found.append(done[key])

    empty, own_start, has_blocks = torch.empty, launch._start, product.has_blocks
    launch._start = start
    product.has_blocks = lambda device: arch == 90  # pyright: ignore[reportPrivateImportUsage]
    torch.empty = torch.zeros  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.new_empty = Tensor.new_zeros  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        launch._start, torch.empty = own_start, empty
        product.has_blocks = has_blocks  # pyright: ignore[reportPrivateImportUsage]
        del Tensor.new_empty  # that of the base class is there again
