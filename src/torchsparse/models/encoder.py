"""Encoders of detectors: voxels in, a bird's-eye view of an eighth of the resolution out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchsparse import nn as spnn
from torchsparse._validate import one_of
from torchsparse.models.blocks import conv_block, residual_stage
from torchsparse.tensor import SparseTensor

__all__ = ["ENCODERS", "EncoderDesign", "SparseEncoder"]


@dataclass(frozen=True)
class EncoderDesign:
    """Blocks and widths of an encoder with four stages, each at half the resolution of the one
    before."""

    residual: bool  # residual blocks, or convolution blocks
    channels: tuple[int, ...]  # [4] of the stages
    layers: tuple[int, ...]  # [4] blocks that keep the sites
    out_channels: int = 128


ENCODERS: dict[str, EncoderDesign] = {
    "second": EncoderDesign(False, (16, 32, 64, 64), (1, 2, 2, 2)),
    "centerpoint": EncoderDesign(True, (16, 32, 64, 128), (2, 2, 2, 2)),
}
"""The middle encoders of SECOND (as in OpenPCDet) and of CenterPoint."""


class SparseEncoder(nn.Module):
    """The sparse part of a detector, which ends in a dense map for a two-dimensional head.

    For an input range of (B, X, Y, Z), which the tensor must have::

        stem       3x3x3                                   (B, X, Y, Z)
        stage 0    blocks                                  (B, X, Y, Z)
        stage 1    3x3x3 stride 2 padding 1, blocks        (B, X/2, Y/2, Z/2)   rounded up
        stage 2    the same                                (B, X/4, Y/4, Z/4)   rounded up
        stage 3    the same, no padding along z            (B, X/8, Y/8, (Z/4 - 1) / 2)
        out        1x1x3 stride (1, 1, 2)                  (B, X/8, Y/8, Z')

    41 cells along z become 41, 21, 11, 5 and Z' = 2.

    Args:
        in_channels: Features of a voxel.
        design: Blocks and widths.
        eps, momentum: Of the batch norms.
    """

    def __init__(
        self,
        in_channels: int,
        design: EncoderDesign,
        *,
        eps: float = 1e-3,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.design = design
        first = design.channels[0]
        self.stem = conv_block(in_channels, first, 3)
        self.stages = nn.ModuleList()
        c = first
        for number, (width, count) in enumerate(zip(design.channels, design.layers)):
            parts: list[nn.Module] = []
            if number > 0:
                padding = (1, 1, 0) if number == 3 else 1
                parts.append(conv_block(c, width, 3, 2, padding))
            parts.append(_blocks(design.residual, width, count))
            self.stages.append(nn.Sequential(*parts))
            c = width
        self.out = conv_block(c, design.out_channels, (1, 1, 3), (1, 1, 2))
        for module in self.modules():
            if isinstance(module, spnn.BatchNorm):
                module.eps, module.momentum = eps, momentum

    @classmethod
    def named(cls, name: str, in_channels: int, **kwargs: Any) -> SparseEncoder:
        """The encoder of a name in `ENCODERS`, "second" or "centerpoint".

        Raises:
            ValueError: Another name; the message lists all.
        """
        return cls(in_channels, ENCODERS[one_of(name, tuple(ENCODERS), "name")], **kwargs)

    def features(self, x: SparseTensor) -> list[SparseTensor]:
        """The output of each stage and, last, the one that becomes the map."""
        outputs = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return [*outputs, self.out(x)]

    def forward(self, x: SparseTensor) -> Tensor:
        """Encode the voxels.

        Args:
            x: Features [N, in_channels] at coordinates [N, 4], with the range (B, X, Y, Z).

        Returns:
            [B, C Z', X', Y'] with channel c Z' + z, 0 where no voxel is; C is
            ``design.out_channels``, and X', Y', Z' are those of the last row above.

        Raises:
            ValueError: No range, or one too small along z (below 25 cells).
        """
        if x.spatial_range is None:
            raise ValueError(
                "an encoder needs a tensor with a `spatial_range` = (B, X, Y, Z), which says how "
                "large its map is; this one has none"
            )
        grid = self.features(x)[-1].dense()  # [B, X', Y', Z', C]
        return grid.permute(0, 4, 3, 1, 2).flatten(1, 2)


def _blocks(residual: bool, width: int, count: int) -> nn.Sequential:
    if residual:
        return residual_stage("basic", width, width, count)
    return nn.Sequential(*(conv_block(width, width, 3) for _ in range(count)))
