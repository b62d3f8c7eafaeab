"""Networks of TorchSparse 2.1, with its names and state dictionaries."""

from torchsparse.backbones import modules, resnet, unet
from torchsparse.backbones.resnet import SparseResNet, SparseResNet21D
from torchsparse.backbones.unet import SparseResUNet, SparseResUNet42

__all__ = [
    "SparseResNet",
    "SparseResNet21D",
    "SparseResUNet",
    "SparseResUNet42",
    "modules",
    "resnet",
    "unet",
]
