"""Hashes of voxel coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._compiling import left_to_python
from torchsparse._ops import table
from torchsparse._validate import check_same_device

__all__ = ["sphash"]


@left_to_python
def sphash(coords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Hash coordinate rows: 64-bit FNV-1a, one step per column taken as unsigned 32 bits.

    Args:
        coords: [N, 4] int32, columns (b, x, y, z).
        offsets: [K, 3] int32, added to (x, y, z), for instance from ``get_kernel_offsets``.

    Returns:
        [N] int64; with offsets [K, N].

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape.
    """
    _check(coords, 4, "coords")
    if offsets is not None:
        _check(offsets, 3, "offsets")
        check_same_device(coords=coords, offsets=offsets)
    return table.hash_rows(coords, offsets)


def _check(value: Any, columns: int, name: str) -> None:
    dtype = getattr(value, "dtype", type(value).__name__)
    if dtype != torch.int32:
        raise TypeError(f"`{name}` must be an int32 tensor, got {dtype}")
    if value.dim() != 2 or value.shape[1] != columns:
        rows = "N" if columns == 4 else "K"
        raise ValueError(f"`{name}` must have shape [{rows}, {columns}], got {list(value.shape)}")
