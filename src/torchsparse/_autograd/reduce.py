"""Derivatives of sums, maxima and normalisations over groups of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._ops import norm, reduce

__all__ = ["SampleNorm", "SegmentMax", "SegmentSum", "sample_norm", "segment_max", "segment_sum"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class SegmentSum(Function):
    """Sums of rows per group; every row receives the gradient of its group."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, index: Tensor, num: int) -> Tensor:
        ctx.save_for_backward(index)
        return reduce.segment_sum(feats, reduce.group_rows(index, num), None, None, feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def segment_sum(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Sum the rows of each group.

    Args:
        feats: [N, C] floating.
        index: [N] integers, 0 <= i < num.
        num: Number of groups.

    Returns:
        [num, C] in the dtype of ``feats``, summed in float32 (float64 in float64). Differentiable.
    """
    return SegmentSum.apply(feats, index, num)  # pyright: ignore[reportReturnType]


class SegmentMax(Function):
    """Maxima per group; one maximal row receives the gradient."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, index: Tensor, num: int) -> Tensor:
        top = reduce.segment_max(feats, index, num)
        ctx.save_for_backward(feats, index, top)
        return top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        feats, index, top = ctx.saved_tensors
        rows = reduce.argmax_rows(feats, index, top)
        # Empty groups write into one spare row.
        out = grad.new_zeros((feats.shape[0] + 1, feats.shape[1]))
        out.scatter_(0, rows, grad)
        return out.resize_(feats.shape), None, None


def segment_max(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Maximum of each group and channel.

    Args:
        feats: [N, C] floating.
        index: [N] integers, 0 <= i < num.
        num: Number of groups.

    Returns:
        [num, C] in the dtype of ``feats``, 0 for empty groups. The gradient goes to the lowest of
        the maximal rows.
    """
    return SegmentMax.apply(feats, index, num)  # pyright: ignore[reportReturnType]


class SampleNorm(Function):
    """Normalisation per sample and channel group: y = (x - mean) / sqrt(var + eps) * w + b."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: Tensor,
        num_samples: int,
        num_groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = reduce.group_rows(batch, num_samples)
        mean, var = norm.sample_moments(feats, batch, groups, num_groups)
        rstd = torch.rsqrt(var + eps)
        centre, scale = _per_channel(mean, feats.shape[1]), _per_channel(rstd, feats.shape[1])
        if weight is not None:
            scale = scale * weight.to(scale.dtype)
        shift = None if bias is None else bias.to(scale.dtype).expand_as(scale)
        ctx.save_for_backward(feats, weight, batch, *groups, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var)
        return norm.affine(feats, batch, centre, scale, shift, feats.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        feats, weight, batch, order, starts, mean, rstd = ctx.saved_tensors
        groups = reduce.Groups(order, starts)
        channels = feats.shape[1]
        mean_c, rstd_c = _per_channel(mean, channels), _per_channel(rstd, channels)
        # Per sample and channel: sum of dy, and of dy * x_hat with x_hat = (x - mean) * rstd.
        sums = reduce.segment_sum(grad, groups)
        dots = norm.centred_dots(feats, grad, batch, groups, mean_c) * rstd_c
        grad_weight = None if weight is None else dots.sum(0).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else sums.sum(0).to(ctx.bias_dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None, None, None
        w = torch.ones_like(sums) if weight is None else weight.to(sums.dtype).expand_as(sums)
        # dx = rstd (w dy - <w dy> - x_hat <w dy x_hat>), <.> = mean over the group
        sizes = (starts.diff()[:-1, None] * (channels // mean.shape[1])).clamp(min=1)
        plain = _per_channel(_over_groups(w * sums, mean.shape[1]) / sizes, channels)
        along = _per_channel(_over_groups(w * dots, mean.shape[1]) / sizes, channels)
        slope = -rstd_c * rstd_c * along
        grad_feats = norm.affine(
            feats, batch, mean_c, slope, -rstd_c * plain, feats.dtype, (grad, w * rstd_c)
        )
        return grad_feats, grad_weight, grad_bias, None, None, None, None


def _per_channel(values: Tensor, channels: int) -> Tensor:
    """[B, G] -> [B, C]: every channel of a group has its value."""
    # repeat_interleave waits for a GPU.
    return values[:, :, None].expand(-1, -1, channels // values.shape[1]).flatten(1)


def _over_groups(values: Tensor, num_groups: int) -> Tensor:
    """[B, C] -> [B, G]: sums over the channels of a group."""
    return values.unflatten(1, (num_groups, -1)).sum(2)


def sample_norm(
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: Tensor,
    num_samples: int,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each sample over its rows and the channels of each group.

    Args:
        feats: [N, C] floating.
        weight, bias: [C] or None.
        batch: [N] integers, sample of each row, 0 <= b < num_samples.
        num_samples: B.
        num_groups: G, a divisor of C.
        eps: Added to the variance.

    Returns:
        [N, C] in the dtype of ``feats``; mean and biased variance [B, G], float32 (float64 in
        float64), without gradient. Differentiable in ``feats``, ``weight`` and ``bias``.
    """
    return SampleNorm.apply(feats, weight, bias, batch, num_samples, num_groups, eps)  # pyright: ignore[reportReturnType]
