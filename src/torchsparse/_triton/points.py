"""Rows between points, voxels and dense grids, as kernels."""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._capacity import row_count
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.primitives import real_rows
from torchsparse._triton.rows import WIDE, accumulator, divide, note, row_tile, words

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

BLOCK = 256  # rows of kernels without channels
CLAIMS = 128  # rows that a program claims cells for: one per thread
CHUNKS = 1024  # of 16 bytes, which it clears
MAX_AXES = 5  # columns that cells are counted from
# Cells of a grid from this size on (bytes) may be read through a table from cells to rows.
TABLE_FROM = 64
SECTOR = 32  # bytes that memory moves at least
TABLE = 2**26  # cells of a table at once, 256 MB, unless a 16th of the grid is more


# ------------------------------------------------------------------ cells
def flat_index(
    coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Row-major cell of each coordinate row; -1 outside and for padding.

    [N, A], A extents -> [N] int64.
    """
    n = coords.shape[0]
    index = torch.empty(n, dtype=torch.int64, device=coords.device)
    launch(
        _flat_index_kernel, (cdiv(n, BLOCK),), coords,
        coords, index, word, row_count(coords), n, coords.stride(0), coords.stride(1), bit,
        *_sizes(extents), AXES=len(extents), FLAG=word is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return index


def _sizes(extents: tuple[int, ...]) -> tuple[int, ...]:
    """Extents as the kernels take them."""
    if len(extents) > MAX_AXES:
        raise ValueError(
            f"coordinates of at most {MAX_AXES} columns are supported, got {len(extents)}"
        )
    return (*extents, *(1,) * (MAX_AXES - len(extents)))


@triton.jit
def _cells(
    coords, row, here, row_stride, stride, e0, e1, e2, e3, e4, AXES: tl.constexpr
):  # fmt: skip
    """Cell of each row that is ``here``, -1 outside."""
    cell = tl.zeros_like(row).to(tl.int64)
    inside = here
    for axis in tl.static_range(AXES):
        if axis == 0:
            extent = e0
        elif axis == 1:
            extent = e1
        elif axis == 2:
            extent = e2
        elif axis == 3:
            extent = e3
        else:
            extent = e4
        c = tl.load(coords + row.to(tl.int64) * row_stride + axis * stride, mask=here, other=0)
        c = c.to(tl.int64)
        inside = inside & (c >= 0) & (c < extent)
        cell = cell * extent + c
    return tl.where(inside, cell, -1)


@triton.jit(do_not_specialize=["n", "bit", "e0", "e1", "e2", "e3", "e4"])
def _flat_index_kernel(
    coords, index, word, limit, n, row_stride, stride, bit, e0, e1, e2, e3, e4,
    AXES: tl.constexpr, FLAG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = _cells(coords, row, row < n, row_stride, stride, e0, e1, e2, e3, e4, AXES)
    tl.store(index + row, cell, mask=row < n)
    if FLAG:
        real = row < real_rows(n, limit)
        note(word, bit, tl.max((real & (cell < 0)).to(tl.int32), 0) > 0)


# ------------------------------------------------------------------ moves
def scatter_rows(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Row j of ``feats`` becomes row ``index[j]``; -1 is skipped, the rest is 0.  -> [num, C]."""
    return place_rows(feats, index[:, None], (num,))[0]


def place_rows(
    feats: Tensor, coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None,
    bit: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scatter_rows` to `flat_index`, and the latter.  -> [num, C], [N] int64.

    Of rows with one cell the last is kept, as on the CPU: rows claim cells in a table from cells
    to rows, in which the maximum stays, whatever the order of the threads. What no row claimed is
    garbage there, as clearing the table would take a launch and twice its bytes: whoever reads it
    sees whether a row is the cell's.

    Two launches. Where many wide cells are occupied, the second writes each cell once, through the
    table. Elsewhere the first also clears the grid, and the second puts the last rows into it.
    """
    n, channels = feats.shape
    num, size = math.prod(extents), channels * feats.element_size()
    if n == 0 or num == 0 or channels == 0:
        return feats.new_zeros((num, channels)), flat_index(coords, extents, word, bit)
    feats, sizes, limit = feats.contiguous(), _sizes(extents), row_count(coords)
    index = torch.empty(n, dtype=torch.int64, device=feats.device)

    def claim(table: Tensor, first: int, grid: Tensor | None, begin: int, end: int) -> None:
        """Claim the cells of a table, of which ``first`` is the first, and clear chunks."""
        programs = max(cdiv(n, CLAIMS), cdiv(end - begin, CHUNKS))
        launch(
            _claim_kernel, (programs,), feats,
            coords, index, table, grid, word, limit, n, coords.stride(0), coords.stride(1), bit,
            *sizes, first, table.shape[0], begin, end,
            AXES=len(extents), FLAG=word is not None, CLAIMS=CLAIMS,
            CHUNKS=0 if grid is None else CHUNKS,
        )  # fmt: skip

    # A table is read whole; without one, rows write cells once more and read their own entries.
    if size >= TABLE_FROM and 4 * num <= n * (size + SECTOR):
        table = torch.empty(num, dtype=torch.int32, device=feats.device)
        claim(table, 0, None, 0, 0)
        return _gather(feats, table, index), index
    flat = feats.new_empty(cdiv(num * size, WIDE) * WIDE // feats.element_size())
    whole = flat.view(torch.int32)
    (source, target), width, unit = words(feats, flat)
    # Narrow rows: fewer elements per program, or there would be too few programs.
    tile = row_tile(width, unit, min(BLOCK * next_power(width), 2048))
    # Cells may be narrower than their entries: a table that is too large serves parts in turn.
    step = max(TABLE, num * size // (16 * 4) // WIDE * WIDE)
    for first in range(0, num, step):
        end = min(first + step, num)
        table = torch.empty(end - first, dtype=torch.int32, device=feats.device)
        claim(table, first, whole, first * size // WIDE, cdiv(end * size, WIDE))
        launch(
            _scatter_kernel, tile.grid(n), feats,
            source, index, table, target, n, first, end, tile.units, **tile.constants,
        )  # fmt: skip
    return flat.resize_(num, channels), index


@triton.jit(
    do_not_specialize=["n", "bit", "e0", "e1", "e2", "e3", "e4", "first", "count", "begin", "end"]
)
def _claim_kernel(
    coords, index, table, grid, word, limit, n, row_stride, stride, bit, e0, e1, e2, e3, e4,
    first, count, begin, end,
    AXES: tl.constexpr, FLAG: tl.constexpr, CLAIMS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The cell of each row; its entry in the table becomes the largest row; chunks become 0.

    A row that takes the place of a larger one of its cell puts that back, as a maximum: from then
    on the entry cannot fall below it, unless another takes its place, which does the same. So the
    largest row stays at last.
    """
    program = tl.program_id(0).to(tl.int64)
    if CHUNKS > 0:  # these stores are on their way while rows wait for the table
        chunk = begin + program * CHUNKS + tl.arange(0, CHUNKS)
        at = chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(grid + at, tl.zeros([CHUNKS, 4], tl.int32), mask=(chunk < end)[:, None])
    if program * CLAIMS < n:
        row = tl.program_id(0) * CLAIMS + tl.arange(0, CLAIMS)
        cell = _cells(coords, row, row < n, row_stride, stride, e0, e1, e2, e3, e4, AXES)
        tl.store(index + row, cell, mask=row < n)
        place = cell - first
        there = (cell >= 0) & (place >= 0) & (place < count)
        before = tl.atomic_xchg(table + place, row, mask=there, sem="relaxed")
        # Garbage may be the number of a row; if that has the same cell, it counts anyway.
        larger = there & (before > row) & (before < n)
        rival = _cells(coords, before, larger, row_stride, stride, e0, e1, e2, e3, e4, AXES)
        tl.atomic_max(table + place, before, mask=larger & (rival == cell), sem="relaxed")
        if FLAG:
            real = row < real_rows(n, limit)
            note(word, bit, tl.max((real & (cell < 0)).to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=["n", "first", "end", "units"])
def _scatter_kernel(
    source, index, table, out, n, first, end, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.load(index + row, mask=row < n, other=-1)
    there = (cell >= 0) & (cell >= first) & (cell < end)
    there = there & (tl.load(table + (cell - first), mask=there, other=-1) == row)
    mask = there[:, None] & (col < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    value = tl.load(source + at, mask=mask, other=0)
    tl.store(out + cell[:, None] * width + col[None, :], value, mask=mask)


def gather_rows(grid: Tensor, index: Tensor) -> Tensor:
    """Row ``index[j]`` of the cells of ``grid`` [..., C], 0 for -1.  [N] int64 -> [N, C]."""
    n, channels = index.shape[0], grid.shape[-1]
    index = index.contiguous()
    if grid.numel() == 0:
        return grid.new_zeros((n, channels))
    if grid.is_contiguous():
        return _gather(grid.view(-1, channels), index)
    axes = _joined(grid)
    if len(axes) > 2:
        return _gather(grid.contiguous().view(-1, channels), index)
    # A permuted or expanded gradient: a copy of the whole grid would cost more.
    (_, outer), (inner, stride) = ((1, 0), (1, 0), *axes)[-2:]
    out = grid.new_empty((n, channels))
    tile = row_tile(channels, grid.element_size())
    launch(
        _gather_strided_kernel, tile.grid(n), grid,
        grid, index, out, n, math.prod(grid.shape[:-1]), tile.units,
        inner, outer, stride, grid.stride(-1), **tile.constants,
    )  # fmt: skip
    return out


def _joined(grid: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading axes, those joined that one stride walks through."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(grid.shape[:-1], grid.stride()[:-1]):
        if size == 1:
            continue
        if axes and axes[-1][1] == stride * size:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def _gather(rows: Tensor, index: Tensor, owner: Tensor | None = None) -> Tensor:
    """Row ``index[j]`` of contiguous ``rows`` [M, C], 0 outside.  -> [N, C].

    With ``owner`` [M] only rows count whose owner is j.
    """
    n = index.shape[0]
    out = rows.new_empty((n, rows.shape[1]))
    (source, target), width, unit = words(rows, out)
    tile = row_tile(width, unit)
    launch(
        _gather_kernel, tile.grid(n), rows,
        source, index, owner, target, n, rows.shape[0], tile.units, **tile.constants,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "num", "units"])
def _gather_kernel(
    source, index, owner, out, n, num, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # cells can exceed 2^31
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    inside = (col < width)[None, :]
    known = (cell >= 0) & (cell < num)
    if owner is not None:
        known = known & (tl.load(owner + cell, mask=known, other=-1) == row)
    there = known[:, None] & inside
    value = tl.load(source + cell[:, None] * width + col[None, :], mask=there, other=0)
    tl.store(out + row[:, None] * width + col[None, :], value, mask=(row < n)[:, None] & inside)


@triton.jit(do_not_specialize=["n", "num", "units", "inner", "outer_stride", "inner_stride"])
def _gather_strided_kernel(
    grid, index, out, n, num, units, inner, outer_stride, inner_stride, channel_stride,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    inside = (col < width)[None, :]
    there = ((cell >= 0) & (cell < num))[:, None] & inside
    first = (cell // inner) * outer_stride + (cell % inner) * inner_stride
    at = first[:, None] + col.to(tl.int64)[None, :] * channel_stride
    value = tl.load(grid + at, mask=there, other=0)
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + at, value, mask=(row < n)[:, None] & inside)


def share_rows(rows: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """``rows[index[n]] / counts[index[n]]``, 0 for none and where the count is 0.  -> [N, C]."""
    n, (num, channels) = index.shape[0], rows.shape
    out = rows.new_empty((n, channels))
    tile = row_tile(channels, rows.element_size())
    launch(
        _share_kernel, tile.grid(n), rows,
        rows.contiguous(), index.contiguous(), counts.contiguous(), out, n, num, tile.units,
        ACC=accumulator(rows.dtype)[1], **tile.constants,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "num", "units"])
def _share_kernel(
    rows, index, counts, out, n, num, units,
    ACC: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    group = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    there = (group >= 0) & (group < num)
    count = tl.load(counts + group, mask=there, other=0).to(ACC)
    inside = (col < width)[None, :]
    mask = (there & (count != 0))[:, None] & inside
    value = tl.load(rows + group[:, None] * width + col[None, :], mask=mask, other=0).to(ACC)
    value = divide(value, tl.where(count == 0, 1, count)[:, None] + tl.zeros_like(value))
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(row < n)[:, None] & inside)


# ------------------------------------------------------------------ interpolation
def devoxelize(
    feats: Tensor, index: Tensor, weights: Tensor, word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Sum of ``weights[n, j] * feats[index[n, j]]`` over j.  -> [N, C]."""
    num, channels = feats.shape
    n, width = index.shape
    out = feats.new_empty((n, channels))
    tile = row_tile(channels, feats.element_size())
    launch(
        _devoxelize_kernel, tile.grid(n), feats,
        feats.contiguous(), index.contiguous(), weights.contiguous(), out,
        word, n, num, width, tile.units, bit,
        ACC=accumulator(feats.dtype)[1], FLAG=word is not None, **tile.constants,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "num", "neighbours", "units", "bit"])
def _devoxelize_kernel(
    feats, index, weights, out, word, n, num, neighbours, units, bit,
    ACC: tl.constexpr, FLAG: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (col < width)[None, :]
    total = tl.zeros([ROWS, COLS], ACC)
    highest = tl.full([ROWS], -1, tl.int64)
    for start in range(0, neighbours, 4):
        for k in tl.static_range(4):  # four rows are on their way at a time
            j = start + k
            here = (row < n) & (j < neighbours)
            i = tl.load(index + row * neighbours + j, mask=here, other=-1).to(tl.int64)
            highest = tl.maximum(highest, i)
            there = (i >= 0) & (i < num)
            w = tl.load(weights + row * neighbours + j, mask=there, other=0).to(ACC)
            at = i[:, None] * width + col[None, :]
            value = tl.load(feats + at, mask=there[:, None] & inside, other=0).to(ACC)
            total += w[:, None] * value
    at = row[:, None] * width + col[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < n)[:, None] & inside)
    if FLAG:
        note(word, bit, tl.max(highest, 0) >= num)


def devoxelize_weight_grad(feats: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """Dot products of ``grad[n]`` and ``feats[index[n, j]]``, 0 for none.  -> [N, J]."""
    num, channels = feats.shape
    n, width = index.shape
    dtype, acc = accumulator(feats.dtype)
    out = torch.empty((n, width), dtype=dtype, device=feats.device)
    tile = row_tile(channels, max(feats.element_size(), grad.element_size()), cols=64)
    launch(
        _weight_grad_kernel, (cdiv(n, tile.rows), width), feats,
        feats.contiguous(), index.contiguous(), grad.contiguous(), out, n, num, width, tile.units,
        ACC=acc, **tile.constants,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "num", "neighbours", "units"])
def _weight_grad_kernel(
    feats, index, grad, out, n, num, neighbours, units,
    ACC: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    # Neighbours fastest: the programs that share rows of the gradient run side by side.
    program = tl.program_id(0).to(tl.int64) + tl.program_id(1).to(tl.int64) * tl.num_programs(0)
    row = program // neighbours * ROWS + tl.arange(0, ROWS)
    at = row * neighbours + program % neighbours
    i = tl.load(index + at, mask=row < n, other=-1).to(tl.int64)
    there = (i >= 0) & (i < num)
    total = tl.zeros([ROWS, COLS], ACC)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        mask = there[:, None] & (col < width)[None, :]
        g = tl.load(grad + row[:, None] * width + col[None, :], mask=mask, other=0)
        f = tl.load(feats + i[:, None] * width + col[None, :], mask=mask, other=0)
        total += g.to(ACC) * f.to(ACC)
    tl.store(out + at, tl.sum(total, 1), mask=row < n)


def trilinear_weights(points: Tensor, scale: float) -> Tensor:
    """Shares of the 8 corners of each point's cell, corner 4 jx + 2 jy + jz.  [N, 3] -> [N, 8]."""
    n = points.shape[0]
    out = points.new_empty((n, 8))
    launch(
        _trilinear_kernel, (cdiv(n, BLOCK // 8),), points,
        points, out, n, points.stride(0), points.stride(1), float(scale), ROWS=BLOCK // 8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n"])
def _trilinear_kernel(points, out, n, row_stride, stride, scale: tl.float64, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    corner = tl.arange(0, 8)
    share = tl.full([ROWS, 8], 1, points.dtype.element_ty)
    edge = tl.full([ROWS], scale, points.dtype.element_ty)
    for axis in tl.static_range(3):
        at = row.to(tl.int64) * row_stride + axis * stride
        c = tl.load(points + at, mask=row < n, other=0)
        upper = divide(c - tl.floor(divide(c, edge)) * edge, edge)
        far = ((corner >> (2 - axis)) & 1)[None, :] != 0
        share *= tl.where(far, upper[:, None], 1 - upper[:, None])
    at = row.to(tl.int64)[:, None] * 8 + corner[None, :]
    tl.store(out + at, share, mask=(row < n)[:, None])
