"""Features between points and the voxels of a network's levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._autograd.voxels import group_sum
from torchsparse._cache import Stamp
from torchsparse._compiling import left_to_python
from torchsparse._ops.voxels import group_points
from torchsparse._validate import check_coords, check_feats, check_rows, check_same_device
from torchsparse.nn.functional.count import spcount
from torchsparse.nn.functional.devoxelize import calc_ti_weights, spdevoxelize
from torchsparse.nn.functional.hash import sphash
from torchsparse.nn.functional.interpolate import on_lattice
from torchsparse.nn.functional.query import sphashquery
from torchsparse.nn.functional.voxelize import spvoxelize
from torchsparse.nn.utils.kernel import get_kernel_offsets
from torchsparse.tensor import PointTensor, SparseTensor, wrap

__all__ = ["initial_voxelize", "point_to_voxel", "voxel_to_point"]


@left_to_python
def initial_voxelize(
    points: PointTensor, init_res: float = 1.0, after_res: float = 1.0
) -> SparseTensor:
    """The voxels that hold points, with the mean of their features. Waits for the device once.

    Args:
        points: ``F`` [N, C] and ``C`` [N, 4] floating, columns (b, x, y, z). Changed: ``C``
            becomes positions in voxels, and ``additional_features`` remembers the voxel of each
            point and their number, for `point_to_voxel`.
        init_res: Unit of the given positions.
        after_res: Edge of a voxel, in the same measure: a position p lies in voxel
            ``floor(p * init_res / after_res)``.

    Returns:
        Features [M, C] at stride 1; coordinates [M, 4] int32, sorted. Differentiable in ``F``.

    Raises:
        TypeError: Features or positions that are not floating.
        ValueError: Shapes that do not fit, positions that are not finite or too large.
    """
    _check_points(points)
    batch, positions = points.C[:, 0], points.C[:, 1:] * (init_res / after_res)
    groups = group_points(positions, (1.0, 1.0, 1.0), batch.to(torch.int64))
    points.C = torch.cat([batch[:, None], positions], 1)
    counts = groups.counts()
    out = SparseTensor(group_sum(points.F, groups, counts), groups.coords)
    _tables_of(points, out)
    points.additional_features["idx_query"][out.stride] = groups.inverse.to(torch.int32)
    points.additional_features["counts"][out.stride] = counts.to(torch.int32)
    return out


@left_to_python
def point_to_voxel(input: SparseTensor, points: PointTensor) -> SparseTensor:
    """The mean of the features of the points of each voxel.

    Args:
        input: Whose sites to use; its features are not looked at. Stride S.
        points: ``F`` [N, C] and ``C`` [N, 4] as `initial_voxelize` leaves them: a point p lies in
            the voxel ``floor(p / S)``. Where each point lies is remembered in
            ``additional_features``.

    Returns:
        Features [M, C], 0 for voxels without points; sites, range and caches of ``input``.
        Differentiable in ``F``.

    Raises:
        TypeError, ValueError: Dtypes and shapes that do not fit, different devices.
    """
    _check_points(points)
    _check_sites(input, points)
    known = _tables_of(points, input)
    if input.stride not in known["idx_query"]:
        rows = sphashquery(sphash(_cells(points.C, input.stride)), sphash(input.coords))
        known["idx_query"][input.stride] = rows
        known["counts"][input.stride] = spcount(rows, input.coords.shape[0])
    rows, counts = known["idx_query"][input.stride], known["counts"][input.stride]
    return wrap(spvoxelize(points.F, rows, counts), input)


@left_to_python
def voxel_to_point(input: SparseTensor, points: PointTensor, nearest: bool = False) -> PointTensor:
    """Features of voxels at points: trilinear, or those of the voxel that a point lies in.

    Args:
        input: Features [M, C] at stride S.
        points: ``C`` [N, 4] as `initial_voxelize` leaves them. The 8 rows around each point and
            their shares are remembered in ``idx_query`` and ``weights``.
        nearest: Do not interpolate; a point whose voxel is absent gets 0.

    Returns:
        Features [N, C] on the same positions and tables as ``points``. Differentiable in the
        features of ``input``. (`interpolate_points` also has gradients for positions.)

    Raises:
        TypeError, ValueError: Dtypes and shapes that do not fit, different devices.
    """
    _check_points(points)
    _check_sites(input, points)
    _tables_of(points, input)
    stride = input.stride
    if stride not in points.idx_query:
        corners = get_kernel_offsets(2, device=points.C.device)
        around = sphash(_cells(points.C, stride), corners)  # [8, N]
        rows = sphashquery(around, sphash(input.coords)).t().contiguous()
        points.idx_query[stride] = rows
        points.weights[stride] = calc_ti_weights(on_lattice(points.C, stride), rows)
    rows, shares = points.idx_query[stride], points.weights[stride]
    if nearest:
        rows, shares = rows[:, :1], torch.ones_like(shares[:, :1])
    out = PointTensor(
        spdevoxelize(input.feats, rows, shares), points.C, points.idx_query, points.weights
    )
    out.additional_features = points.additional_features
    return out


def _check_points(points: Any) -> None:
    if not isinstance(points, PointTensor):
        raise TypeError(f"`points` must be a PointTensor, got {type(points).__name__}")
    check_feats(points.F, "points.F")
    check_feats(points.C, "points.C")
    if points.C.shape[1] != 4:
        raise ValueError(
            f"`points.C` must have shape [N, 4] with the columns (b, x, y, z), "
            f"got {list(points.C.shape)}"
        )
    if points.F.shape[0] != points.C.shape[0]:
        raise ValueError(
            f"`points` must have one row of features per position, "
            f"got {points.F.shape[0]} and {points.C.shape[0]}"
        )


def _check_sites(x: SparseTensor, points: PointTensor) -> None:
    check_feats(x.feats)
    check_coords(x.coords)
    check_rows(x.feats, x.coords)
    check_same_device(feats=x.feats, coords=x.coords, points=points.C)


def _tables_of(points: PointTensor, x: SparseTensor) -> dict[str, dict[Any, Any]]:
    """What is remembered about points and voxels, without what belongs to other ones.

    Tables have an entry per stride. Another tensor of that stride may have other sites, and
    positions may have been replaced.
    """
    tables = points.additional_features
    ends = tables.setdefault("ends", {})
    known = ends.get(x.stride)
    if known is None or not (known[0].fits(points.C) and known[1].fits(x.coords)):
        for table in (points.idx_query, points.weights, tables["idx_query"], tables["counts"]):
            table.pop(x.stride, None)
        ends[x.stride] = (Stamp(points.C), Stamp(x.coords))
    return tables


def _cells(positions: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The voxel of each point.  [N, 4] -> [N, 4] int32."""
    cells = torch.floor(on_lattice(positions, stride))
    return torch.cat([positions[:, :1], cells], 1).to(torch.int32)
