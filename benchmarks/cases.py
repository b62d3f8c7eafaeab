"""What is timed: single layers and whole networks, as rows of two tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.scenes import Scene
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.nn import functional as F


class Case(NamedTuple):
    """A network and the input it needs."""

    name: str
    build: Callable[[], nn.Module]
    in_channels: int


class _Block(nn.Module):
    """A strided layer and its inverse: the only way to give a transposed layer its fine sites."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = spnn.Conv3d(channels, channels, 2, 2)
        self.up = spnn.Conv3d(channels, channels, 2, 2, transposed=True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.up(self.down(x))


def _layer(name: str, c_in: int, c_out: int, *args: Any) -> Case:
    return Case(name, lambda: spnn.Conv3d(c_in, c_out, *args), c_in)


LAYERS = {
    case.name: case
    for case in (
        _layer("subm-3-4-32", 4, 32, 3),  # kernel size, C_in, C_out
        _layer("subm-3-32-32", 32, 32, 3),
        _layer("subm-3-64-64", 64, 64, 3),
        _layer("subm-3-128-128", 128, 128, 3),
        _layer("subm-5-32-32", 32, 32, 5),
        _layer("strided-3-32-64", 32, 64, 3, 2, 1),
        _layer("strided-2-64-64", 64, 64, 2, 2),
        Case("down-up-2-64-64", lambda: _Block(64), 64),
    )
}
NETWORKS = {
    "minkunet": Case("minkunet", SparseResUNet42, 4),
    "minkunet-half": Case("minkunet-half", lambda: SparseResUNet42(width_multiplier=0.5), 4),
    "resnet21d": Case("resnet21d", SparseResNet21D, 4),
}
CASES = LAYERS | NETWORKS


def tensor(scene: Scene, channels: int, device: Any, dtype: torch.dtype) -> SparseTensor:
    """A scene as input: its own features for 4 channels, random ones for others."""
    feats = torch.from_numpy(scene.feats)
    if channels != feats.shape[1]:
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(len(scene.coords), channels, generator=generator)
    return SparseTensor(
        feats.to(device, dtype), torch.from_numpy(scene.coords).to(device, torch.int32)
    )


def fresh(x: SparseTensor, keep_maps: bool, requires_grad: bool = False) -> SparseTensor:
    """The same tensor for another call, with its maps or without."""
    feats = x.feats.detach().requires_grad_(requires_grad)
    out = SparseTensor(feats, x.coords, x.stride, x.spatial_range)
    if keep_maps:
        out._caches = x._caches
    return out


def result(output: Any) -> Tensor:
    """The features of the last tensor that a network returned."""
    return (output[-1] if isinstance(output, list) else output).feats


@contextmanager
def counting(network: nn.Module) -> Iterator[list[float]]:
    """Count multiplications and additions of all convolutions, per forward pass."""
    flops: list[float] = []

    def count(conv: Any, inputs: tuple[Any, ...]) -> None:
        flops.append(2.0 * pairs(conv, inputs[0]) * conv.in_channels * conv.out_channels)

    convs = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    hooks = [conv.register_forward_pre_hook(count) for conv in convs]
    try:
        yield flops
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def pairs(conv: Any, x: SparseTensor) -> int:
    """Valid neighbours of a layer: the sum of its output for ones and a kernel of ones."""
    if math.prod(conv.kernel_size) == 1 and math.prod(conv.stride) == 1:
        return x.feats.shape[0]
    ones = SparseTensor(torch.ones_like(x.feats[:, :1]), x.coords, x.stride, x.spatial_range)
    ones._caches = x._caches
    kernel = torch.ones_like(conv.kernel[..., :1, :1])
    out = F.conv3d(
        ones, kernel, conv.kernel_size, None, conv.stride, conv.padding, conv.dilation,
        transposed=conv.transposed,
    )  # fmt: skip
    return int(out.feats.double().sum())
