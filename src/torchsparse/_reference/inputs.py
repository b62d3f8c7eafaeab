"""The input of a captured network in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._capacity import PAD

__all__ = ["place_input"]


def place_input(
    coords: Tensor, feats: Tensor, into_coords: Tensor, into_feats: Tensor, count: Tensor,
    filled: int,
) -> None:  # fmt: skip
    """Write rows, padding behind them, and how many are real."""
    n = coords.shape[0]
    with torch.no_grad():
        places = into_coords.detach(), into_feats.detach()
        for place, rows, padding in zip(places, (coords, feats), (PAD, 0)):
            place[:n].copy_(rows)
            place[n:filled].fill_(padding)
        count.fill_(n)
