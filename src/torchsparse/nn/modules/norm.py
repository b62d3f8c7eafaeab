"""Normalisation as modules; parameters, buffers and state-dict keys are those of PyTorch."""

from __future__ import annotations

from torch import nn

from torchsparse.nn.functional.norm import group_norm, instance_norm
from torchsparse.nn.utils.apply import fapply
from torchsparse.tensor import SparseTensor, wrap

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm"]

# The base classes take dense tensors.
# pyright: reportIncompatibleMethodOverride=false


class BatchNorm(nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over the rows of all samples; same arguments.

    Without rows, features come back as they are and the running statistics stay.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        if input.feats.shape[0] == 0:
            return wrap(input.feats, input)
        return fapply(input, super().forward)


class GroupNorm(nn.GroupNorm):
    """Per sample, over its rows and the channels of each group; arguments of `nn.GroupNorm`.

    Statistics in float32 (float64 in float64), also under autocast.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class InstanceNorm(nn.InstanceNorm1d):
    """Per sample and channel, over its rows; arguments of `nn.InstanceNorm1d`.

    Statistics in float32 (float64 in float64), also under autocast. With ``track_running_stats``,
    evaluation uses the running ones, as in PyTorch.
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
