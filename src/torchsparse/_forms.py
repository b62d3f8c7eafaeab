"""Other forms of features on sites: dense grids, COO tensors of PyTorch, lists of samples.

Tensors in, tensors out; the methods of `SparseTensor` are the public face.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchsparse._autograd.take import take_rows
from torchsparse._flags import Complaint, complain_if, raise_pending
from torchsparse._ops import points, reduce
from torchsparse._validate import wide_ints

__all__ = ["batch_size_of", "from_coo", "from_grid", "pick_samples", "split_samples", "to_coo"]


def from_grid(dense: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """The cells of a grid that hold something.

    Args:
        dense: [B, X, Y, Z, C] (any number of axes).
        mask: [B, X, Y, Z] bool, or None: cells with a channel that is not 0.

    Returns:
        Features [N, C] and coordinates [N, 4] int32 in row-major order. Waits for the device.
    """
    if not isinstance(dense, Tensor):
        raise TypeError(f"`dense` must be a tensor, got {type(dense).__name__}")
    if dense.dim() < 3:
        raise ValueError(
            f"`dense` must have shape [B, X, Y, Z, C], channels last, got {list(dense.shape)}"
        )
    cells = dense.shape[:-1]
    if mask is None:
        mask = (dense.detach() != 0).any(-1)
    elif not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != cells:
        came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(f"`mask` must be a bool tensor of shape {list(cells)}, got {came}")
    coords = mask.nonzero()
    raise_pending(dense.device)  # the line above has waited for the device
    index = points.flat_index(coords, tuple(cells))
    feats = take_rows(dense, index) if dense.is_floating_point() else dense[mask]
    return feats, coords.to(torch.int32)


def to_coo(feats: Tensor, coords: Tensor, extents: tuple[int, ...] | None) -> Tensor:
    """[N, C] and [N, 1 + D] as a hybrid COO tensor, whose size is ``extents`` or fitted."""
    coords = wide_ints(coords)
    if extents is None:
        top = coords.amax(0) + 1 if coords.shape[0] else coords.new_zeros(coords.shape[1])
        extents = tuple(top.tolist())
        raise_pending(coords.device)  # the line above has waited for the device
    size = extents[: coords.shape[1]]
    outside = (points.flat_index(coords, size) < 0).any()
    complain_if(outside, Complaint.DENSE, lambda: f"spatial_range = {size}")
    return torch.sparse_coo_tensor(
        coords.t().to(torch.int64), feats, (*size, feats.shape[1]), check_invariants=False
    )


def from_coo(coo: Any) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Features [N, C], coordinates [N, 1 + D] int32 and range of a COO tensor.

    Its dense axis is the channel; without one there is one channel.
    """
    if not isinstance(coo, Tensor) or coo.layout != torch.sparse_coo:
        came = coo.layout if isinstance(coo, Tensor) else type(coo).__name__
        raise TypeError(f"`coo` must be a tensor of layout torch.sparse_coo, got {came}")
    if coo.dense_dim() > 1 or coo.sparse_dim() < 2:
        raise ValueError(
            f"`coo` must have the sparse axes [B, X, Y, Z] and at most one dense axis [C], "
            f"got {coo.sparse_dim()} sparse and {coo.dense_dim()} dense axes"
        )
    coo = coo.coalesce()
    feats = coo.values()
    if coo.dense_dim() == 0:
        feats = feats[:, None]
    indices = coo.indices().t()
    most = torch.iinfo(torch.int32).max
    if max(coo.shape[: coo.sparse_dim()]) > most + 1:
        far = (indices > most).any()
        complain_if(far, Complaint.OVERFLOW, lambda: f"up to {indices.amax(0).tolist()}")
        raise_pending(indices.device)
    coords = indices.to(torch.int32).contiguous()
    return feats, coords, tuple(coo.shape[: coo.sparse_dim()])


def batch_size_of(coords: Tensor, spatial_range: tuple[int, ...] | None) -> int:
    """The samples a tensor speaks of: those of its range, else up to the largest batch index
    (which waits for the device)."""
    if spatial_range is not None:
        return spatial_range[0]
    return int(wide_ints(coords[:, 0]).amax()) + 1 if coords.shape[0] else 0


def pick_samples(feats: Tensor, coords: Tensor, samples: list[int]) -> tuple[Tensor, Tensor]:
    """The rows of some samples, which are numbered anew.

    Args:
        feats: [N, C].
        coords: [N, 1 + D].
        samples: Distinct batch indices; ``samples[j]`` becomes sample j.

    Returns:
        Features and coordinates by sample, in the row order of each. Waits for the device.
    """
    if len(set(samples)) < len(samples) or min(samples, default=0) < 0:
        raise ValueError(f"`samples` must be distinct batch indices from 0, got {samples}")
    coords = wide_ints(coords)
    wanted = torch.tensor(samples, dtype=coords.dtype, device=coords.device)
    number, rows = (wanted[:, None] == coords[:, 0]).nonzero(as_tuple=True)
    raise_pending(coords.device)  # the line above has waited for the device
    picked = coords.index_select(0, rows)
    picked[:, 0] = number
    chosen = take_rows(feats, rows) if _has_gradient(feats) else feats.index_select(0, rows)
    return chosen, picked


def split_samples(feats: Tensor, coords: Tensor, num: int) -> tuple[list[Tensor], list[Tensor]]:
    """One [N_b, D] and one [N_b, C] per sample, rows in their order. Waits for the device."""
    coords = wide_ints(coords)
    order, starts = reduce.group_rows(coords[:, 0].contiguous(), num)
    bounds = starts.tolist()
    raise_pending(coords.device)  # the line above has waited for the device
    if bounds[num] != coords.shape[0]:
        raise ValueError(
            f"{Complaint.BATCH_SIZE.value} and not negative (got batch_size = {num} and "
            f"{coords.shape[0] - bounds[num]} rows outside)"
        )
    sizes = [high - low for low, high in pairwise(bounds[: num + 1])]
    sites = coords.index_select(0, order)[:, 1:]
    chosen = take_rows(feats, order) if _has_gradient(feats) else feats.index_select(0, order)
    return list(sites.split(sizes)), list(chosen.split(sizes))


def _has_gradient(feats: Tensor) -> bool:
    return feats.dim() == 2 and feats.is_floating_point()
