"""Batch normalisation in training, over all rows, as kernels.

One pass over the rows for the statistics, one for normalisation with what follows it, two for the
gradients. Sums over all rows are made by a number of programs that depends on shape and dtype
alone, and put together by one program in their order: the same input gives the same bits.

Programs that sum take turns, tile after tile, and the pass that follows begins at the end: what
was read last is still in the L2 cache, even if not all of the features fit into it.
"""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportOptionalOperand=false
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._triton.launch import Step, cdiv, next_power
from torchsparse._triton.primitives import real_rows
from torchsparse._triton.rows import Tile, divide, row_tile

__all__ = ["batch_moments_", "grad_rows", "grad_sums", "normalise"]

SHARES = 512  # at most: one program puts them together, all at once
# Of a reduction, three on each multiprocessor of an H100: to begin and to end costs one as much as
# several of its tiles.
PROGRAMS = 396
LOADS = tl.constexpr(3)  # tiles of a reduction that are on their way at once
FEW = 8  # channels of a program that puts shares together: 32 bytes of each


Options = tuple[tuple[str, Any], ...]


class _Cut(NamedTuple):
    """How [N, C] is shared out; grids, and options of the kernels."""

    tile: Tile  # for reductions
    shares: int  # share s has tiles s, s + shares, s + 2 shares, ... of the rows
    grid: tuple[int, int]  # shares times blocks of channels
    sums: Options
    few: tuple[int, int]  # programs that put shares together
    ends: Options
    wide: Tile  # for passes without sums
    wide_grid: tuple[int, int]  # blocks of rows times blocks of channels
    passes: Options


