"""Statistics per sample and the affine map that applies them: the choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._ops.dispatch import twin
from torchsparse._reference.reduce import Groups

__all__ = ["sample_moments", "scale_shift"]


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


def scale_shift(
    feats: Tensor,
    batch: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``feats * scale[batch] + shift[batch]``.

    Args:
        feats: [N, C] floating.
        batch: [N] integers, 0 <= b < B.
        scale, shift: [B, C] float32 or float64, None = 1 and 0.
        dtype: Of the result; that of ``feats`` if None.

    Returns:
        [N, C], computed in the dtype of ``scale`` and ``shift``.
    """
    return twin("norm", feats).scale_shift(feats, batch, scale, shift, dtype)
