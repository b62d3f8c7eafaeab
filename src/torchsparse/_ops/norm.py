"""Statistics per sample and the affine map that applies them: the choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._ops.dispatch import twin

__all__ = ["affine", "centred_dots", "sample_moments"]


def sample_moments(
    feats: Tensor, batch: Tensor, groups: Groups, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample, over its rows and the channels of a group.

    Args:
        feats: [N, C] floating.
        batch: [N] integers, 0 <= b < B.
        groups: Of ``batch``.
        num_groups: G, a divisor of C.

    Returns:
        Two [B, G], float32 (float64 in float64); 0 for empty samples.
    """
    return twin("norm", feats).sample_moments(feats, batch, groups, num_groups)


def centred_dots(
    feats: Tensor, rows: Tensor, batch: Tensor, groups: Groups, mean: Tensor
) -> Tensor:
    """Sum of ``(feats - mean[b]) * rows`` over the rows of each sample.

    Args:
        feats, rows: [N, C] floating.
        batch: [N] integers, 0 <= b < B.
        groups: Of ``batch``.
        mean: [B, C] float32 or float64, which is the dtype of the computation.

    Returns:
        [B, C] in the dtype of ``mean``; 0 for empty samples.
    """
    return twin("norm", feats).centred_dots(feats, rows, batch, groups, mean)


def affine(
    feats: Tensor,
    batch: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Centre and scale rows by the values of their sample.

    ``(feats - mean[b]) * scale[b] + shift[b]``; the difference comes first, so that nothing
    cancels where the variance is small.

    Args:
        feats: [N, C] floating.
        batch: [N] integers, 0 <= b < B.
        mean: [B, C] float32 or float64, which is the dtype of the computation and of the tables.
        scale, shift: [B, C], None = 1 and 0.
        dtype: Of the result.
        extra: Rows [N, C] and a table [B, C], whose product is added.

    Returns:
        [N, C].
    """
    return twin("norm", feats).affine(feats, batch, mean, scale, shift, dtype, extra)
