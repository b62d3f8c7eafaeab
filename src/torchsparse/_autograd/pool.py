"""Derivatives of pooling over a kernel map. Every gradient is gathered, none is scattered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._capacity import row_count
from torchsparse._kernel_map import KernelMap
from torchsparse._ops import pool
from torchsparse._recipe import sum_dtype

__all__ = ["max_pool", "max_unpool", "sum_pool", "top_pool"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


def _table(kmap: KernelMap, transposed: bool) -> Tensor:
    return kmap.transposed.neighbors if transposed else kmap.neighbors


class _SumPool(Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, kmap: KernelMap, transposed: bool, mean: bool) -> Tensor:
        ctx.kmap, ctx.transposed, ctx.mean, ctx.dtype = kmap, transposed, mean, feats.dtype
        limit = row_count(kmap.in_coords if transposed else kmap.out_coords)
        return pool.pool_sum(feats, _table(kmap, transposed), None, mean, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shares = None
        if ctx.mean:
            table = _table(ctx.kmap, ctx.transposed)
            shares = pool.pool_shares(table, sum_dtype(grad.dtype))
        back = pool.pool_sum(grad, _table(ctx.kmap, not ctx.transposed), shares)
        return back.to(ctx.dtype), None, None, None


def sum_pool(feats: Tensor, kmap: KernelMap, transposed: bool, mean: bool) -> Tensor:
    """Sum, or average, the neighbours of each output.

    Args:
        feats: [N, C] floating, on the map's inputs (its outputs if ``transposed``).
        kmap: From fine to coarse.
        transposed: Read the map from coarse to fine.
        mean: Divide by the number of neighbours that exist.

    Returns:
        [M, C] in the dtype of ``feats``, summed in float32 (float64 in float64), 0 without
        neighbours. Differentiable; the gradient is summed in the same way.
    """
    return _SumPool.apply(feats, kmap, transposed, mean)  # pyright: ignore[reportReturnType]


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, kmap: KernelMap) -> tuple[Tensor, Tensor]:
        out, rows = pool.pool_max(feats, kmap.neighbors, row_count(kmap.out_coords))
        ctx.save_for_backward(rows)
        ctx.mark_non_differentiable(rows)
        ctx.kmap = kmap
        return out, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return pool.unpool_max(grad, rows, ctx.kmap.transposed.neighbors), None


def max_pool(feats: Tensor, kmap: KernelMap) -> tuple[Tensor, Tensor]:
    """Maximum over the neighbours of each output.

    Args:
        feats: [N, C] floating, on the map's inputs.
        kmap: From fine to coarse.

    Returns:
        [M, C] in the dtype of ``feats``, 0 without neighbours, NaN where one is NaN; and
        [M, C] int32, the input row each value comes from, that of the lowest tap among equal
        ones, -1 without neighbours. The gradient goes to those rows.
    """
    return _MaxPool.apply(feats, kmap)  # pyright: ignore[reportReturnType]


def top_pool(feats: Tensor, kmap: KernelMap) -> Tensor:
    """The first result of `max_pool`; its rows are not written unless a gradient wants them."""
    if feats.requires_grad and torch.is_grad_enabled():
        return max_pool(feats, kmap)[0]
    return pool.pool_top(feats, kmap.neighbors, row_count(kmap.out_coords))


class _MaxUnpool(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, kmap: KernelMap) -> Tensor:
        ctx.save_for_backward(rows)
        limit = row_count(kmap.in_coords)
        return pool.unpool_max(values, rows, kmap.transposed.neighbors, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return pool.pick_rows(grad, rows), None, None


def max_unpool(values: Tensor, rows: Tensor, kmap: KernelMap) -> Tensor:
    """Send values back to the rows that `max_pool` found them in.

    Args:
        values: [M, C] floating, on the map's outputs.
        rows: [M, C] int32, the second result of `max_pool` over the same map.
        kmap: From fine to coarse.

    Returns:
        [N, C] in the dtype of ``values``, 0 where nothing came from; values of windows that
        overlap in a row are summed in float32 (float64 in float64). Differentiable.
    """
    return _MaxUnpool.apply(values, rows, kmap)  # pyright: ignore[reportReturnType]
