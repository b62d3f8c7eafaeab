"""Helpers around sparse tensors: from points to voxels, from samples to batches, and back."""

from torchsparse.utils import helpers as helpers
from torchsparse.utils import tensor_cache as tensor_cache
from torchsparse.utils.collate import sparse_collate as sparse_collate
from torchsparse.utils.collate import sparse_collate_fn as sparse_collate_fn
from torchsparse.utils.quantize import sparse_quantize as sparse_quantize
from torchsparse.utils.to_dense import to_dense
from torchsparse.utils.utils import make_divisible, make_ntuple, make_tensor
from torchsparse.utils.voxelize import voxelize_points as voxelize_points

# What `import *` gives, as in v2.1; the names of earlier versions above are reached one by one.
__all__ = ["make_divisible", "make_ntuple", "make_tensor", "to_dense"]
