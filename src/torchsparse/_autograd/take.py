"""Derivative of a choice of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._ops import points

__all__ = ["TakeRows", "take_rows"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class TakeRows(Function):
    """Distinct rows of a grid; the gradient is put back where they came from."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = grid.shape
        return points.gather_rows(grid, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        num = ctx.shape[:-1].numel()
        return points.scatter_rows(grad, index, num).view(ctx.shape), None


def take_rows(grid: Tensor, index: Tensor) -> Tensor:
    """Rows of ``grid``, each at most once, so that backward adds nothing up.

    Args:
        grid: [..., C] floating, the leading axes counted row-major.
        index: [N] int64, distinct.

    Returns:
        [N, C]. Differentiable in ``grid``.
    """
    return TakeRows.apply(grid, index)  # pyright: ignore[reportReturnType]
