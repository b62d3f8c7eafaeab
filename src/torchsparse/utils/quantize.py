"""Points to voxel coordinates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsparse._flags import raise_pending
from torchsparse._keys import MAX_CELLS, fit_layout, pack
from torchsparse.utils.collate import as_tensor

__all__ = ["ravel_hash", "sparse_quantize"]

INT32 = torch.iinfo(torch.int32)


def sparse_quantize(
    coords: Any,
    voxel_size: Any = 1,
    *,
    return_index: bool = False,
    return_inverse: bool = False,
) -> Any:
    """The voxels that hold points: unique rows of ``floor(coords / voxel_size)``.

    Args:
        coords: [N, 3] array or tensor of numbers.
        voxel_size: A number, or three, in the unit of ``coords``.
        return_index: Also return, for each voxel, its first point.
        return_inverse: Also return, for each point, its voxel.

    Returns:
        Voxels [M, 3] int32, sorted by (x, y, z); on request index [M] int64 and inverse [N]
        int64. One result alone, several as a list; tensors on their device for a tensor, arrays
        otherwise. The division is in float64.

    Raises:
        ValueError: Another shape, a voxel size that is not 1 or 3 positive numbers, NaN, Inf, a
            voxel that does not fit into int32.
    """
    is_tensor = isinstance(coords, Tensor)
    points = coords.detach() if is_tensor else as_tensor(coords)
    if points.dim() != 2 or points.shape[1] != 3:
        raise ValueError(f"`coords` must have shape [N, 3], got {list(points.shape)}")
    cells, lower, upper = _cells(points, _voxel_size(voxel_size))
    raise_pending(points.device)  # reading the bounds has waited for the device
    keys, order = torch.sort(_keys(cells, lower, upper), stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=first[1:])
    index = order[first]
    results = [cells.t().to(torch.int32).contiguous().index_select(0, index)]
    if return_index:
        results.append(index)
    if return_inverse:
        results.append(torch.empty_like(order).index_copy_(0, order, first.cumsum(0) - 1))
    if not is_tensor:
        results = [result.numpy() for result in results]
    return results[0] if len(results) == 1 else results


def _voxel_size(value: Any) -> tuple[float, float, float]:
    sizes = np.asarray(value.tolist() if isinstance(value, Tensor) else value, dtype=np.float64)
    if sizes.shape not in ((), (1,), (3,)) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"`voxel_size` must be one positive number or three, got {value}")
    x, y, z = np.broadcast_to(sizes, 3).tolist()
    return x, y, z


def _cells(
    points: Tensor, voxel_size: tuple[float, float, float]
) -> tuple[Tensor, list[int], list[int]]:
    """Floored quotients, one contiguous row per axis, with their bounds.

    Returns:
        [3, N] int64, and the smallest and largest value of each row.
    """
    scaled = torch.empty((3, points.shape[0]), dtype=torch.float64, device=points.device)
    scaled.copy_(points.t())
    for axis, size in zip(scaled, voxel_size):
        # By a tensor: a GPU multiplies by the reciprocal of a number, which rounds otherwise.
        axis /= torch.full((), size, dtype=torch.float64, device=points.device)
    scaled.floor_()
    if points.shape[0] == 0:
        return scaled.to(torch.int64), [0, 0, 0], [0, 0, 0]
    # One axis at a time: over two axes at once, aminmax is nine times slower on the CPU.
    bounds = torch.stack([torch.stack(torch.aminmax(axis)) for axis in scaled])
    lower, upper = bounds.t().tolist()
    if not all(INT32.min <= bound <= INT32.max for bound in lower + upper):  # NaN: False
        raise ValueError(
            f"`coords` / `voxel_size` must be finite and fit into 32-bit integers, "
            f"got cells from {lower} to {upper}"
        )
    return scaled.to(torch.int64), [int(c) for c in lower], [int(c) for c in upper]


def _keys(cells: Tensor, lower: list[int], upper: list[int]) -> Tensor:
    """Integers in the lexicographic order of the columns of ``cells`` [3, N].  -> [N]."""
    if math.prod(high - low + 1 for low, high in zip(lower, upper)) < MAX_CELLS[torch.int64]:
        bounds = torch.tensor([lower, upper])  # on the CPU: nothing waits for a GPU
        return pack(cells.t(), fit_layout(bounds[0], bounds[1]))
    # A box too wide for one number: ranks among the values that occur fit two at a time.
    keys = cells[0]
    for column in cells[1:]:
        keys = _rank(keys) * cells.shape[1] + _rank(column)
    return keys


def _rank(values: Tensor) -> Tensor:
    return torch.unique(values, return_inverse=True)[1]


def ravel_hash(x: NDArray[Any]) -> NDArray[np.uint64]:
    """Row-major number of each row within the bounding box of all rows.

    Args:
        x: [N, D] integers.

    Returns:
        [N] uint64; rows are equal iff their numbers are, while the box has fewer than 2^64 cells.

    Raises:
        ValueError: Another shape.
    """
    x = np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"`x` must have shape [N, D], got {list(x.shape)}")
    keys = np.zeros(x.shape[0], dtype=np.uint64)
    if x.size == 0:
        return keys
    # Differences of 64-bit integers wrap around to the right unsigned number.
    x = x.astype(np.uint64) - x.min(axis=0).astype(np.uint64)
    for column, extent in zip(x.T, x.max(axis=0) + np.uint64(1)):
        keys *= extent
        keys += column
    return keys
