"""Rows by group: the records that sums over groups of rows work from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Groups", "VoxelGroups"]


class Groups(NamedTuple):
    """Rows by group.  index = [1, 0, 1], num = 2:  order = [1, 0, 2], starts = [0, 1, 3, 3].

    The last group holds the rows that belong to none.
    """

    order: Tensor  # [N] int64, rows of group 0, then of group 1, ...; ascending within a group
    starts: Tensor  # [num + 2] int64 = [0] + cumsum(rows per group)


class VoxelGroups(NamedTuple):
    """Points by voxel.  Cells 5, 2, 5 on one axis:

    coords = [[2], [5]], order = [1, 0, 2], starts = [0, 1, 3, 3], inverse = [1, 0, 1],
    first = [1, 0].
    """

    coords: Tensor  # [M, A] int32, distinct rows in lexicographic order
    order: Tensor  # [N] int64, points of voxel 0, then of voxel 1, ...; ascending within a voxel
    starts: Tensor  # [M + 2] int64 = [0] + cumsum(points per voxel) + [N], as in `Groups`
    inverse: Tensor  # [N] int64, voxel of each point
    first: Tensor  # [M] int64, lowest point of each voxel

    def counts(self) -> Tensor:
        """Points of each voxel, [M] int64."""
        return self.starts[1:-1] - self.starts[:-2]
