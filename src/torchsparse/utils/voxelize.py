"""Points with features and labels to voxels with features and labels, in one call."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._autograd.reduce import segment_max
from torchsparse._autograd.take import take_rows
from torchsparse._autograd.voxels import group_sum
from torchsparse._ops import voxels as ops
from torchsparse._validate import check_feats, check_same_device, one_of
from torchsparse.utils.collate import as_tensor
from torchsparse.utils.quantize import cell_size

__all__ = ["VoxelizedPoints", "voxelize_points"]

REDUCTIONS = ("mean", "sum", "max", "first")


class VoxelizedPoints(NamedTuple):
    """M voxels made of N points; tensors, or arrays if arrays came in.

    Points 0.2, 0.9, 0.4 on one axis and voxel size 0.5:  coords = [[0], [1]], index = [0, 1],
    inverse = [0, 1, 0], counts = [2, 1].
    """

    coords: Any  # [M, 3] int32, sorted by (x, y, z); [M, 4] by (b, x, y, z) with a batch
    feats: Any  # [M, C] in the dtype of the points' features, or None
    labels: Any  # [M] in the dtype of the points' labels, or None
    index: Any  # [M] int64, first point of each voxel
    inverse: Any  # [N] int64, voxel of each point
    counts: Any  # [M] int64, points of each voxel


def voxelize_points(
    points: Any,
    voxel_size: Any = 1,
    *,
    feats: Any = None,
    labels: Any = None,
    batch: Any = None,
    reduce: str = "mean",
    ignore_label: int = -100,
) -> VoxelizedPoints:
    """Gather points into voxels ``floor(points / voxel_size)``, with what they carry.

    Works where its tensors are and waits for the device once; on a GPU without Triton again for
    labels. The same points give the same bits, whatever the device's number of threads.
    ``SparseTensor(v.feats, v.coords)`` takes the result
    as it is, if a batch was given and no coordinate is negative.

    Args:
        points: [N, 3] array or tensor of numbers (any D instead of 3).
        voxel_size: A number, or one per axis, in the unit of ``points``. The division is in
            float64.
        feats: [N, C] floating, or None.
        labels: [N] integers, or None. Each voxel gets the most frequent label of its points, the
            lowest of several.
        batch: [N] integers, sample of each point, or None.
        reduce: "mean", "sum", "max" or "first": what becomes of the features of a voxel. Sums are
            in float32 (float64 in float64) in the order of the points.
        ignore_label: Points with this label do not vote; a voxel without votes gets it.

    Returns:
        Coordinates, features, labels, first points, voxel of each point, number of points.
        Differentiable in ``feats``.

    Raises:
        TypeError: Features that are not floating, labels or a batch that are not integers.
        ValueError: Shapes that do not fit, tensors on different devices, an unknown reduction, a
            voxel size that is not positive, NaN, Inf, a voxel that does not fit into int32.
    """
    one_of(reduce, REDUCTIONS, "reduce")
    is_tensor = isinstance(points, Tensor)
    points = points.detach() if is_tensor else as_tensor(points)
    if points.dim() != 2 or points.shape[1] == 0:
        raise ValueError(f"`points` must have shape [N, 3], got {list(points.shape)}")
    n = points.shape[0]
    values = None if feats is None else _per_point(feats, "feats", n, 2)
    votes = None if labels is None else _per_point(labels, "labels", n, 1)
    sample = None if batch is None else _per_point(batch, "batch", n, 1)
    check_same_device(points=points, feats=values, labels=votes, batch=sample)
    groups = ops.group_points(points, cell_size(voxel_size, points.shape[1]), sample)
    counts = groups.counts()
    found = VoxelizedPoints(
        coords=groups.coords,
        feats=None if values is None else _reduced(values, groups, counts, reduce),
        labels=None if votes is None else _voted(votes, ignore_label, groups),
        index=groups.first,
        inverse=groups.inverse,
        counts=counts,
    )
    if is_tensor:
        return found
    return VoxelizedPoints(*(None if x is None else x.detach().numpy() for x in found))


def _per_point(value: Any, name: str, n: int, axes: int) -> Tensor:
    """Features [N, C] or integers [N], checked."""
    value = as_tensor(value)
    if axes == 2:
        check_feats(value, name)
    elif value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integers, got {value.dtype}")
    if value.dim() != axes or value.shape[0] != n:
        shape = f"[{n}, C]" if axes == 2 else f"[{n}]"
        raise ValueError(f"`{name}` must have shape {shape}, got {list(value.shape)}")
    return value


def _reduced(feats: Tensor, groups: ops.VoxelGroups, counts: Tensor, reduce: str) -> Tensor:
    if reduce == "first":
        return take_rows(feats, groups.first)
    if reduce == "max":
        return segment_max(feats, groups.inverse, counts.shape[0])
    return group_sum(feats, groups, counts if reduce == "mean" else None)


def _voted(labels: Tensor, ignored: int, groups: ops.VoxelGroups) -> Tensor:
    """Majority labels in the dtype of the labels."""
    ignored = operator.index(ignored)  # of NumPy too
    return ops.majority(labels.to(torch.int64), ignored, groups).to(labels.dtype)