@lru_cache(maxsize=4096)
def _cut(n: int, channels: int, itemsize: int) -> _Cut:
    # The width that wastes the least of its last block: 96 channels are three times 32.
    cols = min((64, 32), key=lambda width: cdiv(channels, width) * width)
    tile = row_tile(channels, itemsize, 2048, cols)
    wide = row_tile(channels, itemsize, 4096, cols)
    blocks = cdiv(channels, tile.cols)
    shares = min(max(PROGRAMS // blocks, 1), SHARES, cdiv(n, tile.rows))
    end = {"UNIT": tile.unit, "SHARES": max(next_power(shares), 2), "COLS": FEW, "num_warps": 8}
    return _Cut(
        tile, shares, (shares * blocks, 1), tuple(tile.constants.items()),
        (cdiv(channels, FEW), 1), tuple(end.items()),
        wide, (cdiv(n, wide.rows) * blocks, 1), tuple(wide.constants.items()),
    )  # fmt: skip


_known: dict[Any, Step] = {}  # kernels by all that they are compiled for


def _run(
    kernel: Any, options: Options, grid: tuple[int, int], tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...], **more: Any,
) -> None:  # fmt: skip
    """Launch ``kernel[grid](*tensors, *numbers, **options, **more)``."""
    kinds = [None if tensor is None else tensor.dtype for tensor in tensors]
    key = (id(kernel), options, *kinds, *more.values())
    step = _known.get(key)
    if step is None:
        step = _known[key] = Step(kernel, **dict(options), **more)
    step(grid, tensors, numbers)


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _kind(slope: float | None) -> int:
    """0 = no activation, 1 = ReLU, 2 = with a slope below 0."""
    return 0 if slope is None else 1 if slope == 0 else 2


# ------------------------------------------------------------------ forward
def batch_moments_(
    feats: Tensor,
    eps: float,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    limit: Tensor | None = None,
) -> Tensor:
    """Mean and 1 / sqrt(var + eps) of each channel; running statistics follow.  -> [2, C]."""
    n, channels = feats.shape
    feats, device = feats.contiguous(), feats.device
    cut = _cut(n, channels, feats.element_size())
    partial = torch.empty((2, cut.shares, channels), dtype=torch.float32, device=device)
    moments = torch.empty((2, channels), dtype=torch.float32, device=device)
    tile = cut.tile
    _run(_moments_kernel, cut.sums, cut.grid, (feats, partial, batches, limit), (n, tile.units))
    _run(
        _moments_end_kernel, cut.ends, cut.few,
        (partial, moments, mean, var, batches, limit),
        (n, tile.rows, cut.shares, tile.units, float(eps), float(momentum or 0)),
        AVERAGED=momentum is None,
    )  # fmt: skip
    return moments


@triton.jit
def _place(width, COLS: tl.constexpr):
    """Which rows and which channels a program has; those of the same rows run side by side."""
    blocks = (width + COLS - 1) // COLS
    pid = tl.program_id(0)
    return pid // blocks, (pid % blocks) * COLS + tl.arange(0, COLS), tl.num_programs(0) // blocks


@triton.jit
def _steps(n, share, shares, rows):
    """Whole tiles that a share has, and rows of the last tile if that one is its own and short."""
    whole = n // rows
    rest = tl.where(whole % shares == share, n - whole * rows, 0)
    return (whole - share + shares - 1) // shares, rest


@triton.jit(do_not_specialize=["n", "units"])
def _moments_kernel(
    feats, partial, batches, limit, n, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partial[0, s], [1, s]: mean of share s, and the sum of squared distances from it.

    Distances are first taken from the share's first row (Chan, Golub, LeVeque: shifted data). As
    that row is one of the R rows of the share, it lies at most sqrt(R) standard deviations from
    their mean: what cancels costs at most R times the roundings of a sum, and that only if the row
    is the outlier of its share, however far the mean is from 0. Shares may be empty.
    """
    n = real_rows(n, limit)
    width = units * UNIT
    share, col, shares = _place(width, COLS)
    inside = col < width
    begin = share.to(tl.int64) * ROWS
    row = begin + tl.arange(0, ROWS)
    origin = tl.load(feats + begin * width + col, mask=inside & (begin < n), other=0)
    origin = origin.to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    steps, rest = _steps(n, share, shares, ROWS)
    for _ in tl.range(steps, num_stages=LOADS):
        at = row[:, None] * width + col[None, :]
        value = tl.load(feats + at, mask=inside[None, :], other=0).to(tl.float32)
        value -= origin[None, :]
        total += value
        squares += value * value
        row += shares * ROWS
    if rest > 0:
        mask = (row < n)[:, None] & inside[None, :]
        at = row[:, None] * width + col[None, :]
        value = tl.load(feats + at, mask=mask, other=0).to(tl.float32)
        value = tl.where(mask, value - origin[None, :], 0)
        total += value
        squares += value * value
    sums = tl.sum(total, 0)
    apart = divide(sums, tl.maximum(steps * ROWS + rest, 1).to(tl.float32))
    spread = tl.sum(squares, 0) - sums * apart
    spread = tl.where(spread < 0, 0, spread)  # NaN stays NaN
    at = share.to(tl.int64) * width + col
    tl.store(partial + at, origin + apart, mask=inside)
    tl.store(partial + shares.to(tl.int64) * width + at, spread, mask=inside)
    if batches is not None:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + (n > 0))


@triton.jit(do_not_specialize=["n", "step", "shares", "units"])
def _moments_end_kernel(
    partial, moments, mean, var, batches, limit, n, step, shares, units, eps, momentum,
    AVERAGED: tl.constexpr, UNIT: tl.constexpr, SHARES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Moments of all rows from those of each share (Chan, Golub, LeVeque); tiles of ``step``."""
    n = real_rows(n, limit)
    width = units * UNIT
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    share = tl.arange(0, SHARES)
    inside = col < width
    mask = (share < shares)[:, None] & inside[None, :]
    at = share[:, None] * width + col[None, :]
    middle = tl.load(partial + at, mask=mask, other=0)
    spread = tl.load(partial + shares * width + at, mask=mask, other=0)
    steps, rest = _steps(n, share, shares, step)
    rows = tl.where(share < shares, steps * step + rest, 0).to(tl.float32)[:, None]
    every = tl.maximum(n, 1).to(tl.float32)
    centre = divide(tl.sum(middle * rows, 0), every)
    off = tl.where(mask, middle - centre[None, :], 0)
    squares = tl.sum(spread + off * off * rows, 0)
    tl.store(moments + col, centre, mask=inside)
    deviation = tl.sqrt_rn(divide(squares, every) + eps)
    one = tl.full([COLS], 1.0, tl.float32)
    tl.store(moments + width + col, divide(one, deviation), mask=inside)
    if mean is not None:
        new_share = momentum
        if AVERAGED:
            new_share = 1.0 / tl.maximum(tl.load(batches), 1).to(tl.float32)
        new_share = tl.where(n > 0, new_share, 0.0)  # no rows, as in padding alone, move nothing
        old = tl.load(mean + col, mask=inside, other=0).to(tl.float32)
        new = old * (1 - new_share) + centre * new_share
        tl.store(mean + col, new.to(mean.dtype.element_ty), mask=inside)
        old = tl.load(var + col, mask=inside, other=0).to(tl.float32)
        unbiased = divide(squares, tl.maximum(every - 1, 1))
        new = old * (1 - new_share) + unbiased * new_share
        tl.store(var + col, new.to(var.dtype.element_ty), mask=inside)


@triton.jit
def _columns(moments, weight, bias, col, width):
    """What turns channels x into (x - mean) * scale + shift."""
    inside = col < width
    mean = tl.load(moments + col, mask=inside, other=0)
    scale = tl.load(moments + width + col, mask=inside, other=0)
    shift = tl.zeros_like(mean)
    if weight is not None:
        scale *= tl.load(weight + col, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + col, mask=inside, other=0).to(tl.float32)
    return mean, scale, shift


def normalise(
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float | None,
    limit: Tensor | None = None,
) -> Tensor:
    """``act((feats - mean) * invstd * weight + bias + residual)``.  -> [N, C]."""
    n, channels = feats.shape
    feats, residual = feats.contiguous(), _rows(residual)
    out = torch.empty_like(feats)
    cut, act = _cut(n, channels, feats.element_size()), _kind(slope)
    tile = cut.wide
    _run(
        _normalise_kernel, cut.passes, cut.wide_grid,
        (feats, moments, _rows(weight), _rows(bias), residual, out, limit),
        (slope or 0.0, n, tile.units), ACT=act,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "units"])
def _normalise_kernel(
    feats, moments, weight, bias, residual, out, limit, slope, n, units,
    ACT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    block, col, blocks = _place(width, COLS)
    row = (blocks - 1 - block).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # from the end
    mask = (row < n)[:, None] & (col < width)[None, :]
    real = (row < real_rows(n, limit))[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    value = tl.load(feats + at, mask=real, other=0).to(tl.float32)
    mean, scale, shift = _columns(moments, weight, bias, col, width)
    value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=real, other=0).to(tl.float32)
    if ACT == 1:  # NaN stays NaN, -inf becomes 0
        value = tl.where(value < 0, 0.0, value)
    if ACT == 2:
        value = tl.where(value < 0, value * slope, value)
    value = _unpadded(value, real, limit)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unpadded(value, real, limit):
    """Zeros in rows of padding."""
    if limit is not None:
        value = tl.where(real, value, 0.0)
    return value


# ------------------------------------------------------------------ backward
def grad_sums(
    grad: Tensor,
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    slope: float | None,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Means [2, C] for `grad_rows`, gradients of weight and bias."""
    n, channels = feats.shape
    feats, out = feats.contiguous(), _rows(out)
    cut, act = _cut(n, channels, feats.element_size()), _kind(slope)
    tile = cut.tile
    grad, apart = _parted(grad, tile)
    partial = torch.empty((2, cut.shares, channels), dtype=torch.float32, device=feats.device)
    _run(
        _sums_kernel, cut.sums, cut.grid,
        (grad, feats, moments, _rows(weight), _rows(bias), out, partial, limit),
        (slope or 0.0, n, tile.units, apart), ACT=act,
    )  # fmt: skip
    means = torch.empty_like(moments)
    grad_weight = None if weight is None else torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    _run(
        _sums_end_kernel, cut.ends, cut.few,
        (partial, moments, means, grad_weight, grad_bias, limit), (n, cut.shares, tile.units),
    )  # fmt: skip
    return means, grad_weight, grad_bias


def _parted(grad: Tensor, tile: Tile) -> tuple[Tensor, int]:
    """A gradient, and units from row to row. The gradient of `torch.cat` has parts of wider rows,
    which are read where they lie."""
    apart, along = grad.stride()
    whole = tile.units * tile.unit
    if along != 1 or apart < whole or apart % tile.unit or grad.data_ptr() % 16:
        return grad.contiguous(), tile.units
    return grad, apart // tile.unit


@triton.jit
def _gradient(grad, row, col, mask, apart, UNIT: tl.constexpr):
    """Of rows that lie ``apart`` units from each other."""
    at = row[:, None] * (apart * UNIT) + col[None, :]
    return tl.load(grad + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _passed(grad, value, out, at, mask, mean, scale, shift, slope, ACT: tl.constexpr):
    """The gradient behind the activation; without ``out``, its sign is found as in forward."""
    if ACT > 0:
        if out is not None:
            after = tl.load(out + at, mask=mask, other=0).to(tl.float32)
        else:
            after = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        if ACT == 1:
            grad = tl.where(after <= 0, 0.0, grad)
        else:
            grad = tl.where(after <= 0, grad * slope, grad)
    return grad


@triton.jit
def _terms(
    grad, feats, out, row, col, mask, mean, scale, shift, slope, width, apart,
    ACT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """g and x - mean."""
    at = row[:, None] * width + col[None, :]
    value = tl.load(feats + at, mask=mask, other=0).to(tl.float32)
    g = _gradient(grad, row, col, mask, apart, UNIT)
    g = _passed(g, value, out, at, mask, mean, scale, shift, slope, ACT)
    return g, value - mean[None, :]


@triton.jit(do_not_specialize=["n", "units", "apart"])
def _sums_kernel(
    grad, feats, moments, weight, bias, out, partial, limit, slope, n, units, apart,
    ACT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partial[0, s], [1, s]: sums of g and of g * (x - mean) over share s."""
    n = real_rows(n, limit)
    width = units * UNIT
    share, col, shares = _place(width, COLS)
    inside = col < width
    row = share.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean, scale, shift = _columns(moments, weight, bias, col, width)
    total = tl.zeros([ROWS, COLS], tl.float32)
    along = tl.zeros([ROWS, COLS], tl.float32)
    steps, rest = _steps(n, share, shares, ROWS)
    for _ in tl.range(steps, num_stages=LOADS):
        mask = tl.broadcast_to(inside[None, :], (ROWS, COLS))
        g, x = _terms(
            grad, feats, out, row, col, mask, mean, scale, shift, slope, width, apart, ACT, UNIT
        )
        total += g
        along += g * x
        row += shares * ROWS
    if rest > 0:
        mask = (row < n)[:, None] & inside[None, :]
        g, x = _terms(
            grad, feats, out, row, col, mask, mean, scale, shift, slope, width, apart, ACT, UNIT
        )
        total += g
        along += g * x
    at = share.to(tl.int64) * width + col
    tl.store(partial + at, tl.sum(total, 0), mask=inside)
    tl.store(partial + shares.to(tl.int64) * width + at, tl.sum(along, 0), mask=inside)


@triton.jit(do_not_specialize=["n", "shares", "units"])
def _sums_end_kernel(
    partial, moments, means, grad_weight, grad_bias, limit, n, shares, units,
    UNIT: tl.constexpr, SHARES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums over all shares, and what the gradients make of them."""
    n = real_rows(n, limit)
    width = units * UNIT
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    share = tl.arange(0, SHARES)
    inside = col < width
    mask = (share < shares)[:, None] & inside[None, :]
    at = share[:, None] * width + col[None, :]
    total = tl.sum(tl.load(partial + at, mask=mask, other=0), 0)
    along = tl.sum(tl.load(partial + shares * width + at, mask=mask, other=0), 0)
    invstd = tl.load(moments + width + col, mask=inside, other=0)
    along *= invstd
    every = tl.maximum(n, 1).to(tl.float32)
    tl.store(means + col, divide(total, every), mask=inside)
    tl.store(means + width + col, divide(along * invstd, every), mask=inside)
    if grad_weight is not None:
        tl.store(grad_weight + col, along.to(grad_weight.dtype.element_ty), mask=inside)
    if grad_bias is not None:
        tl.store(grad_bias + col, total.to(grad_bias.dtype.element_ty), mask=inside)


def grad_rows(
    grad: Tensor,
    feats: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    slope: float | None,
    means: Tensor | None,
    residual: bool,
    limit: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of feats and residual."""
    n, channels = feats.shape
    feats, out = feats.contiguous(), _rows(out)
    grad_feats = None if means is None else torch.empty_like(feats)
    grad_residual = torch.empty_like(feats) if residual else None
    cut, act = _cut(n, channels, feats.element_size()), _kind(slope)
    tile = cut.wide
    grad, apart = _parted(grad, tile)
    _run(
        _rows_kernel, cut.passes, cut.wide_grid,
        (grad, feats, moments, _rows(weight), _rows(bias), out, means, grad_feats, grad_residual,
         limit),
        (slope or 0.0, n, tile.units, apart), ACT=act,
    )  # fmt: skip
    return grad_feats, grad_residual


@triton.jit(do_not_specialize=["n", "units", "apart"])
def _rows_kernel(
    grad, feats, moments, weight, bias, out, means, grad_feats, grad_residual, limit, slope, n,
    units, apart,
    ACT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    block, col, blocks = _place(width, COLS)
    row = (blocks - 1 - block).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # from the end
    mask = (row < n)[:, None] & (col < width)[None, :]
    real = (row < real_rows(n, limit))[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    g = _gradient(grad, row, col, real, apart, UNIT)
    value = tl.load(feats + at, mask=real, other=0).to(tl.float32)
    mean, scale, shift = _columns(moments, weight, bias, col, width)
    g = _unpadded(_passed(g, value, out, at, real, mean, scale, shift, slope, ACT), real, limit)
    if grad_residual is not None:
        tl.store(grad_residual + at, g.to(grad_residual.dtype.element_ty), mask=mask)
    if grad_feats is not None:
        plain = tl.load(means + col, mask=col < width, other=0)
        along = tl.load(means + width + col, mask=col < width, other=0)
        value = scale[None, :] * (g - plain[None, :] - (value - mean[None, :]) * along[None, :])
        value = _unpadded(value, real, limit)
        tl.store(grad_feats + at, value.to(grad_feats.dtype.element_ty), mask=mask)
