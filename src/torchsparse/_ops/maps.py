"""Tables and plans of several maps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchsparse._asked import Asked, Made
from torchsparse._capacity import expected_rows, row_count
from torchsparse._geometry import Geometry
from torchsparse._ops.conv import Planned, choose
from torchsparse._ops.dispatch import reference, twin
from torchsparse._recipe import ConvRecipe

__all__ = ["build_together", "layout_together"]


def layout_together(
    coords: Tensor, geometry: Geometry, recipe: ConvRecipe, backward: bool
) -> Any | None:
    """The layout of a plan, if its map gains from being built together with others.

    Args:
        coords: [M, 1 + D], the rows of the table.
        geometry: Of the taps.
        recipe, backward: As in `_ops.conv.plan_key`.
    """
    chosen = choose(coords, recipe)
    if chosen is reference("conv"):
        return None
    rows = coords.shape[0]
    expected = expected_rows(rows, row_count(coords))
    layout = chosen.choose_layout(expected, geometry, recipe, backward)
    return layout if twin("maps", coords).together(geometry, layout, rows) else None


def build_together(asked: Sequence[Asked]) -> list[Made]:
    """What `find_taps`, `invert_taps` and the makers of plans in `plan_key` would make.

    Args:
        asked: With layouts from `layout_together`, on one device; at most 16.
    """
    coords = asked[0].index.layout
    made = twin("maps", coords).build_together(asked)
    chosen = twin("conv", coords)
    return [
        Made(
            neighbors,
            Planned(chosen, plan, True),
            inverse,
            None if back is None else Planned(chosen, back, True),
        )
        for neighbors, plan, inverse, back in made
    ]
