"""Helpers around sparse tensors: from points to voxels, from samples to batches, and back."""

from torchsparse.utils import collate as collate
from torchsparse.utils import helpers as helpers
from torchsparse.utils import quantize as quantize
from torchsparse.utils import tensor_cache as tensor_cache
from torchsparse.utils._older import __dir__ as __dir__
from torchsparse.utils._older import __getattr__ as __getattr__
from torchsparse.utils.to_dense import to_dense
from torchsparse.utils.utils import make_divisible, make_ntuple, make_tensor
from torchsparse.utils.voxelize import voxelize_points as voxelize_points

# What `import *` gives, as in v2.1; names of earlier versions are reached one by one.
__all__ = ["make_divisible", "make_ntuple", "make_tensor", "to_dense"]
