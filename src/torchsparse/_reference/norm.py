"""Statistics per sample and the affine map that applies them, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._reference.reduce import Groups, segment_sum

__all__ = ["sample_moments", "scale_shift"]


def sample_moments(
    feats: Tensor, batch: Tensor, groups: Groups, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample and channel group.  -> 2 x [B, G]."""
    sums = segment_sum(feats, groups)
    sizes = (groups.starts.diff()[:-1, None] * (feats.shape[1] // num_groups)).clamp(min=1)
    mean = sums.unflatten(1, (num_groups, -1)).sum(2) / sizes
    # A second pass around the mean: E[x^2] - E[x]^2 would cancel.
    shift = -mean.repeat_interleave(feats.shape[1] // num_groups, dim=1)
    centred = scale_shift(feats, batch, None, shift, dtype=sums.dtype)
    squares = segment_sum(centred.square_(), groups)
    return mean, squares.unflatten(1, (num_groups, -1)).sum(2) / sizes


def scale_shift(
    feats: Tensor,
    batch: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``feats * scale[batch] + shift[batch]``, computed in the dtype of the tables.  -> [N, C]."""
    out = feats
    if scale is not None:
        out = out.to(scale.dtype) * _rows(scale, batch)
    if shift is not None:
        out = out.to(shift.dtype)
        out = out + _rows(shift, batch) if scale is None else out.add_(_rows(shift, batch))
    return out.to(dtype or feats.dtype)


def _rows(table: Tensor, batch: Tensor) -> Tensor:
    """Row of each sample; one sample needs no gather."""
    return table if table.shape[0] == 1 else table.index_select(0, batch)
