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

__all__ = ["KeyLayout", "fit_layout", "pack", "unpack"]

# A layout must leave room for sentinels above and below every key.
MAX_CELLS = 1 << 62


@dataclass(frozen=True, eq=False)
class KeyLayout:
    """Where each column of a coordinate row lies in its key.

    Columns (b, x), origin (0, -3), extent (2, 10):  stride = (10, 1), key(1, 2) = 10 + 5 = 15.
    """

    origin: Tensor  # [1 + D] int64, smallest coordinate of the widened box
    extent: Tensor  # [1 + D] int64, cells of the widened box
    stride: Tensor  # [1 + D] int64 = product of the extents of the columns behind

    @property
    def lower(self) -> Tensor:
        return self.origin

    @property
    def upper(self) -> Tensor:
        """[1 + D] int64, one past the largest coordinate."""
        return self.origin + self.extent

    def delta(self, offsets: Tensor) -> Tensor:
        """Key distance of spatial offsets.  [K, D] -> [K] int64."""
        return offsets.to(self.stride) @ self.stride[1:]


def fit_layout(lower: Tensor, upper: Tensor) -> KeyLayout:
    """The layout of the box ``lower <= c <= upper`` ([1 + D] int64, both inclusive).

    Raises:
        ValueError: The box has 2^62 cells or more.
    """
    extent = upper - lower + 1
    cells = 1
    for n in extent.tolist():
        cells *= max(int(n), 1)
    if cells >= MAX_CELLS:
        raise ValueError(
            f"the bounding box of the coordinates, widened by the kernel, must have fewer than "
            f"2^62 cells, got extents {extent.tolist()} (columns: batch, then axes)"
        )
    extent = extent.clamp(min=1)
    stride = torch.ones_like(extent)
    stride[:-1] = extent[1:].flip(0).cumprod(0).flip(0)
    return KeyLayout(lower, extent, stride)


def pack(coords: Tensor, layout: KeyLayout) -> Tensor:
    """Keys of coordinate rows inside the layout's box.  [N, 1 + D] -> [N] int64."""
    keys = coords.new_zeros(coords.shape[0], dtype=torch.int64)
    for column in range(coords.shape[1]):
        keys += (coords[:, column].to(torch.int64) - layout.origin[column]) * layout.stride[column]
    return keys


def unpack(keys: Tensor, layout: KeyLayout) -> Tensor:
    """Coordinate rows of keys.  [N] int64 -> [N, 1 + D] int32."""
    coords = torch.empty(
        (keys.shape[0], layout.origin.numel()), dtype=torch.int32, device=keys.device
    )
    rest = keys
    for column in range(layout.origin.numel()):
        digit = torch.div(rest, layout.stride[column], rounding_mode="floor")
        coords[:, column] = digit + layout.origin[column]
        rest = rest - digit * layout.stride[column]
    return coords
