"""Normalisation as modules; parameters, buffers and state-dict keys are those of PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from torchsparse._autograd.late_norm import late_batch_norm
from torchsparse._autograd.sync_norm import normalise_together
from torchsparse._capacity import row_count
from torchsparse._ops.dispatch import is_served
from torchsparse._recipe import Norm, sum_dtype
from torchsparse._settings import settings
from torchsparse._validate import check_feats, check_same_device
from torchsparse.nn.functional.norm import (
    group_norm,
    instance_norm,
    traced_batch_norm,
    traced_running_statistics,
)
from torchsparse.nn.utils.apply import fapply
from torchsparse.tensor import SparseTensor, pending, put_off, wrap

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "SyncBatchNorm", "convert_sync_batchnorm"]

_ONLY_REAL_ROWS = (
    "batch statistics of rows that are not all real, as in training.graphed, need CUDA features "
    "other than float64, torchsparse.backends.fuse, eps > 0 and running statistics, or none, "
    "beside the features"
)

# The base classes take dense tensors.
# pyright: reportIncompatibleMethodOverride=false


class _OverRows(_BatchNorm):
    """Batch normalisation of this process's rows; see `BatchNorm`."""

    def forward(self, input: SparseTensor) -> SparseTensor:
        training = self.training
        if not training and not torch.is_grad_enabled():
            joined = self._join(input)
            if joined is not None:
                return joined
        if training or self._takes_the_batch():
            joined = self._by_batch(input)
            if joined is not None:
                return joined
            if row_count(input.coords) is not None:
                raise RuntimeError(_ONLY_REAL_ROWS)
        if is_compiling():  # how many rows there are, is not known
            return fapply(input, self._traced)
        if input.feats.shape[0] == 0:
            return wrap(input.feats, input)
        return fapply(input, partial(_BatchNorm.forward, self))

    def _takes_the_batch(self) -> bool:
        """In evaluation too: there are no running statistics."""
        buffers = self._buffers
        return buffers.get("running_mean") is None and buffers.get("running_var") is None

    def _traced(self, feats: Tensor) -> Tensor:
        """What PyTorch's layer computes, in operations that take any number of rows."""
        self._check_input_dim(feats)
        running_mean, running_var = self.running_mean, self.running_var
        known = (None, None) if self.training else (running_mean, running_var)
        out, mean, var = traced_batch_norm(feats, self.weight, self.bias, *known, self.eps)
        if not self.training or not self.track_running_stats:
            return out
        if running_mean is not None and running_var is not None:
            traced_running_statistics(
                feats.shape[0], mean, var, running_mean, running_var,
                self.num_batches_tracked, self.momentum,
            )  # fmt: skip
        return out

    def _join(self, input: SparseTensor) -> SparseTensor | None:
        """Normalisation by running statistics, put off so that more can join it."""
        # Straight from the tables: `self.weight` takes a detour of a microsecond.
        buffers, parameters = self._buffers, self._parameters
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        if mean is None or var is None or "weight" not in parameters:
            return None
        chain = pending(input) or put_off(input)
        if chain is None:
            return None
        rows, channels = chain.shape
        if rows == 0 or channels != self.num_features:
            return None
        weight, bias = parameters["weight"], parameters["bias"]
        if (weight is None) != (bias is None):
            return None  # a convolution's epilogue has both or neither
        joined = chain.normalised(Norm(mean, var, weight, bias, self.eps))
        return None if joined is None else wrap(joined, input)

    def _by_batch(self, input: SparseTensor) -> SparseTensor | None:
        """Normalisation by the statistics of these rows, which are taken and recorded now."""
        if not settings.fuse or is_compiling():
            return None
        feats = input.feats
        if not isinstance(feats, Tensor) or not is_served("batch_norm", feats):
            return None
        if feats.dim() != 2 or not feats.is_floating_point():
            return None
        buffers, parameters = self._buffers, self._parameters
        rows, channels = feats.shape
        if rows < 2 or channels != self.num_features or channels == 0 or self.eps <= 0:
            return None
        if "weight" not in parameters or "bias" not in parameters:
            return None
        weight, bias = parameters["weight"], parameters["bias"]
        mean = var = batches = None
        if self.track_running_stats:
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            batches = buffers.get("num_batches_tracked")
            if mean is None or var is None or batches is None or batches.device != feats.device:
                return None
        if not _fit(feats, weight, bias, mean, var):
            return None
        momentum, eps = self.momentum, self.eps
        joined = late_batch_norm(
            feats, weight, bias, mean, var, batches, momentum, eps, row_count(input.coords)
        )
        return wrap(joined, input)


def _fit(feats: Tensor, *own: Tensor | None) -> bool:
    """Whether kernels can use what a module owns beside these features."""
    device, allowed = feats.device, (feats.dtype, sum_dtype(feats.dtype))
    for tensor in own:
        if tensor is not None and (
            tensor.dtype not in allowed or tensor.device != device or not tensor.is_contiguous()
        ):
            return False
    return True


