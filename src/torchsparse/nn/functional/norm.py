"""Normalisation of sparse tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._autograd.reduce import sample_norm
from torchsparse._recipe import sum_dtype
from torchsparse.nn.functional.pooling import samples
from torchsparse.tensor import SparseTensor, wrap

__all__ = ["group_norm", "instance_norm"]


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


def _check_affine(channels: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"`{name}` must have one entry per channel, [{channels}], got {list(tensor.shape)}"
            )
