"""Convolution on given kernel maps: one function per operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import expected_rows
from torchsparse._geometry import Geometry
from torchsparse._ops.dispatch import reference, twin
from torchsparse._recipe import ConvRecipe, Dataflow, Epilogue

__all__ = [
    "Planned",
    "choose",
    "compile_ahead",
    "dense",
    "finish",
    "gather_gemm",
    "pairs_key",
    "plan_key",
    "weight_grad",
]


HALVES = (torch.float16, torch.bfloat16)


class Planned(NamedTuple):
    """A map as an implementation wants it, and that implementation."""

    chosen: ModuleType
    plan: Any
    any_channels: bool = False  # its layout does not depend on them

    @property
    def table(self) -> Callable[[], Tensor] | None:
        """What makes the neighbour table again, with the bits that it had, from what the plan
        keeps; None where that is not enough."""
        return None if self.chosen is reference("conv") else self.chosen.table_of(self.plan)

    def reversed(self) -> Planned:
        """Tap k of the table multiplies weight K - 1 - k."""
        return Planned(self.chosen, self.plan._replace(reverse=True), self.any_channels)

    def swapped(self) -> Planned:
        """Inputs and outputs of the listed pairs exchanged."""
        return Planned(self.chosen, self.plan._replace(swap=True), self.any_channels)


def choose(tensor: Tensor, recipe: ConvRecipe) -> ModuleType:
    """Gather-scatter and float64 are plain PyTorch; kernels do the rest where there are some."""
    if recipe.dataflow is Dataflow.GatherScatter or recipe.compute == torch.float64:
        return reference("conv")
    return twin("conv", tensor)


def plan_key(
    neighbors: Callable[[], Tensor],
    coords: Tensor,
    keys: Any,
    geometry: Geometry,
    identity: int | None,
    recipe: ConvRecipe,
    out_channels: int,
    backward: bool,
    limit: Tensor | None = None,
) -> tuple[Any, Callable[[], Planned]]:
    """A key for the layout that suits a layer, and a function that makes it.

    Args:
        neighbors: Returns the table, [K, M] int32, input rows, -1 = none.
        coords: [M, 1 + D], of the outputs.
        keys: Sort keys of the outputs, or None.
        geometry: Of the taps.
        identity: The tap with ``neighbors[k, m] = m``, or None.
        recipe: Of the call.
        out_channels: Of the product.
        backward: It computes a gradient.
        limit: [1] int64 on the device, how many outputs are real; None: all.

    Returns:
        (key, make): equal keys mean equal plans; ``make()`` returns the plan.
    """
    chosen = choose(coords, recipe)
    if chosen is reference("conv"):
        layout = chosen.choose_layout(out_channels, coords.device)
        return ("reference", layout), lambda: Planned(
            chosen, chosen.make_plan(neighbors(), identity, layout)
        )
    rows = expected_rows(coords.shape[0], limit)
    layout = chosen.choose_layout(rows, geometry, recipe, backward)
    return layout, lambda: Planned(
        chosen, chosen.make_plan(neighbors(), keys, geometry, layout, limit), True
    )


def pairs_key(
    neighbors: Callable[[], Tensor], coords: Tensor, geometry: Geometry, recipe: ConvRecipe
) -> tuple[Any, Callable[[], Planned]] | None:
    """The same for `weight_grad`; None if it wants the plan of `gather_gemm`."""
    chosen = choose(coords, recipe)
    if chosen is reference("conv"):
        return None
    return "pairs", lambda: Planned(chosen, chosen.make_pairs(neighbors(), geometry))


def gather_gemm(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    planned: Planned,
    precision: str,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """``out[m] = bias + sum over taps k of feats[neighbors[k, m]] @ weight[k]``.

    Args:
        feats: [N, C_in] floating.
        weight: [K, C_in, C_out] in the dtype of feats; any strides.
        bias: [C_out] in the dtype of feats, or None.
        planned: The neighbour table.
        precision: Of float32 products on a GPU: "ieee", "tf32" or "tf32x3".
        epilogue: Applied to the sums before they are rounded, or None.

    Returns:
        [M, C_out] in the dtype of feats, summed in float32 (float64 for float64).
    """
    return planned.chosen.gather_gemm(feats, weight, bias, planned.plan, precision, epilogue)


def dense(feats: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor | None:
    """``feats @ weight + bias`` with an epilogue in one pass, where there is one.

    Args:
        feats: [M, C_in] floating.
        weight: [C_in, C_out] in the dtype of feats.
        bias: [C_out] in the dtype of feats, or None.
        epilogue: Applied to the float32 sums before they are rounded.

    Returns:
        [M, C_out] in the dtype of feats; None: use a product and `finish`.
    """
    chosen = twin("conv", feats)
    if chosen is reference("conv"):
        return chosen.dense(feats, weight, bias, epilogue) if feats.device.type == "cpu" else None
    if feats.dtype not in HALVES or feats.shape[1] % 8:
        return None
    return chosen.dense(feats, weight, bias, epilogue)


def finish(feats: Tensor, epilogue: Epilogue) -> Tensor:
    """Apply an epilogue to features.

    Args:
        feats: [M, C] floating.
        epilogue: What to apply.

    Returns:
        [M, C] in the dtype of feats, computed in float32 (float64 for float64).
    """
    if feats.dtype == torch.float64:
        return reference("conv").finish(feats, epilogue)
    return twin("conv", feats).finish(feats, epilogue)


def weight_grad(feats: Tensor, grad: Tensor, planned: Planned, precision: str) -> Tensor:
    """``out[k] = sum over the pairs (i, m) of tap k of feats[i]^T grad[m]``.

    Args:
        feats: [N, C_in] floating.
        grad: [M, C_out] in the same dtype.
        planned: The pairs.
        precision: Of float32 products on a GPU.

    Returns:
        [K, C_in, C_out] float32, or float64 for float64 inputs.
    """
    return planned.chosen.weight_grad(feats, grad, planned.plan, precision)


def compile_ahead(
    like: Tensor,
    calls: Iterable[Callable[[], Any]],
    *,
    maps_only: bool = False,
    make_maps: bool = False,
) -> int:
    """Compile, several at once, what calls on the device of ``like`` would launch; run nothing.

    Args:
        like: On the device.
        calls: Whose launches to look at; their results are garbage.
        maps_only: Compile the kernels of maps alone.
        make_maps: Let these run, so that the sizes of levels are the true ones.

    Returns:
        The number of kernels; 0 where there are none.
    """
    chosen = twin("conv", like)
    if chosen is reference("conv"):
        return 0
    return chosen.compile_ahead(calls, maps_only=maps_only, make_maps=make_maps)
