"""Building maps from coordinates: one function per operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._geometry import Geometry
from torchsparse._ops.dispatch import twin

__all__ = [
    "build_index",
    "check_sites",
    "find_taps",
    "generative_sites",
    "invert_taps",
    "strided_sites",
]

Bounds = tuple[int | None, ...]


def build_index(coords: Tensor, reach: tuple[int, ...]) -> Any:
    """A search structure over coordinate rows; equal rows are complained about.

    Args:
        coords: [N, 1 + D] int32.
        reach: D ints, how far searches will leave the coordinates' bounding box.

    Returns:
        A record with ``margin``: D ints, at least ``reach``. The rest is the implementation's.

    Raises:
        ValueError: The widened box has 2^62 cells or more.
    """
    return twin("coords", coords).build_index(coords, reach)


def check_sites(index: Any, spatial_range: tuple[int, ...] | None, allow_negative: bool) -> None:
    """Complain about coordinates outside the range that holds for them.

    Args:
        index: Of the coordinates.
        spatial_range: (B, X, Y, ...), or None if unbounded.
        allow_negative: Whether axes may have negative coordinates; batch indices may not.
    """
    twin("coords", index.keys).check_sites(index, spatial_range, allow_negative)


def find_taps(index: Any, coarse: Tensor | None, geometry: Geometry) -> tuple[Tensor, Any]:
    """Rows of the fine sites under every tap of every coarse site.

    Args:
        index: Over the fine sites, with a margin of at least ``geometry.reach``.
        coarse: [M, 1 + D] int32; None for the submanifold relation, where they are the fine ones.
        geometry: Its K taps.

    Returns:
        [K, M] int32, -1 where no fine site is; [M] sort keys of the coarse sites, for
        implementations that compute them on the way.
    """
    return twin("coords", index.keys).find_taps(index, coarse, geometry)


def invert_taps(neighbors: Tensor, num_inputs: int, geometry: Geometry) -> tuple[Tensor, Any]:
    """The same pairs seen from the inputs: result[k, neighbors[k, m]] = m.

    Args:
        neighbors: [K, M] int32; each input meets a tap at most once.
        num_inputs: N.
        geometry: Of the taps.

    Returns:
        [K, N] int32, -1 = none; [N] sort keys of the inputs or None.
    """
    return twin("coords", neighbors).invert_taps(neighbors, num_inputs, geometry)


def strided_sites(
    index: Any, coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds | None
) -> tuple[Tensor, Any]:
    """All coarse sites that some tap ties to a fine site.

    Args:
        index: Of the fine sites.
        coords: Fine sites, [N, 1 + D] int32.
        geometry: The relation.
        lower, upper: Inclusive bounds of the coarse coordinates per axis; None for an axis =
            unbounded, None for ``upper`` = TorchSparse 2.1's, from the batch's largest
            coordinates.

    Returns:
        [M, 1 + D] int32 in lexicographic order, and their index.

    Raises:
        ValueError: Sites outside int32, or in a box of 2^62 cells or more.
    """
    return twin("coords", coords).strided_sites(index, coords, geometry, lower, upper)


def generative_sites(
    index: Any, coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds
) -> tuple[Tensor, Any]:
    """All fine sites that some tap ties to a coarse site; else as `strided_sites`."""
    return twin("coords", coords).generative_sites(index, coords, geometry, lower, upper)
