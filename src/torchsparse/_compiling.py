"""How operations are told to PyTorch's compiler: as operators that it calls and does not open."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.library import Library

__all__ = [
    "left_to_python",
    "operator",
    "runs_while_tracing",
    "with_gradient",
    "without_second_gradient",
]

F = TypeVar("F", bound=Callable[..., Any])

HOME = "torchsparse"
_library = Library(HOME, "DEF")

# Strides stay as they were traced. CUDA graphs cannot hold what waits for sizes.
_TAGS = [
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "needs_fixed_stride_order", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
]


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Any], Any]:
    """Make a function the operator ``torchsparse::name``.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        fake: The same function for tensors without data: shapes, dtypes and devices alone.

    Returns:
        A decorator; in place of the function it leaves the operator.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)

    def decorate(function: Callable[..., Any]) -> Any:
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{HOME}::{name}", fake, lib=_library)
        return getattr(getattr(torch.ops, HOME), name).default

    return decorate


def with_gradient(
    operator: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Give an operator its derivative, in the manner of ``torch.library.register_autograd``."""
    name = operator.name()
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def without_second_gradient(operator: Any) -> None:
    """Refuse to differentiate an operator that is a derivative itself. PyTorch would leave its
    share out, in silence."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"second derivatives through {operator.name()} are not provided for")

    with_gradient(operator, refuse, lambda ctx, inputs, output: None)


def runs_while_tracing(function: Any) -> Any:
    """Let a function that returns None run while a program is traced, not as part of it.

    The same as ``torch.compiler.assume_constant_result``, which would import the compiler.
    """
    function._dynamo_marked_constant = True
    return function


_left: list[Callable[..., Any]] = []
_closed: list[Callable[..., Any]] = []  # the same for compilers, once one has come


@runs_while_tracing
def _close() -> None:
    for function in _left[len(_closed) :]:
        _closed.append(torch.compiler.disable(function))  # imports the compiler: not before


def left_to_python(function: F) -> F:
    """Let compilers leave a function alone: a program is cut in two where it calls it."""
    place = len(_left)
    _left.append(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _close()
            return _closed[place](*args, **kwargs)
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
