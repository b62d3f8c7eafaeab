"""Rows brought together by group, as kernels."""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.rows import lower_bound

__all__ = ["group_rows"]

BLOCK = 256  # rows of kernels without channels
FEW_SORTED = 31  # groups up to this number are sorted by counting


def group_rows(index: Tensor, num: int) -> Groups:
    """Bring rows of one group together.  [N] integers -> `Groups`."""
    n, index = index.shape[0], index.contiguous()
    starts = torch.empty(num + 2, dtype=torch.int64, device=index.device)
    if num <= FEW_SORTED and n > 0:
        return Groups(_count_and_place(index, num, starts), starts)
    # The radix sort of PyTorch, stable, on keys as short as they can be.
    dtype = torch.int16 if num < 2**15 else torch.int32 if num < 2**31 else torch.int64
    keys = torch.empty(n, dtype=dtype, device=index.device)
    launch(_group_keys_kernel, (cdiv(n, BLOCK),), index, index, keys, n, num, BLOCK=BLOCK)
    keys, order = torch.sort(keys, stable=True)
    launch(
        _starts_kernel, (cdiv(num + 2, BLOCK),), index,
        keys, starts, n, num, n.bit_length(), BLOCK=BLOCK,
    )  # fmt: skip
    return Groups(order, starts)


def _count_and_place(index: Tensor, num: int, starts: Tensor) -> Tensor:
    """Sort rows by few groups: each block of rows counts its own, and after a running sum over
    (group, block) knows where they go. Fills ``starts`` and returns the order."""
    n = index.shape[0]
    order = torch.empty(n, dtype=torch.int64, device=index.device)
    bins = next_power(num + 1)
    rows = min(4096 // bins, 512)
    blocks = cdiv(n, rows)
    tallies = torch.empty((bins, blocks), dtype=torch.int32, device=index.device)
    launch(_tally_kernel, (blocks,), index, index, tallies, n, num, blocks, BINS=bins, ROWS=rows)
    ends = tallies.view(-1).cumsum(0)
    launch(
        _place_kernel, (blocks,), index,
        index, tallies, ends, order, starts, n, num, blocks, BINS=bins, ROWS=rows,
    )  # fmt: skip
    return order


@triton.jit
def _members(index, n, num, BINS: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BINS] int32: 1 where a row of this block belongs to a group; the last one is none."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.load(index + row, mask=row < n, other=0).to(tl.int64)
    group = tl.where((group >= 0) & (group < num), group, num).to(tl.int32)
    mine = (group[:, None] == tl.arange(0, BINS)[None, :]) & (row < n)[:, None]
    return mine.to(tl.int32)


@triton.jit(do_not_specialize=["n", "num", "blocks"])
def _tally_kernel(index, tallies, n, num, blocks, BINS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.sum(_members(index, n, num, BINS, ROWS), 0)
    tl.store(tallies + tl.arange(0, BINS) * blocks + tl.program_id(0), rows)


@triton.jit(do_not_specialize=["n", "num", "blocks"])
def _place_kernel(
    index, tallies, ends, order, starts, n, num, blocks, BINS: tl.constexpr, ROWS: tl.constexpr
):
    block = tl.program_id(0)
    group = tl.arange(0, BINS)
    mine = _members(index, n, num, BINS, ROWS)
    at = group * blocks + block
    first = tl.load(ends + at).to(tl.int32) - tl.load(tallies + at)
    place = tl.sum(mine * (first[None, :] + tl.cumsum(mine, 0) - 1), 1)
    row = block * ROWS + tl.arange(0, ROWS)
    tl.store(order + place, row.to(tl.int64), mask=row < n)
    if block == 0:
        tl.store(starts + group, first, mask=group <= num)
        tl.store(starts + num + 1, n)


@triton.jit(do_not_specialize=["n", "num"])
def _group_keys_kernel(index, keys, n, num, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(index + row, mask=row < n, other=0).to(tl.int64)
    key = tl.where((group >= 0) & (group < num), group, num)
    tl.store(keys + row, key.to(keys.dtype.element_ty), mask=row < n)


@triton.jit(do_not_specialize=["n", "num", "steps"])
def _starts_kernel(keys, starts, n, num, steps, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = lower_bound(keys, n, group, steps)
    tl.store(starts + group, at, mask=group < num + 2)
