"""The same bits every time, whatever lay in the memory before, and the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.gpu.layers import (
    CHANNELS,
    DTYPES,
    KINDS,
    Result,
    assert_right,
    assert_same_bits,
    poison,
    run,
    surface,
)
from torchsparse import SparseTensor, generative_add
from torchsparse.nn import functional as F

CPU = torch.device("cpu")
RUNS = 10


def repeat(gpu: torch.device, name: str, channels: tuple[int, int], dtype: str, flow: int) -> None:
    first: Result | None = None
    for turn in range(RUNS):
        before = partial(poison, gpu, 0xFF if turn % 2 else 0x7F)
        got = run(KINDS[name], channels, dtype, gpu, dataflow=flow, before=before)
        if first is None:
            first = got
            assert_right(got, run(KINDS[name], channels, dtype, CPU), dtype)
        assert_same_bits(got, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_ten_runs(name: str, channels: tuple[int, int], dtype: str, gpu: torch.device) -> None:
    repeat(gpu, name, channels, dtype, 0)


@pytest.mark.parametrize("dataflow", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_ten_runs_of_other_dataflows(name: str, dataflow: int, gpu: torch.device) -> None:
    repeat(gpu, name, (32, 64), "fp16", dataflow)


def voxelized(x: SparseTensor) -> Tensor:
    """Three rows to a voxel, far apart."""
    voxel = (torch.arange(len(x.coords), device=x.coords.device) % 500).int()
    return F.spvoxelize(x.feats, voxel, F.spcount(voxel, 500))


def devoxelized(x: SparseTensor) -> Tensor:
    """Every voxel is a corner of many points: the gradient adds up what they send."""
    device = x.coords.device
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 40, (3000, 8), generator=generator).int().to(device)
    shares = torch.rand(3000, 8, generator=generator).to(device, x.feats.dtype)
    return F.spdevoxelize(x.feats, index, shares)


ROWS_TO_ROWS: dict[str, Callable[[SparseTensor], Tensor]] = {
    "voxelize": voxelized,
    "devoxelize": devoxelized,
    "mean": lambda x: F.global_avg_pool(x, 2),
    "max": lambda x: F.global_max_pool(x, 2),
    "max of windows": lambda x: F.max_pool3d(x, 3, 2, 1).feats,
    "mean of windows": lambda x: F.avg_pool3d(x, 3, 2, 1).feats,
    "union": lambda x: generative_add(x, SparseTensor(x.feats, x.coords + 1)).feats,
}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ROWS_TO_ROWS)
def test_ten_runs_of_sums(name: str, dtype: str, gpu: torch.device) -> None:
    """Points, pools and unions: many rows meet in one, in an order that must not matter."""
    found: list[tuple[Tensor, Tensor]] = []
    coords = torch.from_numpy(surface(1500)).to(gpu)
    numbers = torch.randn(1500, 24, generator=torch.Generator().manual_seed(1))
    for turn in range(RUNS):
        feats = numbers.to(gpu, DTYPES[dtype]).requires_grad_()
        poison(gpu, 0xFF if turn % 2 else 0x7F)
        out = ROWS_TO_ROWS[name](SparseTensor(feats, coords))
        push = torch.linspace(-1, 1, out.numel(), device=gpu).view_as(out).to(out.dtype)
        (grad,) = torch.autograd.grad(out, feats, push)
        assert torch.isfinite(out).all() and torch.isfinite(grad).all()
        found.append((out.detach(), grad))
    for again in found[1:]:
        assert torch.equal(again[0], found[0][0]), "output"
        assert torch.equal(again[1], found[0][1]), "gradient"


@pytest.mark.parametrize("rows", [0, 1, 2, 127, 129])
@pytest.mark.parametrize("name", KINDS)
def test_few_rows(name: str, rows: int, gpu: torch.device) -> None:
    """Less than a tile, and a row more or less than one."""
    poison(gpu, 0xFF)
    got = run(KINDS[name], (16, 8), "fp16", gpu, rows=rows)
    assert_right(got, run(KINDS[name], (16, 8), "fp16", CPU, rows=rows), "fp16")
