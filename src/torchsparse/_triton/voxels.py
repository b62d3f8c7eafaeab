"""Points by voxel, as kernels: one sort and one wait for their number; votes by hashing."""

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
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.primitives import mix
from torchsparse._triton.rows import divide

__all__ = ["VoxelGroups", "group_points", "majority"]

BLOCK = 1024  # points of a program
SHORT = 16  # points of a voxel whose labels are compared with each other
ELECTIONS = 32  # voxels of a program that does so
VOTERS = 128  # points of one warp, which walks until the last of them has found its slot
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
# are maxima.
BOUNDS = tl.constexpr(3)


def group_points(
    points: Tensor, voxel_size: tuple[float, ...], batch: Tensor | None
) -> VoxelGroups | None:
    """Bring the points of each cell ``floor(point / voxel_size)`` together.

    Args:
        points: [N, D] numbers, divided in float64.
        voxel_size: D numbers.
        batch: [N] integers, the first column of the cells; None = no such column.

    Returns:
        The groups, with A = D, or 1 + D columns with a batch. None for what is left to the
        reference: no points, many axes, rare dtypes, boxes of 2^62 cells, to say what is wrong
        with cells that are not finite or outside int32, and while kernels are compiled ahead.
    """
    n, axes = points.shape
    dtypes = {points.dtype} if batch is None else {points.dtype, batch.dtype}
    if n == 0 or not 0 < axes <= MAX_AXES or not dtypes <= NUMBERS:
        return None
    columns = axes + (batch is not None)
    found = torch.zeros(BOUNDS.value + 2 * columns, dtype=torch.int64, device=points.device)
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
    outside, changes, complaints, *bounds = found.tolist()  # the one synchronisation
    if complaints and word is not None:
        word.zero_()
        raise_found(complaints, points.device)
    num = changes + 1
    coords = torch.empty((num, columns), dtype=torch.int32, device=points.device)
    starts = torch.empty(num + 2, dtype=torch.int64, device=points.device)
    inverse = torch.empty_like(order)
    first = torch.empty(num, dtype=torch.int64, device=points.device)
    launch(
        _voxels_kernel, blocks, points,
        keys, order, ends, found, coords, starts, inverse, first, n, num,
        COLUMNS=columns, BLOCK=BLOCK,
    )  # fmt: skip
    most = INT_MAX.value - INT_MIN.value
    cells = math.prod(low + high - most + 1 for low, high in zip(bounds[::2], bounds[1::2]))
    # While kernels are compiled ahead nothing runs: bounds of zero give nonsense, which is not in
    # this range. Others read memory by what they get here, so it must be right even then.
    if outside or not 0 < cells < MAX_CELLS[torch.int64]:
        return None
    return VoxelGroups(coords, order, starts, inverse, first)


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
    keys, order, ends, found, coords, starts, inverse, lowest, n, num,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The voxel of each point; the first one of a voxel writes its coordinates, its start and
    itself."""
    block = tl.program_id(0)
    row, here = _points_here(n, BLOCK)
    key, new = _changed(keys, row, here)
    before = tl.load(ends + block - 1, mask=block > 0, other=0)
    voxel = before + tl.cumsum(new.to(tl.int32), 0)
    point = tl.load(order + row, mask=here, other=0)
    tl.store(inverse + point, voxel, mask=here)
    first = new | (row == 0)
    tl.store(starts + voxel, row, mask=first)
    tl.store(lowest + voxel, point, mask=first)
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


# ------------------------------------------------------------------ votes
def majority(labels: Tensor, ignored: int, groups: VoxelGroups) -> Tensor:
    """The most frequent label of each voxel, the lowest of several.

    In voxels of up to SHORT points all labels are compared with all. In larger ones pairs of voxel
    and label are counted in a table with open addresses, at most half full, that holds points:
    pairs are compared where they stand, so labels may be any. Counts, their maxima and the lowest
    labels that reach them are integers, the same whoever comes first.

    Args:
        labels: [N] int64.
        ignored: A label that does not count.
        groups: Of N points.

    Returns:
        [M] int64; ``ignored`` for a voxel without another label.
    """
    n, num, device = labels.shape[0], groups.first.shape[0], labels.device
    slots = next_power(2 * n)
    # For each slot a point plus 1 and the votes of its pair, for each voxel the most votes.
    table = torch.zeros(2 * slots + num, dtype=torch.int32, device=device)
    winner = torch.empty(num, dtype=torch.int64, device=device)
    labels = labels.contiguous()
    launch(
        _vote_kernel, (cdiv(n, VOTERS),), labels,
        groups.inverse, groups.starts, labels, table, winner, ignored, n, num, slots,
        SHORT=SHORT, BLOCK=VOTERS, num_warps=1,
    )  # fmt: skip
    launch(
        _win_kernel, (cdiv(slots, BLOCK),), labels,
        groups.inverse, labels, table, winner, slots, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _elect_kernel, (cdiv(num, ELECTIONS),), labels,
        groups.order, groups.starts, labels, table, winner, ignored, num, slots,
        SHORT=SHORT, BLOCK=ELECTIONS, num_warps=1,
    )  # fmt: skip
    return winner


@triton.jit(do_not_specialize=["ignored", "n", "num", "slots"])
def _vote_kernel(
    inverse, starts, labels, table, winner, ignored, n, num, slots,
    SHORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count pairs of voxel and label in long voxels, and the most votes of each of these.

    Every count of a pair is seen by the voter who made it, the last one too.
    """
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(winner + point, tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64), mask=point < num)
    voxel = tl.load(inverse + point, mask=point < n, other=0)
    end = tl.load(starts + voxel + 1, mask=point < n, other=0)
    votes = end - tl.load(starts + voxel, mask=point < n, other=0) > SHORT
    label = tl.load(labels + point, mask=votes, other=0)
    votes = votes & (label != ignored)
    busy = votes
    slot = mix(mix(voxel) + label) & (slots - 1)
    place = slot
    while tl.max(busy.to(tl.int32), 0) > 0:
        # There is no mask: who is done compares with a number that no slot holds.
        held = tl.atomic_cas(
            table + slot, tl.where(busy, 0, -1), (point + 1).to(tl.int32), sem="relaxed"
        ) - 1  # fmt: skip
        other = busy & (held >= 0)
        same = tl.load(inverse + held, mask=other, other=-1) == voxel
        same = same & (tl.load(labels + held, mask=other, other=0) == label)
        place = tl.where(busy, slot, place)
        busy = other & (same == 0)
        slot = (slot + 1) & (slots - 1)
    count = tl.atomic_add(table + slots + place, 1, mask=votes, sem="relaxed") + 1
    tl.atomic_max(table + slots + slots + voxel, count, mask=votes, sem="relaxed")


