"""Derivatives of the moves between points, voxels and dense grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._capacity import PAD, row_count
from torchsparse._compiling import operator, with_gradient, without_second_gradient
from torchsparse._flags import Complaint, complain_if, flag_word
from torchsparse._ops import points, reduce
from torchsparse._validate import (
    check_coords,
    check_feats,
    check_rows,
    check_same_device,
    wide_ints,
)

__all__ = ["Devoxelize", "ToDense", "Voxelize", "devoxelize", "to_dense", "voxelize"]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


class ToDense(Function):
    """Voxels to a dense grid; the gradient is gathered from the cells."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, coords: Tensor, extents: tuple[int, ...]) -> Tensor:
        grid, index = _dense(feats, coords, extents)
        ctx.save_for_backward(index)
        return grid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return points.gather_rows(grad, index), None, None


def to_dense(feats: Tensor, coords: Tensor, spatial_range: Any) -> Tensor:
    """Write voxels into a dense grid, channels last.

    Args:
        feats: [N, C] floating.
        coords: [N, 4] integers, columns (b, x, y, z). Of equal rows the last is kept.
        spatial_range: (B, X, Y, Z); further entries are ignored.

    Returns:
        [B, X, Y, Z, C] in the dtype of ``feats``, 0 where no voxel is. Differentiable in
        ``feats``.

    Raises:
        TypeError: Features that are not floating, coordinates that are not integers.
        ValueError: Shapes that do not fit, a range with too few entries, a row outside it.
    """
    check_feats(feats)
    check_coords(coords, ndim=None)
    check_rows(feats, coords)
    check_same_device(feats=feats, coords=coords)
    columns = coords.shape[1]
    entries = spatial_range.tolist() if hasattr(spatial_range, "tolist") else spatial_range
    extents = tuple(int(entry) for entry in entries)[:columns]
    if len(extents) < columns or any(extent < 0 for extent in extents):
        raise ValueError(
            f"`spatial_range` must hold {columns} extents, batch size first, got {spatial_range}"
        )
    if torch.compiler.is_compiling():
        return _dense_op(feats, coords, list(extents))
    if feats.requires_grad and torch.is_grad_enabled():
        return ToDense.apply(feats, coords, extents)  # pyright: ignore[reportReturnType]
    return _dense(feats, coords, extents)[0]


def _dense(feats: Tensor, coords: Tensor, extents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The grid [*extents, C] and the cell of each row, [N] int64."""
    word, coords = flag_word(coords.device), wide_ints(coords)
    grid, index = points.place_rows(feats, coords, extents, word, Complaint.DENSE.bit)
    if word is None:
        outside = index < 0
        if row_count(coords) is not None:  # padding has no cell
            outside &= coords[:, 0] != PAD
        complain_if(outside.any(), Complaint.DENSE, lambda: f"spatial_range = {extents}")
    # Not a view: the output of a Function can then be changed in place.
    return grid.resize_(*extents, feats.shape[1]), index


# ------------------------------------------------------------------ for compiled programs
def _fake_dense(feats: Tensor, coords: Tensor, extents: list[int]) -> Tensor:
    return feats.new_empty((*extents, feats.shape[1]))


@operator("to_dense(Tensor feats, Tensor coords, SymInt[] extents) -> Tensor", _fake_dense)
def _dense_op(feats: Tensor, coords: Tensor, extents: list[int]) -> Tensor:
    """`to_dense` with its arguments checked."""
    return _dense(feats, coords, tuple(extents))[0]


def _fake_from_dense(grid: Tensor, coords: Tensor, extents: list[int]) -> Tensor:
    return grid.new_empty((coords.shape[0], grid.shape[-1]))


@operator("from_dense(Tensor grid, Tensor coords, SymInt[] extents) -> Tensor", _fake_from_dense)
def _from_dense_op(grid: Tensor, coords: Tensor, extents: list[int]) -> Tensor:
    """The rows [N, C] of a grid [B, X, Y, Z, C] at coordinates: the derivative of `to_dense`."""
    return points.gather_rows(grid, points.flat_index(wide_ints(coords), tuple(extents)))


def _save_cells(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, coords, ctx.extents = inputs
    ctx.save_for_backward(coords)


def _from_cells(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (coords,) = ctx.saved_tensors
    return _from_dense_op(grad, coords, ctx.extents), None, None


with_gradient(_dense_op, _from_cells, _save_cells)
without_second_gradient(_from_dense_op)


# ------------------------------------------------------------------ points and voxels


class Voxelize(Function):
    """Sums of rows per voxel, divided by given counts."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(index, counts)
        groups = reduce.group_rows(index, counts.shape[0])
        return reduce.segment_sum(feats, groups, None, counts, feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, counts = ctx.saved_tensors
        return points.share_rows(grad, index, counts), None, None


def voxelize(feats: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Sum rows per voxel and divide by ``counts``.

    Args:
        feats: [N, C] floating.
        index: [N] integers, voxel of each row; outside 0 <= i < M = none.
        counts: [M] integers; a voxel with count 0 stays 0.

    Returns:
        [M, C] in the dtype of ``feats``, summed in float32 (float64 in float64). Differentiable in
        ``feats``.
    """
    return Voxelize.apply(feats, index, counts)  # pyright: ignore[reportReturnType]


class Devoxelize(Function):
    """Weighted sums of voxel rows around points."""

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, index: Tensor, weights: Tensor, word: Tensor | None, bit: int
    ) -> Tensor:
        # Features are needed for the gradient of the weights alone.
        saved = feats if weights.requires_grad else None
        ctx.save_for_backward(index, weights, saved)
        ctx.num_voxels = feats.shape[0]
        return points.devoxelize(feats, index, weights, word, bit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, weights, feats = ctx.saved_tensors
        grad_feats = grad_weights = None
        if ctx.needs_input_grad[0]:
            groups = reduce.group_rows(index.flatten(), ctx.num_voxels)
            shares = weights.flatten().index_select(0, groups.order)
            pairs = reduce.Groups(groups.order // max(index.shape[1], 1), groups.starts)
            grad_feats = reduce.segment_sum(grad, pairs, shares, None, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_weights = points.devoxelize_weight_grad(feats, index, grad).to(weights.dtype)
        return grad_feats, None, grad_weights, None, None


def devoxelize(feats: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Interpolate voxel rows at points.

    Args:
        feats: [M, C] floating.
        index: [N, J] integers, rows around each point; negative = none.
        weights: [N, J] floating.

    Returns:
        [N, C] in the dtype of ``feats``, summed in float32 (float64 in float64). Differentiable in
        ``feats`` and ``weights``.

    Raises:
        ValueError: An index of M or more (noticed later on a GPU, and taken for none).
    """
    num, word = feats.shape[0], flag_word(feats.device)
    if word is None:
        complain_if((index >= num).any(), Complaint.INDEX, lambda: f"{num} rows")
    out = Devoxelize.apply(feats, index, weights, word, Complaint.INDEX.bit)
    return out  # pyright: ignore[reportReturnType]
