"""What is timed: single layers and whole networks, as rows of two tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks.floors import Work
from benchmarks.scenes import Scene
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.backbones.modules.blocks import SparseResBlock
from torchsparse.backbones.unet import SparseResUNet
from torchsparse.nn import functional as F


class Case(NamedTuple):
    """A network and the input it needs."""

    name: str
    build: Callable[[], nn.Module]
    in_channels: int


class Last(nn.Module):
    """A network that returns its last tensor alone, as one for segmentation does.

    Graphs copy whatever a network returns, so that levels in between would be part of its time.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        return self.body(x)[-1]


class LastOfUNet(Last):
    """The same of a U-Net, which lets go of a level after its last use, as SpConv's twin does."""

    body: SparseResUNet

    def forward(self, x: Any) -> Any:
        skips = [self.body.stem(x)]
        for encoder in self.body.encoders:
            skips.append(encoder(skips[-1]))
        y = skips.pop()
        for decoder in self.body.decoders:
            parts: Any = decoder
            y = parts["fuse"](torchsparse.cat([parts["upsample"](y), skips.pop()]))
        return y


def _layer(name: str, c_in: int, c_out: int, *args: Any) -> Case:
    return Case(name, lambda: spnn.Conv3d(c_in, c_out, *args), c_in)


def _down_up(channels: int) -> nn.Module:
    """A strided layer and its inverse: the only way to give a transposed layer its fine sites."""
    return nn.Sequential(
        spnn.Conv3d(channels, channels, 2, 2),
        spnn.Conv3d(channels, channels, 2, 2, transposed=True),
    )


def centerpoint() -> nn.Module:
    """The sparse encoder of CenterPoint: four stages of residual blocks, then along z."""

    def block(c_in: int, c_out: int, *args: Any) -> list[nn.Module]:
        return [spnn.Conv3d(c_in, c_out, *args), spnn.BatchNorm(c_out), spnn.ReLU(True)]

    layers: list[nn.Module] = [*block(4, 16, 3)]
    widths = (16, 32, 64, 128)
    for c_in, c in zip((None, *widths), widths):
        layers += [] if c_in is None else block(c_in, c, 3, 2, 1)
        layers += [SparseResBlock(c, c, 3), SparseResBlock(c, c, 3)]
    return nn.Sequential(*layers, *block(128, 128, (1, 1, 3), (1, 1, 2)))


LAYERS = {
    case.name: case
    for case in (
        _layer("subm-3-4-32", 4, 32, 3),  # kernel size, C_in, C_out
        _layer("subm-3-16-16", 16, 16, 3),
        _layer("subm-3-32-32", 32, 32, 3),
        _layer("subm-3-64-64", 64, 64, 3),
        _layer("subm-3-128-128", 128, 128, 3),
        _layer("subm-3-256-256", 256, 256, 3),
        _layer("subm-5-32-32", 32, 32, 5),
        _layer("strided-3-32-64", 32, 64, 3, 2, 1),
        _layer("strided-2-64-64", 64, 64, 2, 2),
        Case("down-up-2-64-64", lambda: _down_up(64), 64),
    )
}
NETWORKS = {
    "minkunet": Case("minkunet", lambda: LastOfUNet(SparseResUNet42()), 4),
    "minkunet-half": Case(
        "minkunet-half", lambda: LastOfUNet(SparseResUNet42(width_multiplier=0.5)), 4
    ),
    "centerpoint": Case("centerpoint", centerpoint, 4),
    "resnet21d": Case("resnet21d", lambda: Last(SparseResNet21D()), 4),
}
CASES = LAYERS | NETWORKS


def tensor(scene: Scene, channels: int, device: Any, dtype: torch.dtype) -> SparseTensor:
    """A scene as input: its own features for as many channels, random ones for others."""
    feats = torch.from_numpy(scene.feats)
    if channels != feats.shape[1]:
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(len(scene.coords), channels, generator=generator)
    return SparseTensor(
        feats.to(device, dtype), torch.from_numpy(scene.coords).to(device, torch.int32)
    )


@contextmanager
def counting(network: nn.Module) -> Iterator[list[Work]]:
    """What each convolution of a forward pass has to do."""
    found: list[Work] = []

    def count(conv: Any, inputs: tuple[Any, ...], output: SparseTensor) -> None:
        sizes = inputs[0].feats.shape[0], output.feats.shape[0]
        found.append(
            Work(pairs(conv, inputs[0]), *sizes, conv.kernel_volume, conv.in_channels,
                 conv.out_channels)
        )  # fmt: skip

    convs = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def pairs(conv: Any, x: SparseTensor) -> int:
    """Valid neighbours of a layer: the sum of its output for ones and a kernel of ones."""
    if conv.kernel_volume == 1 and max(conv.stride) == 1:
        return x.feats.shape[0]
    # In float64, for which nothing has to be compiled.
    ones = torch.ones(len(x.coords), 1, dtype=torch.float64, device=x.feats.device)
    given = SparseTensor(ones, x.coords, x.stride, x.spatial_range)
    given._caches = x._caches
    kernel = ones.new_ones(conv.kernel_volume, 1, 1)
    out = F.conv3d(
        given, kernel, conv.kernel_size, None, conv.stride, conv.padding, conv.dilation,
        transposed=conv.transposed,
    )  # fmt: skip
    return int(out.feats.sum())


def features(output: Any) -> Tensor:
    """What a network computed."""
    return output.feats
