"""Whole networks, put together from the blocks of ``torchsparse.backbones``."""

from torchsparse.models.minkunet import MinkUNet

__all__ = ["MinkUNet"]
