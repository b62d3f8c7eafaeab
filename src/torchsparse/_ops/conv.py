"""Convolution on given kernel maps: one function per operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._ops.dispatch import twin

__all__ = ["gather_gemm", "make_pairs", "make_plan", "weight_grad"]


def make_plan(
    neighbors: Tensor, order: Tensor | None, in_channels: int, out_channels: int
) -> tuple[Any, Any]:
    """A key for the layout that suits these channels, and a function that makes it.

    Args:
        neighbors: [K, M] int32, -1 = none.
        order: [M] int32, a spatial order of the output rows; None if they are in one.
        in_channels, out_channels: Of the layer.

    Returns:
        (key, make): equal keys mean equal plans; ``make()`` returns the plan for `gather_gemm`.
    """
    chosen = twin("conv", neighbors)
    size = chosen.chunk_pairs(in_channels, out_channels)
    return size, lambda: chosen.make_plan(neighbors, order, size)


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


def make_pairs(neighbors: Tensor) -> Any:
    """List the valid neighbours of a table [K, M] by tap, then by output row."""
    return twin("conv", neighbors).make_pairs(neighbors)


def weight_grad(feats: Tensor, grad: Tensor, pairs: Any) -> Tensor:
    """``out[k] = sum over pairs (i, m) of tap k of feats[i]^T grad[m]``.

    Args:
        feats: [N, C_in] floating.
        grad: [M, C_out] in the same dtype.
        pairs: From `make_pairs`.

    Returns:
        [K, C_in, C_out] float32, or float64 for float64 inputs.
    """
    return twin("conv", feats).weight_grad(feats, grad, pairs)
