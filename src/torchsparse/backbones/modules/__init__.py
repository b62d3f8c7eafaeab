"""Blocks of the backbones."""

from torchsparse.backbones.modules.blocks import (
    SparseConvBlock,
    SparseConvTransposeBlock,
    SparseResBlock,
)

__all__ = ["SparseConvBlock", "SparseConvTransposeBlock", "SparseResBlock"]
