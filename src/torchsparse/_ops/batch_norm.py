"""Batch normalisation in training, over all rows: the choice of implementation.

y = act((x - mean) * invstd * weight + bias + residual),   act(v) = v if v > 0 else slope * v
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from torchsparse._ops.dispatch import reference, twin

__all__ = ["batch_moments_", "grad_rows", "grad_sums", "normalise"]


def _choose(feats: Tensor) -> ModuleType:
    if feats.dtype == torch.float64:
        return reference("batch_norm")
    return twin("batch_norm", feats)


def batch_moments_(
    feats: Tensor,
    eps: float,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    limit: Tensor | None = None,
) -> Tensor:
    """Statistics of each channel; the running ones follow, as those of ``nn.BatchNorm1d``.

    Args:
        feats: [N, C] floating, N >= 1, C >= 1.
        eps: Added to the biased variance.
        mean, var: [C] floating and contiguous, written to; the variance is the unbiased one, 0 of
            one row. Both or neither.
        batches: [] int64, counted up, or None.
        momentum: Share of these rows in the running statistics; None: 1 / batches.
        limit: [1] int64 on the device, how many rows are real (`_capacity`); None: all.

    Returns:
        [2, C] float32 (float64 for float64): mean and 1 / sqrt(var + eps), without gradient.
    """
    return _choose(feats).batch_moments_(feats, eps, mean, var, batches, momentum, limit)


def normalise(
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float | None,
    limit: Tensor | None = None,
) -> Tensor:
    """Normalise, add, activate, in one pass.

    Args:
        feats: [N, C] floating.
        moments: From `batch_moments_`.
        weight, bias: [C] floating, None = 1 and 0.
        residual: [N, C] in the dtype of feats, or None.
        slope: Of negative values, 0 is ReLU; None = no activation.
        limit: As in `batch_moments_`.

    Returns:
        [N, C] in the dtype of feats, rounded once; zeros behind the real rows.
    """
    return _choose(feats).normalise(feats, moments, weight, bias, residual, slope, limit)


def grad_sums(
    grad: Tensor,
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    slope: float | None,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the gradients need of all rows: the first pass of the derivative.

    Args:
        grad: [N, C], of the result.
        feats, moments, weight, bias, slope: Of `normalise`.
        out: Its result, whose sign tells where the activation was flat; None without a residual,
            where that follows from the rest.
        limit: As in `batch_moments_`.

    Returns:
        With g = grad times the slope of the activation and x_hat = (x - mean) * invstd:
        [2, C] as ``moments``, the means of g and of g * x_hat * invstd; the sums of g * x_hat and
        of g in the dtypes of weight and bias, None for None.
    """
    return _choose(feats).grad_sums(grad, feats, moments, weight, bias, out, slope, limit)


def grad_rows(
    grad: Tensor,
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    slope: float | None,
    means: Tensor | None,
    residual: bool,
    limit: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of feats and residual: the second pass.

    Args:
        grad, feats, moments, weight, bias, out, slope: Of `grad_sums`.
        means: Its first result; None if feats needs no gradient.
        residual: Whether the residual needs one.
        limit: As in `batch_moments_`.

    Returns:
        [N, C] in the dtype of feats: ``weight * invstd * (g - means[0] - (x - mean) * means[1])``
        and g; None where not wanted; zeros behind the real rows.
    """
    return _choose(feats).grad_rows(
        grad, feats, moments, weight, bias, out, slope, means, residual, limit
    )
