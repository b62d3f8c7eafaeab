"""Statistics per sample and the affine map that applies them, as kernels."""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._groups import Groups
from torchsparse._triton.launch import launch, next_power
from torchsparse._triton.rows import accumulator, divide, row_tile
from torchsparse._triton.sums import sum_groups

__all__ = ["affine", "centred_dots", "sample_moments"]


def sample_moments(
    feats: Tensor, batch: Tensor, groups: Groups, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample and channel group.  -> 2 x [B, G]."""
    mean, centre = _mean(sum_groups(feats, groups), groups, num_groups)
    # A second pass around the mean: E[x^2] - E[x]^2 would cancel.
    var, _ = _mean(sum_groups(feats, groups, centre=centre), groups, num_groups)
    return mean, var


def _mean(sums: Tensor, groups: Groups, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sums [B, C] over the entries of each channel group: [B, G], and for each channel [B, C]."""
    samples, channels = sums.shape
    mean = sums.new_empty((samples, num_groups))
    spread = torch.empty_like(sums)
    size = channels // num_groups
    launch(
        _mean_kernel, (samples, num_groups), sums,
        sums, groups.starts, mean, spread, num_groups, size,
        BLOCK=min(next_power(max(size, 1)), 1024), num_warps=1,
    )  # fmt: skip
    return mean, spread


@triton.jit(do_not_specialize=["num_groups", "size"])
def _mean_kernel(sums, starts, mean, spread, num_groups, size, BLOCK: tl.constexpr):
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.load(starts + sample + 1) - tl.load(starts + sample)
    first = (sample * num_groups + group) * size
    total = tl.zeros([BLOCK], sums.dtype.element_ty)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums + first + at, mask=at < size, other=0)
    entries = tl.maximum(rows * size, 1).to(sums.dtype.element_ty)
    value = divide(tl.sum(total, 0), entries)
    tl.store(mean + sample * num_groups + group, value)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(spread + first + at, value + tl.zeros_like(total), mask=at < size)


def centred_dots(
    feats: Tensor, rows: Tensor, batch: Tensor, groups: Groups, mean: Tensor
) -> Tensor:
    """Sum of ``(feats - mean[b]) * rows`` over each sample.  -> [B, C]."""
    return sum_groups(feats, groups, centre=mean, other=rows)


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
    n, channels = feats.shape
    out = torch.empty((n, channels), dtype=dtype, device=feats.device)
    rows, table = extra or (None, None)
    tile = row_tile(channels, max(feats.element_size(), out.element_size()), cols=64)
    launch(
        _affine_kernel, tile.grid(n), feats,
        feats.contiguous(), batch.contiguous(), mean.contiguous(),
        _or_none(scale), _or_none(shift), _or_none(rows), _or_none(table), out,
        n, mean.shape[0], tile.units, ACC=accumulator(mean.dtype)[1],
        SCALE=scale is not None, SHIFT=shift is not None, EXTRA=extra is not None,
        **tile.constants,
    )  # fmt: skip
    return out


def _or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit(do_not_specialize=["n", "num", "units"])
def _affine_kernel(
    feats, batch, mean, scale, shift, rows, table, out, n, num, units,
    ACC: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, EXTRA: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.load(batch + row, mask=row < n, other=-1).to(tl.int64)
    inside = (col < width)[None, :]
    mask = (row < n)[:, None] & inside
    known = ((b >= 0) & (b < num))[:, None] & inside  # no address from a wrong number
    at = row[:, None] * width + col[None, :]
    of = b[:, None] * width + col[None, :]
    value = tl.load(feats + at, mask=mask, other=0).to(ACC)
    value = value - tl.load(mean + of, mask=known, other=0)
    if SCALE:
        value = value * tl.load(scale + of, mask=known, other=0)
    if SHIFT:
        value = value + tl.load(shift + of, mask=known, other=0)
    if EXTRA:
        factor = tl.load(table + of, mask=known, other=0)
        value = value + tl.load(rows + at, mask=mask, other=0).to(ACC) * factor
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
