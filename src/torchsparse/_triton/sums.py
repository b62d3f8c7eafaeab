"""Sums over groups of rows, as kernels.

They run over sorted rows in an order that depends on the sizes of the groups alone, so the same
input gives the same bits in every run.
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
from torchsparse._triton.rows import Tile, accumulator, divide, row_tile

__all__ = ["sum_groups"]

# Groups up to this size are summed side by side, one row of each at a time; larger ones alone.
SHORT = 32
# Groups up to this size are summed by one program; larger ones in chunks.
CHUNK = 256
CHUNKS = 1024  # aim for the number of chunks: their sums are added by one program


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