@triton.jit(do_not_specialize=["slots"])
def _win_kernel(inverse, labels, table, winner, slots, BLOCK: tl.constexpr):
    """The lowest label of each long voxel among those with the most votes."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    point = tl.load(table + slot, mask=slot < slots, other=0) - 1
    used = point >= 0
    count = tl.load(table + slots + slot, mask=used, other=0)
    voxel = tl.load(inverse + point, mask=used, other=0)
    most = used & (tl.load(table + slots + slots + voxel, mask=used, other=0) == count)
    label = tl.load(labels + point, mask=most, other=0)
    tl.atomic_min(winner + voxel, label, mask=most, sem="relaxed")


@triton.jit(do_not_specialize=["ignored", "num", "slots"])
def _elect_kernel(
    order, starts, labels, table, winner, ignored, num, slots,
    SHORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Let short voxels vote, and give ``ignored`` to those where nobody did."""
    voxel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = voxel < num
    begin = tl.load(starts + voxel, mask=real, other=0)
    size = tl.load(starts + voxel + 1, mask=real, other=0) - begin
    short = tl.where(size > SHORT, 0, size)
    seat = tl.arange(0, SHORT)
    here = seat[None, :] < short[:, None]
    point = tl.load(order + begin[:, None] + seat[None, :], mask=here, other=0)
    label = tl.load(labels + point, mask=here, other=0)
    count = tl.zeros([BLOCK, SHORT], tl.int32)
    for k in range(tl.max(short, 0)):  # what the k-th of each voxel says
        other = tl.load(order + begin + k, mask=k < short, other=0)
        one = tl.load(labels + other, mask=k < short, other=0)
        count += ((label == one[:, None]) & (k < short)[:, None]).to(tl.int32)
    count = tl.where(here & (label != ignored), count, 0)
    most = tl.max(count, 1)
    last = tl.full([BLOCK, SHORT], 0x7FFFFFFFFFFFFFFF, tl.int64)
    lowest = tl.min(tl.where(count == most[:, None], tl.where(count > 0, label, last), last), 1)
    long = real & (size > SHORT)
    most = tl.where(long, tl.load(table + slots + slots + voxel, mask=long, other=0), most)
    lowest = tl.where(long, tl.load(winner + voxel, mask=long, other=0), lowest)
    nobody = tl.full([BLOCK], ignored, tl.int64)
    tl.store(winner + voxel, tl.where(most > 0, lowest, nobody), mask=real)
