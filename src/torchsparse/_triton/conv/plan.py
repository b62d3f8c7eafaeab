"""What a map is turned into before a convolution: tiles, shares of the taps, lists of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchsparse._geometry import Geometry
from torchsparse._recipe import ConvRecipe, Dataflow
from torchsparse._triton.conv.order import SortKeys, key_bits, make_tiles, row_sort_keys, untile
from torchsparse._triton.conv.pairs import Pairs, list_pairs
from torchsparse._triton.conv.product import Plan
from torchsparse._triton.launch import only_noted
from torchsparse._triton.tiles import shares_of

__all__ = ["choose_layout", "make_pairs", "make_plan", "table_of"]

# Below so many rows a sort costs more than the taps it saves.
FEW_ROWS = 1024


def choose_layout(
    rows: int, geometry: Geometry, recipe: ConvRecipe, backward: bool
) -> tuple[str, bool, int]:
    """(kind, sorted, shares): equal layouts mean equal plans of one map of about so many rows.

    With ``recipe.literal`` every field is an order; otherwise an order is only what asks for a
    sort or for several splits of the forward pass.
    """
    if recipe.dataflow is Dataflow.FetchOnDemand:
        return "fetch", False, 1
    splits = recipe.splits_bwd if backward else recipe.splits
    splits = min(splits, geometry.volume)
    if recipe.literal:
        return "gemm", recipe.sort, splits
    if not backward and (recipe.sort or splits > 1):
        return "gemm", True, splits
    return own_layout(rows, geometry, recipe.compute, recipe.precision)


def own_layout(
    rows: int, geometry: Geometry, dtype: torch.dtype, precision: str
) -> tuple[str, bool, int]:
    """`choose_layout` where nothing is ordered, for operands of a type and precision."""
    if rows <= FEW_ROWS or geometry.volume == 1:
        return "gemm", False, 1
    if not geometry.is_symmetric:
        return "gemm", True, 1
    return "gemm", True, shares_of(rows, geometry.volume, dtype, precision)


def make_plan(
    neighbors: Tensor,
    keys: SortKeys | None,
    geometry: Geometry,
    layout: tuple[str, bool, int],
    limit: Tensor | None = None,
) -> Plan:
    """Lay out a neighbour table for `gather_gemm`.

    Args:
        neighbors: [K, M] int32, input rows, -1 = none; any strides.
        keys: Sort keys of its rows, if they were computed with it.
        geometry: Of the taps.
        layout: From `choose_layout`.
        limit: [1] int64 on the device, how many rows are real; None: all.
    """
    kind, sort, splits = layout
    rows = neighbors.shape[1]
    if kind == "fetch":
        return Plan(rows, None, {}, make_pairs(neighbors, geometry))
    if not sort:
        own = None
    elif splits == 1 and keys is not None:
        own = [keys]
    else:
        bits = key_bits(geometry, neighbors.device, splits)
        own = [row_sort_keys(neighbors, of_share) for of_share in bits]
    return Plan(rows, make_tiles(neighbors, own, limit, splits), {}, limit=limit)


def table_of(plan: Plan) -> Callable[[], Tensor] | None:
    """What makes the table again that a plan was made from; None if it is not all there."""
    if plan.tiles is None or only_noted():  # nothing was written to the tiles then
        return None
    return partial(untile, plan.tiles)


def make_pairs(neighbors: Tensor, geometry: Geometry) -> Pairs:
    """List the pairs of a table for `weight_grad`; nothing waits for the device."""
    m = neighbors.shape[1]
    if geometry.is_symmetric:
        return list_pairs(neighbors, True, (geometry.volume // 2 + 1) * m)
    return list_pairs(neighbors, False, math.prod(neighbors.shape))
