"""Sparse convolution for point clouds and voxels, in pure PyTorch and Triton."""

from torchsparse import backend, backends, nn, operators, tensor, utils
from torchsparse.operators import cat, generative_add
from torchsparse.tensor import PointTensor, SparseTensor
from torchsparse.version import __version__

__all__ = [
    "PointTensor",
    "SparseTensor",
    "__version__",
    "backend",
    "backends",
    "cat",
    "generative_add",
    "nn",
    "operators",
    "tensor",
    "utils",
]
