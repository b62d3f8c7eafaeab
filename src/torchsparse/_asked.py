"""What is asked for, and made, where the tables of several maps are built together."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from torchsparse._geometry import Geometry

__all__ = ["Asked", "Made"]


class Asked(NamedTuple):
    """The table of one map, laid out for products, and perhaps the same seen from its inputs."""

    index: Any  # over the fine sites: see `_ops.coords.build_index`
    coarse: Tensor | None  # [M, 1 + D] int32; None for the submanifold relation
    geometry: Geometry
    layout: Any  # of the plan: see `choose_layout` of the implementation
    back: Any = None  # of the inverted table's plan; None: it is not wanted


class Made(NamedTuple):
    """What `Asked` led to; tables are left out where plans hold what is in them."""

    neighbors: Tensor | None  # [K, M] int32, as from `find_taps`
    plan: Any
    inverse: Tensor | None = None  # [K, N] int32, as from `invert_taps`
    inverse_plan: Any = None
