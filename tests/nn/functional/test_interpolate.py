"""interpolate_points against a search in Python, and against what linear functions promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import clouds
from tests.cases import assert_close, sparse
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

F64 = torch.float64


def search(
    x: SparseTensor, points: Any, mode: str, anchor: float, normalize: bool
) -> NDArray[np.float64]:
    rows = {tuple(c): f for c, f in zip(x.coords.tolist(), x.feats.cpu().numpy())}
    out = np.zeros((len(points), x.feats.shape[1]))
    for n, (b, *position) in enumerate(points.tolist()):
        u = [p / s - anchor for p, s in zip(position, x.stride)]
        if mode == "nearest":
            found = rows.get((int(b), *(math.floor(c + 0.5) for c in u)))
            out[n] = 0 if found is None else found
            continue
        total = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            site = (int(b), *(math.floor(c) + j for c, j in zip(u, corner)))
            inner = [c - math.floor(c) for c in u]
            share = math.prod(t if j else 1 - t for t, j in zip(inner, corner))
            if site in rows:
                out[n] += share * rows[site]
                total += share
        if normalize and total:
            out[n] /= total
    return out


def around(x: SparseTensor, q: int = 150, seed: int = 0) -> torch.Tensor:
    """Points near the voxels, some on them, some far away."""
    generator = torch.Generator().manual_seed(seed)
    if not len(x.coords):
        return torch.rand(q, 4, generator=generator, dtype=F64).to(x.coords.device) * 5
    rows = torch.randint(0, len(x.coords), (q,), generator=generator)
    base = x.coords.cpu()[rows].double()
    base[:, 1:] *= torch.tensor(x.stride)
    moved = base[:, 1:] + torch.randn(q, 3, generator=generator, dtype=F64) * 2
    moved[::5] = base[::5, 1:]
    moved[0] = 1e6
    base[1, 0] = 9
    return torch.cat([base[:, :1], moved], 1).to(x.coords.device)


@pytest.mark.parametrize(
    "cloud", ["empty", "single", "origin", "odd", "batch_gap", "negative", "block"]
)
@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
@pytest.mark.parametrize(("anchor", "normalize"), [(0.0, True), (0.0, False), (0.5, True)])
def test_equals_a_search(cloud: str, mode: str, anchor: float, normalize: bool, device) -> None:
    for stride in (1, (2, 4, 3)):
        x = sparse(device, cloud, stride=stride)
        points = around(x)
        got = F.interpolate_points(x, points, mode, anchor=anchor, normalize=normalize)
        assert got.dtype == F64 and got.device == x.feats.device
        assert_close(got, search(x, points, mode, anchor, normalize), F64)


def test_no_points(device: torch.device) -> None:
    for mode in ("nearest", "trilinear"):
        none = torch.zeros(0, 4, device=device)
        assert F.interpolate_points(sparse(device), none, mode).shape == (0, 3)


def test_a_linear_function_is_reproduced(device: torch.device) -> None:
    """Between voxels that are all there, whatever the anchor."""
    grid = torch.cartesian_prod(torch.zeros(1).int(), *[torch.arange(4).int()] * 3).to(device)
    slope = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]], dtype=F64, device=device)
    for anchor, stride in ((0.0, 1), (0.5, 2)):
        x = SparseTensor((grid[:, 1:].double() + anchor) * stride @ slope, grid, stride)
        inner = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
        positions = ((inner + anchor) * stride).to(device)
        points = torch.cat([positions.new_zeros(50, 1), positions], 1)
        got = F.interpolate_points(x, points, anchor=anchor)
        assert_close(got, positions @ slope, F64)


def test_equals_the_v21_functions(device: torch.device) -> None:
    x = sparse(device, "block")
    points = around(x)[2:]
    queries = torch.floor(points).int()
    offsets = torch.tensor(list(itertools.product((0, 1), repeat=3)), dtype=torch.int32)
    rows = F.sphashquery(F.sphash(queries, offsets.to(device)), F.sphash(x.coords)).t()
    weights = F.calc_ti_weights(points[:, 1:], rows)
    want = F.spdevoxelize(x.feats, rows, weights)
    # That normalisation adds 1e-8 to the sum; where the sum is small, it shows.
    near = (rows >= 0).sum(1) >= 4
    assert near.sum() > 20
    got = F.interpolate_points(x, points)
    torch.testing.assert_close(got[near], want[near], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("cloud", ["single", "block", "batch_gap"])
def test_gradients_of_features_and_positions(cloud: str, normalize: bool, device) -> None:
    x = sparse(device, cloud, channels=2, stride=(1, 2, 1))
    points = around(x, 14)
    points[:, 1:] = torch.floor(points[:, 1:]) + 0.21 + 0.5 * (points[:, 1:] % 0.9)
    feats = x.feats.requires_grad_()

    def compute(feats: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        at = torch.cat([points[:, :1], positions], 1)
        tensor = SparseTensor(feats, x.coords, x.stride)
        return F.interpolate_points(tensor, at, normalize=normalize)

    positions = points[:, 1:].clone().requires_grad_()
    assert compute(feats, positions).abs().sum() > 0
    assert torch.autograd.gradcheck(compute, (feats, positions))


def test_gradient_of_nearest(device: torch.device) -> None:
    x = sparse(device, "block", channels=2)
    points = around(x, 40)

    def compute(feats: torch.Tensor) -> torch.Tensor:
        return F.interpolate_points(SparseTensor(feats, x.coords), points, "nearest")

    assert torch.autograd.gradcheck(compute, (x.feats.requires_grad_(),))
    moving = points.requires_grad_()
    assert not F.interpolate_points(
        SparseTensor(x.feats.detach(), x.coords), moving, "nearest"
    ).requires_grad


def test_positions_can_be_learned(device: torch.device) -> None:
    """Points climb to where the features are largest."""
    grid = torch.cartesian_prod(torch.zeros(1).int(), *[torch.arange(6).int()] * 3).to(device)
    hill = -((grid[:, 1:] - 3.0) ** 2).sum(1, keepdim=True)
    x = SparseTensor(hill, grid)
    start = torch.tensor([[0.0, 1.3, 4.4, 1.6]], device=device)
    points = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([points], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (-F.interpolate_points(x, points).sum()).backward()
        assert points.grad is not None and points.grad[0, 0] == 0
        optimizer.step()
    assert (start[0, 1:] - 3).abs().min() > 1.3 and (points[0, 1:] - 3).abs().max() < 0.6


def test_half_features_far_from_the_origin(device: torch.device) -> None:
    """Positions keep their precision, sums are in float32."""
    coords = torch.tensor([[0, 100_000, 0, 0], [0, 100_001, 0, 0]], device=device).int()
    x = SparseTensor(torch.tensor([[0.0], [1.0]], device=device).half(), coords)
    points = torch.tensor([[0, 100_000.25, 0, 0]], device=device)
    got = F.interpolate_points(x, points)
    assert got.dtype == torch.float16 and got.item() == 0.25


P = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("points", "mode", "error", "match"),
    [
        (P, "cubic", ValueError, "'trilinear', 'nearest', got 'cubic'"),
        (P[:, :3], "nearest", ValueError, r"shape \[Q, 4\].*got \[2, 3\]"),
        (P.int(), "nearest", TypeError, "`points` must be floating, got torch.int32"),
        (P.numpy(), "nearest", TypeError, "`points` must be a tensor, got ndarray"),
    ],
)
def test_refusals(points: Any, mode: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        F.interpolate_points(sparse(torch.device("cpu")), points, mode)


def test_rows_in_any_order(device: torch.device) -> None:
    x = sparse(device, clouds.batch_gap)
    order = torch.randperm(len(x.coords), generator=torch.Generator().manual_seed(0)).to(device)
    points = around(x)
    mixed = SparseTensor(x.feats[order], x.coords[order])
    assert torch.equal(F.interpolate_points(mixed, points), F.interpolate_points(x, points))
