"""Depthwise convolution in plain PyTorch: gather rows, scale them per tap, sum them per output.

The chunks are those of a convolution (`conv.make_plan`): the scaled rows of a chunk lie by
tap, and an embedding bag sums them by output row. Sums run in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._recipe import sum_dtype
from torchsparse._reference.conv import Chunk, Plan, scratch, sum_bags

__all__ = ["depthwise", "weight_grad"]


def _prepare(feats: Tensor, channels: int) -> Tensor:
    """Rows in the dtype of sums, each channel repeated up to ``channels``."""
    feats = feats.to(sum_dtype(feats.dtype))
    if feats.shape[1] == channels:
        return feats
    return feats.repeat_interleave(channels // feats.shape[1], 1)


def depthwise(
    feats: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, fold: int = 1
) -> Tensor:
    """``out[m, c] = bias[c] + sum over taps k of feats[neighbors[k, m], c // r] * weight[k, c]``.

    Args:
        feats: [N, C / r] floating.
        weight: [K, C] in the dtype of feats; any strides.
        bias: [C / fold] in the dtype of feats, or None.
        plan: Of the neighbour table, from `conv.make_plan`.
        fold: So many neighbouring channels of the result are summed to one.

    Returns:
        [M, C / fold] in the dtype of feats; half types are summed in float32 and rounded once.
    """
    channels = weight.shape[1]
    taps = weight.to(sum_dtype(feats.dtype))
    taps = taps.flip(0) if plan.reverse else taps
    xs = _prepare(feats, channels)
    out = xs.new_empty((plan.num_outputs, channels))
    for chunk in plan.chunks:
        rows = out[chunk.begin : chunk.end]
        _sum_pairs(xs, taps, chunk, rows)
        if plan.identity is not None:
            rows.addcmul_(xs[chunk.begin : chunk.end], taps[plan.identity])
    if fold > 1:
        out = out.view(-1, channels // fold, fold).sum(2)
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(feats.dtype)


def _sum_pairs(xs: Tensor, taps: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """Write the listed pairs' share of a chunk's output rows."""
    if chunk.inputs.shape[0] == 0:
        rows.zero_()
        return
    scaled = scratch.take("products", xs, (chunk.inputs.shape[0], xs.shape[1]))
    torch.index_select(xs, 0, chunk.inputs, out=scaled)
    for part, tap in zip(scaled.split(chunk.sizes), taps):
        part.mul_(tap)
    rows.copy_(sum_bags(scaled, chunk))


def weight_grad(feats: Tensor, grad: Tensor, plan: Plan) -> Tensor:
    """``out[k, c] = sum over the pairs (i, m) of tap k of feats[i, c // r] * grad[m, c]``.

    Args:
        feats: [N, C / r] floating.
        grad: [M, C] in the same dtype.
        plan: Of the neighbour table, from `conv.make_plan`.

    Returns:
        [K, C] float32, or float64 for float64 inputs.
    """
    channels = grad.shape[1]
    xs = _prepare(feats, channels)
    gs = _prepare(grad, channels)
    out = xs.new_zeros((plan.volume, channels))
    for chunk in plan.chunks:
        shape = chunk.inputs.shape[0], channels
        products = scratch.take("products", xs, shape)
        others = scratch.take("gathered", gs, shape)
        torch.index_select(xs, 0, chunk.inputs, out=products)
        torch.index_select(gs, 0, chunk.outputs, out=others)
        products.mul_(others)
        for total, part in zip(out, products.split(chunk.sizes)):
            total += part.sum(0)
        if plan.identity is not None:
            rows = slice(chunk.begin, chunk.end)
            out[plan.identity] += (xs[rows] * gs[rows]).sum(0)
    return out.flip(0) if plan.reverse else out
