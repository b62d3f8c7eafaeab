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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "PAD",
    "Found",
    "Growth",
    "Planned",
    "Room",
    "expected_rows",
    "growing",
    "growth",
    "mark_rows",
    "rounded",
    "row_count",
]

PAD = -(2**31)  # in all columns of a padding row
STEP = 128  # rows of capacities are a multiple of it
# The share of a padded level that is usually real: there is room for 1.15 times what was seen, of
# an input that fills 0.8 to all of its bucket (`_graphs`).
FILLED = 0.8


def mark_rows(coords: Tensor, count: Tensor) -> None:
    """Note that only the first ``count`` ([1] int64 on the device) rows of coordinates are real.

    The note belongs to this very tensor. Without it padding is told by PAD alone.
    """
    coords._torchsparse_rows = count  # pyright: ignore[reportAttributeAccessIssue]


def row_count(coords: Tensor) -> Tensor | None:
    """What `mark_rows` noted, or None: all rows are real."""
    return getattr(coords, "_torchsparse_rows", None)


def expected_rows(rows: int, count: Tensor | None) -> int:
    """About how many of so many rows are real, where ``count`` as from `row_count` is not read."""
    return rows if count is None else int(rows * FILLED)


def rounded(rows: int) -> int:
    """The next multiple of STEP, at least one."""
    return max(-(-rows // STEP), 1) * STEP


class Room(NamedTuple):
    """What is planned for a level."""

    rows: int | None  # None: for as many as there can be
    narrow: bool = False  # its keys fit into 32 bits


class Planned(NamedTuple):
    """What a level gets."""

    rows: int
    narrow: bool


class Found(NamedTuple):
    """A level that a layer created."""

    sites: int
    cells: int  # possible keys in its bounding box
    each: int  # sites that one of the input's can create


class Growth:
    """Sizes of the levels that the layers of a network create, in the order of their creation.

    Args:
        rooms: What is planned for each, or None to note sizes.
        rows: Of the network's input.
        guess: Plan for a pass in which nothing is launched: any number of levels, none of them
            larger than the input if ``rows`` says how large that is, none marked as padded.

    Attributes:
        levels: Noted: what each level was found to be.
        rooms: As given.
        given: Rows that each level got, all different, and not those of the input.
        infos: [4] int64 on the device for each level: its sites, those lost for lack of slots, and
            at last its cells.
        wishes: Noted or given: which maps the network asks for (`nn.functional.conv.ahead`).
        complete: Called when the last of the planned levels was created.
    """

    def __init__(
        self, rooms: list[Room] | None = None, guess: bool = False, rows: int = 0
    ) -> None:
        self.levels: list[Found] = []
        self.rooms = rooms
        self.rows = rows
        self.guess = guess
        self.given: list[int] = []
        self.infos: list[Tensor] = []
        self.wishes: Any = None
        self.complete: Callable[[], None] = lambda: None

    @property
    def padded(self) -> bool:
        """Whether sizes are planned, so that nobody need wait for them."""
        return self.guess or self.rooms is not None

    def note(self, sites: int, cells: int, each: int) -> None:
        """A layer created a level."""
        self.levels.append(Found(sites, cells, each))

    def created(self, info: Tensor) -> None:
        """A level was created in planned rows; what is known of it, as in ``infos``."""
        self.infos.append(info)
        if self.rooms is not None and len(self.infos) == len(self.rooms):
            self.complete()

    def plan(self, most: int) -> Planned:
        """What the next level gets, of ``most`` sites at most.

        Raises:
            RuntimeError: The network creates more levels than in the pass before.
        """
        if self.guess:
            return Planned(rounded(min(most, self.rows) if self.rows else most), True)
        if self.rooms is None or len(self.given) == len(self.rooms):
            raise RuntimeError(
                "the network creates other levels than before: what it computes must not depend "
                "on the data"
            )
        room = self.rooms[len(self.given)]
        rows = rounded(most) if room.rows is None else room.rows
        while rows == self.rows or rows in self.given:
            rows += STEP
        self.given.append(rows)
        return Planned(rows, room.narrow)


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
