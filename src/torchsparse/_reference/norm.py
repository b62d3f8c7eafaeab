"""Statistics per sample and the affine map that applies them, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._reference.reduce import segment_sum

__all__ = ["affine", "centred_dots", "sample_moments"]

# Rows that are worked on at a time on the CPU: temporaries of the size of the features would cost
# more in page faults than the arithmetic (2 GB/s on an EPYC 9004), these stay in the cache.
CHUNK_ROWS = 2048


def sample_moments(
    feats: Tensor, batch: Tensor, groups: Groups, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample and channel group.  -> 2 x [B, G]."""
    sums = segment_sum(feats, groups)
    sizes = (groups.starts.diff()[:-1, None] * (feats.shape[1] // num_groups)).clamp(min=1)
    mean = sums.unflatten(1, (num_groups, -1)).sum(2) / sizes
    # A second pass around the mean: E[x^2] - E[x]^2 would cancel.
    centre = mean.repeat_interleave(feats.shape[1] // num_groups, dim=1)
    centred = affine(feats, batch, centre, None, None, sums.dtype)
    squares = segment_sum(centred.square_(), groups)
    return mean, squares.unflatten(1, (num_groups, -1)).sum(2) / sizes


def centred_dots(
    feats: Tensor, rows: Tensor, batch: Tensor, groups: Groups, mean: Tensor
) -> Tensor:
    """Sum of ``(feats - mean[b]) * rows`` over each sample.  -> [B, C]."""
    return segment_sum(affine(feats, batch, mean, None, None, mean.dtype).mul_(rows), groups)


def affine(
    feats: Tensor,
    batch: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``(feats - mean[b]) * scale[b] + shift[b] + rows * table[b]``, (rows, table) = extra."""
    n = feats.shape[0]
    out = torch.empty(feats.shape, dtype=dtype, device=feats.device)
    step = CHUNK_ROWS if out.device.type == "cpu" else max(n, 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        b = batch[part]
        total = feats[part].to(mean.dtype) - mean.index_select(0, b)
        if scale is not None:
            total *= scale.index_select(0, b)
        if shift is not None:
            total += shift.index_select(0, b)
        if extra is not None:
            rows, table = extra
            total.addcmul_(rows[part].to(mean.dtype), table.index_select(0, b))
        out[part] = total
    return out
