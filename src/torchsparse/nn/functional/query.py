"""Where hashes stand."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._compiling import left_to_python
from torchsparse._ops import table
from torchsparse._validate import check_same_device

__all__ = ["sphashquery"]


@left_to_python
def sphashquery(queries: Tensor, references: Tensor) -> Tensor:
    """Find each query among the references.

    Args:
        queries: int64, any shape; any value, 0 included.
        references: int64, any shape; counted row-major.

    Returns:
        int32 in the shape of ``queries``: the lowest row of ``references`` with that value, or -1.

    Raises:
        TypeError: Another dtype.
    """
    for name, value in (("queries", queries), ("references", references)):
        dtype = getattr(value, "dtype", type(value).__name__)
        if dtype != torch.int64:
            raise TypeError(f"`{name}` must be an int64 tensor, as from sphash, got {dtype}")
    check_same_device(queries=queries, references=references)
    return table.find_rows(references.flatten(), queries.contiguous())
