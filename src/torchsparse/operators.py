"""Joining sparse tensors: along channels, or over the union of their sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchsparse._autograd.reduce import segment_sum
from torchsparse._cache import TensorCache
from torchsparse._keys import fit_layout, pack, unpack
from torchsparse._validate import check_coords, check_feats, check_rows, check_same_device
from torchsparse.tensor import SparseTensor, check_same_sites, wrap

__all__ = ["cat", "generative_add"]


def cat(inputs: Sequence[SparseTensor]) -> SparseTensor:
    """Join features along the channels.

    Args:
        inputs: Tensors with the same coordinates in the same row order.

    Returns:
        Features [N, C_1 + C_2 + ...]; coordinates, stride, range and caches of ``inputs[0]``.

    Raises:
        ValueError: No tensors, or coordinates that disagree (noticed later on a GPU).
    """
    inputs = list(inputs)
    if not inputs:
        raise ValueError("cat() needs at least one sparse tensor, got none")
    for other in inputs[1:]:
        check_same_sites(inputs[0], other)
    return wrap(torch.cat([x.feats for x in inputs], dim=1), inputs[0])


def generative_add(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """Add two tensors of one stride over the union of their sites.

    Returns:
        Sites sorted by (b, x, y, z), features summed per site; the stride of ``a``; the
        elementwise maximum of both ranges, None if one has none. Its own cache knows the
        coordinates of the other strides (those of ``a``, then of ``b``) and no maps.
        Differentiable.

    Raises:
        ValueError: Different strides or numbers of channels.
    """
    for x in (a, b):
        check_feats(x.feats)
        check_coords(x.coords, ndim=None)
        check_rows(x.feats, x.coords)
    check_same_device(a=a.feats, a_coords=a.coords, b=b.feats, b_coords=b.coords)
    if a.stride != b.stride:
        raise ValueError(f"tensors must have the same stride, got {a.stride} and {b.stride}")
    for what, x, y in (("channels", a.feats, b.feats), ("columns of coords", a.coords, b.coords)):
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"tensors must have the same number of {what}, got {x.shape[1]} and {y.shape[1]}"
            )
    coords, row = _union(torch.cat([a.coords, b.coords]))
    feats = segment_sum(torch.cat([a.feats, b.feats]), row, coords.shape[0])
    extent = None
    if a.spatial_range is not None and b.spatial_range is not None:
        extent = tuple(map(max, a.spatial_range, b.spatial_range))
    out = wrap(feats, a, coords, a.stride, extent)
    out._caches = _joined_levels(a, b)
    out._caches.record(a.stride, coords, extent)
    return out


def _union(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, sorted, and where each given row went.  [N, 4] -> [M, 4] int32, [N] int64."""
    if coords.shape[0] == 0:
        return coords.to(torch.int32), torch.zeros(0, dtype=torch.int64, device=coords.device)
    bounds = torch.stack([torch.stack(torch.aminmax(axis)) for axis in coords.unbind(1)])
    lower, upper = bounds.to(torch.int64).unbind(1)
    layout = fit_layout(lower, upper)
    keys, order = torch.sort(pack(coords, layout), stable=True)
    keys, inverse = torch.unique_consecutive(keys, return_inverse=True)
    return unpack(keys, layout), torch.empty_like(order).index_copy_(0, order, inverse)


def _joined_levels(a: SparseTensor, b: SparseTensor) -> TensorCache:
    """A cache with the levels of both tensors but their own, and what users attached to theirs."""
    cache = TensorCache()
    for source in (a._caches, b._caches):
        for name, value in source.extras().items():
            vars(cache).setdefault(name, value)
        for stride in source.cmaps:
            level = source.level(stride, a.coords.device)
            if level is not None and stride != a.stride:
                cache.record(stride, *level)
    return cache
