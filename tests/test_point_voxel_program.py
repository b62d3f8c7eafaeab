"""A network with a branch of points, as written for TorchSparse 2.1: the tensors of the library
subclassed, tables on its caches, a hash table called by hand. Against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchsparse import PointTensor, SparseTensor
from torchsparse import nn as spnn
from torchsparse.backend import GPUHashTable
from torchsparse.nn import functional as F
from torchsparse.nn.utils import *  # noqa: F403
from torchsparse.utils import *  # noqa: F403
from torchsparse.utils.tensor_cache import TensorCacheMode, set_tensor_cache_mode


class Cloud(SparseTensor):
    """A tensor that remembers where it came from."""

    def __init__(self, feats: Tensor, coords: Tensor, stride: Any = 1, name: str = "") -> None:
        super().__init__(feats, coords, stride)
        self.name = name


def voxels_of(points: PointTensor) -> Cloud:
    """Means of the points of each cell; the tables lie on the caches."""
    cells = torch.floor(points.C).int()
    hashed = F.sphash(cells)
    unique = torch.unique(hashed)
    index = F.sphashquery(hashed, unique)
    counts = F.spcount(index, len(unique))
    coords = F.spvoxelize(torch.floor(points.C), index, counts).round().int()
    x = Cloud(F.spvoxelize(points.F, index, counts), coords, 1, "voxels")
    x._caches.idx_query_devox = {}  # pyright: ignore[reportAttributeAccessIssue]
    x._caches.weights_devox = {}  # pyright: ignore[reportAttributeAccessIssue]
    points.additional_features["idx_query"][x.s] = index
    points.additional_features["counts"][x.s] = counts
    return x


def to_points(x: SparseTensor, points: PointTensor) -> Tensor:
    """Trilinear, with tables that layers of one stride share."""
    tables: Any = x._caches
    if x.s not in tables.idx_query_devox:
        offsets = get_kernel_offsets(2, 1, 1, device=str(points.F.device))  # noqa: F405
        lattice = torch.cat([points.C[:, :1], points.C[:, 1:] / x.s[0]], 1)
        corners = F.sphash(torch.floor(lattice).int(), offsets)
        seen = GPUHashTable(2 * len(x.coords))
        seen.insert_vals(F.sphash(x.coords))
        index = seen.lookup_vals(corners.view(-1))[: corners.numel()].view_as(corners) - 1
        index = index.t().contiguous()
        tables.weights_devox[x.s] = F.calc_ti_weights(lattice[:, 1:], index, scale=1)
        tables.idx_query_devox[x.s] = index
    return F.spdevoxelize(x.feats, tables.idx_query_devox[x.s], tables.weights_devox[x.s])


def to_voxels(points: PointTensor, x: SparseTensor) -> SparseTensor:
    """Means of point features at the voxels of a level."""
    lattice = points.C.clone()
    lattice[:, 1:] = torch.floor(points.C[:, 1:] / x.s[0])
    index = F.sphashquery(F.sphash(lattice.int()), F.sphash(x.coords))
    counts = F.spcount(index, len(x.coords))
    y = SparseTensor(F.spvoxelize(points.F, index, counts), x.coords, x.s)
    y._caches = x._caches
    return y


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(spnn.Conv3d(3, 8, 3), spnn.BatchNorm(8), spnn.ReLU(True))
        self.down = nn.Sequential(spnn.Conv3d(8, 8, 2, stride=2), spnn.ReLU(True))
        self.up = spnn.Conv3d(8, 8, 2, stride=2, transposed=True)
        self.points = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(True))
        self.head = nn.Linear(8, 5)

    def forward(self, points: PointTensor) -> Tensor:
        x = self.stem(voxels_of(points))
        z = PointTensor(to_points(x, points) + self.points(points.F), points.C)
        coarse = self.down(to_voxels(z, x))
        z = PointTensor(to_points(coarse, points) + z.F, points.C)
        return self.head(to_points(self.up(coarse), points) + z.F)


def example(device: torch.device) -> PointTensor:
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 6, (300, 3))
    batch = np.sort(rng.integers(0, 2, 300))[:, None]
    feats = torch.from_numpy(rng.normal(size=(300, 3))).float().to(device)
    return PointTensor(feats, torch.from_numpy(np.hstack([batch, place])).float().to(device))


def test_voxels_and_points_are_those_of_loops(device: torch.device) -> None:
    points = example(device)
    x = voxels_of(points)
    cells: dict[tuple[int, ...], list[int]] = {}
    for n, place in enumerate(points.C.cpu().numpy()):
        cells.setdefault(tuple(np.floor(place).astype(int).tolist()), []).append(n)
    assert x.name == "voxels" and len(x.coords) == len(cells)
    feats = points.F.cpu().numpy()
    values = {cell: feats[rows].mean(0) for cell, rows in cells.items()}
    for cell, value in zip(x.coords.tolist(), x.feats.cpu().numpy()):
        np.testing.assert_allclose(value, values[tuple(cell)], rtol=1e-5, atol=1e-6)
    got = to_points(x, points).cpu().numpy()
    for place, value in zip(points.C.cpu().numpy().astype(np.float64), got):
        low, total, want = np.floor(place[1:]), 0.0, np.zeros(3)
        for corner in np.ndindex(2, 2, 2):
            cell = (int(place[0]), *(low + corner).astype(int).tolist())
            if cell in values:
                share = np.prod(np.where(corner, place[1:] - low, 1 - place[1:] + low))
                total, want = total + share, want + share * values[cell]
        np.testing.assert_allclose(value, want / (total + 1e-8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", TensorCacheMode)
def test_it_trains_and_evaluates(mode: TensorCacheMode, device: torch.device) -> None:
    set_tensor_cache_mode(mode)
    try:
        torch.manual_seed(0)
        model, points = Network().to(device), example(device)
        target = (points.F.sum(1) > 0).long()
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(20):
            losses.append(nn.functional.cross_entropy(model(points), target))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert losses[-1] < 0.7 * losses[0]
        model.eval()
        want = model(points)
        with torch.no_grad():
            torch.testing.assert_close(model(points), want, rtol=1e-4, atol=1e-5)
    finally:
        set_tensor_cache_mode(TensorCacheMode.SEPARATE_TENSOR_CACHE)
