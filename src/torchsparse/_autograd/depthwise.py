"""Convolution in groups of channels, with its derivatives, over a given kernel map.

With one input channel per group, a layer moves bytes and hardly computes: it has operations of
its own. Larger groups are convolutions of their own, one after the other on the same map.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchsparse._autograd.conv import conv_feats_grad, conv_weight_grad, sparse_conv
from torchsparse._frozen import cast
from torchsparse._kernel_map import KernelMap
from torchsparse._ops.depthwise import depthwise, weight_grad
from torchsparse._recipe import ConvRecipe, Dataflow, sum_dtype

__all__ = [
    "grouped_conv",
    "grouped_feats_grad",
    "grouped_pointwise",
    "grouped_weight_grad",
]


def grouped_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
    groups: int,
) -> Tensor:
    """`sparse_conv` whose output channel j reads the input channels of group j // (C_out / G).

    Args:
        feats: [N, C_in], on the map's inputs (its outputs if ``transposed``).
        weight: [K, C_in / G, C_out].
        bias: [C_out] or None.
        kmap: From fine to coarse.
        transposed: Read the map from coarse to fine.
        recipe: The choices of the call; sums are float32, or float64 for float64.
        groups: G.

    Returns:
        [M, C_out] in ``recipe.dtype``. Differentiable in feats, weight and bias; each gradient
        has the dtype of its tensor and is summed in float32 or better.
    """
    if weight.shape[1] == 1:
        taps = weight[:, 0]
        if torch.is_grad_enabled() and (
            feats.requires_grad or taps.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _Depthwise.apply(feats, taps, bias, kmap, transposed, recipe)  # pyright: ignore[reportReturnType]
        return _forward(feats, taps, bias, kmap, transposed, recipe)
    width = weight.shape[2] // groups
    biases = [None] * groups if bias is None else bias.split(width)
    parts = zip(feats.split(weight.shape[1], 1), weight.split(width, 2), biases)
    return torch.cat([sparse_conv(*part, kmap, transposed, recipe) for part in parts], 1)


def grouped_feats_grad(
    grad: Tensor,
    weight: Tensor,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
    groups: int,
) -> Tensor:
    """The gradient of `grouped_conv` with respect to its features.

    Args:
        grad: [M, C_out], of the result.
        weight: [K, C_in / G, C_out].
        kmap, transposed, recipe, groups: Of the call.

    Returns:
        [N, C_in] in ``recipe.compute``.
    """
    width = weight.shape[2] // groups
    if weight.shape[1] == 1:
        return _feats_grad(grad, weight[:, 0], kmap, transposed, recipe, width)
    parts = zip(grad.split(width, 1), weight.split(width, 2))
    return torch.cat([conv_feats_grad(*part, kmap, transposed, recipe) for part in parts], 1)


def grouped_weight_grad(
    feats: Tensor,
    grad: Tensor,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
    groups: int,
) -> Tensor:
    """The gradient of `grouped_conv` with respect to its weight.

    Args:
        feats: [N, C_in], as it was given.
        grad: [M, C_out], of the result.
        kmap, transposed, recipe, groups: Of the call.

    Returns:
        [K, C_in / G, C_out] float32, or float64 for float64.
    """
    if feats.shape[1] == groups:
        return _taps_grad(feats, grad, kmap, transposed, recipe)[:, None]
    parts = zip(feats.chunk(groups, 1), grad.chunk(groups, 1))
    return torch.cat([conv_weight_grad(*part, kmap, transposed, recipe) for part in parts], 2)


@lru_cache(maxsize=1024)
def _plain(recipe: ConvRecipe) -> ConvRecipe:
    """The recipe without what is about products alone, so that the kernels find one sorted table.

    Gather-scatter stays: it asks for plain PyTorch.
    """
    if recipe.dataflow is Dataflow.GatherScatter:
        return recipe
    dataflow = Dataflow.ImplicitGEMM
    return replace(recipe, dataflow=dataflow, sort=True, splits=1, splits_bwd=1, literal=True)


def _forward(
    feats: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
) -> Tensor:
    planned = kmap.plan(_plain(recipe), 1, transposed)
    dtype = recipe.compute
    bias = None if bias is None else cast(bias, dtype)
    return depthwise(feats.to(dtype), cast(taps, dtype), bias, planned).to(recipe.dtype)


def _feats_grad(
    grad: Tensor, taps: Tensor, kmap: KernelMap, transposed: bool, recipe: ConvRecipe, fold: int
) -> Tensor:
    """Of [M, C_out] and [K, C_out]: [N, C_out / fold] in ``recipe.compute``."""
    planned = kmap.plan(_plain(recipe), 1, not transposed)
    return depthwise(grad.to(recipe.compute), taps.to(recipe.compute), None, planned, fold)


def _taps_grad(
    feats: Tensor, grad: Tensor, kmap: KernelMap, transposed: bool, recipe: ConvRecipe
) -> Tensor:
    """Of [N, C_in] and [M, C_out]: [K, C_out], summed in float32 or better."""
    pairs = kmap.pairs(_plain(recipe), 1, transposed)
    return weight_grad(feats.to(recipe.compute), grad.to(recipe.compute), pairs)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        taps: Tensor,
        bias: Tensor | None,
        kmap: KernelMap,
        transposed: bool,
        recipe: ConvRecipe,
    ) -> Tensor:
        ctx.save_for_backward(feats, taps)
        ctx.kmap, ctx.transposed, ctx.recipe = kmap, transposed, recipe
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(feats, taps, bias, kmap, transposed, recipe)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # names hidden
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        feats, taps = ctx.saved_tensors
        kmap, transposed, recipe = ctx.kmap, ctx.transposed, ctx.recipe
        dtype = recipe.compute
        grad = grads[0].to(dtype)
        grad_feats = grad_taps = grad_bias = None
        if ctx.needs_input_grad[0]:
            fold = taps.shape[1] // feats.shape[1]
            grad_feats = _feats_grad(grad, taps, kmap, transposed, recipe, fold).to(feats.dtype)
        if ctx.needs_input_grad[1]:
            grad_taps = _taps_grad(feats, grad, kmap, transposed, recipe).to(taps.dtype)
        if ctx.needs_input_grad[2]:
            total = sum_dtype(dtype)
            grad_bias = grad.sum(0, dtype=total).to(ctx.bias_dtype)
        return grad_feats, grad_taps, grad_bias, None, None, None


def grouped_pointwise(
    feats: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, groups: int
) -> Tensor:
    """A 1x1 convolution in groups: a product of each group's channels, in ``dtype``.

    Args:
        feats: [N, C_in].
        weight: [C_in / G, C_out].
        bias: [C_out] or None.
        dtype: Of the result; sums are float32, or float64 for float64.
        groups: G.
    """
    compute = sum_dtype(dtype)
    (n, c_in), c_out = feats.shape, weight.shape[1]
    with torch.autocast(feats.device.type, enabled=False):
        x = feats.to(dtype).to(compute).view(n, groups, c_in // groups)
        w = cast(cast(weight, dtype), compute).view(c_in // groups, groups, c_out // groups)
        if c_in == groups:
            out = x * w  # [N, G, 1] * [1, G, C_out / G]
        else:
            out = torch.bmm(x.transpose(0, 1), w.transpose(0, 1)).transpose(0, 1)
        out = out.reshape(n, c_out)
        return (out if bias is None else out + cast(cast(bias, dtype), compute)).to(dtype)
