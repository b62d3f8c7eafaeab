"""Compile the kernels for an H100, with or without one, and print what the machine code holds.

    python tests/_triton/compile_points.py

The public functions run on small CPU tensors with a launch that compiles instead of launching, so
kernels are compiled for exactly the arguments that they get. Prints one JSON object: for each
kernel the bytes per thread that spill, the registers, and the widest load and store.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchsparse._groups import Groups, VoxelGroups
from torchsparse._triton import grouping, norm, points, pool, reduce, sums, table, voxels

TARGET = GPUTarget("cuda", 90, 32)
FAMILIES: tuple[Any, ...] = (grouping, norm, points, pool, reduce, sums, table, voxels)
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def source(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What Triton's launcher would compile for these arguments."""
    values = dict(zip(kernel.arg_names, args)) | constants
    signature, constexprs, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value, aligned = values[param.name], False
        if isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
        elif isinstance(value, float):
            signature[param.name] = param.annotation_type
        elif value == 1 and not param.do_not_specialize:
            signature[param.name] = "constexpr"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not param.do_not_specialize
        if signature[param.name] == "constexpr":
            constexprs[(i,)] = value
        if aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attrs)


def machine_code(cubin: bytes) -> str:
    """SASS and resource usage, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return "".join(
            subprocess.run(
                [tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )


def report(compiled: Any) -> dict[str, Any]:
    code = machine_code(compiled.asm["cubin"])

    def widest(op: str) -> int:
        found = re.findall(rf"\b{op}\.E(\S*)", code)
        sizes = {"128": 16, "64": 8, "U16": 2, "U8": 1}
        return max((next((b for w, b in sizes.items() if w in f), 4) for f in found), default=0)

    found = re.search(r"REG:(\d+) STACK:(\d+)", code)
    assert found is not None, code[:400]
    return {
        "registers": int(found[1]), "stack": int(found[2]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "load": widest("LDG"), "store": widest("STG"),
        "float_atomics": len(re.findall(r"(?:RED|ATOMG?)\.[A-Z.]*(?:F16|F32|F64|BF16)", code)),
    }  # fmt: skip


def collect(run: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Compile what ``run`` launches; reports by kernel, variants counted on: "sum", "sum2"."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()

    def compile_only(kernel: Any, grid: Any, where: Any, *args: Any, **options: Any) -> None:
        warps = options.pop("num_warps", 4)
        ast = source(kernel, args, options)
        if ast.hash() not in seen:
            seen.add(ast.hash())
            compiled = triton.compile(ast, target=TARGET, options={"num_warps": warps})
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            variant = sum(re.fullmatch(rf"{name}\d*", other) is not None for other in found)
            found[name + (str(variant + 1) if variant else "")] = report(compiled)

    before = [family.launch for family in FAMILIES]
    for family in FAMILIES:
        family.launch = compile_only
    try:
        run()
    finally:
        for family, launch in zip(FAMILIES, before):
            family.launch = launch
    return found


def run_all(dtype: torch.dtype = torch.float16, channels: int = 64) -> None:
    """Every kernel once, on features of 128 bytes per row."""
    n, num = 1000, 400
    feats = torch.zeros((n, channels), dtype=dtype)
    coords = torch.zeros((n, 4), dtype=torch.int32)
    index = torch.zeros(n, dtype=torch.int32)
    eight, shares = torch.zeros((n, 8), dtype=torch.int32), torch.zeros((n, 8))
    counts = torch.ones(num, dtype=torch.int32)
    cells = points.flat_index(coords, (2, 10, 10, 10), torch.zeros((), dtype=torch.int64), 8)
    cells.zero_()
    points.scatter_rows(feats[:, :8], cells, 2000)
    points.scatter_rows(feats, cells, 2000)
    points.gather_rows(torch.zeros((2, channels, 5, 200)).permute(0, 2, 3, 1), cells)
    points.share_rows(feats, index, counts)
    points.devoxelize(feats, eight, shares)
    points.devoxelize_weight_grad(feats, eight, feats)
    points.trilinear_weights(torch.zeros((n, 3)), 1.0)
    reduce.group_rows(index, num)
    reduce.group_rows(index, 5)
    reduce.group_rows(index, 31)
    groups = Groups(torch.arange(n), torch.zeros(num + 2, dtype=torch.int64))
    reduce.count(index, 5)
    reduce.segment_sum(feats, groups, torch.ones(n), counts, dtype)
    reduce.segment_sum(feats, Groups(groups.order, groups.starts[:4]))
    top = reduce.segment_max(feats, index, 5)
    reduce.argmax_rows(feats, index, top)
    table_ = torch.zeros((5, channels))
    norm.sample_moments(feats, index, Groups(groups.order, groups.starts[:7]), 8)
    norm.centred_dots(feats, feats, index, groups, torch.zeros((num, channels)))
    norm.affine(feats, index, table_, table_, table_, dtype, (feats, table_))
    taps, limit = torch.zeros((27, num), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    pool.pool_sum(feats, taps, None, True, limit)
    pool.pool_sum(feats, taps, pool.pool_shares(taps, torch.float32))
    _, rows = pool.pool_max(feats, taps, limit)
    pool.pool_top(feats, taps)
    pool.unpool_max(feats[:num], rows, taps, limit)
    pool.pick_rows(feats, rows)
    keys = table.hash_rows(coords, torch.zeros((27, 3), dtype=torch.int32))
    table.find_rows(keys[0], keys)
    table.lookup(keys[0], index, keys)
    table.site_keys(coords.to(torch.int64))
    for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64):
        voxels.group_points(torch.zeros((n, 3), dtype=kind), (0.1,) * 3, None)
    samples = torch.zeros(n, dtype=torch.int64)
    voxels.group_points(torch.zeros((n, 4)), (0.1,) * 4, samples)
    voxels.majority(samples, -1, VoxelGroups(coords, samples, samples, samples, samples[:num]))


if __name__ == "__main__":
    args = sys.argv[1:]
    dtype = getattr(torch, args[0]) if args else torch.float16
    print(json.dumps(collect(lambda: run_all(dtype, int(args[1]) if args[1:] else 64)), indent=1))
