"""Sparse convolution for point clouds and voxels, in pure PyTorch and Triton."""

from torchsparse import (
    backend,
    backends,
    compat,
    inference,
    nn,
    operators,
    tensor,
    training,
    utils,
)
from torchsparse import point_tensor as point_tensor
from torchsparse import sparse_tensor as sparse_tensor
from torchsparse.operators import cat, generative_add
from torchsparse.tensor import PointTensor, SparseTensor
from torchsparse.utils.tune import tune
from torchsparse.version import __version__

__all__ = [
    "PointTensor",
    "SparseTensor",
    "__version__",
    "backend",
    "backends",
    "cat",
    "compat",
    "generative_add",
    "inference",
    "nn",
    "operators",
    "tensor",
    "training",
    "tune",
    "utils",
]
