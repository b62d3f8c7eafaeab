"""How often the host waits for the GPU. A wait costs a network more than most of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.gpu.layers import KINDS, Kind, surface
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResUNet42
from torchsparse.utils import voxelize_points

# Most waits per map: a strided or generative layer has as many sites as the data says.
MOST_PER_MAP = {
    "pointwise": 0, "submanifold-3": 0, "submanifold-even": 0, "submanifold-5": 0,
    "strided-2": 1, "strided-3": 1, "generative": 1,
}  # fmt: skip
MOST_AT_FIRST = 4  # of a U-Net: one for each halving
MOST_PER_UNET = 1  # afterwards: its maps are built together


@contextmanager
def counted() -> Iterator[list[str]]:
    """One entry per operation that PyTorch knows to wait for the GPU."""
    found: list[str] = []
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield found
            found += [
                f"{w.filename}:{w.lineno}" for w in caught if "a synchronizing" in str(w.message)
            ]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layer(kind: Kind) -> spnn.Conv3d:
    return spnn.Conv3d(
        16, 16, kind.kernel_size, kind.stride, kind.padding, kind.dilation,
        transposed=kind.transposed, generative=kind.generative,
    )  # fmt: skip


def cloud(gpu: torch.device, channels: int = 16, ranged: bool = False) -> SparseTensor:
    coords = torch.from_numpy(surface(1500)).to(gpu)
    spatial_range = (2, 64, 64, 24) if ranged else None
    return SparseTensor(torch.ones(len(coords), channels, device=gpu), coords, 1, spatial_range)


def warm(call: Callable[[], Any]) -> None:
    """Compile, and fill whatever is made once per process."""
    for _ in range(2):
        call()


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("name", MOST_PER_MAP)
def test_waits_per_map(name: str, ranged: bool, gpu: torch.device) -> None:
    conv = layer(KINDS[name]).to(gpu)
    warm(lambda: conv(cloud(gpu, ranged=ranged)))
    x = cloud(gpu, ranged=ranged)
    with counted() as waits:
        conv(x)
    print(f"{name}, range {ranged}: {len(waits)} waits {waits}")
    assert len(waits) <= MOST_PER_MAP[name], waits


@pytest.mark.parametrize("n", [1, 5000, 200_000])
def test_voxels_of_points_wait_once(n: int, gpu: torch.device) -> None:
    """For their number; the labels' bounds and earlier complaints come along."""
    points = torch.rand(n, 3, device=gpu) * 50
    ids = torch.arange(n, device=gpu)

    def step() -> None:
        voxelize_points(points, 0.2, feats=points, labels=ids % 9, batch=ids % 2)

    warm(step)
    with counted() as waits:
        step()
    assert len(waits) == 1, waits


@pytest.mark.parametrize("training", [False, True])
def test_a_kept_map_needs_no_wait(training: bool, gpu: torch.device) -> None:
    conv = layer(KINDS["submanifold-3"]).to(gpu)
    x = cloud(gpu)
    x.feats.requires_grad_(training)

    def step() -> None:
        with torch.set_grad_enabled(training):
            y = conv(x)
        if training:
            y.feats.sum().backward()

    warm(step)
    with forbidden():
        step()


@pytest.mark.parametrize("training", [False, True])
def test_pools_on_kept_maps_need_no_wait(training: bool, gpu: torch.device) -> None:
    x = cloud(gpu)
    x.feats.requires_grad_(training)
    down, up = spnn.MaxPool3d(2, return_indices=True), spnn.MaxUnpool3d(2)

    def step() -> None:
        with torch.set_grad_enabled(training):
            total = up(*down(x)).feats.sum() + spnn.AvgPool3d(3, 1)(x).feats.sum()
        if training:
            total.backward()

    warm(step)
    with forbidden():
        step()


@pytest.mark.parametrize("training", [False, True])
def test_waits_per_u_net(training: bool, gpu: torch.device) -> None:
    """Backward waits for nothing: all its maps are views of those of the forward pass."""
    model = SparseResUNet42(width_multiplier=0.25).to(gpu).train(training)

    def step(x: SparseTensor, backward: bool = training) -> torch.Tensor:
        with torch.set_grad_enabled(training):
            y = model(x)[-1].feats
        if backward:
            y.sum().backward()
        return y

    warm(lambda: step(cloud(gpu, 4)))
    x = cloud(gpu, 4)
    with counted() as waits:
        y = step(x, backward=False)
    print(f"U-Net, training {training}: {len(waits)} waits {waits}")
    assert len(waits) <= MOST_PER_UNET, waits
    if training:
        with forbidden():
            y.sum().backward()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_norms_wait_for_nothing(momentum: float | None, gpu: torch.device) -> None:
    """The cumulative average, too: PyTorch's waits for the number of batches."""
    norm, relu = spnn.BatchNorm(16, momentum=momentum).to(gpu), spnn.ReLU(True)
    x = cloud(gpu)
    x.feats.requires_grad_()

    def step() -> None:
        relu(norm(x) + x).feats.sum().backward()

    warm(step)
    with forbidden():
        step()
