"""The convolutions themselves: pick tiles, allocate, launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._recipe import Epilogue
from torchsparse._triton.conv.fetch import fetch_kernel
from torchsparse._triton.conv.gemm import gemm_kernel, narrow_kernel, sum_kernel
from torchsparse._triton.conv.order import Tiles
from torchsparse._triton.conv.pairs import Pairs
from torchsparse._triton.conv.wgrad import sum_chunks_kernel, wgrad_kernel
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.tiles import (
    GemmTile,
    NarrowTile,
    gemm_tile,
    grad_tile,
    loop_step,
    narrow_tile,
)

__all__ = ["Plan", "Share", "finish", "gather_gemm", "weight_grad"]


class Share(NamedTuple):
    """Tiles of the taps from first to last - 1: rows are sorted by these taps alone."""

    first: int
    last: int
    tiles: Tiles


class Plan(NamedTuple):
    """A neighbour table, laid out for the kernels."""

    neighbors: Tensor  # [K, M] int32, natural row order, any strides
    shares: tuple[Share, ...]  # for the implicit GEMM
    pairs: Pairs | None = None  # for the fetch-on-demand dataflow, in place of shares
    reverse: bool = False  # tap k of the table multiplies weight K - 1 - k
    limit: Tensor | None = None  # [1] int64, how many rows are real; None: all (`_capacity`)


def _aligned(feats: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Channels padded to 16 bytes, without which no row can be copied asynchronously."""
    step = 16 // feats.element_size()
    missing = -feats.shape[1] % step
    if missing:
        feats = torch.nn.functional.pad(feats, (0, missing))
        weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
    return feats, weight


class _End(NamedTuple):
    """An epilogue as the kernels want it."""

    tensors: tuple[Any, ...]  # bias, mean, var, gamma, beta, eps, residual, slope
    flags: dict[str, Any]
    kind: tuple[Any, ...]  # dtypes and flags


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _end(bias: Tensor | None, epilogue: Epilogue | None) -> _End:
    norm, residual, slope = epilogue or NOTHING
    act = 0 if slope is None else 1 if slope == 0 else 2
    bias, residual = _contiguous(bias), _contiguous(residual)
    if norm is None:
        mean = var = gamma = beta = None
        eps, kind, norm_dtypes = 0.0, 0, None
    else:
        mean, var, gamma, beta = map(_contiguous, norm[:4])
        eps, kind = float(norm.eps), 1 if gamma is None else 2
        norm_dtypes = tuple(t if t is None else t.dtype for t in norm[:4])
    return _End(
        (bias, mean, var, gamma, beta, eps, residual, float(slope or 0.0)),
        {"BIAS": bias is not None, "NORM": kind, "RESIDUAL": residual is not None, "ACT": act},
        (
            None if bias is None else bias.dtype,
            norm_dtypes,
            None if residual is None else residual.dtype,
            act,
        ),
    )


NOTHING = Epilogue()
NO_END = _end(None, None)


def finish(feats: Tensor, epilogue: Epilogue) -> Tensor:
    """Apply an epilogue to features in one pass.  [M, C] -> [M, C] in the same dtype."""
    out = torch.empty_like(feats, memory_format=torch.contiguous_format)
    _sum(feats.contiguous(), 1, out, _end(None, epilogue))
    return out


def _sum(partial: Tensor, parts: int, out: Tensor, end: _End, limit: Tensor | None = None) -> None:
    m, channels = out.shape
    width = min(max(next_power(channels), 16), 128)
    launch(
        sum_kernel, (cdiv(m, 32), cdiv(channels, width)), out, partial, out, *end.tensors,
        limit, m, CO=channels, PARTS=parts, BM=32, BN=width, **end.flags,
    )  # fmt: skip


def gather_gemm(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    precision: str = "ieee",
    epilogue: Epilogue | None = None,
) -> Tensor:
    """``out[m] = bias + sum over taps k of feats[neighbors[k, m]] @ weight[k]``.

    Args:
        feats: [N, C_in] float16, bfloat16 or float32.
        weight: [K, C_in, C_out] in the dtype of feats; any strides.
        bias: [C_out] in the dtype of feats, or None.
        plan: Of the neighbour table, from `make_plan`.
        precision: Of float32 products: "ieee", "tf32" or "tf32x3".
        epilogue: Applied to the sums, or None.

    Returns:
        [M, C_out] in the dtype of feats, summed in float32 and rounded once.
    """
    volume, c_in, c_out = weight.shape
    m = plan.neighbors.shape[1]
    out = feats.new_empty((m, c_out))
    if out.numel() == 0:
        return out
    if feats.shape[0] == 0 or c_in == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return out if epilogue is None else finish(out, epilogue)
    end = _end(bias, epilogue)
    feats = feats.contiguous()
    precision = precision if feats.dtype == torch.float32 else "ieee"
    if plan.pairs is not None:
        feats, weight = _aligned(feats, weight)
        _fetch(feats, weight, end, plan.pairs, plan.reverse, precision, out)
        return out
    narrow = narrow_tile(m, c_in, c_out, volume)
    if narrow is not None:
        _narrow(feats, weight, end, plan, narrow, precision, out)
        return out
    feats, weight = _aligned(feats, weight)
    c_in = feats.shape[1]
    if feats.dtype == torch.float32 and weight.stride(1) != 1 and precision != "ieee":
        # The tensor cores take float32 operands only with the summed axis innermost.
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    swapped = weight.stride(1) == 1 and weight.stride(2) != 1
    tile = gemm_tile(m, c_in, c_out, volume, feats.dtype, precision, swapped, feats.device)
    if len(plan.shares) > 1:
        tile = tile._replace(splits=1)
    parts = len(plan.shares) * tile.splits
    target = out if parts == 1 else feats.new_empty((parts, m, c_out), dtype=torch.float32)
    for number, (first, last, tiles) in enumerate(plan.shares):
        taps = slice(volume - last, volume - first) if plan.reverse else slice(first, last)
        part = target if parts == 1 else target[number * tile.splits]
        own_end = end if parts == 1 else NO_END
        _gemm(feats, weight[taps], own_end, tiles, plan.reverse, tile, precision, part)
    if parts > 1:
        _sum(target, parts, out, end, plan.limit)
    return out


