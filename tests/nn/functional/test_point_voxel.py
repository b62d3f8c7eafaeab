"""Moves between points and voxels against loops over points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.cases import assert_close, sparse
from torchsparse import PointTensor, SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

F64 = torch.float64


def example(device: torch.device, n: int = 120, seed: int = 0) -> PointTensor:
    """Samples 0 and 2, in a box of 4 voxels' edge at a resolution of 1."""
    rng = np.random.default_rng(seed)
    positions = np.concatenate([rng.integers(0, 2, (n, 1)) * 2, rng.uniform(0, 4, (n, 3))], 1)
    return PointTensor(
        torch.from_numpy(rng.normal(size=(n, 3))).to(device),
        torch.from_numpy(positions).to(device),
    )


def cell(row: list[float], stride: tuple[int, ...]) -> tuple[int, ...]:
    return (int(row[0]), *(math.floor(p / s) for p, s in zip(row[1:], stride)))


def means(points: PointTensor, stride: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
    found: dict[tuple[int, ...], list[Any]] = {}
    for row, feats in zip(points.C.tolist(), points.F.detach().cpu().numpy()):
        found.setdefault(cell(row, stride), []).append(feats)
    return {site: np.mean(rows, 0) for site, rows in found.items()}


@pytest.mark.parametrize("n", [0, 1, 120])
@pytest.mark.parametrize(("init_res", "after_res"), [(1.0, 1.0), (0.05, 0.1)])
def test_initial_voxelize(n: int, init_res: float, after_res: float, device) -> None:
    points = example(device, n)
    given, scale = points.C.clone(), init_res / after_res
    x = F.initial_voxelize(points, init_res, after_res)
    assert torch.equal(points.C[:, 0], given[:, 0])
    assert_close(points.C[:, 1:], given[:, 1:] * scale, F64)
    want = means(points, (1, 1, 1))
    assert [tuple(c) for c in x.coords.tolist()] == sorted(want)
    assert x.coords.dtype == torch.int32 and x.stride == (1, 1, 1) and x.feats.shape[1] == 3
    if n:
        assert_close(x.feats, np.stack([want[c] for c in sorted(want)]), F64)
    rows = points.additional_features["idx_query"][1, 1, 1].tolist()
    assert [x.coords.tolist()[r] for r in rows] == [
        list(cell(row, (1, 1, 1))) for row in points.C.tolist()
    ]
    counts = points.additional_features["counts"][1, 1, 1]
    assert counts.tolist() == np.bincount(np.array(rows, int), minlength=len(x.coords)).tolist()
    assert counts.dtype == torch.int32


def levels(device: torch.device, points: PointTensor) -> list[SparseTensor]:
    x = F.initial_voxelize(points)
    down = spnn.Conv3d(3, 3, 2, (2, 2, 1), config={"downsample_mode": "minkowski"})
    return [x, down.to(device).double()(x)]


@pytest.mark.parametrize("level", [0, 1])
def test_point_to_voxel(level: int, device: torch.device) -> None:
    points = example(device)
    x = levels(device, points)[level]
    assert x.stride == [(1, 1, 1), (2, 2, 1)][level]
    points.F = points.F * 2 + 1  # not what was voxelised at first
    got = F.point_to_voxel(x, points)
    want = means(points, x.stride)
    assert got.coords is x.coords and got._caches is x._caches and got.stride == x.stride
    assert_close(got.feats, np.stack([want[tuple(c)] for c in x.coords.tolist()]), F64)


def test_voxels_without_points_and_points_without_voxels(device: torch.device) -> None:
    x = sparse(device, "batch_gap")
    points = PointTensor(
        torch.ones(2, 1, dtype=F64, device=device),
        torch.cat([x.coords[:1].double() + torch.tensor([0, 0.5, 0.5, 0.5]).to(device),
                   torch.tensor([[1, 0, 0, 0]]).to(device)]),
    )  # fmt: skip
    got = F.point_to_voxel(x, points).feats
    assert got[0].tolist() == [1] and got[1:].count_nonzero() == 0
    assert F.voxel_to_point(x, points).F[1].tolist() == [0, 0, 0]
    assert F.voxel_to_point(x, points, nearest=True).F.tolist() == [x.feats[0].tolist(), [0] * 3]


@pytest.mark.parametrize("level", [0, 1])
def test_voxel_to_point(level: int, device: torch.device) -> None:
    """The interpolation of `interpolate_points`, up to the 1e-8 in v2.1's normalisation."""
    points = example(device)
    x = levels(device, points)[level]
    got = F.voxel_to_point(x, points)
    want = F.interpolate_points(x, points.C)
    torch.testing.assert_close(got.F, want, rtol=1e-4, atol=1e-4)
    assert got.C is points.C and got.weights is points.weights
    assert points.idx_query[x.stride].shape == points.weights[x.stride].shape == (120, 8)
    nearest = F.voxel_to_point(x, points, nearest=True)
    rows = {tuple(c): f for c, f in zip(x.coords.tolist(), x.feats.detach().cpu().numpy())}
    assert_close(nearest.F, np.stack([rows[cell(p, x.stride)] for p in points.C.tolist()]), F64)
    assert torch.equal(F.voxel_to_point(x, points).F, got.F)  # the tables are still trilinear


def test_tables_are_used_again_and_only_where_they_fit(device: torch.device) -> None:
    points = example(device)
    x = levels(device, points)[0]
    F.voxel_to_point(x, points)
    F.point_to_voxel(x, points)
    rows, where = points.idx_query[x.stride], points.additional_features["idx_query"][x.stride]
    again = F.voxel_to_point(x * 1, points)
    F.point_to_voxel(x, again)
    assert again.idx_query[x.stride] is rows
    assert again.additional_features["idx_query"][x.stride] is where
    # Another tensor of the same stride.
    order = torch.randperm(len(x.coords), generator=torch.Generator().manual_seed(0)).to(device)
    mixed = SparseTensor(x.feats[order], x.coords[order])
    assert_close(F.voxel_to_point(mixed, points).F, again.F, F64)
    assert_close(F.point_to_voxel(mixed, points).feats, x.feats[order], F64)
    # Other positions.
    points.C = points.C.roll(1, 0)
    assert_close(F.voxel_to_point(mixed, points).F, again.F.roll(1, 0), F64)


def test_tables_follow_to_another_device_and_type(device: torch.device) -> None:
    points = example(torch.device("cpu"))
    x = F.initial_voxelize(points)
    want = F.voxel_to_point(x, points).F
    points.to(device)
    got = F.voxel_to_point(x.to(device), points)
    assert_close(got.F, want, F64)


@pytest.mark.parametrize("way", ["initial", "down", "up", "nearest"])
def test_gradients(way: str, device: torch.device) -> None:
    points = example(device, 14)
    x = F.initial_voxelize(points)
    tables = (points.C, points.idx_query, points.weights)

    def compute(feats: torch.Tensor) -> torch.Tensor:
        if way == "initial":
            return F.initial_voxelize(PointTensor(feats, points.C)).feats
        if way == "down":
            return F.point_to_voxel(x, PointTensor(feats, *tables)).feats
        voxels = SparseTensor(feats, x.coords)
        return F.voxel_to_point(voxels, points, nearest=way == "nearest").F

    given = points.F if way in ("initial", "down") else x.feats.detach()
    assert torch.autograd.gradcheck(compute, (given.clone().requires_grad_(),))


@pytest.mark.parametrize("act", [F.point_to_voxel, F.voxel_to_point])
def test_refusals(act: Any, device: torch.device) -> None:
    x, points = sparse(device), example(device)
    with pytest.raises(TypeError, match="`points` must be a PointTensor, got Tensor"):
        act(x, points.F)
    with pytest.raises(TypeError, match=r"`points\.C` must be floating, got torch\.int32"):
        act(x, PointTensor(points.F, points.C.int()))
    with pytest.raises(ValueError, match=r"columns \(b, x, y, z\), got \[120, 3\]"):
        act(x, PointTensor(points.F, points.C[:, :3]))
    with pytest.raises(ValueError, match="one row of features per position, got 119 and 120"):
        act(x, PointTensor(points.F[1:], points.C))
    with pytest.raises(TypeError, match="`feats` must be floating"):
        act(SparseTensor(x.feats.int(), x.coords), points)


def test_positions_that_are_no_numbers(device: torch.device) -> None:
    points = example(device)
    points.C[3, 2] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        F.initial_voxelize(points)
