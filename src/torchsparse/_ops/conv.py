"""Convolution on given kernel maps: one function per operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._ops.dispatch import twin

__all__ = ["gather_gemm", "make_plan", "weight_grad"]


def make_plan(
    neighbors: Tensor,
    identity: int | None,
    in_order: Tensor | None,
    out_order: Tensor | None,
    out_channels: int,
) -> tuple[Any, Any]:
    """A key for the layout that suits these channels, and a function that makes it.

    Args:
        neighbors: [K, M] int32, positions of inputs, -1 = none.
        identity: The tap with ``neighbors[k, m] = m``, or None.
        in_order, out_order: [N], [M] int32, the row at each position; None: they are equal.
        out_channels: Of the layer.

    Returns:
        (key, make): equal keys mean equal plans; ``make()`` returns the plan.
    """
    chosen = twin("conv", neighbors)
    layout = chosen.choose_layout(out_channels)
    return layout, lambda: chosen.make_plan(neighbors, identity, in_order, out_order, layout)


def gather_gemm(feats: Tensor, weight: Tensor, bias: Tensor | None, plan: Any) -> Tensor:
    """``out[m] = bias + sum over taps k of feats[neighbors[k, m]] @ weight[k]``.

    Args:
        feats: [N, C_in] floating.
        weight: [K, C_in, C_out] in the dtype of feats; any strides.
        bias: [C_out] in the dtype of feats, or None.
        plan: The neighbour table, from `make_plan`.

    Returns:
        [M, C_out] in the dtype of feats, summed in float32 (float64 for float64).
    """
    return twin("conv", feats).gather_gemm(feats, weight, bias, plan)


def weight_grad(feats: Tensor, grad: Tensor, plan: Any) -> Tensor:
    """``out[k] = sum over the pairs (i, m) of tap k of feats[i]^T grad[m]``.

    Args:
        feats: [N, C_in] floating.
        grad: [M, C_out] in the same dtype.
        plan: The neighbour table, from `make_plan`.

    Returns:
        [K, C_in, C_out] float32, or float64 for float64 inputs.
    """
    return twin("conv", feats).weight_grad(feats, grad, plan)
