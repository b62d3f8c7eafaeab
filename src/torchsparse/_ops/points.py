"""Rows between points, voxels and dense grids: the choice of implementation."""

from __future__ import annotations

from torch import Tensor

from torchsparse._ops.dispatch import twin

__all__ = [
    "devoxelize",
    "devoxelize_weight_grad",
    "flat_index",
    "gather_rows",
    "place_rows",
    "scatter_rows",
    "share_rows",
    "trilinear_weights",
]


def flat_index(
    coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Row-major cell of each coordinate row in a box that starts at 0.

    Args:
        coords: [N, A] integers.
        extents: A extents.
        word: [] int64, into which ``bit`` is or-ed, in place, if a row lies outside the box.
        bit: Its bit.

    Returns:
        [N] int64, -1 outside the box.
    """
    return twin("points", coords).flat_index(coords, extents, word, bit)


def scatter_rows(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Put rows where ``index`` says.

    Args:
        feats: [N, C].
        index: [N] int64 below ``num``, -1 = skip. Of equal ones, the last row is kept.
        num: Rows of the result.

    Returns:
        [num, C] in the dtype of ``feats``, 0 where nothing was put.
    """
    return twin("points", feats).scatter_rows(feats, index, num)


def place_rows(
    feats: Tensor, coords: Tensor, extents: tuple[int, ...], word: Tensor | None = None,
    bit: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scatter_rows` to `flat_index`: one pass over coordinates serves both.

    Args:
        feats: [N, C].
        coords, extents, word, bit: As in `flat_index`.

    Returns:
        [num, C], where num is the product of the extents, and the index [N] int64.
    """
    return twin("points", feats).place_rows(feats, coords, extents, word, bit)


def gather_rows(grid: Tensor, index: Tensor) -> Tensor:
    """Take rows from where ``index`` says.

    Args:
        grid: [..., C], the leading axes counted row-major; any strides.
        index: [N] int64, -1 = none.

    Returns:
        [N, C], 0 for none.
    """
    return twin("points", grid).gather_rows(grid, index)


def share_rows(rows: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Hand the rows of groups back to their members, divided by counts.

    Args:
        rows: [num, C] floating.
        index: [N] integers; outside 0 <= i < num = none.
        counts: [num] integers; 0 = none.

    Returns:
        [N, C] in the dtype of ``rows``, 0 for none.
    """
    return twin("points", rows).share_rows(rows, index, counts)


def devoxelize(
    feats: Tensor, index: Tensor, weights: Tensor, word: Tensor | None = None, bit: int = 0
) -> Tensor:
    """Weighted sums of rows around points.

    Args:
        feats: [M, C] floating.
        index: [N, J] integers; outside 0 <= i < M = none.
        weights: [N, J] floating.
        word, bit: As in `flat_index`, for an index of M or more.

    Returns:
        [N, C] in the dtype of ``feats``, summed in float32 (float64 in float64).
    """
    return twin("points", feats).devoxelize(feats, index, weights, word, bit)


def devoxelize_weight_grad(feats: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `devoxelize` with respect to its weights.

    Args:
        feats: [M, C] floating.
        index: [N, J] integers; outside 0 <= i < M = none.
        grad: [N, C] floating.

    Returns:
        [N, J] float32 (float64 in float64), 0 for none.
    """
    return twin("points", feats).devoxelize_weight_grad(feats, index, grad)


def trilinear_weights(points: Tensor, scale: float) -> Tensor:
    """Trilinear shares of the corners of the cell around each point.

    Args:
        points: [N, 3] float32 or float64.
        scale: Edge of a cell.

    Returns:
        [N, 8] in the dtype of ``points``; corner 4 jx + 2 jy + jz has the share
        prod_i (u_i if j_i else 1 - u_i), where u is the position within the cell, 0 <= u < 1.
    """
    return twin("points", points).trilinear_weights(points, scale)
