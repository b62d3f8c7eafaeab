"""Rows by group: the record that sums over groups of rows work from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Groups"]


class Groups(NamedTuple):
    """Rows by group.  index = [1, 0, 1], num = 2:  order = [1, 0, 2], starts = [0, 1, 3, 3].

    The last group holds the rows that belong to none.
    """

    order: Tensor  # [N] int64, rows of group 0, then of group 1, ...; ascending within a group
    starts: Tensor  # [num + 2] int64 = [0] + cumsum(rows per group)
