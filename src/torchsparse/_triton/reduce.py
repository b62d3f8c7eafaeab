"""Sums and maxima over groups of rows, as kernels.

Sums run over sorted rows in an order that depends on the sizes of the groups alone, so the same
input gives the same bits in every run; maxima, minima and counts are formed by integer atomics,
whose result does not depend on the order.
"""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.rows import Tile, accumulator, divide, lower_bound, note, row_tile

__all__ = [
    "Groups",
    "argmax_rows",
    "count",
    "group_rows",
    "segment_max",
    "segment_sum",
    "sum_groups",
]

BLOCK = 256  # rows of kernels without channels
# Groups up to this size are summed side by side, one row of each at a time; larger ones alone.
SHORT = 32
# Groups up to this size are summed by one program; larger ones in chunks.
CHUNK = 256
CHUNKS = 1024  # aim for the number of chunks: their sums are added by one program
FEW_SORTED = 31  # groups up to this number are sorted by counting
FEW_BINS = 256  # counts up to this number are collected before they reach memory
FEW_GROUPS = tl.constexpr(4)  # of a tile of rows, whose maxima are collected likewise


# ------------------------------------------------------------------ grouping
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


# ------------------------------------------------------------------ sums
def segment_sum(
    feats: Tensor,
    groups: Groups,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of ``weights[p] * feats[order[p]]`` over each group, over counts.  -> [num, C]."""
    return sum_groups(feats, groups, weights=weights, counts=counts, dtype=dtype)


def sum_groups(
    feats: Tensor,
    groups: Groups,
    *,
    weights: Tensor | None = None,
    centre: Tensor | None = None,
    other: Tensor | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`segment_sum`, also of ``x * x`` or ``x * other[order[p]]`` with x = feats - centre[group].

    Two launches. The first sums those stretches of CHUNK positions that belong to groups with more
    than CHUNK rows (two such groups at most meet in one stretch). The second sums groups: short
    ones many at a time, longer ones by all threads of a program, those of the first launch from
    their stretches.
    """
    order, starts = groups
    n, num, channels = order.shape[0], starts.shape[0] - 2, feats.shape[1]
    acc_dtype, acc = accumulator(feats.dtype)
    dtype = dtype or acc_dtype
    if n == 0 or num == 0 or feats.numel() == 0:
        return torch.zeros((num, channels), dtype=dtype, device=feats.device)
    feats = feats.contiguous()
    tile = row_tile(channels, feats.element_size(), cols=64)
    blocks = cdiv(channels, tile.cols)
    chunk = max(CHUNK, next_power(cdiv(n, CHUNKS)))
    partial = feats.new_empty((2 * cdiv(n, chunk), channels), dtype=acc_dtype)
    inputs = (
        feats, order, starts,
        None if weights is None else weights.contiguous(),
        None if centre is None else centre.to(acc_dtype).contiguous(),
        None if other is None else other.contiguous(),
    )  # fmt: skip
    constants = {
        "WEIGHTED": weights is not None, "CENTRED": centre is not None, "SQUARED": other is None,
        "ACC": acc, "UNIT": tile.unit, "COLS": tile.cols,
    }  # fmt: skip
    if n > chunk:  # otherwise no group is longer
        launch(
            _chunks_kernel, (cdiv(n, chunk), blocks), feats,
            *inputs, partial, n, num, chunk, tile.units, LANES=max(tile.rows, 2), **constants,
        )  # fmt: skip
    out = torch.empty((num, channels), dtype=dtype, device=feats.device)
    together, lanes = _shape(n, num, tile)
    launch(
        _groups_kernel, (cdiv(num, together), blocks), feats,
        *inputs, partial, None if counts is None else counts.contiguous(), out,
        num, chunk, tile.units, DIVIDED=counts is not None, TOGETHER=together, SHORT=SHORT,
        LANES=lanes, **constants, num_warps=4 if max(together, lanes) * tile.cols > 512 else 1,
    )  # fmt: skip
    return out


def _shape(n: int, num: int, tile: Tile) -> tuple[int, int]:
    """Groups that a program sums side by side, and rows of one group that it reads at a time.

    Groups that are short on average fill a tile together. Longer ones have a program each, whose
    tile is not much longer than they are; in steps of 4, so that few kernels exist.
    """
    lanes = max(tile.rows, 2)
    if n < SHORT // 2 * num:
        return min(lanes, 128), lanes
    while lanes >= 8 * cdiv(n, num):
        lanes //= 4
    return 1, lanes


@triton.jit
def _sum_rows(
    feats, order, weights, centre, other, begin, end, col, width,
    WEIGHTED: tl.constexpr, CENTRED: tl.constexpr, SQUARED: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum over positions begin <= p < end; ``centre`` is the [COLS] row of their group."""
    total = tl.zeros([LANES, COLS], ACC)
    lane = tl.arange(0, LANES)
    following = tl.load(order + begin + lane, mask=begin + lane < end, other=0)
    for start in range(begin, end, LANES):
        at = start + lane
        row = following  # asked for one round ahead: its features can be asked for at once
        following = tl.load(order + at + LANES, mask=at + LANES < end, other=0)
        mask = (at < end)[:, None] & (col < width)[None, :]
        cell = row[:, None] * width + col[None, :]
        value = tl.load(feats + cell, mask=mask, other=0).to(ACC)
        if CENTRED:
            value = tl.where(mask, value - centre[None, :], 0)
            if SQUARED:
                value = value * value
            else:
                value = value * tl.load(other + cell, mask=mask, other=0).to(ACC)
        if WEIGHTED:
            w = tl.load(weights + at, mask=at < end, other=0).to(ACC)
            value = value * w[:, None]
        total += value
    return tl.sum(total, 0)


@triton.jit
def _group_at(starts, num, position):
    """The group that holds a position: the last one that starts at it or before."""
    low = tl.zeros_like(position)
    high = low + num + 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= position
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["n", "num", "chunk", "units"])
def _chunks_kernel(
    feats, order, starts, weights, centre, other, partial, n, num, chunk, units,
    WEIGHTED: tl.constexpr, CENTRED: tl.constexpr, SQUARED: tl.constexpr, ACC: tl.constexpr,
    UNIT: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partial[2 c]: the long group at the first position of chunk c; [2 c + 1]: at the last."""
    width = units * UNIT
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, n)
    first = _group_at(starts, num, begin)
    last = _group_at(starts, num, end - 1)
    for side in tl.static_range(2):
        group = first if side == 0 else last
        group_begin, group_end = tl.load(starts + group), tl.load(starts + group + 1)
        wanted = (group < num) & (group_end - group_begin > chunk)
        if side == 1:
            wanted = wanted & (last != first)
        if wanted:
            middle = tl.zeros([COLS], ACC)
            if CENTRED:
                middle = tl.load(centre + group * width + col, mask=col < width, other=0)
            sums = _sum_rows(
                feats, order, weights, middle, other,
                tl.maximum(begin, group_begin), tl.minimum(end, group_end), col, width,
                WEIGHTED, CENTRED, SQUARED, ACC, LANES, COLS,
            )  # fmt: skip
            at = 2 * tl.program_id(0).to(tl.int64) + side
            tl.store(partial + at * width + col, sums, mask=col < width)


@triton.jit
def _sum_partial(
    partial, begin, end, chunk, col, width,
    ACC: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum of the stretches of a long group; only its first can be the second of a chunk."""
    total = tl.zeros([LANES, COLS], ACC)
    lane = tl.arange(0, LANES)
    for start in range(begin // chunk, (end - 1) // chunk + 1, LANES):
        c = start + lane
        mask = (c * chunk < end)[:, None] & (col < width)[None, :]
        at = 2 * c + (c * chunk < begin).to(tl.int64)
        total += tl.load(partial + at[:, None] * width + col[None, :], mask=mask, other=0)
    return tl.sum(total, 0)


@triton.jit
def _finish(sums, counts, group, mask, ACC: tl.constexpr, DIVIDED: tl.constexpr):
    """Sums over counts, 0 where the count is 0."""
    if DIVIDED:
        n = tl.load(counts + group, mask=mask, other=0).to(ACC) + tl.zeros_like(sums)
        sums = tl.where(n == 0, 0, divide(sums, tl.where(n == 0, 1, n)))
    return sums


@triton.jit(do_not_specialize=["num", "chunk", "units"])
def _groups_kernel(
    feats, order, starts, weights, centre, other, partial, counts, out, num, chunk, units,
    DIVIDED: tl.constexpr, TOGETHER: tl.constexpr, SHORT: tl.constexpr,
    WEIGHTED: tl.constexpr, CENTRED: tl.constexpr, SQUARED: tl.constexpr, ACC: tl.constexpr,
    UNIT: tl.constexpr, LANES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    longest = SHORT + 1
    if TOGETHER > 1:
        # Columns from the start: slices of tiles, [:, None], fail to compile here (Triton 3.6).
        many = (first + tl.arange(0, TOGETHER))[:, None]
        begins = tl.load(starts + many, mask=many < num, other=0)
        sizes = tl.load(starts + many + 1, mask=many < num, other=0) - begins
        longest = tl.max(tl.max(sizes, 1), 0)
        short = (many < num) & (sizes <= SHORT)
        inside = (col < width)[None, :]
        mask = short & inside
        cells = many * width + col[None, :]
        total = tl.zeros([TOGETHER, COLS], ACC)
        middles = total
        if CENTRED:
            middles = tl.load(centre + cells, mask=mask, other=0)
        for start in range(0, tl.minimum(longest, SHORT), 4):
            for k in tl.static_range(4):  # four rows of each group are on their way at a time
                at = begins + (start + k)
                here = short & (start + k < sizes)
                row = tl.load(order + at, mask=here, other=0)
                read = here & inside
                cell = row * width + col[None, :]
                value = tl.load(feats + cell, mask=read, other=0).to(ACC)
                if CENTRED:
                    value = tl.where(read, value - middles, 0)
                    if SQUARED:
                        value = value * value
                    else:
                        value = value * tl.load(other + cell, mask=read, other=0).to(ACC)
                if WEIGHTED:
                    w = tl.load(weights + at, mask=here, other=0).to(ACC)
                    value = value * w
                total += value
        total = _finish(total, counts, many, short, ACC, DIVIDED)
        tl.store(out + cells, total.to(out.dtype.element_ty), mask=mask)
    if longest > SHORT:
        for k in range(TOGETHER):
            group = first + k
            begin = tl.load(starts + group, mask=group < num, other=0)
            end = tl.load(starts + group + 1, mask=group < num, other=0)
            if (TOGETHER == 1) | (end - begin > SHORT):
                if end - begin > chunk:
                    sums = _sum_partial(partial, begin, end, chunk, col, width, ACC, LANES, COLS)
                else:
                    middle = tl.zeros([COLS], ACC)
                    if CENTRED:
                        middle = tl.load(centre + group * width + col, mask=col < width, other=0)
                    sums = _sum_rows(
                        feats, order, weights, middle, other, begin, end, col, width,
                        WEIGHTED, CENTRED, SQUARED, ACC, LANES, COLS,
                    )  # fmt: skip
                sums = _finish(sums, counts, group, group < num, ACC, DIVIDED)
                tl.store(
                    out + group * width + col, sums.to(out.dtype.element_ty), mask=col < width
                )


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
