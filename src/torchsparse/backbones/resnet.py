"""Residual encoders for detection."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchsparse.backbones.modules.blocks import SparseConvBlock, SparseResBlock
from torchsparse.tensor import SparseTensor

__all__ = ["SparseResNet", "SparseResNet21D"]


class SparseResNet(nn.ModuleList):
    """Stages of one convolution block and residual blocks.

    Args:
        blocks: One (blocks, channels, kernel size, stride) per stage.
        in_channels: Of the input.
        width_multiplier: Scales all channels.
    """

    def __init__(
        self,
        blocks: list[tuple[int, int, Any, Any]],
        *,
        in_channels: int = 4,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.in_channels = in_channels
        self.width_multiplier = width_multiplier
        for count, channels, kernel_size, stride in blocks:
            channels = int(channels * width_multiplier)
            stage: list[nn.Module] = [SparseConvBlock(in_channels, channels, kernel_size, stride)]
            stage += [SparseResBlock(channels, channels, kernel_size) for _ in range(count - 1)]
            self.append(nn.Sequential(*stage))
            in_channels = channels

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """[N, in_channels] features -> for every stage [M, its channels]."""
        outputs = []
        for stage in self:
            x = stage(x)
            outputs.append(x)
        return outputs


class SparseResNet21D(SparseResNet):
    """The encoder that CenterPoint-style detectors use."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            blocks=[
                (3, 16, 3, 1),
                (3, 32, 3, 2),
                (3, 64, 3, 2),
                (3, 128, 3, 2),
                (1, 128, (1, 3, 1), (1, 2, 1)),
            ],
            **kwargs,
        )
