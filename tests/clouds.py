"""Named clouds of voxels: (N, 4) int32 rows (b, x, y, z), distinct unless the name says so.

Every cloud is small: its answers come from a search in Python.
"""

from __future__ import annotations

import itertools
import zlib

import numpy as np
from numpy.typing import NDArray

Coords = NDArray[np.int32]

# Smallest (X, Y, Z) that holds every cloud without negative coordinates, with room to spare on
# each side of the border rules: no two axes alike, and none a multiple of 2 * 3.
ROOM = (13, 14, 15)
BATCH = 3


def rng(name: str) -> np.random.Generator:
    """Random numbers that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def scatter(name: str, rows: int, extent: tuple[int, int, int], sample: int = 0) -> Coords:
    """``rows`` distinct sites in a box, in random order."""
    grid = np.array(list(itertools.product(*(range(e) for e in extent))), np.int32)
    picked = grid[rng(name).permutation(len(grid))[:rows]]
    return np.concatenate([np.full((len(picked), 1), sample, np.int32), picked], 1)


def empty() -> Coords:
    return np.zeros((0, 4), np.int32)


def single() -> Coords:
    return np.array([[0, 4, 7, 5]], np.int32)


def origin() -> Coords:
    """One voxel whose packed key is 0."""
    return np.zeros((1, 4), np.int32)


def odd() -> Coords:
    """61 rows, one sample, no row order."""
    return scatter("odd", 61, (9, 10, 11))


def batch_gap() -> Coords:
    """Samples 0 and 2; sample 1 has no rows. The rows of the samples are mixed."""
    rows = np.concatenate([scatter("a", 45, (9, 8, 7)), scatter("b", 38, (8, 11, 9), sample=2)])
    return rows[rng("gap").permutation(len(rows))]


def negative() -> Coords:
    rows = batch_gap()
    rows[:, 1:] -= np.array([5, 4, 6], np.int32)
    return rows


def plane() -> Coords:
    """One height, half of it occupied: the shape of a road."""
    rows = scatter("plane", 60, (11, 11, 1))
    rows[:, 3] = 6
    return rows


def block() -> Coords:
    """Every site of a box: all taps are met inside."""
    rows = scatter("block", 10**6, (5, 4, 5))
    rows[:, 1:] += 3
    return rows


def duplicates() -> Coords:
    rows = odd()
    return np.concatenate([rows, rows[7:8]])


CLOUDS = {f.__name__: f for f in (empty, single, origin, odd, batch_gap, negative, plane, block)}
