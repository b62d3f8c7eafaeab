"""The sparse U-Net with residual blocks that point-cloud segmentation calls MinkUNet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from torchsparse.backbones.modules.blocks import (
    SparseConvBlock,
    SparseConvTransposeBlock,
    SparseResBlock,
)
from torchsparse.operators import cat
from torchsparse.tensor import SparseTensor

__all__ = ["MinkUNet"]


class MinkUNet(nn.Module):
    """A class score for every voxel.

    With L levels and N_j voxels at stride 2^j, features go through these shapes::

        stem          [N_0, in_channels]             -> [N_0, stem]
        encoder j     [N_j, encoder[j - 1]]          -> [N_j+1, encoder[j]]    j = 0..L-1
        decoder j     [N_L-j, decoder[j - 1]]
                      beside the skip [N_L-j-1, ...] -> [N_L-j-1, decoder[j]]
        classifier    [N_0, decoder[L - 1]]          -> [N_0, num_classes]

    where ``encoder[-1]`` reads ``stem``, and the first decoder reads the last encoder.
    ``backbones.SparseResUNet`` is the body of the defaults, with every stage's output.

    Args:
        in_channels: Features of a voxel.
        num_classes: Scores of a voxel.
        stem: Channels at full resolution.
        encoder: Channels after each halving of the resolution; their number is L.
        decoder: Channels after each doubling, coarsest first; L of them.
        depth: Residual blocks per encoder and decoder stage, 1 or more.

    Raises:
        ValueError: ``encoder`` and ``decoder`` differ in length or are empty; ``depth`` below 1.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        stem: int = 32,
        encoder: Sequence[int] = (32, 64, 128, 256),
        decoder: Sequence[int] = (256, 128, 96, 96),
        depth: int = 2,
    ) -> None:
        super().__init__()
        if not encoder or len(encoder) != len(decoder):
            raise ValueError(
                f"`encoder` and `decoder` must have the same number of levels, at least one, "
                f"got {list(encoder)} and {list(decoder)}"
            )
        if depth < 1:
            raise ValueError(f"`depth` must be 1 or more, got {depth}")
        down = [stem, *encoder]
        up = [encoder[-1], *decoder]
        skips = down[-2::-1]
        self.stem = nn.Sequential(
            SparseConvBlock(in_channels, stem, 3), SparseConvBlock(stem, stem, 3)
        )
        self.encoders = nn.ModuleList(
            nn.Sequential(SparseConvBlock(c, c, 2, 2), _residual(c, wide, depth))
            for c, wide in zip(down, encoder)
        )
        self.upsamples = nn.ModuleList(
            SparseConvTransposeBlock(c, wide, 2, 2) for c, wide in zip(up, decoder)
        )
        self.fuses = nn.ModuleList(
            _residual(c + skip, c, depth) for c, skip in zip(decoder, skips)
        )
        self.classifier = nn.Linear(decoder[-1], num_classes)

    def forward(self, x: SparseTensor) -> Tensor:
        """Score the voxels.

        Args:
            x: Features [N, in_channels] at coordinates [N, 4].

        Returns:
            [N, num_classes], unnormalised, in the row order of ``x``.
        """
        levels = [self.stem(x)]
        for encoder in self.encoders:
            levels.append(encoder(levels[-1]))
        y = levels.pop()
        for upsample, fuse in zip(self.upsamples, self.fuses):
            y = fuse(cat([upsample(y), levels.pop()]))
        return self.classifier(y.feats)


def _residual(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    widths = [in_channels, *[out_channels] * depth]
    return nn.Sequential(*(SparseResBlock(a, b, 3) for a, b in pairwise(widths)))
