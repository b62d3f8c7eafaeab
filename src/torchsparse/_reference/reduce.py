"""Sums and maxima over groups of rows, in plain PyTorch.

Rows are brought together by a stable sort of their group numbers (a radix sort on the CPU) and
summed in that order by an embedding bag, so the same input gives the same bits on any number of
threads. ``index_add_`` has neither property on a GPU and is slower on the CPU for wide rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._recipe import sum_dtype

__all__ = ["Groups", "argmax_rows", "count", "group_rows", "segment_max", "segment_sum"]

# Rows summed one after the other before partial sums are added: bounds the rounding error of
# long segments and gives threads something to share.
CHUNK = 256


def _or_last(index: Tensor, num: int) -> Tensor:
    """Group numbers with ``num`` for everything outside 0 <= i < num."""
    return torch.where((index >= 0) & (index < num), index, num)


def group_rows(index: Tensor, num: int) -> Groups:
    """Bring rows of one group together.  [N] integers -> `Groups`."""
    n = index.shape[0]
    keys = _or_last(index, num)
    if index.device.type == "cpu" and bool((keys[1:] >= keys[:-1]).all()):
        order = torch.arange(n)
    else:
        keys, order = torch.sort(keys, stable=True)
    numbers = torch.arange(num + 2, dtype=keys.dtype, device=keys.device)
    return Groups(order, torch.searchsorted(keys, numbers))


def segment_sum(
    feats: Tensor,
    groups: Groups,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of ``weights[p] * feats[order[p]]`` over each group, over counts.  -> [num, C]."""
    sums = _sums(feats, groups, weights)
    if counts is not None:
        counts = counts[:, None]
        sums = torch.where(counts == 0, 0, sums / counts.to(sums.dtype))
    return sums if dtype is None else sums.to(dtype)


def _sums(feats: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
    order, starts = groups
    num, channels = starts.shape[0] - 2, feats.shape[1]
    dtype = sum_dtype(feats.dtype)
    feats = feats.to(dtype).contiguous()
    if feats.numel() == 0 or order.shape[0] == 0 or num == 0:
        return feats.new_zeros((num, channels))
    if order.shape[0] < 2 * CHUNK * num:
        return _bags(feats, order, starts, weights).resize_(num, channels)
    # First sums over chunks of CHUNK rows that do not cross a group, then sums of those.
    chunks = (starts.diff() + CHUNK - 1) // CHUNK
    ends = chunks.cumsum(0)
    numbers = torch.arange(order.shape[0] // CHUNK + num + 1, device=order.device)
    group = torch.searchsorted(ends, numbers, right=True).clamp_(max=num)
    chunk_starts = starts[group] + (numbers - (ends - chunks)[group]) * CHUNK
    chunk_starts.clamp_(max=order.shape[0])  # chunks behind the last one are empty
    chunk_starts = torch.cat([chunk_starts, starts[-1:]])
    partial = _bags(feats, order, chunk_starts, weights)
    first = torch.cat([ends.new_zeros(1), ends])
    rows = torch.arange(partial.shape[0], device=order.device)
    first[-1] = rows.shape[0]
    return _bags(partial, rows, first, None).resize_(num, channels)


def _bags(feats: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    return torch.nn.functional.embedding_bag(
        rows,
        feats,
        starts,
        mode="sum",
        per_sample_weights=None if weights is None else weights.to(feats.dtype),
        include_last_offset=True,
    )


def count(index: Tensor, num: int, word: Tensor | None = None, bit: int = 0) -> Tensor:
    """Rows per group; numbers outside are skipped.  [N] integers -> [num] int32."""
    if word is not None:
        word |= (index >= num).any() * bit
    found = torch.bincount(_or_last(index, num), minlength=num + 1)
    return found[:num].to(torch.int32)


def segment_max(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Largest value per group and channel, 0 for an empty group; NaN wins.  -> [num, C]."""
    index = _or_last(index, num).to(torch.int64)
    top = feats.new_full((num + 1, feats.shape[1]), -torch.inf)
    top.scatter_reduce_(0, index[:, None].expand(-1, feats.shape[1]), feats, "amax")
    empty = torch.ones(num + 1, dtype=torch.bool, device=feats.device).index_fill_(0, index, False)
    top.masked_fill_(empty[:, None], 0)
    return top.resize_(num, feats.shape[1])


def argmax_rows(feats: Tensor, index: Tensor, top: Tensor) -> Tensor:
    """Lowest row that holds the maximum ``top`` of its group.  -> [num, C] int64, N for none."""
    n, (num, channels) = feats.shape[0], top.shape
    inside = ((index >= 0) & (index < num)).nonzero().squeeze(1)
    group = index.index_select(0, inside).to(torch.int64)
    values, tops = feats.index_select(0, inside), top.index_select(0, group)
    row, channel = ((values == tops) | (values.isnan() & tops.isnan())).nonzero(as_tuple=True)
    best = torch.full((num * channels,), n, dtype=torch.int64, device=feats.device)
    best.scatter_reduce_(0, group[row] * channels + channel, inside[row], "amin")
    return best.view(num, channels)
