"""Checks of arguments: each error says what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._flags import Complaint, complain_if

__all__ = [
    "check_coords",
    "check_feats",
    "check_rows",
    "check_same_device",
    "one_of",
    "wide_ints",
]


INT64 = torch.iinfo(torch.int64)


def one_of(value: Any, allowed: tuple[Any, ...], name: str) -> Any:
    """``value``, if it is among ``allowed``; ValueError otherwise."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_feats(feats: Any, name: str = "feats") -> None:
    """Features are a floating [N, C] tensor."""
    if not isinstance(feats, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(feats).__name__}")
    if not feats.is_floating_point():
        raise TypeError(f"`{name}` must be floating, got {feats.dtype}")
    if feats.dim() != 2:
        raise ValueError(f"`{name}` must have shape [N, C], got {list(feats.shape)}")


def check_coords(coords: Any, ndim: int | None = 3, name: str = "coords") -> None:
    """Coordinates are an integer [N, 1 + ndim] tensor, batch index first (any ndim if None)."""
    if not isinstance(coords, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(coords).__name__}")
    if coords.is_floating_point() or coords.is_complex() or coords.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must hold integers (int32), got {coords.dtype}: features come first in "
            f"SparseTensor(feats, coords); points become voxels by flooring and casting"
        )
    if coords.dim() != 2 or (ndim is not None and coords.shape[1] != 1 + ndim):
        columns = "1 + D" if ndim is None else str(1 + ndim)
        raise ValueError(
            f"`{name}` must have shape [N, {columns}] with the batch index first, "
            f"got {list(coords.shape)}"
        )


def wide_ints(values: Tensor) -> Tensor:
    """Integers of any type as int32 or int64, the two that PyTorch compares and indexes with.

    Args:
        values: Any shape.

    Returns:
        int32 and int64 as they are, smaller types as int32, larger ones as int64.

    Raises:
        ValueError: uint64 of 2^63 and more (noticed later on a GPU).
    """
    dtype = values.dtype
    if dtype in (torch.int32, torch.int64):
        return values
    if dtype == torch.uint64:
        wide = values.view(torch.int64)
        complain_if(
            (wide < 0).any(),
            Complaint.OVERFLOW,
            lambda: f"up to {int((wide ^ INT64.min).amax()) - INT64.min}",
        )
        return wide
    return values.to(torch.int32 if dtype.itemsize < 4 else torch.int64)


def check_rows(feats: Tensor, coords: Tensor) -> None:
    """One feature row per coordinate row."""
    if feats.shape[0] != coords.shape[0]:
        raise ValueError(
            f"`feats` and `coords` must have the same number of rows, "
            f"got {feats.shape[0]} and {coords.shape[0]}"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """All given tensors live on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"`{name}` on {device}" for name, device in devices.items())
        raise ValueError(f"tensors must be on one device, got {found}")
