"""Derivatives of rows that move as a whole: to other sites, or from samples to their rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, where
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._ops import points, reduce

__all__ = ["move_rows", "repeat_rows"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class _MoveRows(Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, source: Tensor, place: Tensor, fill: float) -> Tensor:
        ctx.save_for_backward(place)
        if feats.shape[0] == 0:
            return feats.new_full((source.shape[0], feats.shape[1]), fill)
        rows = points.gather_rows(feats, source)
        return rows if fill == 0 else where(source[:, None] < 0, fill, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        if grad.shape[0] == 0:
            return grad.new_zeros((place.shape[0], grad.shape[1])), None, None, None
        return points.gather_rows(grad, place), None, None, None


def move_rows(feats: Tensor, source: Tensor, place: Tensor, fill: float = 0.0) -> Tensor:
    """Put each row where it belongs; both ways are gathers.

    Args:
        feats: [N, C] floating.
        source: [M] int64, the row at each place, -1 = none.
        place: [N] int64, the place of each row, -1 = none; ``source[place[n]] = n``.
        fill: What stands at a place without a row.

    Returns:
        [M, C] in the dtype of ``feats``. Differentiable.
    """
    return _MoveRows.apply(feats, source, place, fill)  # pyright: ignore[reportReturnType]


class _RepeatRows(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num = values.shape[0]
        if ctx.num == 0:
            return values.new_zeros((index.shape[0], values.shape[1]))
        return points.gather_rows(values, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = reduce.segment_sum(grad, reduce.group_rows(index, ctx.num))
        return total.to(grad.dtype), None


def repeat_rows(values: Tensor, index: Tensor) -> Tensor:
    """A copy of row ``index[n]`` for each n.

    Args:
        values: [B, C] floating.
        index: [N] int64, 0 <= i < B; -1 = none.

    Returns:
        [N, C] in the dtype of ``values``, 0 for none. Differentiable; gradients are summed in
        float32 (float64 in float64), in a fixed order.
    """
    return _RepeatRows.apply(values, index)  # pyright: ignore[reportReturnType]
