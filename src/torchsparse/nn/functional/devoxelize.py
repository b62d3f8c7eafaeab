"""Voxels to points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._autograd.points import devoxelize
from torchsparse._compat import note
from torchsparse._compiling import left_to_python
from torchsparse._ops import points
from torchsparse._validate import check_feats, check_same_device, wide_ints
from torchsparse.nn.functional.count import check_index

__all__ = ["calc_ti_weights", "spdevoxelize"]


@left_to_python
def spdevoxelize(feats: Tensor, coords: Tensor, weights: Tensor) -> Tensor:
    """Interpolate voxel features at points.

    Args:
        feats: Voxel features, [M, C] floating.
        coords: Rows of ``feats`` around each point, [N, 8] integers, negative = absent; from
            ``sphashquery``. Any other width works too.
        weights: Their shares, [N, 8] floating, any dtype; from ``calc_ti_weights``.

    Returns:
        [N, C] in the dtype of ``feats``, summed in float32 (float64 in float64), also under
        autocast. Differentiable in ``feats`` and ``weights``.

    Raises:
        TypeError: Features or weights that are not floating, indices that are not integers.
        ValueError: Shapes that do not fit, tensors on different devices, an index of M or more
            (noticed later on a GPU).
    """
    check_feats(feats)
    check_feats(weights, "weights")
    check_index(coords, 2, "coords")
    if coords.shape != weights.shape:
        raise ValueError(
            f"`coords` and `weights` must have the same shape [N, 8], "
            f"got {list(coords.shape)} and {list(weights.shape)}"
        )
    check_same_device(feats=feats, coords=coords, weights=weights)
    return devoxelize(feats, wide_ints(coords), weights)


@torch.no_grad()
@left_to_python
def calc_ti_weights(coords: Tensor, idx_query: Tensor, scale: Any = 1) -> Tensor:
    """Trilinear shares of the 8 voxels around each point.

    With f = floor(c / scale) * scale and u = (c - f) / scale, corner 4 jx + 2 jy + jz has
    the share prod_i (u_i if j_i else 1 - u_i). Absent corners get 0, the others are divided by
    their sum + 1e-8.

    Args:
        coords: Points, [N, 3 or more], x, y, z first.
        idx_query: [N, 8] integers, -1 = absent. [8, N], the layout of earlier versions, is
            understood unless N = 8, with a note.
        scale: Edge of a voxel in the unit of ``coords``.

    Returns:
        In the shape of ``idx_query`` and the dtype of ``coords``, at least float32. No gradient.

    Raises:
        TypeError: Indices that are not integers.
        ValueError: Shapes that do not fit.
    """
    check_index(idx_query, 2, "idx_query")
    if coords.dim() != 2 or coords.shape[1] < 3:
        raise ValueError(f"`coords` must have shape [N, 3 or more], got {list(coords.shape)}")
    n = coords.shape[0]
    corner_first = tuple(idx_query.shape) == (8, n) and n != 8
    if not corner_first and tuple(idx_query.shape) != (n, 8):
        raise ValueError(
            f"`idx_query` must have shape [{n}, 8] or [8, {n}], got {list(idx_query.shape)}"
        )
    check_same_device(coords=coords, idx_query=idx_query)
    xyz = coords[:, :3].to(torch.promote_types(coords.dtype, torch.float32))
    shares = points.trilinear_weights(xyz, scale)
    if corner_first:
        note("calc_ti_weights(coords, idx_query [8, N], scale)")
        idx_query = idx_query.t()
    shares = shares.masked_fill_(idx_query < 0, 0)
    shares = shares / (shares.sum(1, keepdim=True) + 1e-8)
    return shares.t().contiguous() if corner_first else shares
