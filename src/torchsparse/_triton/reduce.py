"""Sums and maxima over groups of rows, as kernels.

Counts, maxima and their rows are formed by integer atomics, whose result does not depend on the
order of the threads; sums, where it would, are in `sums`.
"""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._triton.grouping import group_rows
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.rows import note, row_tile
from torchsparse._triton.sums import sum_groups

__all__ = ["Groups", "argmax_rows", "count", "group_rows", "segment_max", "segment_sum"]

BLOCK = 256  # rows of kernels without channels
FEW_BINS = 256  # counts up to this number are collected before they reach memory
FEW_GROUPS = tl.constexpr(4)  # of a tile of rows, whose maxima are collected likewise


def segment_sum(
    feats: Tensor,
    groups: Groups,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of ``weights[p] * feats[order[p]]`` over each group, over counts.  -> [num, C]."""
    return sum_groups(feats, groups, weights=weights, counts=counts, dtype=dtype)


def count(index: Tensor, num: int, word: Tensor | None = None, bit: int = 0) -> Tensor:
    """Rows per group; numbers outside are skipped.  [N] integers -> [num] int32."""
    n, index = index.shape[0], index.contiguous()
    found = torch.zeros(num, dtype=torch.int32, device=index.device)
    few = num <= FEW_BINS
    block = 2048 if few else BLOCK
    bins = max(next_power(num), 32)
    launch(
        _count_kernel, (cdiv(n, block),), index,
        index, found, word, n, num, bit,
        BINS=bins if few else 0, FLAG=word is not None, BLOCK=block,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["n", "num", "bit"])
def _count_kernel(
    index, found, word, n, num, bit,
    BINS: tl.constexpr, FLAG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    inside = (group >= 0) & (group < num)
    if BINS > 0:  # few addresses: atomics on them would queue
        bins = tl.arange(0, BINS)
        # Rows outside are counted in bin 0, and taken off again.
        rows = tl.histogram(tl.where(inside, group, 0).to(tl.int32), BINS)
        outside = BLOCK - tl.sum(inside.to(tl.int32), 0)
        rows = tl.where(bins == 0, rows - outside, rows)
        tl.atomic_add(found + bins, rows, mask=(bins < num) & (rows > 0), sem="relaxed")
    else:
        tl.atomic_add(found + group, tl.full([BLOCK], 1, tl.int32), mask=inside, sem="relaxed")
    if FLAG:
        note(word, bit, tl.max(group, 0) >= num)


# ------------------------------------------------------------------ maxima
def segment_max(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Largest value per group and channel, 0 for an empty group; NaN wins.  -> [num, C]."""
    n, channels = feats.shape
    wide = feats.dtype == torch.float64
    codes = torch.int64 if wide else torch.int32
    lowest = torch.iinfo(codes).min
    best = torch.full((num, channels), lowest, dtype=codes, device=feats.device)
    out = torch.empty((num, channels), dtype=feats.dtype, device=feats.device)
    tile = row_tile(channels, feats.element_size(), 4096, 64)
    launch(
        _max_kernel, tile.grid(n), feats,
        feats.contiguous(), index.contiguous(), best, n, num, tile.units,
        LOWEST=lowest, **tile.constants,
    )  # fmt: skip
    size = num * channels
    launch(_decode_kernel, (cdiv(size, BLOCK),), feats, best, out, size, BLOCK=BLOCK)
    return out


@triton.jit
def _wide(value):
    """Numbers of 16 bits as float32, which not every GPU can compare."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def _code(value, codes: tl.constexpr):
    """Integers in the order of floating-point numbers; NaN is the largest, none the smallest.

    Negative numbers count backwards: all bits but the sign are turned.
    """
    if codes == tl.int64:
        bits = value.to(tl.int64, bitcast=True)
        largest = tl.full([1, 1], 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        bits = value.to(tl.int32, bitcast=True)
        largest = tl.full([1, 1], 0x7FFFFFFF, tl.int32)
    return tl.where(value != value, largest, tl.where(bits < 0, bits ^ largest, bits))


@triton.jit(do_not_specialize=["n", "num", "units"])
def _max_kernel(
    feats, index, best, n, num, units, LOWEST: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    codes: tl.constexpr = best.dtype.element_ty
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    group = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    there = (group >= 0) & (group < num)
    mask = there[:, None] & (col < width)[None, :]
    value = tl.load(feats + row[:, None] * width + col[None, :], mask=mask, other=0)
    code = tl.where(mask, _code(_wide(value), codes), tl.full([1, 1], LOWEST, codes))
    lowest_group = tl.min(tl.where(there, group, num), 0)
    highest_group = tl.max(tl.where(there, group, -1), 0)
    if highest_group - lowest_group < FEW_GROUPS:  # rows are mostly sorted by sample
        for g in range(lowest_group, highest_group + 1):
            mine = tl.where((group == g)[:, None], code, tl.full([1, 1], LOWEST, codes))
            top = tl.max(mine, 0)
            known = (col < width) & (top > tl.full([1], LOWEST, codes))
            tl.atomic_max(best + g * width + col, top, mask=known, sem="relaxed")
    else:
        at = group[:, None] * width + col[None, :]
        tl.atomic_max(best + at, code, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["size"])
def _decode_kernel(best, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(best + at, mask=at < size, other=0)
    if best.dtype.element_ty == tl.int64:
        largest = tl.full([1], 0x7FFFFFFFFFFFFFFF, tl.int64)
        value = tl.where(code < 0, code ^ largest, code).to(tl.float64, bitcast=True)
    else:
        largest = tl.full([1], 0x7FFFFFFF, tl.int32)
        value = tl.where(code < 0, code ^ largest, code).to(tl.float32, bitcast=True)
    # The code of no number is that of -NaN: all other NaN are positive.
    value = tl.where((value != value) & (code < 0), 0, value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


def argmax_rows(feats: Tensor, index: Tensor, top: Tensor) -> Tensor:
    """Lowest row that holds the maximum ``top`` of its group.  -> [num, C] int64, N for none."""
    n, (num, channels) = feats.shape[0], top.shape
    best = torch.full((num, channels), n, dtype=torch.int64, device=feats.device)
    tile = row_tile(channels, feats.element_size(), 2048, 64)
    launch(
        _argmax_kernel, tile.grid(n), feats,
        feats.contiguous(), index.contiguous(), top.contiguous(), best, n, num, tile.units,
        **tile.constants,
    )  # fmt: skip
    return best


@triton.jit(do_not_specialize=["n", "num", "units"])
def _argmax_kernel(
    feats, index, top, best, n, num, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    group = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    there = (group >= 0) & (group < num)
    mask = there[:, None] & (col < width)[None, :]
    value = _wide(tl.load(feats + row[:, None] * width + col[None, :], mask=mask, other=0))
    at = group[:, None] * width + col[None, :]
    most = _wide(tl.load(top + at, mask=mask, other=0))
    equal = mask & ((value == most) | ((value != value) & (most != most)))
    lowest_group = tl.min(tl.where(there, group, num), 0)
    highest_group = tl.max(tl.where(there, group, -1), 0)
    if highest_group - lowest_group < FEW_GROUPS:
        for g in range(lowest_group, highest_group + 1):
            mine = equal & (group == g)[:, None]
            first = tl.min(tl.where(mine, row[:, None], n), 0).to(tl.int64)
            known = (col < width) & (first < n)
            tl.atomic_min(best + g * width + col, first, mask=known, sem="relaxed")
    else:
        rows = row[:, None] + tl.zeros_like(at)
        tl.atomic_min(best + at, rows, mask=equal, sem="relaxed")
