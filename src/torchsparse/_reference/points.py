"""Rows between points, voxels and dense grids, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchsparse._recipe import sum_dtype

__all__ = [
    "devoxelize",
    "devoxelize_weight_grad",
    "flat_index",
    "gather_rows",
    "place_rows",
    "scatter_rows",
    "share_rows",
    "trilinear_weights",
]


def flat_index(
    coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Row-major cell of each coordinate row; -1 outside.  [N, A], A extents -> [N] int64."""
    index = torch.zeros(coords.shape[0], dtype=torch.int64, device=coords.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for column, extent in enumerate(extents):
        c = coords[:, column]
        inside &= (c >= 0) & (c < extent)
        index.mul_(extent).add_(c)
    if word is not None:
        word |= (~inside).any() * bit
    return index.masked_fill_(~inside, -1)


def scatter_rows(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Row j of ``feats`` becomes row ``index[j]``; -1 is skipped, the rest is 0.  -> [num, C]."""
    # Of rows with one cell the last is kept. `index_copy_` alone would keep any of them, another
    # in every run on several threads.
    cells, rows = torch.sort(torch.where(index < 0, num, index), stable=True)
    overwritten = cells[:-1] == cells[1:]
    cells = torch.cat([cells[:-1].masked_fill(overwritten, num), cells[-1:]])
    # These and skipped rows land behind the result: one spare row, cut off without a copy.
    out = feats.new_zeros((num + 1, feats.shape[1]))
    out.index_copy_(0, cells, feats.index_select(0, rows))
    return out.resize_(num, feats.shape[1])


def place_rows(
    feats: Tensor, coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None,
    bit: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scatter_rows` to `flat_index`, and the latter.  -> [num, C], [N] int64."""
    index = flat_index(coords, extents, word, bit)
    return scatter_rows(feats, index, math.prod(extents)), index


def gather_rows(grid: Tensor, index: Tensor) -> Tensor:
    """Row ``index[j]`` of the cells of ``grid`` [..., C], 0 for -1.  [N] int64 -> [N, C]."""
    shape = grid.shape[:-1]
    absent = index < 0
    if grid.is_contiguous():
        cells = grid.view(math.prod(shape), grid.shape[-1])
        rows = cells.index_select(0, index.clamp(min=0))
    else:  # a permuted or expanded gradient: a copy of the whole grid would cost more
        rows = grid[torch.unravel_index(index.clamp(min=0), shape)]
    if index.device.type == "cpu" and not bool(absent.any()):
        return rows
    return rows.masked_fill_(absent[:, None], 0)


def share_rows(rows: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """``rows[index[n]] / counts[index[n]]``, 0 for none and where the count is 0.  -> [N, C]."""
    counts = counts[:, None]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    shares = torch.where(counts == 0, 0, wide / counts.to(wide.dtype)).to(rows.dtype)
    # A number behind the last group is none, like a negative one.
    return gather_rows(shares, torch.where(index < counts.shape[0], index, -1))


def devoxelize(
    feats: Tensor, index: Tensor, weights: Tensor, word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Sum of ``weights[n, j] * feats[index[n, j]]`` over j.  -> [N, C]."""
    num, channels = feats.shape
    dtype = sum_dtype(feats.dtype)
    if word is not None:
        word |= (index >= num).any() * bit
    if index.numel() == 0 or channels == 0:
        return feats.new_zeros((index.shape[0], channels))
    absent = (index < 0) | (index >= num)
    table, weights = feats.to(dtype), weights.to(dtype)
    if feats.device.type != "cpu" or bool(absent.any()):
        # Absent neighbours read a row of zeros: a weight of 0 alone would let NaN through.
        table = torch.cat([table, table.new_zeros((1, channels))])
        index = torch.where(absent, num, index)
        weights = weights.masked_fill(absent, 0)
    out = torch.nn.functional.embedding_bag(
        index.contiguous(), table.contiguous(), mode="sum", per_sample_weights=weights.contiguous()
    )
    return out.to(feats.dtype)


def devoxelize_weight_grad(feats: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """Dot products of ``grad[n]`` and ``feats[index[n, j]]``, 0 for none.  -> [N, J]."""
    num = feats.shape[0]
    dtype = sum_dtype(feats.dtype)
    out = torch.zeros(index.shape, dtype=dtype, device=feats.device)
    if num == 0:
        return out
    table, grad = feats.to(dtype), grad.to(dtype)
    absent = (index < 0) | (index >= num)
    index = index.masked_fill(absent, 0)
    for j in range(index.shape[1]):  # one column at a time: [N, J, C] would be large
        torch.sum(table.index_select(0, index[:, j]) * grad, dim=1, out=out[:, j])
    return out.masked_fill_(absent, 0)


def trilinear_weights(points: Tensor, scale: float) -> Tensor:
    """Shares of the 8 corners of each point's cell, corner 4 jx + 2 jy + jz.  [N, 3] -> [N, 8]."""
    upper = (points - torch.floor(points / scale) * scale) / scale
    both = torch.stack([1 - upper, upper], dim=2)  # [N, 3, 2]
    x, y, z = both.unbind(1)
    return (x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]).flatten(1)
