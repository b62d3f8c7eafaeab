"""The modules, name by name."""

from torchsparse.nn.modules.activation import LeakyReLU, ReLU, SiLU
from torchsparse.nn.modules.bev import (
    ToBEVConvolution,
    ToBEVHeightCompression,
    ToBEVReduction,
    ToDenseBEVConvolution,
)
from torchsparse.nn.modules.conv import Conv3d
from torchsparse.nn.modules.crop import SparseCrop
from torchsparse.nn.modules.norm import BatchNorm, GroupNorm, InstanceNorm
from torchsparse.nn.modules.pooling import GlobalAvgPool, GlobalMaxPool

__all__ = [
    "BatchNorm",
    "Conv3d",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "GroupNorm",
    "InstanceNorm",
    "LeakyReLU",
    "ReLU",
    "SiLU",
    "SparseCrop",
    "ToBEVConvolution",
    "ToBEVHeightCompression",
    "ToBEVReduction",
    "ToDenseBEVConvolution",
]
