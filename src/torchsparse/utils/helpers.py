"""Names of versions before 2.0 for the functions of `quantize`, `collate` and `utils`."""

from __future__ import annotations

from typing import Any

from torchsparse import _compat
from torchsparse.utils import collate, quantize, utils

__all__ = [
    "make_tuple",
    "ravel_hash_vec",
    "sparse_collate",
    "sparse_collate_fn",
    "sparse_quantize",
]

# Handed out by __getattr__, with a note.
make_tuple: Any
"""`torchsparse.utils.make_ntuple`."""
ravel_hash_vec: Any
"""`torchsparse.utils.quantize.ravel_hash`: [N, D] integers -> [N] uint64."""
sparse_collate: Any
"""`torchsparse.utils.collate.sparse_collate`: samples [N_j, 3] -> one batch [sum of N_j, 4]."""
sparse_collate_fn: Any
"""`torchsparse.utils.collate.sparse_collate_fn`."""
sparse_quantize: Any
"""`torchsparse.utils.quantize.sparse_quantize`: points [N, 3] -> voxels [M, 3] int32."""

_NOW = {
    "make_tuple": utils.make_ntuple,
    "ravel_hash_vec": quantize.ravel_hash,
    "sparse_collate": collate.sparse_collate,
    "sparse_collate_fn": collate.sparse_collate_fn,
    "sparse_quantize": quantize.sparse_quantize,
}


def __getattr__(name: str) -> Any:
    return _compat.renamed(__name__, name, _NOW)


def __dir__() -> list[str]:
    return [*globals(), *_NOW]
