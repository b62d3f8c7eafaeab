"""Points to voxel coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchsparse._ops.voxels import group_points
from torchsparse.utils.collate import as_tensor

__all__ = ["cell_size", "ravel_hash", "sparse_quantize"]


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
    groups = group_points(points, cell_size(voxel_size, 3))
    results = [groups.coords]
    if return_index:
        results.append(groups.first)
    if return_inverse:
        results.append(groups.inverse)
    if not is_tensor:
        results = [result.numpy() for result in results]
    return results[0] if len(results) == 1 else results


def cell_size(value: Any, ndim: int) -> tuple[float, ...]:
    """A voxel size as ``ndim`` numbers.

    Raises:
        ValueError: Not one or ``ndim`` positive numbers.
    """
    sizes = np.asarray(value.tolist() if isinstance(value, Tensor) else value, dtype=np.float64)
    fits = sizes.shape in ((), (1,), (ndim,))
    if not fits or not (np.isfinite(sizes) & (sizes > 0)).all():
        many = "three" if ndim == 3 else str(ndim)
        raise ValueError(f"`voxel_size` must be one positive number or {many}, got {value}")
    return tuple(np.broadcast_to(sizes, ndim).tolist())


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
