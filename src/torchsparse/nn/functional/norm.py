"""Normalisation of sparse tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._autograd.reduce import sample_norm
from torchsparse._compiling import left_to_python
from torchsparse._recipe import sum_dtype
from torchsparse.nn.functional.pooling import samples
from torchsparse.tensor import SparseTensor, wrap

__all__ = ["group_norm", "instance_norm"]


@left_to_python
def group_norm(
    input: SparseTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> SparseTensor:
    """Normalise each sample over its rows and the channels of each group (biased variance).

    Args:
        input: Features [N, C].
        num_groups: A divisor of C.
        weight, bias: [C] or None.
        eps: Added to the variance.

    Returns:
        Features in their dtype; statistics in float32 (float64 in float64), also under autocast.

    Raises:
        ValueError: Shapes that do not fit, a negative batch index.
    """
    batch, num = samples(input)
    channels = input.feats.shape[1]
    _check_affine(channels, weight=weight, bias=bias)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"`num_groups` must divide the number of channels, got {num_groups} and {channels}"
        )
    if input.feats.numel() == 0:
        return wrap(input.feats, input)
    feats, _, _ = sample_norm(input.feats, weight, bias, batch, num, num_groups, eps)
    return wrap(feats, input)


@left_to_python
def instance_norm(
    input: SparseTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> SparseTensor:
    """Normalise each channel of each sample over its rows (biased variance).

    Args:
        input: Features [N, C].
        running_mean, running_var: [C], updated in place when ``use_input_stats`` is set: with the
            means over the samples of their mean and unbiased variance (that of a single row
            counts as 0; samples without rows do not count).
        weight, bias: [C] or None.
        use_input_stats: Whether to normalise by the statistics of the input, or the running ones.
        momentum: Share of the new statistics.
        eps: Added to the variance.

    Returns:
        Features in their dtype; statistics in float32 (float64 in float64), also under autocast.

    Raises:
        ValueError: Shapes that do not fit, a negative batch index, no running statistics where
            they are needed.
    """
    batch, num = samples(input)
    feats = input.feats
    channels = feats.shape[1]
    _check_affine(
        channels, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    if feats.numel() == 0:
        return wrap(feats, input)
    if not use_input_stats:
        return wrap(_normalise(feats, running_mean, running_var, weight, bias, eps), input)
    feats, mean, var = sample_norm(feats, weight, bias, batch, num, channels, eps)
    if running_mean is not None and running_var is not None:
        _update(running_mean, running_var, mean, var, batch, momentum)
    return wrap(feats, input)


def _normalise(
    feats: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``feats`` by given statistics; parameters in the dtype that sums have."""
    if mean is None or var is None:
        raise ValueError("`running_mean` and `running_var` are needed unless `use_input_stats`")
    dtype = sum_dtype(feats.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    out = torch.nn.functional.batch_norm(
        feats.to(dtype), mean.to(dtype), var.to(dtype), weight, bias, eps=eps
    )
    return out.to(feats.dtype)


@torch.no_grad()
def _update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    batch: Tensor,
    momentum: float,
) -> None:
    """Move running statistics [C] towards the mean over samples of ``mean`` and ``var`` [B, C]."""
    rows = torch.bincount(batch, minlength=mean.shape[0])[:, None]
    present = rows > 0
    num = present.sum()
    unbiased = torch.where(rows > 1, var * rows / (rows - 1).clamp(min=1), 0)
    for running, values in ((running_mean, mean), (running_var, unbiased)):
        new = torch.where(present, values, 0).sum(0) / num
        running.lerp_(new.to(running.dtype), momentum)


def traced_batch_norm(
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm for programs that do not know how many rows come; PyTorch's asks.

    Args:
        feats: [N, C] floating.
        weight, bias: [C] or None.
        mean, var: Known statistics, [C]; None: those of the rows.
        eps: Added to the biased variance.

    Returns:
        [N, C] in the dtype of ``feats``, computed in float32 (float64 in float64); the mean and
        the biased variance it was normalised by, [C], 0 without rows.

    Raises:
        RuntimeError: A single row without known statistics, when the program runs.
    """
    rows, dtype = feats.shape[0], sum_dtype(feats.dtype)
    x = feats.to(dtype)
    if mean is None or var is None:
        torch._check(rows != 1, lambda: "batch norm needs more than one row in training, got 1")
        count = torch.sym_max(rows, 1)
        mean = x.sum(0) / count
        # The gradient of the variance need not see the mean: deviations from it add up to 0.
        var = (x - mean.detach()).square().sum(0) / count
    mean, var = mean.to(dtype), var.to(dtype)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    out = (x - mean) * scale
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(feats.dtype), mean, var


@torch.no_grad()
def traced_running_statistics(
    rows: int,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    momentum: float | None,
) -> None:
    """Move the running statistics as ``nn.BatchNorm1d`` does; no rows move nothing.

    Args:
        rows: N.
        mean, var: [C], from `traced_batch_norm`.
        running_mean, running_var: [C], written to; the variance is the unbiased one.
        batches: [] int64, counted up, or None.
        momentum: Share of these rows in the running statistics; None: 1 / batches.
    """
    present = torch.sym_min(rows, 1)
    share: Any = 0.0 if momentum is None else momentum
    if batches is not None:
        batches.add_(present)
        if momentum is None:
            share = 1 / batches.clamp(min=1)
    unbiased = var * torch.sym_max(rows, 1) / torch.sym_max(rows - 1, 1)
    for running, value in ((running_mean, mean), (running_var, unbiased)):
        running.add_((value - running) * share * present)


def _check_affine(channels: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"`{name}` must have one entry per channel, [{channels}], got {list(tensor.shape)}"
            )
