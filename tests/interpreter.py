"""Triton's interpreter without work that it does again and again, and without a mistake.

More than half of what a test of kernels took went into what does not depend on the values: with
every call of a function inside a kernel, the interpreter walks through all names of the language,
and for every intermediate result it builds its type anew. To spare it that changes nothing of what
is computed; what a newer interpreter computes wrongly is mended.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np

__all__ = ["prepare"]


def prepare() -> None:
    """Spare the interpreter of Triton 3.6 this work; mend that of 3.9. Others stay as they are."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version >= (3, 9):
        _keep_bools(interpreter, tl)
    if version != (3, 6):
        return
    _patch_once(interpreter, tl)
    _know_dtypes(interpreter, tl)
    _know_shapes(tl)


def _keep_bools(interpreter: Any, tl: Any) -> None:
    """That of Triton 3.9 takes a comparison of numbers, next to one of blocks, for whole numbers,
    which it then refuses as a mask: ``(block < n) & (number < n)``."""
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, kind: Any, number: Any) -> Any:
        if number.data.dtype != bool or kind.scalar != tl.int1:
            return splat(self, kind, number)
        data = np.full(kind.shape, number.data.reshape(-1)[0])
        return interpreter.TensorHandle(data, tl.int1)

    interpreter.InterpreterBuilder.create_splat = create_splat


def _patch_once(interpreter: Any, tl: Any) -> None:
    """Names of the language that a launch has replaced are not replaced by the functions that its
    kernel calls."""
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope
    replaced: set[int] = set()  # modules, by the launch under way
    inner: list[Any] = []  # what its functions have replaced besides

    class Launch(scope):
        def restore(self) -> None:
            while inner:
                inner.pop().restore()
            super().restore()
            replaced.clear()

    def patch_once(fn: Any) -> Any:
        found = {id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}
        if replaced and found <= replaced:
            return scope()
        done = patch(fn)
        if replaced:
            inner.append(done)
        else:
            done.__class__ = Launch
        replaced.update(found)
        return done

    interpreter._patch_lang = patch_once


def _know_dtypes(interpreter: Any, tl: Any) -> None:
    """NumPy's types of numbers are looked up by name."""
    look_up, known = interpreter._get_np_dtype, {}

    def get(kind: Any) -> Any:
        scalar = kind.element_ty if type(kind) is tl.block_type else kind
        if type(scalar) is not tl.dtype:
            return look_up(kind)
        found = known.get(scalar.name)
        if found is None:
            found = known[scalar.name] = look_up(scalar)
        return found

    interpreter._get_np_dtype = get


def _know_shapes(tl: Any) -> None:
    """Equal shapes are described once."""
    core = tl.core
    make = core.block_type.__init__
    none = core.tuple([]), core.constexpr(1)
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    of_blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if not type.is_block():
            self.shape, self.numel = none
            return
        lengths = tuple(type.shape.values)
        found = of_tensors.get(lengths)
        if found is None:
            shape = core.tuple([core.constexpr(n) for n in lengths])
            found = of_tensors[lengths] = shape, core.constexpr(math.prod(lengths))
        self.shape, self.numel = found

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        lengths = tuple(shape.values if type(shape) is core.tuple else shape)
        for n in lengths:
            if type(n) is not int:
                return make(self, element_ty, shape)
        found = of_blocks.get(lengths)
        if found is None:
            make(self, element_ty, shape)
            of_blocks[lengths] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = found
        self.name = f"<{text}, {element_ty}>"

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type
