"""Points by voxel, as kernels: one sort, and one wait for the number of voxels."""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._flags import flag_word, raise_found
from torchsparse._groups import VoxelGroups
from torchsparse._keys import MAX_CELLS
from torchsparse._triton.launch import cdiv, launch
from torchsparse._triton.rows import divide

__all__ = ["VoxelGroups", "group_points"]

BLOCK = 1024  # points of a program
MAX_AXES = 4  # voxel sizes that the kernels know
NUMBERS = frozenset(
    {
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    }
)  # fmt: skip
INT_MIN, INT_MAX = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
# What the host waits for, as int64 that begin at zero: whether a cell is outside int32, the number
# of voxels minus 1, earlier complaints; for each column INT_MAX - lower and upper - INT_MIN, which
# are maxima; numbers that ride along, as the bits of float64.
BOUNDS = tl.constexpr(3)


def group_points(
    points: Tensor, voxel_size: tuple[float, ...], batch: Tensor | None, also: Tensor | None
) -> tuple[VoxelGroups, list[float]] | None:
    """Bring the points of each cell ``floor(point / voxel_size)`` together.

    Args:
        points: [N, D] numbers, divided in float64.
        voxel_size: D numbers.
        batch: [N] integers, the first column of the cells; None = no such column.
        also: [J] numbers to be read while waiting for the number of voxels.

    Returns:
        The groups, with A = D, or 1 + D columns with a batch; ``also``, rounded to float64. None
        for what is left to the reference: no points, many axes, rare dtypes, boxes of 2^62 cells,
        to say what is wrong with cells that are not finite or outside int32, and while kernels
        are compiled ahead.
    """
    n, axes = points.shape
    dtypes = {points.dtype} if batch is None else {points.dtype, batch.dtype}
    if n == 0 or not 0 < axes <= MAX_AXES or not dtypes <= NUMBERS:
        return None
    columns = axes + (batch is not None)
    integers = BOUNDS.value + 2 * columns
    width = integers + (0 if also is None else also.shape[0])
    found = torch.zeros(width, dtype=torch.int64, device=points.device)
    if also is not None:
        found[integers:].view(torch.float64).copy_(also)
    keys = torch.empty(n, dtype=torch.int64, device=points.device)
    blocks = (cdiv(n, BLOCK),)
    for target in (None, keys):
        launch(
            _cells_kernel, blocks, points,
            found, target, points, batch, n, points.stride(0), points.stride(1),
            0 if batch is None else batch.stride(0),
            *map(float, voxel_size), *(1.0,) * (MAX_AXES - axes),
            AXES=axes, BLOCK=BLOCK,
        )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    tallies = torch.empty(blocks, dtype=torch.int64, device=points.device)
    word = flag_word(points.device)
    launch(_changes_kernel, blocks, points, keys, tallies, found, word, n, BLOCK=BLOCK)
    ends = tallies.cumsum(0)
    host = found.cpu()  # the one synchronisation
    outside, changes, complaints, *bounds = host[:integers].tolist()
    if complaints and word is not None:
        word.zero_()
        raise_found(complaints, points.device)
    num = changes + 1
    coords = torch.empty((num, columns), dtype=torch.int32, device=points.device)
    starts = torch.empty(num + 2, dtype=torch.int64, device=points.device)
    inverse = torch.empty_like(order)
    launch(
        _voxels_kernel, blocks, points,
        keys, order, ends, found, coords, starts, inverse, n, num, COLUMNS=columns, BLOCK=BLOCK,
    )  # fmt: skip
    most = INT_MAX.value - INT_MIN.value
    cells = math.prod(low + high - most + 1 for low, high in zip(bounds[::2], bounds[1::2]))
    # While kernels are compiled ahead nothing runs: bounds of zero give nonsense, which is not in
    # this range. Others read memory by what they get here, so it must be right even then.
    if outside or not 0 < cells < MAX_CELLS[torch.int64]:
        return None
    read = host[integers:].view(torch.float64).tolist()
    return VoxelGroups(coords, order, starts, inverse), read


