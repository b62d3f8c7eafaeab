"""Residual U-Nets for segmentation."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchsparse import nn as spnn
from torchsparse.backbones.modules.blocks import (
    SparseConvBlock,
    SparseConvTransposeBlock,
    SparseResBlock,
)
from torchsparse.operators import cat
from torchsparse.tensor import SparseTensor

__all__ = ["SparseResUNet", "SparseResUNet42"]


class SparseResUNet(nn.Module):
    """A stem, four encoder stages (each halves the resolution) and four decoder stages.

    Args:
        stem_channels: Of the stem.
        encoder_channels, decoder_channels: Four each.
        in_channels: Of the input.
        width_multiplier: Scales all of them.
    """

    def __init__(
        self,
        stem_channels: int,
        encoder_channels: list[int],
        decoder_channels: list[int],
        *,
        in_channels: int = 4,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.stem_channels = stem_channels
        self.encoder_channels = encoder_channels
        self.decoder_channels = decoder_channels
        self.in_channels = in_channels
        self.width_multiplier = width_multiplier
        widths = [stem_channels, *encoder_channels, *decoder_channels]
        c = [int(width_multiplier * width) for width in widths]
        self.stem = nn.Sequential(
            spnn.Conv3d(in_channels, c[0], 3),
            spnn.BatchNorm(c[0]),
            spnn.ReLU(True),
            spnn.Conv3d(c[0], c[0], 3),
            spnn.BatchNorm(c[0]),
            spnn.ReLU(True),
        )
        self.encoders = nn.ModuleList(
            nn.Sequential(
                SparseConvBlock(c[j], c[j], 2, 2),
                SparseResBlock(c[j], c[j + 1], 3),
                SparseResBlock(c[j + 1], c[j + 1], 3),
            )
            for j in range(4)
        )
        self.decoders = nn.ModuleList(
            nn.ModuleDict(
                {
                    "upsample": SparseConvTransposeBlock(c[j + 4], c[j + 5], 2, 2),
                    "fuse": nn.Sequential(
                        SparseResBlock(c[j + 5] + c[3 - j], c[j + 5], 3),
                        SparseResBlock(c[j + 5], c[j + 5], 3),
                    ),
                }
            )
            for j in range(4)
        )

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """[N, in_channels] features -> nine tensors [M, channels]: the stem's, the four encoders',
        the four decoders'."""
        outputs = [self.stem(x)]
        for encoder in self.encoders:
            outputs.append(encoder(outputs[-1]))
        for j, decoder in enumerate(self.decoders):
            up = decoder["upsample"](outputs[-1])  # pyright: ignore[reportIndexIssue]
            outputs.append(decoder["fuse"](cat([up, outputs[3 - j]])))  # pyright: ignore[reportIndexIssue]
        return outputs


class SparseResUNet42(SparseResUNet):
    """The U-Net that the segmentation benchmarks call MinkUNet (42 convolutions)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            stem_channels=32,
            encoder_channels=[32, 64, 128, 256],
            decoder_channels=[256, 128, 96, 96],
            **kwargs,
        )
