"""Helpers around sparse tensors: from points to voxels, from samples to batches, and back."""

from torchsparse.utils.collate import sparse_collate, sparse_collate_fn
from torchsparse.utils.quantize import sparse_quantize
from torchsparse.utils.to_dense import to_dense
from torchsparse.utils.utils import make_divisible, make_ntuple, make_tensor

# What `import *` gives, as in v2.1; the others are reached by name.
__all__ = ["make_divisible", "make_ntuple", "make_tensor", "to_dense"]

_also = (sparse_collate, sparse_collate_fn, sparse_quantize)
