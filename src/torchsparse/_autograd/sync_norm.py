"""Batch normalisation in training over the rows of all processes of a group.

Forward shares the count, mean and sum of squared distances of each process, and puts them
together as Chan, Golub and LeVeque do ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979):

    n = sum n_r      mean = sum n_r mean_r / n      squares = sum squares_r + n_r (mean_r - mean)^2

Backward shares the sums of g and g * x_hat. Both are one ``all_reduce`` of a few rows of sums,
which every backend has; forward gives each process a row of zeros to fill, so that sums are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._ops import batch_norm
from torchsparse._recipe import sum_dtype

__all__ = ["normalise_together"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class _Sums(NamedTuple):
    """Of the rows of all processes, for each channel."""

    rows: Tensor  # [] floating: n, on the device; above 2^24 a float32 rounds it
    mean: Tensor  # [C] = sum(x) / n, 0 without rows
    squares: Tensor  # [C] = sum((x - mean)^2)


def _gathered(feats: Tensor, group: Any) -> _Sums:
    """Sums over all processes, the same bits in each of them."""
    n, channels = feats.shape
    shape, dtype = (dist.get_world_size(group), 2 * channels + 1), sum_dtype(feats.dtype)
    message = torch.zeros(shape, dtype=dtype, device=feats.device)
    if n > 0:
        mine = message[dist.get_rank(group)]
        mean, squares = mine[:channels], mine[channels : 2 * channels]
        batch_norm.batch_moments_(feats, 1.0, mean, squares, None, 1.0)
        squares.mul_(max(n - 1, 1))  # was the unbiased variance
        mine[2 * channels].fill_(n)
    dist.all_reduce(message, group=group)
    means, squares, counts = message.split([channels, channels, 1], 1)
    rows = counts.sum()
    mean = (means * counts).sum(0) / rows.clamp(min=1)
    return _Sums(rows, mean, (squares + counts * (means - mean).square()).sum(0))


def _record_(
    sums: _Sums,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> None:
    """Running statistics follow, as those of ``nn.BatchNorm1d``."""
    if batches is not None:
        batches.add_(1)
    if mean is None or var is None:
        return
    share: Tensor | float = momentum or 0.0
    if momentum is None and batches is not None:
        share = 1 / batches.to(sums.rows.dtype)
    mean.copy_(mean * (1 - share) + sums.mean * share)
    var.copy_(var * (1 - share) + sums.squares / (sums.rows - 1) * share)


class _Together(Function):
    """(x - mean) * invstd * weight + bias, mean and invstd being functions of all processes' x.

    Gradients of weight and bias are those of this process's rows: whoever trains adds them up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Tensor,
        rows: Tensor,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(feats, weight, bias, moments, rows)
        ctx.group = group
        return _normalised(feats, weight, bias, moments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight, bias, moments, rows = ctx.saved_tensors
        by_feats, by_weight, by_bias, *_ = ctx.needs_input_grad
        n, grad_feats = feats.shape[0], None
        means, grad_weight, grad_bias = _grad_sums(
            grad, feats, moments, weight if by_weight else None, bias if by_bias else None
        )
        if by_feats:
            sums = means * n
            dist.all_reduce(sums, group=ctx.group)
            grad_feats = torch.empty_like(feats)
            if n > 0:
                grad_feats, _ = batch_norm.grad_rows(
                    grad, feats, moments, weight, bias, None, None, sums / rows, False
                )
        return grad_feats, grad_weight, grad_bias, None, None, None


def _normalised(
    feats: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor
) -> Tensor:
    if feats.shape[0] == 0:
        return torch.empty_like(feats)
    return batch_norm.normalise(feats, moments, weight, bias, None, None)


def _grad_sums(
    grad: Tensor, feats: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`_ops.batch_norm.grad_sums`, also without rows."""
    if feats.shape[0] > 0:
        return batch_norm.grad_sums(grad, feats, moments, weight, bias, None, None)
    zeros = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
    return torch.zeros_like(moments), *zeros  # pyright: ignore[reportReturnType]


def normalise_together(
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    eps: float,
    group: Any,
) -> Tensor:
    """Normalise rows by the statistics of all processes; all of them must call it, in one order.

    The number of rows stays on the device; a process with fewer than two of its own waits for it,
    for all of them may have too few.

    Args:
        feats: [N, C] floating, N >= 0, C >= 1; N may differ between processes.
        weight, bias: [C] or None.
        mean, var: Running statistics [C], written to; both or neither.
        batches: [] int64, counted up, or None.
        momentum: Share of these rows in the running statistics; None: 1 / batches.
        eps: Added to the biased variance.
        group: Of ``torch.distributed``, with this process in it.

    Returns:
        [N, C] in the dtype of feats, from statistics in float32 (float64 for float64). Without
        rows in any process, running statistics stay. Differentiable once in feats, weight and
        bias; backward waits for all processes if feats has a gradient.

    Raises:
        ValueError: One row in all processes together; said in each of them.
    """
    with torch.no_grad():
        sums = _gathered(feats, group)
        every = 2 if feats.shape[0] > 1 else int(sums.rows)  # at least
        if every == 1:
            size = torch.Size([1, feats.shape[1]])
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {size}"
            )
        if every > 1:
            _record_(sums, mean, var, batches, momentum)
        rows = sums.rows.clamp(min=1)
        moments = torch.stack([sums.mean, 1 / (sums.squares / rows + eps).sqrt()])
    if torch.is_grad_enabled() and (
        feats.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _Together.apply(feats, weight, bias, moments, rows, group)  # pyright: ignore[reportReturnType]
    return _normalised(feats, weight, bias, moments)
