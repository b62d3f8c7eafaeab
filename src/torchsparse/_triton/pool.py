"""Sums and maxima over the neighbours of a kernel map, as kernels.

Bytes decide. A program takes a block of output rows and channels through the taps, keeps its sums
or maxima in registers and writes them once; an absent neighbour is not read. For h neighbours per
output, K taps, C channels and e bytes per number, one number of the result moves

    sum, mean, maximum       e (h + 1)      + 4 K / C   of the table
    maximum with rows        e (h + 1) + 4  + 4 K / C
    gradient of the maximum  (e + 4) h + e  + 4 K / C   for h outputs per input

of which the h reads of a row by neighbouring outputs mostly meet in the cache. Gradients are
gathered through the transposed table, so nothing is added atomically.
"""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._triton.launch import cdiv, launch
from torchsparse._triton.primitives import real_rows
from torchsparse._triton.rows import Tile, divide, row_tile

__all__ = ["pick_rows", "pool_max", "pool_shares", "pool_sum", "pool_top", "unpool_max"]

BLOCK = 256  # rows of kernels without channels
ELEMENTS = 1024  # of a block: 16 bytes per lane and neighbour for 16-bit features
MOST_ROWS = 128  # of a block at most: a row per lane


def _tile(channels: int, itemsize: int) -> Tile:
    """Blocks without idle lanes if at least 32 channels, a power of two, divide a row."""
    even = channels & -channels
    tile = row_tile(channels, itemsize, ELEMENTS, min(even, 128) if even >= 32 else 128)
    return tile._replace(rows=min(tile.rows, MOST_ROWS))


def pool_sum(
    feats: Tensor,
    table: Tensor,
    shares: Tensor | None = None,
    mean: bool = False,
    limit: Tensor | None = None,
) -> Tensor:
    """``out[m] = sum over the neighbours n = table[k, m] of shares[n] * feats[n]``.

    Args:
        feats: [N, C] float16, bfloat16 or float32.
        table: [K, M] int32, rows of feats, -1 = none; any strides.
        shares: [N] float32 factors, None = 1.
        mean: Divide by the number of neighbours.
        limit: [1] int64, how many outputs are real: the rest gets zeros. None: all.

    Returns:
        [M, C] in the dtype of feats, summed in float32 in the order of the taps and rounded once;
        0 without neighbours.
    """
    (taps, m), channels = table.shape, feats.shape[1]
    out = feats.new_empty((m, channels))
    tile = _tile(channels, feats.element_size())
    launch(
        _pool_sum_kernel, tile.grid(m), feats,
        feats.contiguous(), table, None if shares is None else shares.contiguous(), out, limit,
        m, taps, *table.stride(), tile.units,
        SHARES=shares is not None, MEAN=mean, **tile.constants,
    )  # fmt: skip
    return out


