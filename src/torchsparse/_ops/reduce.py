"""Sums and maxima over groups of rows: the choice of implementation.

A group number outside 0 <= i < num means "none"; such rows are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._ops.dispatch import twin

__all__ = ["Groups", "argmax_rows", "count", "group_rows", "segment_max", "segment_sum"]


def group_rows(index: Tensor, num: int) -> Groups:
    """Bring the rows of each group together, in ascending order.

    Args:
        index: [N] integers, group of each row.
        num: Number of groups.
    """
    return twin("reduce", index).group_rows(index, num)


def segment_sum(
    feats: Tensor,
    groups: Groups,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum the rows of each group, or average them.

    Args:
        feats: [R, C] floating.
        groups: Of ``num`` groups; its ``order`` may name a row of ``feats`` several times.
        weights: [N] floating factors in the sequence of ``groups.order``, None = 1.
        counts: [num] integers, by which the sums are divided; a group with count 0 becomes 0.
        dtype: Of the result; None = that of the sums.

    Returns:
        [num, C], summed in float32 (float64 if ``feats`` is) in a fixed order; 0 for empty groups.
    """
    return twin("reduce", feats).segment_sum(feats, groups, weights, counts, dtype)


def count(index: Tensor, num: int, word: Tensor | None = None, bit: int = 0) -> Tensor:
    """Count the rows of each group.

    Args:
        index: [N] integers.
        num: Number of groups.
        word: [] int64, into which ``bit`` is or-ed, in place, if a number is ``num`` or more.
        bit: Its bit.

    Returns:
        [num] int32.
    """
    return twin("reduce", index).count(index, num, word, bit)


def segment_max(feats: Tensor, index: Tensor, num: int) -> Tensor:
    """Maximum of each group and channel.

    Args:
        feats: [N, C] floating.
        index: [N] integers.
        num: Number of groups.

    Returns:
        [num, C] in the dtype of ``feats``; 0 for empty groups, NaN where a group has one.
    """
    return twin("reduce", feats).segment_max(feats, index, num)


def argmax_rows(feats: Tensor, index: Tensor, top: Tensor) -> Tensor:
    """Where the maxima come from.

    Args:
        feats: [N, C] floating.
        index: [N] integers.
        top: [num, C], what `segment_max` returned.

    Returns:
        [num, C] int64, the lowest of the maximal rows; N for an empty group.
    """
    return twin("reduce", feats).argmax_rows(feats, index, top)
