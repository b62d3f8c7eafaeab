"""Voxels as a dense grid."""

from torchsparse._autograd.points import to_dense

__all__ = ["to_dense"]
