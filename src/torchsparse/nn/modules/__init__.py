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
from torchsparse.nn.modules.local_pooling import (
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    AvgPool4d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxPool4d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    MaxUnpool4d,
    SumPool1d,
    SumPool2d,
    SumPool3d,
    SumPool4d,
    Unpool1d,
    Unpool2d,
    Unpool3d,
    Unpool4d,
)
from torchsparse.nn.modules.norm import BatchNorm, GroupNorm, InstanceNorm
from torchsparse.nn.modules.pooling import GlobalAvgPool, GlobalMaxPool, GlobalSumPool

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "AvgPool4d",
    "BatchNorm",
    "Conv3d",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "GlobalSumPool",
    "GroupNorm",
    "InstanceNorm",
    "LeakyReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxPool4d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "MaxUnpool4d",
    "ReLU",
    "SiLU",
    "SparseCrop",
    "SumPool1d",
    "SumPool2d",
    "SumPool3d",
    "SumPool4d",
    "ToBEVConvolution",
    "ToBEVHeightCompression",
    "ToBEVReduction",
    "ToDenseBEVConvolution",
    "Unpool1d",
    "Unpool2d",
    "Unpool3d",
    "Unpool4d",
]
