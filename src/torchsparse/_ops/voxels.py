"""Points by voxel: the choice of implementation."""

from __future__ import annotations

from torch import Tensor

from torchsparse._groups import VoxelGroups
from torchsparse._ops.dispatch import reference, twin

__all__ = ["VoxelGroups", "group_points", "majority"]


def group_points(
    points: Tensor,
    voxel_size: tuple[float, ...],
    batch: Tensor | None = None,
) -> VoxelGroups:
    """Bring the points of each cell ``floor(point / voxel_size)`` together.

    Waits for the device once, for the number of voxels, and raises what it had noticed before.

    Args:
        points: [N, D] numbers, divided in float64.
        voxel_size: D numbers.
        batch: [N] integers, the first column of the cells; None = no such column.

    Returns:
        The groups, with coordinates of D, or 1 + D columns with a batch.

    Raises:
        ValueError: A point that is not finite, a cell outside int32.
    """
    found = twin("voxels", points).group_points(points, voxel_size, batch)
    if found is None:  # not for kernels, as this one says
        found = reference("voxels").group_points(points, voxel_size, batch)
    return found


def majority(labels: Tensor, ignored: int, groups: VoxelGroups) -> Tensor:
    """The most frequent label of each voxel, the lowest of several.

    Args:
        labels: [N] int64.
        ignored: A label that does not count.
        groups: Of N points.

    Returns:
        [M] int64; ``ignored`` for a voxel without another label.
    """
    return twin("voxels", labels).majority(labels, ignored, groups)
