"""Pair lists: the valid neighbours of a map, grouped by tap, for the weight gradient."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._triton.launch import Step, cdiv

__all__ = ["Pairs", "list_pairs"]

BLOCK_ROWS = 32


class Pairs(NamedTuple):
    """Pairs by tap, then output row, in buffers that may be longer than the lists.

    For neighbors = [[-1, 0, -1], [0, 1, 2], [1, -1, -1]] (one block of rows, all taps listed):
        inputs = [0, 0, 1, 2, 1]    outputs = [1, 0, 1, 2, 0]    ends = [[1], [4], [5]]
    """

    inputs: Tensor  # [capacity] int32
    outputs: Tensor  # [capacity] int32
    ends: Tensor  # [L, blocks], one past the pairs of a tap in rows up to the end of a block
    volume: int  # K
    lists: int  # L: taps beyond the list read list K - 1 - k from its other end
    swap: bool  # inputs and outputs are exchanged
    memo: dict[Any, Any]  # how weight gradients over these pairs are launched


@triton.jit(do_not_specialize=["M", "blocks", "n_row", "n_tap"])
def count_kernel(
    neighbors, counts, M, blocks, n_row, n_tap, L: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """counts[k, block] = pairs of tap k in a block of rows."""
    block = tl.program_id(0)
    rows = block * BR + tl.arange(0, BR)
    taps = tl.program_id(1) * 32 + tl.arange(0, 32)
    at = rows.to(tl.int64)[:, None] * n_row + taps.to(tl.int64)[None, :] * n_tap
    idx = tl.load(neighbors + at, mask=(rows < M)[:, None] & (taps < L)[None, :], other=-1)
    found = tl.sum((idx >= 0).to(tl.int32), axis=0)
    tl.store(counts + taps.to(tl.int64) * blocks + block, found, mask=taps < L)


@triton.jit(do_not_specialize=["M", "blocks", "n_row", "n_tap"])
def list_kernel(
    neighbors, ends, inputs, outputs, M, blocks, n_row, n_tap, L: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Write the pairs of a block of rows behind those of the blocks before it."""
    block = tl.program_id(0)
    rows = block * BR + tl.arange(0, BR)
    taps = tl.program_id(1) * 32 + tl.arange(0, 32)
    listed = taps < L
    at = rows.to(tl.int64)[:, None] * n_row + taps.to(tl.int64)[None, :] * n_tap
    idx = tl.load(neighbors + at, mask=(rows < M)[:, None] & listed[None, :], other=-1)
    there = idx >= 0
    count = there.to(tl.int32)
    end = tl.load(ends + taps.to(tl.int64) * blocks + block, mask=listed, other=0).to(tl.int64)
    begin = end - tl.sum(count, axis=0)
    place = begin[None, :] + tl.cumsum(count, axis=0) - 1
    tl.store(inputs + place, idx, mask=there)
    row = tl.broadcast_to(rows[:, None], (BR, 32))
    tl.store(outputs + place, row, mask=there)


def list_pairs(neighbors: Tensor, symmetric: bool, most: int) -> Pairs:
    """List the pairs of a table; nothing waits for the device.

    Args:
        neighbors: [K, M] int32, -1 = none; any strides.
        symmetric: Tap K - 1 - k lists the pairs of tap k the other way round: half is enough.
        most: A bound for the number of pairs.
    """
    volume, m = neighbors.shape
    lists = volume // 2 + 1 if symmetric else volume
    capacity = min(lists * m, most)
    blocks, words = cdiv(m, BLOCK_ROWS), cdiv(lists, 32)
    n_tap, n_row = neighbors.stride()
    numbers = (m, blocks, n_row, n_tap)
    count, write = _listing(lists, capacity >= 1 << 31)
    counts = neighbors.new_empty(lists * blocks)
    count((blocks, words), (neighbors, counts), numbers)
    wide = torch.int64 if capacity >= 1 << 31 else torch.int32
    ends = torch.cumsum(counts, 0, dtype=wide).view(lists, blocks)
    inputs, outputs = neighbors.new_empty(capacity), neighbors.new_empty(capacity)
    write((blocks, words), (neighbors, ends, inputs, outputs), numbers)
    return Pairs(inputs, outputs, ends, volume, lists, False, {})


@cache
def _listing(lists: int, wide: bool) -> tuple[Step, Step]:
    """Two launches for so many lists; ``wide``: their ends have 64 bits."""
    return (
        Step(count_kernel, L=lists, BR=BLOCK_ROWS, num_warps=1),
        Step(list_kernel, L=lists, BR=BLOCK_ROWS, num_warps=1),
    )
