"""Batch normalisation in training, with the sum and the activation behind it, as one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchsparse._autograd.applied import applied
from torchsparse._ops import batch_norm
from torchsparse._recipe import sum_dtype

__all__ = ["normalise_batch"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class _BatchNorm(Function):
    """act((x - mean) * invstd * weight + bias + residual), mean and invstd being functions of x.

    Backward must know where the activation was flat. That follows from x, mean, invstd, weight and
    bias, which it reads anyway. With a residual it follows from the sign of the result, which the
    next convolution keeps too; the residual itself may be needed by nobody else.
    """

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        moments: Tensor,
        slope: float | None,
        eps: float,
        limit: Tensor | None,
    ) -> Tensor:
        out = batch_norm.normalise(feats, moments, weight, bias, residual, slope, limit)
        signs = None if residual is None or slope is None else out
        ctx.save_for_backward(feats, weight, bias, moments, signs)
        ctx.slope, ctx.eps, ctx.limit = slope, eps, limit
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight, bias, moments, signs = ctx.saved_tensors
        slope, limit = ctx.slope, ctx.limit
        by_feats, by_weight, by_bias, by_residual, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # these gradients are to be differentiated again
            if limit is not None:
                raise RuntimeError("padded rows have first derivatives alone")
            wanted = by_feats, by_weight, by_bias, by_residual
            found = _in_pytorch(grad, (feats, weight, bias), wanted, signs, slope, ctx.eps)
            return *found, None, None, None, None
        grad_feats = grad_weight = grad_bias = grad_residual = means = None
        if by_feats or by_weight or by_bias:
            means, grad_weight, grad_bias = batch_norm.grad_sums(
                grad, feats, moments, weight, bias, signs, slope, limit
            )
        if by_residual and slope is None:
            grad_residual, by_residual = grad, False
        if by_feats or by_residual:
            grad_feats, found = batch_norm.grad_rows(
                grad, feats, moments, weight, bias, signs, slope,
                means if by_feats else None, by_residual, limit,
            )  # fmt: skip
            grad_residual = found if grad_residual is None else grad_residual
        return grad_feats, grad_weight, grad_bias, grad_residual, None, None, None, None


_apply = applied(_BatchNorm)


def _in_pytorch(
    grad: Tensor,
    given: tuple[Tensor, Tensor | None, Tensor | None],
    wanted: tuple[bool, ...],
    signs: Tensor | None,
    slope: float | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of feats, weight, bias and residual as operations that have derivatives."""
    dtype = sum_dtype(given[0].dtype)
    # Nodes of their own: feats may itself depend on weight, which is no matter of this function.
    leaves = [None if t is None else t.view_as(t) for t in given]
    feats, weight, bias = (None if t is None else t.to(dtype) for t in leaves)
    assert feats is not None
    rows = torch.nn.functional.batch_norm(feats, None, None, weight, bias, True, 0.0, eps)
    if slope is not None:
        grad = torch.where((rows if signs is None else signs) <= 0, grad * slope, grad)
    inputs = [t for t, want in zip(leaves, wanted) if want and t is not None]
    found = torch.autograd.grad(rows, inputs, grad.to(dtype), create_graph=True) if inputs else ()
    grads = iter(found)
    first = (next(grads) if want else None for want in wanted[:3])
    return *first, grad if wanted[3] else None


def normalise_batch(
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    moments: Tensor,
    slope: float | None,
    eps: float,
    limit: Tensor | None = None,
) -> Tensor:
    """Normalise rows by their own statistics, add, activate.

    Args:
        feats: [N, C] floating.
        weight, bias: [C] or None.
        residual: [N, C] in the dtype of feats, or None.
        moments: Of these feats, from `_ops.batch_norm.batch_moments_`.
        slope: Of negative values, at least 0; None = no activation.
        eps: That of ``moments``.
        limit: [1] int64 on the device, how many rows are real (`_capacity`); None: all.

    Returns:
        [N, C] in the dtype of feats. Differentiable in feats (also through ``moments``), weight,
        bias and residual; second derivatives are PyTorch's.
    """
    if torch.is_grad_enabled() and (
        feats.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(feats, weight, bias, residual, moments, slope, eps, limit)
    return batch_norm.normalise(feats, moments, weight, bias, residual, slope, limit)
