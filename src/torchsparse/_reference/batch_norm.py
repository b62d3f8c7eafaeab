"""Batch normalisation in training, over all rows, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._recipe import sum_dtype

__all__ = ["batch_moments_", "grad_rows", "grad_sums", "normalise"]


@torch.no_grad()
def batch_moments_(
    feats: Tensor,
    eps: float,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    limit: Tensor | None = None,
) -> Tensor:
    """Mean and 1 / sqrt(var + eps) of each channel; running statistics follow.  -> [2, C]."""
    feats = feats.to(sum_dtype(feats.dtype))
    if limit is None:
        rows: Any = feats.shape[0]
        found, centre = torch.var_mean(feats, 0, correction=0)
        unbiased = found * (rows / max(rows - 1, 1))
    else:
        rows = limit.to(feats.dtype).clamp(min=1)
        centre = _unpadded(feats, limit).sum(0) / rows
        found = _unpadded((feats - centre).square(), limit).sum(0) / rows
        unbiased = found * (rows / (rows - 1).clamp(min=1))
    if batches is not None:
        batches.add_(1 if limit is None else limit[0] > 0)
    if mean is not None and var is not None:
        if momentum is None:
            assert batches is not None
            share = 1 / batches.to(found.dtype).clamp(min=1)
        else:
            share = found.new_full((), momentum)  # filled on the device
        if limit is not None:  # no rows, as in padding alone, move nothing
            share = torch.where(limit > 0, share, 0)
        mean.copy_(mean * (1 - share) + centre * share)
        var.copy_(var * (1 - share) + unbiased * share)
    return torch.stack([centre, 1 / (found + eps).sqrt()])


def _unpadded(rows: Tensor, limit: Tensor | None) -> Tensor:
    """The same with zeros from row ``limit`` on, whatever is there."""
    if limit is None:
        return rows
    live = torch.arange(rows.shape[0], device=rows.device) < limit
    return torch.where(live[:, None], rows, 0)


def _centred(
    feats: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x - mean [N, C], its factor [C], and the normalised rows [N, C]."""
    rows = feats.to(moments.dtype) - moments[0]
    scale = moments[1] if weight is None else moments[1] * weight
    return rows, scale, rows * scale if bias is None else rows * scale + bias


def normalise(
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float | None,
    limit: Tensor | None = None,
) -> Tensor:
    """``act((feats - mean) * invstd * weight + bias + residual)``.  -> [N, C]."""
    _, _, rows = _centred(feats, moments, weight, bias)
    if residual is not None:
        rows = rows + residual
    if slope is not None:
        rows = torch.where(rows < 0, rows * slope if slope else 0, rows)
    return _unpadded(rows, limit).to(feats.dtype)


def _passed(grad: Tensor, normalised: Tensor, out: Tensor | None, slope: float | None) -> Tensor:
    """The gradient behind the activation, in the dtype of the sums."""
    grad = grad.to(normalised.dtype)
    if slope is None:
        return grad
    flat = (normalised if out is None else out) <= 0
    return torch.where(flat, grad * slope, grad)


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
    """Means [2, C] for `grad_rows`, gradients of weight and bias."""
    rows, _, normalised = _centred(feats, moments, weight, bias)
    grad = _passed(grad, normalised, out, slope)
    total = _unpadded(grad, limit).sum(0)
    along = _unpadded(grad * rows, limit).sum(0) * moments[1]
    count = feats.shape[0] if limit is None else limit.clamp(min=1)
    means = torch.stack([total, along * moments[1]]) / count
    return (
        means,
        None if weight is None else along.to(weight.dtype),
        None if bias is None else total.to(bias.dtype),
    )


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
    """Gradients of feats and residual."""
    rows, scale, normalised = _centred(feats, moments, weight, bias)
    grad = _passed(grad, normalised, out, slope)
    grad_feats = None
    if means is not None:
        grad_feats = _unpadded(scale * (grad - means[0] - rows * means[1]), limit).to(feats.dtype)
    return grad_feats, _unpadded(grad, limit).to(feats.dtype) if residual else None
