"""Whole networks, put together from the blocks of ``torchsparse.backbones``."""

from torchsparse.models.classifier import RESNETS, ResNetClassifier
from torchsparse.models.encoder import ENCODERS, EncoderDesign, SparseEncoder
from torchsparse.models.minkresunet import MINKOWSKI_NAMES, MINKUNETS, MinkResUNet, UNetDesign
from torchsparse.models.minkunet import MinkUNet
from torchsparse.models.spvcnn import SPVCNN, SPVNAS_NAMES

__all__ = [
    "ENCODERS",
    "MINKOWSKI_NAMES",
    "MINKUNETS",
    "RESNETS",
    "SPVCNN",
    "SPVNAS_NAMES",
    "EncoderDesign",
    "MinkResUNet",
    "MinkUNet",
    "ResNetClassifier",
    "SparseEncoder",
    "UNetDesign",
]
