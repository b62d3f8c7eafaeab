"""Triton's interpreter without work that it does again and again.

A third of what a test of kernels takes is spent on what does not depend on the values: with every
call of a function inside a kernel, the interpreter walks through all names of the language, and
for every intermediate result it builds its type anew. Nothing here changes what is computed.
"""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["hasten"]


def hasten() -> None:
    """Spare the interpreter this work, if it is the one that this was written for."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_once(interpreter, tl)
    _know_dtypes(interpreter, tl)
    _know_shapes(tl)


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
    """Equal shapes have one type."""
    core = tl.core
    make, known = core._type_for_tuple_values, {}

    def type_of(values: Any, fields: Any = None) -> Any:
        if fields is not None or not all(type(v) is core.constexpr for v in values):
            return make(values, fields)
        shape = tuple([v.value for v in values])
        if not all(type(n) is int for n in shape):
            return make(values, fields)
        found = known.get(shape)
        if found is None:
            found = known[shape] = make(values, fields)
        return found

    core._type_for_tuple_values = type_of
