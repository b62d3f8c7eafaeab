"""The input of a captured network in one launch: in PyTorch it takes five."""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._capacity import PAD
from torchsparse._triton.launch import Step, cdiv
from torchsparse._triton.rows import words

__all__ = ["place_input"]

BLOCK = 1024


def place_input(
    coords: Tensor, feats: Tensor, into_coords: Tensor, into_feats: Tensor, count: Tensor,
    filled: int,
) -> None:  # fmt: skip
    """Write rows, padding behind them, and how many are real."""
    n, columns = coords.shape
    last = max(n, filled)
    coords, feats = coords.contiguous(), feats.contiguous()
    (source, target), width, _ = words(feats.detach(), into_feats.detach())
    most = last * max(columns, width)
    place = _places[source.dtype]
    place(
        (max(cdiv(most, BLOCK), 1), 1), (coords, source, into_coords, target, count),
        (n * columns, n * width, last * columns, last * width, n),
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_coords", "n_feats", "all_coords", "all_feats", "n"])
def place_input_kernel(
    coords, feats, into_coords, into_feats, count, n_coords, n_feats, all_coords, all_feats, n,
    NONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers of coordinates and words of features: of real rows, and of all."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    coord = tl.load(coords + at, mask=at < n_coords, other=NONE)
    tl.store(into_coords + at, coord, mask=at < all_coords)
    word = tl.load(feats + at, mask=at < n_feats, other=0)
    tl.store(into_feats + at, word, mask=at < all_feats)
    if tl.program_id(0) == 0:
        tl.store(count, n.to(tl.int64))


_places = {
    dtype: Step(place_input_kernel, NONE=PAD, BLOCK=BLOCK) for dtype in (torch.int32, torch.int16)
}
