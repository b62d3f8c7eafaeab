"""Derivatives of what happens to features when points become voxels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._ops import reduce
from torchsparse._ops.voxels import VoxelGroups

__all__ = ["GroupSum", "group_sum"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class GroupSum(Function):
    """Sums over the points of each voxel, over their number if asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        order: Tensor,
        starts: Tensor,
        inverse: Tensor,
        counts: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inverse, counts)
        groups = reduce.Groups(order, starts)
        return reduce.segment_sum(feats, groups, counts=counts, dtype=feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, counts = ctx.saved_tensors
        if counts is not None:
            dtype = torch.promote_types(grad.dtype, torch.float32)
            grad = (grad / counts[:, None].to(dtype)).to(grad.dtype)
        return grad.index_select(0, inverse), None, None, None, None


def group_sum(feats: Tensor, groups: VoxelGroups, counts: Tensor | None = None) -> Tensor:
    """Sums, or means, over the points of each voxel.

    Args:
        feats: [N, C] floating.
        groups: Of N points.
        counts: [M] integers, by which the sums are divided: those of the groups for means.

    Returns:
        [M, C] in the dtype of ``feats``, summed in float32 (float64 in float64) in the order of
        the points. Differentiable in ``feats``.
    """
    return GroupSum.apply(feats, groups.order, groups.starts, groups.inverse, counts)  # pyright: ignore[reportReturnType]
