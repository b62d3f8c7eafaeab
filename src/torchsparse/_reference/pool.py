"""Sums and maxima over the neighbours of a kernel map, in plain PyTorch.

Tap by tap, in order, so that the same input gives the same bits; nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchsparse._recipe import sum_dtype
from torchsparse._reference.coords import flat_nonzero

__all__ = ["pick_rows", "pool_max", "pool_shares", "pool_sum", "pool_top", "unpool_max"]

# Features of a block of outputs on a CPU: with those of its neighbours they stay in the L2 cache.
BLOCK = 65536


def _blocks(table: Tensor, channels: int) -> Iterator[slice]:
    """Outputs in blocks whose features stay in the cache; a GPU takes them all at once."""
    m = table.shape[1]
    size = max(BLOCK // max(channels, 1), 1) if table.device.type == "cpu" else max(m, 1)
    return (slice(begin, min(begin + size, m)) for begin in range(0, m, size))


def _candidates(neighbors: Tensor) -> Tensor:
    """Outputs that a tap has to look at: on a CPU those with a neighbour, elsewhere all, for
    listing them would wait for the device.  [M] -> [at most M] int64."""
    if neighbors.device.type == "cpu":
        return flat_nonzero(neighbors >= 0)
    return torch.arange(neighbors.shape[0], device=neighbors.device)


def pool_sum(
    feats: Tensor,
    table: Tensor,
    shares: Tensor | None = None,
    mean: bool = False,
    limit: Tensor | None = None,
) -> Tensor:
    """``out[m] = sum over the neighbours n = table[k, m] of shares[n] * feats[n]``.

    Args:
        feats: [N, C] floating.
        table: [K, M] int32, rows of feats, -1 = none.
        shares: [N] floating factors, None = 1.
        mean: Divide by the number of neighbours.
        limit: Not used: outputs behind it have no neighbours.

    Returns:
        [M, C] in the dtype of feats, summed in float32 (float64 in float64); 0 without neighbours.
    """
    if feats.shape[1] == 0 or table.shape[1] == 0:  # an empty bag reads beyond its table
        return feats.new_zeros((table.shape[1], feats.shape[1]))
    rows = feats.to(sum_dtype(feats.dtype))
    if shares is not None:
        rows = rows * shares.to(rows.dtype)[:, None]
    # Absent neighbours read one more row, of zeros.
    padded = torch.cat([rows, rows.new_zeros((1, feats.shape[1]))])
    index = torch.where(table < 0, feats.shape[0], table).t().contiguous()
    out = torch.nn.functional.embedding_bag(index, padded, mode="sum")
    if mean:
        out = out / _counts(table)[:, None]
    return out.to(feats.dtype)


def _counts(table: Tensor) -> Tensor:
    """Neighbours of each output, at least 1.  -> [M] int32"""
    return (table >= 0).sum(0, dtype=torch.int32).clamp(min=1)


def pool_shares(table: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the number of neighbours of each output.

    Args:
        table: [K, M] int32, -1 = none.
        dtype: float32 or float64.

    Returns:
        [M] in ``dtype``, 1 without neighbours.
    """
    return _counts(table).to(dtype).reciprocal()


def pool_max(feats: Tensor, table: Tensor, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maximum over the neighbours, and the row it comes from.

    Args:
        feats: [N, C] floating.
        table: [K, M] int32, rows of feats, -1 = none.
        limit: Not used: outputs behind it have no neighbours.

    Returns:
        [M, C] in the dtype of feats, 0 without neighbours, NaN where one of them is NaN; and
        [M, C] int32, the maximal (or NaN) row of the lowest tap, -1 without neighbours.
    """
    (n, channels), m = feats.shape, table.shape[1]
    if table.numel() == 0 or n == 0:
        rows = torch.full((m, channels), -1, dtype=torch.int32, device=feats.device)
        return feats.new_zeros((m, channels)), rows
    present = table >= 0
    # Each output begins with its first neighbour. Absent ones repeat it, which changes nothing.
    first = table.gather(0, present.to(torch.uint8).argmax(0, keepdim=True)).squeeze(0)
    start = first.clamp(min=0)
    out = feats.index_select(0, start)
    rows = start[:, None].repeat(1, channels)
    for block in _blocks(table, channels):
        _raise_to_max(feats, table[:, block], start[block], out[block], rows[block])
    none = (first < 0)[:, None]
    return out.masked_fill_(none, 0), rows.masked_fill_(none, -1)


def pool_top(feats: Tensor, table: Tensor, limit: Tensor | None = None) -> Tensor:
    """The first result of `pool_max`, where nobody asks for the second."""
    return pool_max(feats, table, limit)[0]


def _raise_to_max(feats: Tensor, table: Tensor, start: Tensor, out: Tensor, rows: Tensor) -> None:
    """Bring ``out`` [M, C] and ``rows``, so far those of the first neighbour, to the maximum."""
    # From the last tap to the first: of equal values the lowest tap comes last and stays.
    for neighbors in table.flip(0).unbind(0):
        where = _candidates(neighbors)
        inputs = neighbors.index_select(0, where)
        inputs = torch.where(inputs < 0, start.index_select(0, where), inputs)
        values, best = feats.index_select(0, inputs), out.index_select(0, where)
        wins = (values >= best) | values.isnan()
        rows.index_copy_(0, where, torch.where(wins, inputs[:, None], rows.index_select(0, where)))
        out.index_copy_(0, where, torch.where(wins, values, best))


def unpool_max(values: Tensor, rows: Tensor, table: Tensor, limit: Tensor | None = None) -> Tensor:
    """Send values back to the rows they came from: the adjoint of `pick_rows`.

    Args:
        values: [M, C] floating.
        rows: [M, C] int32, from `pool_max`.
        table: [K, N] int32, the transposed of the table that `pool_max` read.
        limit: Not used: rows behind it have no neighbours.

    Returns:
        [N, C] in the dtype of values: the sum over taps of ``values[m, c]`` for the
        m = table[k, n] with ``rows[m, c] = n``, in float32 (float64 in float64).
    """
    n, channels = table.shape[1], values.shape[1]
    out = values.new_zeros((n, channels), dtype=sum_dtype(values.dtype))
    if values.shape[0] == 0:
        return out.to(values.dtype)
    own = torch.arange(n, dtype=torch.int32, device=values.device)
    for block in _blocks(table, channels):
        _add_winners(values, rows, table[:, block], own[block], out[block])
    return out.to(values.dtype)


def _add_winners(values: Tensor, rows: Tensor, table: Tensor, own: Tensor, out: Tensor) -> None:
    """Add to ``out`` [N, C] the values that came from the rows ``own`` [N]."""
    for neighbors in table.unbind(0):
        where = _candidates(neighbors)
        outputs = neighbors.index_select(0, where)
        asked = torch.where(outputs < 0, -2, own.index_select(0, where))
        outputs = outputs.clamp(min=0)
        hit = rows.index_select(0, outputs) == asked[:, None]
        part = torch.where(hit, values.index_select(0, outputs), 0).to(out.dtype)
        out.index_copy_(0, where, out.index_select(0, where) + part)


def pick_rows(feats: Tensor, rows: Tensor) -> Tensor:
    """``out[m, c] = feats[rows[m, c], c]``, 0 for -1.

    Args:
        feats: [N, C] floating.
        rows: [M, C] int32.

    Returns:
        [M, C] in the dtype of feats.
    """
    if feats.shape[0] == 0:
        return feats.new_zeros(rows.shape)
    picked = feats.gather(0, rows.clamp(min=0).to(torch.int64))
    return torch.where(rows < 0, 0, picked)
