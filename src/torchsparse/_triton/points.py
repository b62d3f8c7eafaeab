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
from torchsparse._triton.launch import cdiv, launch
from torchsparse._triton.primitives import real_rows
from torchsparse._triton.rows import accumulator, divide, note, row_tile, words

__all__ = [
    "devoxelize",
    "devoxelize_weight_grad",
    "flat_index",
    "gather_rows",
    "scatter_rows",
    "share_rows",
    "trilinear_weights",
]

BLOCK = 256  # rows of kernels without channels
MAX_AXES = 5  # columns that the kernel of `flat_index` knows
# Cells of a grid from this size on (bytes) may be written through a table from cells to rows.
TABLE_FROM = 64
CLAIM = 64  # bytes that move when a row claims its cell: a sector of memory there and back


# ------------------------------------------------------------------ cells
def flat_index(
    coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Row-major cell of each coordinate row; -1 outside and for padding.

    [N, A], A extents -> [N] int64.
    """
    n, axes = coords.shape[0], len(extents)
    index = torch.empty(n, dtype=torch.int64, device=coords.device)
    if axes > MAX_AXES:
        raise ValueError(f"coordinates of at most {MAX_AXES} columns are supported, got {axes}")
    sizes = (*extents, *(1,) * (MAX_AXES - axes))
    launch(
        _flat_index_kernel, (cdiv(n, BLOCK),), coords,
        coords, index, word, row_count(coords), n, coords.stride(0), coords.stride(1), bit, *sizes,
        AXES=axes, FLAG=word is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return index


@triton.jit(do_not_specialize=["n", "bit", "e0", "e1", "e2", "e3", "e4"])
def _flat_index_kernel(
    coords, index, word, limit, n, row_stride, stride, bit, e0, e1, e2, e3, e4,
    AXES: tl.constexpr, FLAG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < n
    cell = tl.zeros([BLOCK], tl.int64)
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
    tl.store(index + row, tl.where(inside, cell, -1), mask=here)
    if FLAG:
        real = row < real_rows(n, limit)
        note(word, bit, tl.max((real & (inside == 0)).to(tl.int32), 0) > 0)


# ------------------------------------------------------------------ moves
def scatter_rows(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Row j of ``feats`` becomes row ``index[j]``; -1 is skipped, the rest is 0.  -> [num, C].

    Of rows with one cell the last is kept, as on the CPU. A maximum over row numbers per cell
    finds it, whatever the order of the threads. Wide cells may have a table for these maxima (4
    bytes per cell, a 16th of the grid at most), from which each cell is then written once. Where
    rows are few, or cells so narrow that the table would be as large as the grid, the maximum is
    formed inside a cleared cell, where the winner overwrites it.
    """
    n, channels = feats.shape
    size = channels * feats.element_size()
    if n == 0 or num == 0 or channels == 0:
        return feats.new_zeros((num, channels))
    feats, index = feats.contiguous(), index.contiguous()
    # A table is written and read whole; without one, rows write cells that are written already.
    if size >= TABLE_FROM and 8 * num <= n * (size + CLAIM):
        table = torch.full((num,), -1, dtype=torch.int32, device=feats.device)
        launch(_last_row_kernel, (cdiv(n, BLOCK),), feats, index, table, n, num, BLOCK=BLOCK)
        return _gather(feats, table)
    # One byte per row behind the grid, zeroed together with it: this row was not the last.
    spare = cdiv(n, size)
    out = feats.new_zeros((num + spare, channels))
    flat = out.view(-1)
    lost = flat.view(torch.uint8)[num * size : num * size + n]
    if size >= 4:
        aligned = flat[: flat.numel() * out.element_size() // 4 * 4 // out.element_size()]
        launch(
            _claim_kernel, (cdiv(n, BLOCK),), feats,
            index, aligned.view(torch.int32), lost, n, num, size // 2, BLOCK=BLOCK,
        )  # fmt: skip
    else:  # a cell of 2 bytes holds no row number
        keys, order = torch.sort(index, stable=True)
        lost.index_copy_(0, order[:-1], (keys[1:] == keys[:-1]).to(torch.uint8))
    source, target = words(feats, out)
    tile = row_tile(source.shape[1], source.element_size())
    launch(
        _scatter_kernel, tile.grid(n), feats,
        source, index, lost, target, n, num, tile.units, **tile.constants,
    )  # fmt: skip
    return out.resize_(num, channels)


@triton.jit(do_not_specialize=["n", "num"])
def _last_row_kernel(index, table, n, num, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    tl.atomic_max(table + cell, row, mask=(cell >= 0) & (cell < num), sem="relaxed")


@triton.jit(do_not_specialize=["n", "num", "halves"])
def _claim_kernel(index, grid, lost, n, num, halves, BLOCK: tl.constexpr):
    """Each cell's first aligned word becomes the largest row number + 1; the others are marked.

    A row learns that it lost either from a larger number already there, or is told by the larger
    number that displaces it.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    there = (cell >= 0) & (cell < num)
    word = grid + (cell * halves + 1) // 2
    before = tl.atomic_max(word, row + 1, mask=there, sem="relaxed") - 1
    beaten = tl.minimum(before, row)
    tl.store(lost + beaten, (beaten >= 0).to(tl.uint8), mask=there & (before >= 0))


@triton.jit(do_not_specialize=["n", "num", "units"])
def _scatter_kernel(
    source, index, lost, out, n, num, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    there = (cell >= 0) & (cell < num)
    there = there & (tl.load(lost + row, mask=there, other=1) == 0)
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


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Row ``index[j]`` of contiguous ``rows`` [M, C], 0 outside.  -> [N, C]."""
    n = index.shape[0]
    out = rows.new_empty((n, rows.shape[1]))
    source, target = words(rows, out)
    tile = row_tile(source.shape[1], source.element_size())
    launch(
        _gather_kernel, tile.grid(n), rows,
        source, index, target, n, rows.shape[0], tile.units, **tile.constants,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "num", "units"])
def _gather_kernel(
    source, index, out, n, num, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # cells can exceed 2^31
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.load(index + row, mask=row < n, other=-1).to(tl.int64)
    inside = (col < width)[None, :]
    there = ((cell >= 0) & (cell < num))[:, None] & inside
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
