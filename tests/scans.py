"""Scans and small networks for tests of whole networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import torchsparse
from torchsparse import SparseTensor
from torchsparse import nn as spnn

__all__ = ["Dense", "Several", "again", "assert_agree", "flat", "network", "scan"]

SIZE = 12


def scan(
    rows: int, seed: int, device: torch.device, size: int = SIZE, ranged: bool = False
) -> SparseTensor:
    """Two samples of distinct voxels in a box, in random order, four channels."""
    draw = torch.Generator().manual_seed(seed)
    sites = torch.randint(0, size, (rows, 3), generator=draw)
    batch = torch.randint(0, 2, (rows, 1), generator=draw)
    coords = torch.cat([batch, sites], 1).unique(dim=0)
    coords = coords[torch.randperm(len(coords), generator=draw)].int()
    feats = torch.randn(len(coords), 4, generator=draw)
    extents = (2, size, size, size) if ranged else None
    return SparseTensor(feats.to(device), coords.to(device), 1, extents)


def again(x: SparseTensor) -> SparseTensor:
    """The same tensor without maps."""
    return SparseTensor(x.feats, x.coords, x.stride, x.spatial_range)


class Dense(nn.Module):
    """An encoder that ends in a dense grid and in vectors per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spnn.Conv3d(4, 8, 3), spnn.BatchNorm(8), spnn.ReLU(),
            spnn.Conv3d(8, 16, 3, stride=2, padding=1), spnn.BatchNorm(16), spnn.ReLU(),
        )  # fmt: skip

    def forward(self, x: SparseTensor) -> dict[str, Any]:
        y = self.body(x)
        pooled = spnn.functional.global_avg_pool(y, batch_size=2)
        return {"grid": y.dense(), "pooled": [pooled, y], "logits": x.feats * 2, "name": "d"}


class Several(nn.Module):
    """Layers of every kind that a graph may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(spnn.Conv3d(4, 8, 3, bias=True), spnn.LeakyReLU(0.1))
        self.down = spnn.Conv3d(8, 16, 2, stride=2)
        self.pool = spnn.MaxPool3d(3, stride=1)
        self.mid = nn.Sequential(
            spnn.Conv3d(16, 16, 3, groups=16), spnn.BatchNorm(16, momentum=None), spnn.ReLU(True),
            spnn.Conv3d(16, 16, 1, bias=True), spnn.Conv3d(16, 16, (3, 1, 3)), spnn.BatchNorm(16),
        )  # fmt: skip
        self.up = spnn.Conv3d(16, 8, 2, stride=2, transposed=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: SparseTensor) -> dict[str, Any]:
        fine = self.stem(x)
        coarse = self.down(fine)
        coarse = coarse + self.mid(self.pool(coarse))
        both = torchsparse.cat([self.up(coarse), fine])
        return {"logits": self.head(both.feats), "coarse": coarse, "fine": [fine]}


class Shared(nn.Module):
    """One block used twice in a row and on two levels, one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = spnn.Conv3d(4, 8, 3)
        self.block = nn.Sequential(spnn.Conv3d(8, 8, 3), spnn.BatchNorm(8), spnn.ReLU(True))
        self.down = spnn.Conv3d(8, 8, 2, stride=2)
        self.alias = self.stem

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        fine = self.block(self.stem(x))
        fine = fine + self.block(fine)
        coarse = self.block(self.down(fine))
        return [fine + self.alias(x), coarse]


def network(kind: type[nn.Module], device: torch.device) -> nn.Module:
    """In evaluation mode, with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    whole = kind.__module__.startswith("torchsparse.")
    small: dict[str, Any] = {"in_channels": 4, "width_multiplier": 0.125} if whole else {}
    model = kind(**small).to(device)
    for module in model.modules():
        if isinstance(module, spnn.BatchNorm):
            module.running_mean.normal_(0, 0.1)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return model.eval()


def flat(value: Any) -> Iterator[Tensor]:
    """Tensors of a result; coordinates follow their features."""
    if isinstance(value, SparseTensor):
        yield value.feats
        yield value.coords
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from flat(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from flat(entry)


def assert_agree(got: Any, want: Any) -> None:
    pairs = list(zip(flat(got), flat(want), strict=True))
    assert pairs
    for a, b in pairs:
        if b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b)
