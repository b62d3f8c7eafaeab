"""The tables of several maps, one after another: nothing is gained by building them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchsparse._asked import Asked, Made
from torchsparse._geometry import Geometry
from torchsparse._reference.coords import find_taps, invert_taps

__all__ = ["build_together", "together"]


def together(geometry: Geometry, layout: Any, rows: int) -> bool:
    """Whether a map gains from being built together with others."""
    return False


def build_together(asked: Sequence[Asked]) -> list[Made]:
    """The tables of each; plans depend on channels, which nobody told."""
    made = []
    for index, coarse, geometry, _, back in asked:
        neighbors, _ = find_taps(index, coarse, geometry)
        inverse = None
        if back is not None:
            inverse, _ = invert_taps(neighbors, index.keys.shape[0], geometry)
        made.append(Made(neighbors, None, inverse, None))
    return made
