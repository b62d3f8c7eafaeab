"""Building maps from coordinates: one function per operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._geometry import Geometry
from torchsparse._keys import KeyLayout
from torchsparse._ops.dispatch import twin

__all__ = [
    "build_index",
    "find_taps",
    "generative_keys",
    "has_duplicates",
    "index_of_keys",
    "invert_taps",
    "strided_keys",
]

Bounds = tuple[int | None, ...]


def build_index(coords: Tensor, margin: tuple[int, ...]) -> Any:
    """A search structure over coordinate rows.

    Args:
        coords: [N, 1 + D] int32.
        margin: Cells per axis by which searches may leave the coordinates' bounding box.
    """
    return twin("coords", coords).build_index(coords, margin)


def index_of_keys(keys: Tensor, layout: KeyLayout, coords: Tensor) -> Any:
    """The search structure over ``coords``, which were unpacked from ascending ``keys``."""
    return twin("coords", coords).index_of_keys(keys, layout, coords)


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


def strided_keys(
    coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds, margin: tuple[int, ...]
) -> tuple[Tensor, KeyLayout]:
    """Ascending unique keys of all coarse sites that some tap ties to a fine site.

    Args:
        coords: Fine sites, [N, 1 + D] int32.
        geometry: The relation.
        lower, upper: Inclusive bounds of the coarse coordinates per axis; None = unbounded.
        margin: Of the layout that comes back.
    """
    return twin("coords", coords).strided_keys(coords, geometry, lower, upper, margin)


def generative_keys(
    coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds, margin: tuple[int, ...]
) -> tuple[Tensor, KeyLayout]:
    """Ascending unique keys of all fine sites that some tap ties to a coarse site (as above)."""
    return twin("coords", coords).generative_keys(coords, geometry, lower, upper, margin)
