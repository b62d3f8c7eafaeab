"""Sparse convolution with its derivatives, over a given kernel map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchsparse._autograd.applied import applied
from torchsparse._frozen import cast
from torchsparse._kernel_map import KernelMap
from torchsparse._lazy import Lazy
from torchsparse._ops.conv import dense, finish, gather_gemm, weight_grad
from torchsparse._recipe import ConvRecipe, Epilogue, sum_dtype

__all__ = [
    "conv_feats_grad",
    "conv_forward",
    "conv_weight_grad",
    "deferred_conv",
    "deferred_pointwise",
    "pointwise",
    "sparse_conv",
]


def sparse_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
) -> Tensor:
    """Convolve features along a map.

    Args:
        feats: [N, C_in], on the map's inputs (its outputs if ``transposed``).
        weight: [K, C_in, C_out].
        bias: [C_out] or None.
        kmap: From fine to coarse.
        transposed: Read the map from coarse to fine.
        recipe: The choices of the call; sums are float32, or float64 for float64.

    Returns:
        [M, C_out] in ``recipe.dtype``. Differentiable in feats, weight and bias; each gradient has
        the dtype of its tensor and is summed in float32 or better.
    """
    keep = torch.is_grad_enabled()  # other layers on the map may want gradients
    if keep and (
        feats.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(feats, weight, bias, kmap, transposed, recipe)
    return conv_forward(feats, weight, bias, kmap, transposed, recipe, None, keep)


def deferred_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
) -> Lazy:
    """`sparse_conv` without gradients, computed when somebody needs it: what follows may join."""

    def make(epilogue: Epilogue | None) -> Tensor:
        return conv_forward(
            feats, weight, bias, kmap, transposed, recipe, epilogue, torch.is_grad_enabled()
        )

    rows = kmap.num_inputs if transposed else kmap.num_outputs
    inputs = (feats, weight) if bias is None else (feats, weight, bias)
    return Lazy(make, (rows, weight.shape[2]), recipe.dtype, feats.device, inputs)


def deferred_pointwise(
    feats: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Lazy:
    """`pointwise` in the same manner."""

    def make(epilogue: Epilogue | None) -> Tensor:
        if epilogue is None:
            return pointwise(feats, weight, bias, dtype)
        shift = None if bias is None else cast(bias, dtype)
        out = dense(_cast(feats, dtype), cast(weight, dtype), shift, epilogue)
        return finish(pointwise(feats, weight, bias, dtype), epilogue) if out is None else out

    inputs = (feats, weight) if bias is None else (feats, weight, bias)
    return Lazy(make, (feats.shape[0], weight.shape[1]), dtype, feats.device, inputs)


def conv_forward(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kmap: KernelMap,
    transposed: bool,
    recipe: ConvRecipe,
    epilogue: Epilogue | None = None,
    keep: bool = True,
) -> Tensor:
    """`sparse_conv` without gradients; ``epilogue`` is applied to the sums.

    With ``keep`` the map keeps what gradients need.
    """
    planned = kmap.plan(recipe, weight.shape[2], transposed, keep=keep)
    dtype = recipe.compute
    out = gather_gemm(
        _cast(feats, dtype),
        cast(weight, dtype),
        None if bias is None else cast(bias, dtype),
        planned,
        recipe.precision,
        epilogue,
    )
    return _cast(out, recipe.dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes a microsecond also where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kmap: KernelMap,
        transposed: bool,
        recipe: ConvRecipe,
    ) -> Tensor:
        ctx.dtypes = feats.dtype, weight.dtype, None if bias is None else bias.dtype
        # Cast once for both passes, as autocast does with the weights of dense layers.
        feats, weight = _cast(feats, recipe.compute), _cast(weight, recipe.compute)
        ctx.save_for_backward(feats, weight)
        ctx.kmap, ctx.transposed, ctx.recipe = kmap, transposed, recipe
        return conv_forward(feats, weight, bias, kmap, transposed, recipe)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # names hidden
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        feats, weight = ctx.saved_tensors
        kmap, transposed, recipe = ctx.kmap, ctx.transposed, ctx.recipe
        dtype = recipe.compute
        grad = _cast(grads[0], dtype)
        grad_feats = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            found = conv_feats_grad(grad, weight, kmap, transposed, recipe)
            grad_feats = _cast(found, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            found = conv_weight_grad(feats, grad, kmap, transposed, recipe)
            grad_weight = _cast(found, ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            total = grad.sum(0, dtype=sum_dtype(dtype))
            grad_bias = _cast(total, ctx.dtypes[2])
        return grad_feats, grad_weight, grad_bias, None, None, None


_apply = applied(_SparseConv)


def conv_feats_grad(
    grad: Tensor, weight: Tensor, kmap: KernelMap, transposed: bool, recipe: ConvRecipe
) -> Tensor:
    """The gradient of `sparse_conv` with respect to its features.

    Args:
        grad: [M, C_out], of the result.
        weight: [K, C_in, C_out].
        kmap, transposed, recipe: Of the call.

    Returns:
        [N, C_in] in ``recipe.compute``.
    """
    dtype = recipe.compute
    planned = kmap.plan(recipe, weight.shape[1], not transposed, backward=True)
    weight = _cast(weight, dtype).transpose(1, 2)
    return gather_gemm(_cast(grad, dtype), weight, None, planned, recipe.precision)


def conv_weight_grad(
    feats: Tensor, grad: Tensor, kmap: KernelMap, transposed: bool, recipe: ConvRecipe
) -> Tensor:
    """The gradient of `sparse_conv` with respect to its weight.

    Args:
        feats: [N, C_in], as it was given.
        grad: [M, C_out], of the result.
        kmap, transposed, recipe: Of the call.

    Returns:
        [K, C_in, C_out] float32, or float64 for float64.
    """
    dtype = recipe.compute
    pairs = kmap.pairs(recipe, grad.shape[1], transposed)
    return weight_grad(_cast(feats, dtype), _cast(grad, dtype), pairs, recipe.precision)


def pointwise(feats: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution: ``feats @ weight + bias`` in ``dtype``.

    Args:
        feats: [N, C_in].
        weight: [C_in, C_out].
        bias: [C_out] or None.
        dtype: Of the result.
    """
    # Half products on a CPU are computed in float32 and rounded once; a GPU does so by itself.
    device = "cuda" if feats.is_cuda else feats.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return pointwise(feats, weight, bias, dtype)
    compute = sum_dtype(dtype) if device == "cpu" else dtype
    feats = _cast(_cast(feats, dtype), compute)
    weight = cast(cast(weight, dtype), compute)
    if bias is None:
        out = torch.mm(feats, weight)
    else:
        out = torch.addmm(cast(cast(bias, dtype), compute), feats, weight)
    return _cast(out, dtype)
