"""Rows of integers as a set, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._keys import fit_layout, pack, unpack
from torchsparse._reference.coords import bounds

__all__ = ["unique_rows"]


def unique_rows(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, sorted, and which of them each given row is.

    Args:
        coords: [N, A] integers.

    Returns:
        [M, A] int32 in lexicographic order; [N] int64.
    """
    if coords.shape[0] == 0:
        return coords.to(torch.int32), torch.zeros(0, dtype=torch.int64, device=coords.device)
    layout = fit_layout(*bounds(coords))
    keys, order = torch.sort(pack(coords, layout), stable=True)
    keys, rank = torch.unique_consecutive(keys, return_inverse=True)
    return unpack(keys, layout), torch.empty_like(order).index_copy_(0, order, rank)