@triton.jit
def _points_here(n, BLOCK: tl.constexpr):
    """The points of this program, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, row < n


@triton.jit
def _box(found, COLUMN: tl.constexpr):
    """Lower bound and extent of one column of the cells."""
    lower = INT_MAX - tl.load(found + BOUNDS + 2 * COLUMN)
    upper = INT_MIN + tl.load(found + BOUNDS + 2 * COLUMN + 1)
    return lower, upper - lower + 1


@triton.jit
def _changed(keys, row, here):
    """Sorted keys, and which of them differ from the one before."""
    key = tl.load(keys + row, mask=here, other=0)
    behind = here & (row > 0)
    before = tl.load(keys + row - 1, mask=behind, other=0)
    return key, behind & (key != before)


@triton.jit(do_not_specialize=["n"])
def _cells_kernel(
    found, keys, points, batch, n, row_stride, stride, batch_stride,
    s0: tl.float64, s1: tl.float64, s2: tl.float64, s3: tl.float64,
    AXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bounds of the cells of points; or, given ``keys``, the row-major numbers of the cells within
    these bounds, which are nonsense if the box is too large."""
    row, here = _points_here(n, BLOCK)
    front: tl.constexpr = 0 if batch is None else 1
    outside = row < 0
    key = tl.zeros([BLOCK], tl.int64)
    for column in tl.static_range(front + AXES):
        if column < front:
            cell = tl.load(batch + row * batch_stride, mask=here, other=0).to(tl.float64)
        else:
            if column - front == 0:
                size = tl.full([BLOCK], s0, tl.float64)
            elif column - front == 1:
                size = tl.full([BLOCK], s1, tl.float64)
            elif column - front == 2:
                size = tl.full([BLOCK], s2, tl.float64)
            else:
                size = tl.full([BLOCK], s3, tl.float64)
            at = row * row_stride + (column - front) * stride
            value = tl.load(points + at, mask=here, other=0).to(tl.float64)
            cell = tl.floor(divide(value, size))
        fits = (cell >= -2147483648.0) & (cell < 2147483648.0)  # NaN: False
        cell = tl.where(fits, cell, 0.0).to(tl.int64)
        if keys is None:
            outside = outside | (here & (fits == 0))
            low = tl.max(tl.where(here, INT_MAX - cell, 0), 0)
            high = tl.max(tl.where(here, cell - INT_MIN, 0), 0)
            tl.atomic_max(found + BOUNDS + 2 * column, low, sem="relaxed")
            tl.atomic_max(found + BOUNDS + 2 * column + 1, high, sem="relaxed")
        else:
            lower, extent = _box(found, column)
            key = key * extent + (cell - lower)
    if keys is None:
        if tl.max(outside.to(tl.int32), 0) > 0:
            tl.store(found, tl.full([], 1, tl.int64))
    else:
        tl.store(keys + row, key, mask=here)


@triton.jit(do_not_specialize=["n"])
def _changes_kernel(keys, tallies, found, word, n, BLOCK: tl.constexpr):
    """How many keys differ from the one before, in each block and in all."""
    row, here = _points_here(n, BLOCK)
    _, new = _changed(keys, row, here)
    many = tl.sum(new.to(tl.int32), 0).to(tl.int64)
    tl.store(tallies + tl.program_id(0), many)
    tl.atomic_add(found + 1, many, sem="relaxed")
    if word is not None:
        if tl.program_id(0) == 0:
            tl.store(found + 2, tl.load(word))


@triton.jit(do_not_specialize=["n", "num"])
def _voxels_kernel(
    keys, order, ends, found, coords, starts, inverse, n, num,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The voxel of each point; the first one of a voxel writes its coordinates and its start."""
    block = tl.program_id(0)
    row, here = _points_here(n, BLOCK)
    key, new = _changed(keys, row, here)
    before = tl.load(ends + block - 1, mask=block > 0, other=0)
    voxel = before + tl.cumsum(new.to(tl.int32), 0)
    tl.store(inverse + tl.load(order + row, mask=here, other=0), voxel, mask=here)
    first = new | (row == 0)
    tl.store(starts + voxel, row, mask=first)
    for column in tl.static_range(COLUMNS - 1, 0, -1):
        lower, extent = _box(found, column)
        rest = key // extent
        cell = lower + key - rest * extent
        tl.store(coords + voxel * COLUMNS + column, cell.to(tl.int32), mask=first)
        key = rest
    lower, _ = _box(found, 0)
    tl.store(coords + voxel * COLUMNS, (lower + key).to(tl.int32), mask=first)
    if block == 0:
        tl.store(starts + num + tl.arange(0, 2), tl.full([2], n, tl.int64))
