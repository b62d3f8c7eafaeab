"""Names of versions before 2.0 for the functions of `quantize`, `collate` and `utils`."""

from torchsparse.utils.collate import sparse_collate, sparse_collate_fn
from torchsparse.utils.quantize import ravel_hash, sparse_quantize
from torchsparse.utils.utils import make_ntuple

__all__ = [
    "make_tuple",
    "ravel_hash_vec",
    "sparse_collate",
    "sparse_collate_fn",
    "sparse_quantize",
]

ravel_hash_vec = ravel_hash
make_tuple = make_ntuple
