"""Depthwise convolution on given kernel maps: the choice of implementation."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from torchsparse._ops.conv import Planned
from torchsparse._ops.dispatch import reference, twin

__all__ = ["depthwise", "weight_grad"]


def _choose(tensor: Tensor, planned: Planned) -> ModuleType:
    """The twin that reads this plan."""
    if planned.chosen is reference("conv"):
        return reference("depthwise")
    return twin("depthwise", tensor)


def depthwise(
    feats: Tensor, weight: Tensor, bias: Tensor | None, planned: Planned, fold: int = 1
) -> Tensor:
    """``out[m, c] = bias[c] + sum over taps k of feats[neighbors[k, m], c // r] * weight[k, c]``.

    Args:
        feats: [N, C / r] floating.
        weight: [K, C] in the dtype of feats; any strides.
        bias: [C / fold] in the dtype of feats, or None.
        planned: The neighbour table, as a convolution of one output channel wants it.
        fold: So many neighbouring channels of the result are summed to one.

    Returns:
        [M, C / fold] in the dtype of feats, summed in float32 (float64 for float64).
    """
    return _choose(feats, planned).depthwise(feats, weight, bias, planned.plan, fold)


def weight_grad(feats: Tensor, grad: Tensor, planned: Planned) -> Tensor:
    """``out[k, c] = sum over the pairs (i, m) of tap k of feats[i, c // r] * grad[m, c]``.

    Args:
        feats: [N, C / r] floating.
        grad: [M, C] in the same dtype.
        planned: The pairs.

    Returns:
        [K, C] float32, or float64 for float64 inputs.
    """
    return _choose(feats, planned).weight_grad(feats, grad, planned.plan)
