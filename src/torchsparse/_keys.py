"""Coordinate rows as single 64-bit integers, so that sorting and searching see one number.

    key = sum over columns of (c_i - origin_i) * stride_i           batch first

With strides that are products of the extents behind them, integer order is lexicographic row
order and a neighbour lies at a constant distance: ``key + sum(offset_i * stride_i)``. The box is
widened by a margin on every spatial axis, so that a neighbour never carries into another column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MAX_CELLS", "KeyLayout", "fit_layout", "pack", "unpack"]

# A layout leaves room for a sentinel above every key, and for one so far below that adding the
# distance to a neighbour does not reach them. Short keys halve the memory that a search reads.
MAX_CELLS = {torch.int32: 1 << 30, torch.int64: 1 << 62}


@dataclass(frozen=True, eq=False)
class KeyLayout:
    """Where each column of a coordinate row lies in its key.

    Columns (b, x), origin (0, -3), extent (2, 10):  stride = (10, 1), key(1, 2) = 10 + 5 = 15.
    """

    origin: Tensor  # [1 + D] int64, smallest coordinate of the widened box
    extent: Tensor  # [1 + D] int64, cells of the widened box
    stride: Tensor  # [1 + D] int64 = product of the extents of the columns behind
    dtype: torch.dtype  # of the keys: int32 where they fit, else int64

    @property
    def above(self) -> int:
        """A number above every key."""
        return torch.iinfo(self.dtype).max

    @property
    def below(self) -> int:
        """A number that stays below every key when the distance to a neighbour is added."""
        return -MAX_CELLS[self.dtype]

    @property
    def lower(self) -> Tensor:
        return self.origin

    @property
    def upper(self) -> Tensor:
        """[1 + D] int64, one past the largest coordinate."""
        return self.origin + self.extent

    def delta(self, offsets: Tensor) -> Tensor:
        """Key distance of spatial offsets.  [K, D] -> [K] in the dtype of the keys."""
        # Not a product of matrices: CUDA has none of integers.
        return (offsets.to(self.stride) * self.stride[1:]).sum(1).to(self.dtype)


def fit_layout(lower: Tensor, upper: Tensor) -> KeyLayout:
    """The layout of the box ``lower <= c <= upper`` ([1 + D] int64, both inclusive).

    Raises:
        ValueError: The box has 2^62 cells or more.
    """
    extent = upper - lower + 1
    cells = 1
    for n in extent.tolist():
        cells *= max(int(n), 1)
    if cells >= MAX_CELLS[torch.int64]:
        raise ValueError(
            f"the bounding box of the coordinates, widened by the kernel, must have fewer than "
            f"2^62 cells, got extents {extent.tolist()} (columns: batch, then axes)"
        )
    extent = extent.clamp(min=1)
    stride = torch.ones_like(extent)
    stride[:-1] = extent[1:].flip(0).cumprod(0).flip(0)
    dtype = torch.int32 if cells < MAX_CELLS[torch.int32] else torch.int64
    return KeyLayout(lower, extent, stride, dtype)


def pack(coords: Tensor, layout: KeyLayout) -> Tensor:
    """Keys of coordinate rows inside the box.  [N, 1 + D] -> [N] in the layout's dtype."""
    origin, stride = layout.origin.to(layout.dtype), layout.stride.to(layout.dtype)
    keys = coords.new_zeros(coords.shape[0], dtype=layout.dtype)
    for column in range(coords.shape[1]):
        keys += (coords[:, column].to(layout.dtype) - origin[column]) * stride[column]
    return keys


def unpack(keys: Tensor, layout: KeyLayout) -> Tensor:
    """Coordinate rows of keys.  [N] in the layout's dtype -> [N, 1 + D] int32."""
    coords = torch.empty(
        (keys.shape[0], layout.origin.numel()), dtype=torch.int32, device=keys.device
    )
    origin, stride = layout.origin.to(layout.dtype), layout.stride.to(layout.dtype)
    rest = keys
    for column in range(layout.origin.numel()):
        digit = torch.div(rest, stride[column], rounding_mode="floor")
        coords[:, column] = digit + origin[column]
        rest = rest - digit * stride[column]
    return coords
