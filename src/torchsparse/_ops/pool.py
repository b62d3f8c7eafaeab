"""Sums and maxima over the neighbours of a kernel map: the choice of implementation."""

from __future__ import annotations

from torch import Tensor

from torchsparse._ops.dispatch import twin

__all__ = ["pick_rows", "pool_max", "pool_sum", "unpool_max"]


def pool_sum(
    feats: Tensor, table: Tensor, shares: Tensor | None = None, mean: bool = False
) -> Tensor:
    """``out[m] = sum over the neighbours n = table[k, m] of shares[n] * feats[n]``.

    Args:
        feats: [N, C] floating.
        table: [K, M] int32, rows of feats, -1 = none.
        shares: [N] floating factors, None = 1.
        mean: Divide by the number of neighbours.

    Returns:
        [M, C] in the dtype of feats, summed in float32 (float64 in float64) in the order of the
        taps and rounded once; 0 without neighbours.
    """
    return twin("pool", feats).pool_sum(feats, table, shares, mean)


def pool_max(feats: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the neighbours, and the row it comes from.

    Args:
        feats: [N, C] floating.
        table: [K, M] int32, rows of feats, -1 = none.

    Returns:
        [M, C] in the dtype of feats, 0 without neighbours, NaN where one of them is NaN; and
        [M, C] int32, the maximal (or NaN) row of the lowest tap, -1 without neighbours.
    """
    return twin("pool", feats).pool_max(feats, table)


def unpool_max(values: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """Send values back to the rows they came from: the adjoint of `pick_rows`.

    Args:
        values: [M, C] floating.
        rows: [M, C] int32, from `pool_max`.
        table: [K, N] int32, the transposed of the table that `pool_max` read.

    Returns:
        [N, C] in the dtype of values: the sum over taps, in their order, of ``values[m, c]`` for
        the m = table[k, n] with ``rows[m, c] = n``; in float32 (float64 in float64), rounded once.
    """
    return twin("pool", values).unpool_max(values, rows, table)


def pick_rows(feats: Tensor, rows: Tensor) -> Tensor:
    """``out[m, c] = feats[rows[m, c], c]``, 0 for -1.

    Args:
        feats: [N, C] floating.
        rows: [M, C] int32.

    Returns:
        [M, C] in the dtype of feats.
    """
    return twin("pool", feats).pick_rows(feats, rows)
