"""Sums and maxima over the neighbours of a kernel map: the choice of implementation."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from torchsparse._ops.dispatch import reference, twin

__all__ = ["pick_rows", "pool_max", "pool_shares", "pool_sum", "pool_top", "unpool_max"]


def _choose(tensor: Tensor, dtype: torch.dtype) -> ModuleType:
    """float64 is plain PyTorch; kernels do the rest where there are some."""
    return reference("pool") if dtype == torch.float64 else twin("pool", tensor)


def pool_sum(
    feats: Tensor,
    table: Tensor,
    shares: Tensor | None = None,
    mean: bool = False,
    limit: Tensor | None = None,
) -> Tensor:
    """``out[m] = sum over the neighbours n = table[k, m] of shares[n] * feats[n]``.

    Args:
        feats: [N, C] floating.
        table: [K, M] int32, rows of feats, -1 = none.
        shares: [N] floating factors, None = 1.
        mean: Divide by the number of neighbours.
        limit: [1] int64, how many outputs are real (`_capacity`): the rest gets zeros.
            None: all.

    Returns:
        [M, C] in the dtype of feats, summed in float32 (float64 in float64) in the order of the
        taps and rounded once; 0 without neighbours.
    """
    return _choose(feats, feats.dtype).pool_sum(feats, table, shares, mean, limit)


def pool_shares(table: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the number of neighbours of each output.

    Args:
        table: [K, M] int32, -1 = none.
        dtype: float32 or float64.

    Returns:
        [M] in ``dtype``, 1 without neighbours.
    """
    return _choose(table, dtype).pool_shares(table, dtype)


def pool_max(feats: Tensor, table: Tensor, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maximum over the neighbours, and the row it comes from.

    Args:
        feats: [N, C] floating.
        table: [K, M] int32, rows of feats, -1 = none.
        limit: [1] int64, how many outputs are real (`_capacity`): the rest comes from row -1, and
            is 0. None: all.

    Returns:
        [M, C] in the dtype of feats, 0 without neighbours, NaN where one of them is NaN; and
        [M, C] int32, the maximal (or NaN) row of the lowest tap, -1 without neighbours.
    """
    return _choose(feats, feats.dtype).pool_max(feats, table, limit)


def pool_top(feats: Tensor, table: Tensor, limit: Tensor | None = None) -> Tensor:
    """The first result of `pool_max`, where nobody asks for the second."""
    return _choose(feats, feats.dtype).pool_top(feats, table, limit)


def unpool_max(values: Tensor, rows: Tensor, table: Tensor, limit: Tensor | None = None) -> Tensor:
    """Send values back to the rows they came from: the adjoint of `pick_rows`.

    Args:
        values: [M, C] floating.
        rows: [M, C] int32, from `pool_max`.
        table: [K, N] int32, the transposed of the table that `pool_max` read.
        limit: [1] int64, how many of the N rows are real (`_capacity`): the rest gets zeros.
            None: all.

    Returns:
        [N, C] in the dtype of values: the sum over taps, in their order, of ``values[m, c]`` for
        the m = table[k, n] with ``rows[m, c] = n``; in float32 (float64 in float64), rounded once.
    """
    return _choose(values, values.dtype).unpool_max(values, rows, table, limit)


def pick_rows(feats: Tensor, rows: Tensor) -> Tensor:
    """``out[m, c] = feats[rows[m, c], c]``, 0 for -1.

    Args:
        feats: [N, C] floating.
        rows: [M, C] int32.

    Returns:
        [M, C] in the dtype of feats.
    """
    return _choose(feats, feats.dtype).pick_rows(feats, rows)
