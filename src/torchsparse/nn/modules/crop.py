"""Cutting a box out of a sparse tensor, as a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchsparse.nn.functional.crop import spcrop
from torchsparse.tensor import SparseTensor

__all__ = ["SparseCrop"]


class SparseCrop(nn.Module):
    """Keep the rows with ``coords_min <= (x, y, z) < coords_max``; see ``functional.spcrop``.

    [N, C] features -> [M, C], in their dtype.

    Args:
        coords_min, coords_max: 3 ints each (or one for all axes), None = unbounded.
    """

    def __init__(self, coords_min: Any = None, coords_max: Any = None) -> None:
        super().__init__()
        self.coords_min = coords_min
        self.coords_max = coords_max

    def forward(self, input: SparseTensor) -> SparseTensor:
        return spcrop(input, self.coords_min, self.coords_max)

    def extra_repr(self) -> str:
        return f"coords_min={self.coords_min}, coords_max={self.coords_max}"
