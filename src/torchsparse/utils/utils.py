"""Small conversions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._geometry import as_tuple

__all__ = ["make_divisible", "make_ntuple", "make_tensor"]


def make_ntuple(x: Any, ndim: int) -> tuple[int, ...]:
    """An int repeated ``ndim`` times; a list, tuple, array or tensor of ``ndim`` ints as a tuple.

    Args:
        x: What to convert.
        ndim: Entries of the result.

    Raises:
        ValueError: Another length, or entries that are not whole numbers.
    """
    return as_tuple(x, ndim, "x")


def make_tensor(x: Any, dtype: torch.dtype = torch.int, device: Any = "cuda") -> Tensor:
    """``x`` as a tensor of its own: writing into it changes nothing else.

    Args:
        x: A number, list, tuple, array or tensor.
        dtype, device: Of the result.
    """
    return torch.as_tensor(x, dtype=dtype, device=device).clone()


def make_divisible(x: int, divisor: int) -> int:
    """``x`` rounded up to a multiple of ``divisor``."""
    return (x + divisor - 1) // divisor * divisor
