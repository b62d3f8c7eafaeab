"""How many points each voxel has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._compiling import left_to_python
from torchsparse._flags import Complaint, complain_if, flag_word
from torchsparse._ops import reduce
from torchsparse._validate import wide_ints

__all__ = ["check_index", "spcount"]


def check_index(index: Any, dim: int, name: str) -> None:
    """Row numbers are an integer tensor with ``dim`` axes."""
    if not isinstance(index, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(index).__name__}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integers, got {index.dtype}")
    if index.dim() != dim:
        raise ValueError(f"`{name}` must have {dim} axes, got shape {list(index.shape)}")


@left_to_python
def spcount(coords: Tensor, num: int | Tensor) -> Tensor:
    """Count how often each voxel is named.

    Args:
        coords: [N] integers, voxel of each point; negative = none.
        num: M, the number of voxels.

    Returns:
        [M] int32.

    Raises:
        TypeError: Indices that are not integers.
        ValueError: Another shape, or an index of ``num`` or more (noticed later on a GPU).
    """
    check_index(coords, 1, "coords")
    coords, num = wide_ints(coords), int(num)
    word = flag_word(coords.device)
    if word is None:
        complain_if((coords >= num).any(), Complaint.INDEX, lambda: f"{num} rows")
    return reduce.count(coords, num, word, Complaint.INDEX.bit)
