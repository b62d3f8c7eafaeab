"""Levels with more rows than voxels, so that shapes do not depend on the data.

A CUDA graph replays launches of fixed sizes. A network is captured on padded coordinates: rows
behind the real ones hold PAD, belong to no voxel and meet no kernel tap, and what is computed for
them is never read by a real row. How many rows are real is known on the device alone; kernels
that are told skip the rest.

`Growth` watches the levels that layers create: in a first, ordinary pass it notes their sizes,
later it says how many rows each has room for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["PAD", "Growth", "growing", "growth", "mark_rows", "row_count"]

PAD = -(2**31)  # in all columns of a padding row
STEP = 128  # rows of capacities are a multiple of it


def mark_rows(coords: Tensor, count: Tensor) -> None:
    """Note that only the first ``count`` ([1] int64 on the device) rows of coordinates are real.

    The note belongs to this very tensor. Without it padding is told by PAD alone.
    """
    coords._torchsparse_rows = count  # pyright: ignore[reportAttributeAccessIssue]


def row_count(coords: Tensor) -> Tensor | None:
    """What `mark_rows` noted, or None: all rows are real."""
    return getattr(coords, "_torchsparse_rows", None)


def rounded(rows: int) -> int:
    """The next multiple of STEP, at least one."""
    return max(-(-rows // STEP), 1) * STEP


class Growth:
    """Sizes of the levels that the layers of a network create, in the order of their creation.

    Args:
        rooms: Rows planned for each, or None to note sizes.

    Attributes:
        counts: Sizes noted.
        each: How many sites one input site can create at most, of each level.
        rooms: As given.
        infos: Of a padded pass, [4] int64 on the device for each level: its number of sites,
            and of sites lost for lack of slots.
    """

    def __init__(self, rooms: list[int] | None = None) -> None:
        self.counts: list[int] = []
        self.each: list[int] = []
        self.rooms = rooms
        self.infos: list[Tensor] = []
        self.given: list[int] = []

    @property
    def padded(self) -> bool:
        return self.rooms is not None

    def note(self, count: int, each: int) -> None:
        """A layer created ``count`` sites, ``each`` times its input's at most."""
        self.counts.append(count)
        self.each.append(each)

    def rows(self, info: Tensor, most: int) -> int:
        """Room for the next level, of ``most`` sites at most.

        Raises:
            RuntimeError: The network creates more levels than in the pass before.
        """
        if self.rooms is None or len(self.given) == len(self.rooms):
            raise RuntimeError(
                "the network creates other levels than before: what it computes must not depend "
                "on the data"
            )
        room = min(self.rooms[len(self.given)], rounded(most))
        self.given.append(room)
        self.infos.append(info)
        return room


class _Current(threading.local):
    growth: Growth | None = None


_current = _Current()


def growth() -> Growth | None:
    """Who watches the levels created in this thread."""
    return _current.growth


@contextmanager
def growing(watch: Growth) -> Iterator[Growth]:
    """Let ``watch`` see the levels that this thread creates."""
    before, _current.growth = _current.growth, watch
    try:
        yield watch
    finally:
        _current.growth = before
