"""Points by voxel, in plain PyTorch: one sort, and one wait for the number of voxels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torchsparse._flags import pending_word, raise_found
from torchsparse._groups import VoxelGroups
from torchsparse._keys import MAX_CELLS
from torchsparse._reference.coords import flat_nonzero, sorted_values

__all__ = ["VoxelGroups", "group_points", "majority"]

INT32 = torch.iinfo(torch.int32)


def group_points(
    points: Tensor, voxel_size: tuple[float, ...], batch: Tensor | None
) -> VoxelGroups:
    """Bring the points of each cell ``floor(point / voxel_size)`` together.

    Args:
        points: [N, D] numbers, divided in float64.
        voxel_size: D numbers.
        batch: [N] integers, the first column of the cells; None = no such column.

    Returns:
        The groups, with A = D, or 1 + D columns with a batch.

    Raises:
        ValueError: A point that is not finite, a cell outside int32.
    """
    cells = _cells(points, voxel_size, batch)
    axes, n = cells.shape
    if n == 0:
        none = torch.zeros(0, dtype=torch.int64, device=points.device)
        coords = torch.zeros((0, axes), dtype=torch.int32, device=points.device)
        return VoxelGroups(coords, none, none.new_zeros(2), none, none)
    # One axis at a time: over two axes at once, aminmax is nine times slower on the CPU.
    bounds = torch.stack([bound for axis in cells for bound in torch.aminmax(axis)])
    order, new, rank = _ranked(_keys(cells, bounds))
    read = _read(torch.cat([bounds, rank[-1:].double()]))
    lower, upper, last = read[0 : 2 * axes : 2], read[1 : 2 * axes : 2], int(read[2 * axes])
    if not all(INT32.min <= bound <= INT32.max for bound in lower + upper):  # NaN: False
        raise ValueError(
            f"`coords` / `voxel_size` must be finite and fit into 32-bit integers, "
            f"got cells from {lower} to {upper}"
        )
    if math.prod(int(high - low) + 1 for low, high in zip(lower, upper)) >= MAX_CELLS[torch.int64]:
        order, new, rank = _ranked(_wide_keys(cells))
        last = int(rank[-1])
    starts = _starts(new, rank, last + 1)
    inverse = torch.empty_like(order).index_copy_(0, order, rank)
    first = order.index_select(0, starts[: last + 1])
    coords = torch.stack([axis.index_select(0, first).to(torch.int32) for axis in cells], 1)
    return VoxelGroups(coords, order, starts, inverse, first)


def _read(values: Tensor) -> list[float]:
    """Values of a device, waiting for it once: complaints that it noticed come along."""
    if values.device.type == "cpu":
        return values.tolist()
    word = pending_word(values.device)
    *read, found = torch.cat([values, word.double()[None]]).tolist()
    if found:
        word.zero_()
        raise_found(int(found), values.device)
    return read


def _cells(points: Tensor, voxel_size: tuple[float, ...], batch: Tensor | None) -> Tensor:
    """Floored quotients, one contiguous row per axis.  -> [A, N] float64."""
    front = 0 if batch is None else 1
    n, axes = points.shape
    cells = torch.empty((front + axes, n), dtype=torch.float64, device=points.device)
    if batch is not None:
        cells[0] = batch
    spatial = cells[front:]
    spatial.copy_(points.t())
    for axis, size in zip(spatial, voxel_size):
        # By a tensor: a GPU multiplies by the reciprocal of a number, which rounds otherwise.
        axis /= torch.full((), size, dtype=torch.float64, device=points.device)
    spatial.floor_()
    return cells


def _keys(cells: Tensor, bounds: Tensor) -> Tensor:
    """Row-major numbers of cells in their bounding box.  [A, N], [2 A] float64 -> [N] int64.

    Nonsense if the box is too large or not finite, which the caller finds out.
    """
    keys = (cells[0] - bounds[0]).to(torch.int64)
    for axis in range(1, cells.shape[0]):
        lower, upper = bounds[2 * axis], bounds[2 * axis + 1]
        keys *= (upper - lower + 1).to(torch.int64)
        keys += (cells[axis] - lower).to(torch.int64)
    return keys


def _wide_keys(cells: Tensor) -> Tensor:
    """Keys in any box: ranks among the values that occur fit two at a time."""
    keys = cells[0]
    for column in cells[1:]:
        keys = _rank_of(keys) * cells.shape[1] + _rank_of(column)
    return keys


def _rank_of(values: Tensor) -> Tensor:
    return torch.unique(values, return_inverse=True)[1]


def _ranked(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points in key order, which of them have another key than the one before, and the place of
    each one's key among the distinct keys.  3 x [N]."""
    keys, order = torch.sort(keys, stable=True)
    new = torch.zeros_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=new[1:])
    return order, new, new.cumsum(0)


def _starts(new: Tensor, rank: Tensor, num: int) -> Tensor:
    """Where each of ``num`` runs begins, and twice N.  -> [num + 2] int64."""
    n = rank.shape[0]
    if rank.device.type != "cpu":  # nonzero would wait for the device once more
        return torch.searchsorted(rank, torch.arange(num + 2, device=rank.device))
    ends = torch.tensor([n, n])
    return torch.cat([ends.new_zeros(1), flat_nonzero(new), ends])


def majority(labels: Tensor, ignored: int, groups: VoxelGroups) -> Tensor:
    """The most frequent label of each voxel, the lowest of several.

    Args:
        labels: [N] int64.
        ignored: A label that does not count.
        groups: Of N points.

    Returns:
        [M] int64; ``ignored`` for a voxel without another label.
    """
    n = labels.shape[0]
    if n == 0:
        return labels.clone()
    lowest = int(labels.min())
    spread = int(labels.max()) - lowest + 1
    if n * spread >= MAX_CELLS[torch.int64]:  # by rank among the labels that occur, N at most
        known, ranks = torch.unique(labels, return_inverse=True)
        same = (known == ignored).nonzero()
        return known[majority(ranks, int(same) if len(same) else -1, groups)]
    # Half the bytes where they will do.
    dtype = torch.int32 if n * spread < 2**31 else torch.int64
    voxel = groups.inverse.index_select(0, groups.order)
    first = voxel.to(dtype) * spread  # of the places of a voxel's labels
    place = (labels - lowest).to(dtype).index_select(0, groups.order)
    # Equal labels of a voxel side by side; the last of a run knows how many they are.
    runs = sorted_values(first + place)
    numbers = torch.arange(n, dtype=dtype, device=labels.device)
    begin = numbers.clone()
    begin[1:].masked_fill_(runs[1:] == runs[:-1], 0)
    count = numbers - begin.cummax(0)[0] + 1
    place = runs - first
    score = count * spread + (spread - 1 - place)  # more votes first, then the lower label
    if lowest <= ignored < lowest + spread:
        score.masked_fill_(place == ignored - lowest, -1)
    best = _highest(score, voxel, groups.starts[:-2]).to(torch.int64)
    return torch.where(best < 0, ignored, spread - 1 - best % spread + lowest)


def _highest(score: Tensor, voxel: Tensor, starts: Tensor) -> Tensor:
    """Largest score of each voxel, which has one.  [N], [N] ascending, [M] -> [M]."""
    if score.device.type == "cpu":  # three times as fast as a scatter
        return torch.from_numpy(np.maximum.reduceat(score.numpy(), starts.numpy()))
    lowest = score.new_full(starts.shape, -1)
    return lowest.scatter_reduce_(0, voxel, score, "amax")