class BatchNorm(_OverRows, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over the rows of all samples; same arguments.

    [N, C] features -> [N, C], in their dtype. Without rows, features come back as they are and the
    running statistics stay. In training on a GPU, a sum and an activation that follow join its
    pass over the features.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None = their mean over all batches.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation.

    Attributes:
        weight, bias: [C], or None without ``affine``.
        running_mean, running_var: [C], or None without ``track_running_stats``.

    Raises:
        ValueError: One row in training; features without two axes.
    """


class GroupNorm(nn.GroupNorm):
    """Per sample, over its rows and the channels of each group; arguments of `nn.GroupNorm`.

    [N, C] features -> [N, C], in their dtype. Statistics in float32 (float64 in float64), also
    under autocast.

    Args:
        num_groups, num_channels: G and C; G divides C.
        eps: Added to the variance.
        affine: Learn a weight and a bias per channel.

    Attributes:
        weight, bias: [C], or None without ``affine``.

    Raises:
        ValueError: Shapes that do not fit, a negative batch index.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class InstanceNorm(nn.InstanceNorm1d):
    """Per sample and channel, over its rows; arguments of `nn.InstanceNorm1d`.

    [N, C] features -> [N, C], in their dtype. Statistics in float32 (float64 in float64), also
    under autocast. With ``track_running_stats``, evaluation uses the running ones, as in PyTorch.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation.

    Attributes:
        weight, bias: [C], or None without ``affine``.
        running_mean, running_var: [C], or None without ``track_running_stats``.

    Raises:
        ValueError: Shapes that do not fit, a negative batch index.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        use_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_input,
            momentum,
            self.eps,
        )


class SyncBatchNorm(_OverRows, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``: statistics over the rows of all processes; same arguments.

    [N, C] features -> [N, C], in their dtype. Works with every backend, on a CPU too. Each process
    of the group must take part in every forward and backward pass; it may have any number of rows,
    also none. Outside a process group, in evaluation and in a group of one it is `BatchNorm`.
    Differentiable once.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None = their mean over all batches.
        affine: Learn a weight and a bias per channel.
        track_running_stats: Keep running statistics for evaluation.
        process_group: The processes that share statistics; None = all.

    Attributes:
        weight, bias: [C], or None without ``affine``.
        running_mean, running_var: [C], or None without ``track_running_stats``.

    Raises:
        ValueError: In every process, if all together have one row; features of another shape.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        group = self._company()
        if group is None:
            return super().forward(input)
        if row_count(input.coords) is not None:
            raise RuntimeError("graphs cannot hold batch statistics that processes share")
        return fapply(input, self._together, group)

    def _company(self) -> Any:
        """The group, if other processes wait for this one's statistics; else None."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _together(self, feats: Tensor, group: Any) -> Tensor:
        check_feats(feats)
        if feats.shape[1] != self.num_features or self.num_features == 0:
            raise ValueError(
                f"`feats` must have shape [N, {max(self.num_features, 1)}], "
                f"got {list(feats.shape)}"
            )
        mean = var = batches = None
        if self.track_running_stats:
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        weight, bias = self.weight, self.bias
        check_same_device(feats=feats, weight=weight, bias=bias, running_mean=mean)
        return normalise_together(
            feats, weight, bias, mean, var, batches, self.momentum, self.eps, group
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace every batch norm in ``module`` by its synchronising sibling.

        Args:
            module: Changed in place. `BatchNorm` becomes `SyncBatchNorm`, the batch norms of
                ``torch.nn`` become ``torch.nn.SyncBatchNorm``; parameters and buffers are the same
                objects, state-dict keys stay.
            process_group: Of the new modules; None = all processes.

        Returns:
            ``module``; a new module if it is a batch norm itself.
        """
        return convert_sync_batchnorm(module, process_group)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every batch norm in ``module`` by its synchronising sibling.

    Args:
        module: Changed in place, as by `SyncBatchNorm.convert_sync_batchnorm`. Parameters and
            buffers, [C] each, are the same objects; state-dict keys stay.
        process_group: Of the new modules; None = all processes.

    Returns:
        ``module``; a new module if it is a batch norm itself.
    """
    if isinstance(module, BatchNorm):
        return _synchronising(module, process_group)
    if isinstance(module, _BatchNorm):
        if isinstance(module, nn.SyncBatchNorm):
            return module
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in list(module.named_children()):
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def _synchronising(norm: BatchNorm, process_group: Any) -> SyncBatchNorm:
    """A `SyncBatchNorm` that shares the parameters and buffers of ``norm``."""
    found = SyncBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        process_group,
    )
    found._parameters.update(norm._parameters)
    found._buffers.update(norm._buffers)
    found.training = norm.training
    return found
