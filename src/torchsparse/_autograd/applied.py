"""Calling autograd functions with less in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["applied"]

_transforming: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_alive: Any = getattr(getattr(torch._C, "_functorch", None), "unwrap_if_dead", None)


def applied(function: type[Function]) -> Callable[..., Any]:
    """``function.apply``, for functions without ``setup_context`` and positional arguments.

    PyTorch's own looks at the signature, and through every argument for tensors that outlived a
    transform of functorch: 3.7 of 14.6 us. Here only tensors are looked at. Inside a transform,
    and where PyTorch is built differently, it is called itself.
    """
    if _transforming is None or _alive is None:
        return function.apply
    start = super(Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]

    def apply(*args: Any) -> Any:
        if _transforming():
            return function.apply(*args)
        return start(*[_alive(arg) if isinstance(arg, Tensor) else arg for arg in args])

    return apply