def pool_shares(table: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the number of neighbours of each output.

    Args:
        table: [K, M] int32, -1 = none; any strides.
        dtype: float32.

    Returns:
        [M] in ``dtype``, 1 without neighbours.
    """
    taps, m = table.shape
    out = torch.empty(m, dtype=dtype, device=table.device)
    launch(
        _pool_shares_kernel, (cdiv(m, BLOCK),), table,
        table, out, m, taps, *table.stride(), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def pool_max(feats: Tensor, table: Tensor, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maximum over the neighbours, and the row it comes from.

    Args:
        feats: [N, C] float16, bfloat16 or float32.
        table: [K, M] int32, rows of feats, -1 = none; any strides.
        limit: [1] int64, how many outputs are real: the rest comes from row -1, and is 0.
            None: all.

    Returns:
        [M, C] in the dtype of feats, 0 without neighbours, NaN where one of them is NaN; and
        [M, C] int32, the maximal (or NaN) row of the lowest tap, -1 without neighbours.
    """
    rows = torch.empty((table.shape[1], feats.shape[1]), dtype=torch.int32, device=feats.device)
    return _maxima(feats, table, rows, limit), rows


def pool_top(feats: Tensor, table: Tensor, limit: Tensor | None = None) -> Tensor:
    """The first result of `pool_max`, where nobody asks for the second."""
    return _maxima(feats, table, None, limit)


def _maxima(feats: Tensor, table: Tensor, rows: Tensor | None, limit: Tensor | None) -> Tensor:
    (taps, m), channels = table.shape, feats.shape[1]
    out = feats.new_empty((m, channels))
    tile = _tile(channels, feats.element_size())
    launch(
        _pool_max_kernel, tile.grid(m), feats,
        feats.contiguous(), table, out, rows, limit, m, taps, *table.stride(), tile.units,
        WINNERS=rows is not None, **tile.constants,
    )  # fmt: skip
    return out


def unpool_max(values: Tensor, rows: Tensor, table: Tensor, limit: Tensor | None = None) -> Tensor:
    """Send values back to the rows they came from: the adjoint of `pick_rows`.

    Args:
        values: [M, C] float16, bfloat16 or float32.
        rows: [M, C] int32, from `pool_max`.
        table: [K, N] int32, the transposed of the table that `pool_max` read; any strides.
        limit: [1] int64, how many of the N rows are real: the rest gets zeros. None: all.

    Returns:
        [N, C] in the dtype of values: the sum over taps, in their order, of ``values[m, c]`` for
        the m = table[k, n] with ``rows[m, c] = n``; in float32, rounded once.
    """
    (taps, n), channels = table.shape, values.shape[1]
    out = values.new_empty((n, channels))
    tile = _tile(channels, values.element_size())
    launch(
        _unpool_max_kernel, tile.grid(n), values,
        values.contiguous(), rows.contiguous(), table, out, limit,
        n, taps, *table.stride(), tile.units, **tile.constants,
    )  # fmt: skip
    return out


def pick_rows(feats: Tensor, rows: Tensor) -> Tensor:
    """``out[m, c] = feats[rows[m, c], c]``, 0 for -1.

    Args:
        feats: [N, C] float16, bfloat16 or float32.
        rows: [M, C] int32.

    Returns:
        [M, C] in the dtype of feats.
    """
    (n, channels), m = feats.shape, rows.shape[0]
    out = feats.new_empty((m, channels))
    tile = _tile(channels, feats.element_size())
    launch(
        _pick_rows_kernel, tile.grid(m), feats,
        feats.contiguous(), rows.contiguous(), out, n, m, tile.units, **tile.constants,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------ one neighbour
@triton.jit
def _neighbour(places, live, tap, taps, n_tap):
    """What each output has at a tap, -1 = none.  -> [ROWS] int32"""
    return tl.load(places + tap * n_tap, mask=live & (tap < taps), other=-1)


@triton.jit
def _read(x, row, col, width, inside):
    """Rows of features, unspecified where there is none.  -> [ROWS, COLS]"""
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    return tl.load(x + at, mask=(row >= 0)[:, None] & inside, other=0)


@triton.jit
def _add(total, value, shares, row, SHARES: tl.constexpr):
    """total + shares[row] * value; absent rows hold 0."""
    value = value.to(tl.float32)
    if SHARES:
        share = tl.load(shares + row, mask=row >= 0, other=0)
        value = value * share[:, None]
    return total + value


@triton.jit
def _raise(best, winner, alone, value, row, WINNERS: tl.constexpr):
    """The greater of ``best`` and ``value``; an equal one of a higher tap changes nothing.

    16-bit numbers are compared as float32, and kept as they are.
    """
    there = row >= 0
    new, old = value.to(tl.float32), best.to(tl.float32)
    above = (new > old) | ((new != new) & (old == old)) | alone[:, None]
    wins = there[:, None] & above
    best = tl.where(wins, value, best)
    if WINNERS:
        winner = tl.where(wins, row[:, None], winner)
    return best, winner, alone & (row < 0)


# ------------------------------------------------------------------ kernels
# Each turn takes four taps and asks for what the table has at the next four, so that several rows
# are on their way at once and none waits for the table.
@triton.jit(do_not_specialize=["M", "taps", "n_tap", "n_row", "units"])
def _pool_sum_kernel(
    feats, table, shares, out, limit, M, taps, n_tap, n_row, units,
    SHARES: tl.constexpr, MEAN: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum or mean of the neighbours of ROWS outputs in COLS channels."""
    width = units * UNIT
    step = n_tap.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = row < real_rows(M, limit)
    inside = (col < width)[None, :]
    places = table + row * n_row
    a = _neighbour(places, live, 0, taps, step)
    b = _neighbour(places, live, 1, taps, step)
    c = _neighbour(places, live, 2, taps, step)
    d = _neighbour(places, live, 3, taps, step)
    total = tl.zeros([ROWS, COLS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for tap in range(0, taps, 4):
        of_a = _read(feats, a, col, width, inside)
        of_b = _read(feats, b, col, width, inside)
        of_c = _read(feats, c, col, width, inside)
        of_d = _read(feats, d, col, width, inside)
        next_a = _neighbour(places, live, tap + 4, taps, step)
        next_b = _neighbour(places, live, tap + 5, taps, step)
        next_c = _neighbour(places, live, tap + 6, taps, step)
        next_d = _neighbour(places, live, tap + 7, taps, step)
        total = _add(total, of_a, shares, a, SHARES)
        total = _add(total, of_b, shares, b, SHARES)
        total = _add(total, of_c, shares, c, SHARES)
        total = _add(total, of_d, shares, d, SHARES)
        if MEAN:
            count += (a >= 0).to(tl.int32) + (b >= 0).to(tl.int32)
            count += (c >= 0).to(tl.int32) + (d >= 0).to(tl.int32)
        a, b, c, d = next_a, next_b, next_c, next_d
    if MEAN:
        by = tl.maximum(count, 1).to(tl.float32)
        total = divide(total, by[:, None] + tl.zeros_like(total))
    at = row[:, None] * width + col[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < M)[:, None] & inside)


@triton.jit(do_not_specialize=["M", "taps", "n_tap", "n_row"])
def _pool_shares_kernel(table, out, M, taps, n_tap, n_row, BLOCK: tl.constexpr):
    """1 / number of neighbours."""
    step = n_tap.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < M
    places = table + row * n_row
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, taps, 4):
        for tap in tl.static_range(4):
            count += (_neighbour(places, live, first + tap, taps, step) >= 0).to(tl.int32)
    by = tl.maximum(count, 1).to(tl.float32)
    tl.store(out + row, divide(tl.full([BLOCK], 1, tl.float32), by), mask=live)


@triton.jit(do_not_specialize=["M", "taps", "n_tap", "n_row", "units"])
def _pool_max_kernel(
    feats, table, out, rows, limit, M, taps, n_tap, n_row, units,
    WINNERS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Maximum of the neighbours of ROWS outputs in COLS channels, and its row."""
    width = units * UNIT
    step = n_tap.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = row < real_rows(M, limit)
    inside = (col < width)[None, :]
    places = table + row * n_row
    a = _neighbour(places, live, 0, taps, step)
    b = _neighbour(places, live, 1, taps, step)
    c = _neighbour(places, live, 2, taps, step)
    d = _neighbour(places, live, 3, taps, step)
    best = tl.zeros([ROWS, COLS], feats.dtype.element_ty)
    winner = tl.full([ROWS, COLS], -1, tl.int32)
    alone = tl.full([ROWS], 1, tl.int1)  # no neighbour so far
    for tap in range(0, taps, 4):
        of_a = _read(feats, a, col, width, inside)
        of_b = _read(feats, b, col, width, inside)
        of_c = _read(feats, c, col, width, inside)
        of_d = _read(feats, d, col, width, inside)
        next_a = _neighbour(places, live, tap + 4, taps, step)
        next_b = _neighbour(places, live, tap + 5, taps, step)
        next_c = _neighbour(places, live, tap + 6, taps, step)
        next_d = _neighbour(places, live, tap + 7, taps, step)
        best, winner, alone = _raise(best, winner, alone, of_a, a, WINNERS)
        best, winner, alone = _raise(best, winner, alone, of_b, b, WINNERS)
        best, winner, alone = _raise(best, winner, alone, of_c, c, WINNERS)
        best, winner, alone = _raise(best, winner, alone, of_d, d, WINNERS)
        a, b, c, d = next_a, next_b, next_c, next_d
    at = row[:, None] * width + col[None, :]
    tl.store(out + at, best, mask=(row < M)[:, None] & inside)
    if WINNERS:  # also of padding: a row that exists nowhere would be complained about
        tl.store(rows + at, winner, mask=(row < M)[:, None] & inside)


@triton.jit
def _won(total, value, source, own):
    """total + value where the value came from this very row."""
    return total + tl.where(source == own, value.to(tl.float32), 0)


@triton.jit(do_not_specialize=["N", "taps", "n_tap", "n_row", "units"])
def _unpool_max_kernel(
    values, rows, table, out, limit, N, taps, n_tap, n_row, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum of the values that ROWS inputs won in COLS channels."""
    width = units * UNIT
    step = n_tap.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = row < real_rows(N, limit)
    inside = (col < width)[None, :]
    own = row.to(tl.int32)[:, None]
    places = table + row * n_row
    a = _neighbour(places, live, 0, taps, step)
    b = _neighbour(places, live, 1, taps, step)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for tap in range(0, taps, 2):  # two neighbours have as many bytes as four elsewhere
        from_a = _source(rows, a, col, width, inside)
        from_b = _source(rows, b, col, width, inside)
        of_a = _read(values, a, col, width, inside)
        of_b = _read(values, b, col, width, inside)
        next_a = _neighbour(places, live, tap + 2, taps, step)
        next_b = _neighbour(places, live, tap + 3, taps, step)
        total = _won(total, of_a, from_a, own)
        total = _won(total, of_b, from_b, own)
        a, b = next_a, next_b
    at = row[:, None] * width + col[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < N)[:, None] & inside)


@triton.jit
def _source(rows, row, col, width, inside):
    """The row that each maximum came from, -1 where there is none.  -> [ROWS, COLS] int32"""
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    return tl.load(rows + at, mask=(row >= 0)[:, None] & inside, other=-1)


@triton.jit(do_not_specialize=["N", "M", "units"])
def _pick_rows_kernel(
    feats, rows, out, N, M, units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """One number of feats for each of ROWS x COLS."""
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (row < M)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    source = tl.load(rows + at, mask=mask, other=-1).to(tl.int64)
    there = (source >= 0) & (source < N)  # no address from a wrong number
    value = tl.load(feats + source * width + col[None, :], mask=there, other=0)
    tl.store(out + at, value, mask=mask)
