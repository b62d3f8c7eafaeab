"""What the models are built from, besides the blocks of ``torchsparse.backbones``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from torchsparse import nn as spnn
from torchsparse.backbones.modules.blocks import SparseResBlock
from torchsparse.tensor import SparseTensor

__all__ = ["EXPANSION", "KEEP_ALL", "SparseBottleneck", "conv_block", "residual_stage"]

# Halving the resolution, every voxel keeps its coarse site ``floor(c / 2)``, also at the border.
KEEP_ALL = {"downsample_mode": "minkowski"}

# Channels that a residual block returns, in multiples of its width.
EXPANSION = {"basic": 1, "bottleneck": 4}


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    *,
    transposed: bool = False,
    config: Any = None,
) -> nn.Sequential:
    """Conv3d, BatchNorm, ReLU: `SparseConvBlock` with every choice of the convolution."""
    conv = spnn.Conv3d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        transposed=transposed,
        config=config,
    )
    return nn.Sequential(conv, spnn.BatchNorm(out_channels), spnn.ReLU(True))


class SparseBottleneck(nn.Module):
    """``relu(main(x) + shortcut(x))``; ``main`` looks around in a quarter of its channels.

    Its convolutions are 1x1x1, 3x3x3 and 1x1x1. The shortcut is the identity where the channels
    allow it, else a 1x1x1 convolution and BatchNorm.

    Args:
        in_channels: Of the input.
        channels: Of the middle convolution; the output has four times as many.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        wide = channels * EXPANSION["bottleneck"]
        self.main = nn.Sequential(
            *conv_block(in_channels, channels, 1),
            *conv_block(channels, channels, 3),
            spnn.Conv3d(channels, wide, 1),
            spnn.BatchNorm(wide),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != wide:
            self.shortcut = nn.Sequential(spnn.Conv3d(in_channels, wide, 1), spnn.BatchNorm(wide))
        self.relu = spnn.ReLU(True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """[N, in_channels] -> [N, 4 channels], on the same sites."""
        return self.relu(self.main(x) + self.shortcut(x))


def residual_stage(kind: str, in_channels: int, channels: int, count: int) -> nn.Sequential:
    """``count`` residual blocks on the same sites.

    Args:
        kind: "basic" (`SparseResBlock`) or "bottleneck" (`SparseBottleneck`).
        in_channels: Of the first block.
        channels: Width of the blocks; each returns ``EXPANSION[kind]`` times as many.
        count: 1 or more.
    """
    wide = channels * EXPANSION[kind]
    widths = pairwise([in_channels, *[wide] * count])
    if kind == "basic":
        return nn.Sequential(*(SparseResBlock(a, b, 3) for a, b in widths))
    return nn.Sequential(*(SparseBottleneck(a, channels) for a, _ in widths))
