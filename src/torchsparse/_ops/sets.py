"""Rows of integers as a set: the choice of implementation."""

from __future__ import annotations

from torch import Tensor

from torchsparse._ops.dispatch import twin

__all__ = ["unique_rows"]


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, and which of them each given row is. Waits for the device.

    Args:
        rows: [N, A] integers.

    Returns:
        [M, A] int32 in lexicographic order; [N] int64.

    Raises:
        ValueError: The bounding box has 2^62 cells or more.
    """
    return twin("sets", rows).unique_rows(rows)