def _gemm(
    feats: Tensor, weight: Tensor, end: _End, tiles: Tiles, reverse: bool,
    tile: GemmTile, precision: str, out: Tensor,
) -> None:  # fmt: skip
    volume, c_in, c_out = weight.shape
    strides = weight.stride()
    m = tiles.table.shape[1]
    grid = (cdiv(m, tile.BM) * cdiv(c_out, tile.BN), tile.splits)
    kind = (feats.dtype, out.dtype, c_in, c_out, strides, tile, reverse, precision, end.kind)
    launch(
        gemm_kernel, grid, feats, feats, weight, out, tiles.table, tiles.order, tiles.masks,
        *end.tensors, tiles.limit, m, tiles.masks.shape[1], *strides, memo=(tiles.memo, kind),
        K=volume, CI=c_in, CO=c_out, BM=tile.BM, BN=tile.BN, BK=tile.BK, SPLITS=tile.splits,
        SORTED=tiles.order is not None, REVERSE=reverse, PRECISION=precision, **end.flags,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _narrow(
    feats: Tensor, weight: Tensor, end: _End, plan: Plan, tile: NarrowTile, precision: str,
    out: Tensor,
) -> None:  # fmt: skip
    volume, c_in, c_out = weight.shape
    m = out.shape[0]
    table = plan.neighbors
    launch(
        narrow_kernel, (cdiv(m, tile.BM), cdiv(c_out, tile.BN)), feats, feats, weight, out, table,
        *end.tensors, plan.limit, m, table.stride(1), table.stride(0), *weight.stride(),
        K=volume, CI=c_in, CO=c_out, BM=tile.BM, BN=tile.BN,
        BK=loop_step(tile.BK, feats.dtype, precision),
        REVERSE=plan.reverse, PRECISION=precision, **end.flags,
        num_warps=tile.warps, num_stages=3,
    )  # fmt: skip


def _fetch(
    feats: Tensor, weight: Tensor, end: _End, pairs: Pairs, reverse: bool,
    precision: str, out: Tensor,
) -> None:  # fmt: skip
    """Tap after tap, each adding to its output rows: no row has a tap twice."""
    volume, c_in, c_out = weight.shape
    m = out.shape[0]
    total = torch.zeros_like(out, dtype=torch.float32)
    tile = gemm_tile(m, c_in, c_out, 1, feats.dtype, precision)
    longest = min(m, pairs.inputs.shape[0])
    for tap in range(volume):
        listed = tap if tap < pairs.lists else volume - 1 - tap
        launch(
            fetch_kernel, (cdiv(longest, tile.BM), cdiv(c_out, tile.BN)), feats, feats,
            weight[volume - 1 - tap if reverse else tap], total, pairs.inputs, pairs.outputs,
            pairs.ends, listed, pairs.ends.shape[1], *weight.stride()[1:],
            CI=c_in, CO=c_out, BM=tile.BM, BN=tile.BN,
            BK=loop_step(tile.BK, feats.dtype, precision),
            SWAP=pairs.swap != (tap >= pairs.lists), PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    _sum(total, 1, out, end)


def weight_grad(feats: Tensor, grad: Tensor, pairs: Pairs, precision: str = "ieee") -> Tensor:
    """``out[k] = sum over the pairs (i, m) of tap k of feats[i]^T grad[m]``.

    Args:
        feats: [N, C_in] float16, bfloat16 or float32.
        grad: [M, C_out] in the same dtype.
        pairs: From `make_pairs`.
        precision: Of float32 products: "ieee", "tf32" or "tf32x3".

    Returns:
        [K, C_in, C_out] float32, summed in a fixed order.
    """
    c_in, c_out, volume = feats.shape[1], grad.shape[1], pairs.volume
    out = feats.new_empty((volume, c_in, c_out), dtype=torch.float32)
    if out.numel() == 0 or pairs.inputs.shape[0] == 0:
        return out.zero_()
    feats, grad = feats.contiguous(), grad.contiguous()
    precision = precision if feats.dtype == torch.float32 else "ieee"
    listed = pairs.inputs.shape[0]
    tile = grad_tile(listed, c_in, c_out, feats.dtype, precision, volume, feats.device)
    blocks, taps = pairs.ends.shape[1], next_power(volume)
    most = tile.target + volume  # every tap may end with a short chunk
    partial = feats.new_empty((most, c_in, c_out), dtype=torch.float32)
    launch(
        wgrad_kernel, (most, cdiv(c_in, tile.BM) * cdiv(c_out, tile.BN)), feats, feats, grad,
        partial, pairs.inputs, pairs.outputs, pairs.ends, blocks, pairs.lists, tile.target,
        K=volume, KP=taps, CI=c_in, CO=c_out, BM=tile.BM, BN=tile.BN, BK=tile.BK,
        SWAP=pairs.swap, PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    size = c_in * c_out
    rows, width = (4, 1024) if size >= 1 << 14 else (16, 128)
    launch(
        sum_chunks_kernel, (volume, cdiv(size, width)), feats, partial, out, pairs.ends, blocks,
        pairs.lists, tile.target, size, K=volume, KP=taps, BK=tile.BK, ROWS=rows, BLOCK=width,
    )  # fmt: skip
    return out
