"""Building maps from coordinates: one function per operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._geometry import Geometry
from torchsparse._ops.dispatch import twin

__all__ = [
    "build_index",
    "find_taps",
    "generative_sites",
    "has_duplicates",
    "invert_taps",
    "strided_sites",
    "unique_rows",
]

Bounds = tuple[int | None, ...]


def build_index(coords: Tensor, reach: tuple[int, ...]) -> Any:
    """A search structure over coordinate rows.

    Args:
        coords: [N, 1 + D] int32.
        reach: D ints, how far searches will leave the coordinates' bounding box.

    Returns:
        A record with ``lower``, ``upper`` ([1 + D] int64, of the coordinates), ``margin`` (D ints,
        at least ``reach``) and ``rows`` ([N] int32, the row at each position; None: they are
        equal). The rest is the implementation's.

    Raises:
        ValueError: The widened box has 2^62 cells or more.
    """
    return twin("coords", coords).build_index(coords, reach)


def has_duplicates(index: Any) -> Tensor:
    """[] bool: two rows of the indexed coordinates are equal."""
    return twin("coords", index.keys).has_duplicates(index)


def find_taps(index: Any, coarse: Tensor | None, geometry: Geometry) -> Tensor:
    """Positions of the fine sites under every tap of every coarse site.

    Args:
        index: Over the fine sites, with a margin of at least ``geometry.reach``. A position is a
            place in its order.
        coarse: [M, 1 + D] int32; None for the submanifold relation, where coarse positions are
            fine positions.
        geometry: Its K taps.

    Returns:
        [K, M] int32, -1 where no fine site is.
    """
    return twin("coords", index.keys).find_taps(index, coarse, geometry)


def invert_taps(neighbors: Tensor, num_inputs: int) -> Tensor:
    """The same pairs seen from the inputs: result[k, neighbors[k, m]] = m; [K, num_inputs]."""
    return twin("coords", neighbors).invert_taps(neighbors, num_inputs)


def strided_sites(
    coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds
) -> tuple[Tensor, Any]:
    """All coarse sites that some tap ties to a fine site.

    Args:
        coords: Fine sites, [N, 1 + D] int32.
        geometry: The relation.
        lower, upper: Inclusive bounds of the coarse coordinates per axis; None = unbounded.

    Returns:
        [M, 1 + D] int32 in lexicographic order, and their index.

    Raises:
        ValueError: Sites outside int32, or in a box of 2^62 cells or more.
    """
    return twin("coords", coords).strided_sites(coords, geometry, lower, upper)


def generative_sites(
    coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds
) -> tuple[Tensor, Any]:
    """All fine sites that some tap ties to a coarse site; else as `strided_sites`."""
    return twin("coords", coords).generative_sites(coords, geometry, lower, upper)


def unique_rows(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct coordinate rows, and which of them each given row is. Waits for the device.

    Args:
        coords: [N, A] integers.

    Returns:
        [M, A] int32 in lexicographic order; [N] int64.

    Raises:
        ValueError: The bounding box has 2^62 cells or more.
    """
    return twin("coords", coords).unique_rows(coords)
