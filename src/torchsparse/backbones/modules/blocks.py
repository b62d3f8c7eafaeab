"""Convolution, normalisation, activation: the blocks that the backbones repeat."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from torchsparse import nn as spnn
from torchsparse._geometry import as_tuple
from torchsparse.tensor import SparseTensor

__all__ = ["SparseConvBlock", "SparseConvTransposeBlock", "SparseResBlock"]


class SparseConvBlock(nn.Sequential):
    """Conv3d, BatchNorm, ReLU: [N, C_in] features -> [M, C_out].

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel_size, stride, dilation: One int or three.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
    ) -> None:
        super().__init__(
            spnn.Conv3d(in_channels, out_channels, kernel_size, stride, dilation=dilation),
            spnn.BatchNorm(out_channels),
            spnn.ReLU(True),
        )


class SparseConvTransposeBlock(nn.Sequential):
    """Transposed Conv3d, BatchNorm, ReLU: [N, C_in] features -> [M, C_out], on the finer sites.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation: As in `SparseConvBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
    ) -> None:
        super().__init__(
            spnn.Conv3d(
                in_channels, out_channels, kernel_size, stride, dilation=dilation, transposed=True
            ),
            spnn.BatchNorm(out_channels),
            spnn.ReLU(True),
        )


class SparseResBlock(nn.Module):
    """``relu(main(x) + shortcut(x))`` with two convolutions in ``main``.

    The shortcut is the identity where channels and stride allow it, else a 1x1x1 convolution and
    BatchNorm. With a stride, it is evaluated at the main branch's sites: site c reads the input
    at c * stride, zero if nothing is there.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation: As in `SparseConvBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
    ) -> None:
        super().__init__()
        self.main = nn.Sequential(
            spnn.Conv3d(in_channels, out_channels, kernel_size, stride, dilation=dilation),
            spnn.BatchNorm(out_channels),
            spnn.ReLU(True),
            spnn.Conv3d(out_channels, out_channels, kernel_size, dilation=dilation),
            spnn.BatchNorm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        self.strided = math.prod(as_tuple(stride, 3, "stride")) > 1
        if in_channels != out_channels or self.strided:
            self.shortcut = nn.Sequential(
                spnn.Conv3d(in_channels, out_channels, 1, stride),
                spnn.BatchNorm(out_channels),
            )
        self.relu = spnn.ReLU(True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """[N, C_in] -> [M, C_out]."""
        main = self.main(x)
        if not self.strided:
            return self.relu(main + self.shortcut(x))
        conv, norm = self.shortcut  # pyright: ignore[reportGeneralTypeIssues]
        return self.relu(main + norm(conv(x, coordinates=main)))
