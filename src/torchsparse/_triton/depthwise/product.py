"""Depthwise convolution: pick tiles, allocate, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._triton.conv.pairs import Pairs
from torchsparse._triton.conv.product import Plan
from torchsparse._triton.conv.wgrad import sum_chunks_kernel
from torchsparse._triton.depthwise.kernels import depthwise_grad_kernel, depthwise_kernel
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.tiles import PROCESSORS, depthwise_grad_tile, depthwise_tile

__all__ = ["depthwise", "weight_grad"]

WAVES = 16  # programs per multiprocessor that a weight gradient is cut into, about


def depthwise(
    feats: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, fold: int = 1
) -> Tensor:
    """``out[m, c] = bias[c] + sum over taps k of feats[neighbors[k, m], c // r] * weight[k, c]``.

    Args:
        feats: [N, C / r] float16, bfloat16 or float32.
        weight: [K, C] in the dtype of feats; any strides.
        bias: [C / fold] in the dtype of feats, or None.
        plan: Of the neighbour table, from `conv.make_plan`: one share, in tiles.
        fold: So many neighbouring channels of the result are summed to one.

    Returns:
        [M, C / fold] in the dtype of feats, summed in float32 and rounded once.
    """
    volume, channels = weight.shape
    m, c_in, c_out = plan.rows, feats.shape[1], channels // fold
    out = feats.new_empty((m, c_out))
    if out.numel() == 0:
        return out
    if feats.shape[0] == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tiles = plan.tiles
    assert tiles is not None and tiles.shares == 1
    tile = depthwise_tile(c_out)
    launch(
        depthwise_kernel, (cdiv(m, tile.BM) * cdiv(c_out, tile.BC),), feats,
        feats.contiguous(), weight, out, tiles.table, tiles.order, tiles.masks, tiles.limit,
        None if bias is None else bias.contiguous(),
        m, tiles.masks.shape[2], *weight.stride(),
        K=volume, CI=c_in, CO=c_out, REPEAT=channels // c_in, FOLD=fold,
        BM=tile.BM, BC=tile.BC, STAGES=tile.stages, SORTED=tiles.order is not None,
        REVERSE=plan.reverse, BIAS=bias is not None, num_warps=tile.warps,
    )  # fmt: skip
    return out


def weight_grad(feats: Tensor, grad: Tensor, pairs: Pairs) -> Tensor:
    """``out[k, c] = sum over the pairs (i, m) of tap k of feats[i, c // r] * grad[m, c]``.

    Args:
        feats: [N, C / r] float16, bfloat16 or float32.
        grad: [M, C] in the same dtype.
        pairs: From `conv.make_pairs`.

    Returns:
        [K, C] float32, summed in a fixed order.
    """
    c_in, channels, volume = feats.shape[1], grad.shape[1], pairs.volume
    out = feats.new_empty((volume, channels), dtype=torch.float32)
    if out.numel() == 0 or pairs.inputs.shape[0] == 0:
        return out.zero_()
    feats, grad = feats.contiguous(), grad.contiguous()
    tile = depthwise_grad_tile(channels)
    columns, capacity = cdiv(channels, tile.BC), pairs.inputs.shape[0]
    target = max(min(WAVES * PROCESSORS // columns, cdiv(capacity, 4 * tile.BM)), 1)
    blocks, taps = pairs.ends.shape[1], next_power(volume)
    most = target + volume  # every tap may end with a short chunk
    partial = feats.new_empty((most, channels), dtype=torch.float32)
    launch(
        depthwise_grad_kernel, (most, columns), feats, feats, grad, partial, pairs.inputs,
        pairs.outputs, pairs.ends, blocks, pairs.lists, target,
        K=volume, KP=taps, CI=c_in, CO=channels, REPEAT=channels // c_in,
        BM=tile.BM, BC=tile.BC, STAGES=tile.stages, SWAP=pairs.swap, num_warps=tile.warps,
    )  # fmt: skip
    width = min(next_power(channels), 128)
    launch(
        sum_chunks_kernel, (volume, cdiv(channels, width)), feats, partial, out, pairs.ends,
        blocks, pairs.lists, target, channels,
        K=volume, KP=taps, BK=tile.BM, ROWS=16, BLOCK=width,
    )  # fmt: skip
    return out
