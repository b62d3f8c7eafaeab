"""The convolutions themselves: pick tiles, allocate, launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._recipe import Epilogue
from torchsparse._triton.conv.fetch import fetch_kernel
from torchsparse._triton.conv.gemm import (
    dense_kernel,
    gemm_kernel,
    narrow_kernel,
    sum_kernel,
    turn_kernel,
)
from torchsparse._triton.conv.order import Tiles
from torchsparse._triton.conv.pairs import Pairs
from torchsparse._triton.conv.wgrad import sum_chunks_kernel, wgrad_kernel
from torchsparse._triton.launch import (
    Repeated,
    Resolved,
    cdiv,
    launch,
    next_power,
)
from torchsparse._triton.tiles import (
    GemmTile,
    NarrowTile,
    dense_tile,
    gemm_tile,
    grad_tile,
    loop_step,
    narrow_tile,
)
from torchsparse._tuned import generation

__all__ = ["Plan", "Share", "dense", "finish", "gather_gemm", "weight_grad"]


class Share(NamedTuple):
    """Tiles of the taps from first to last - 1: rows are sorted by these taps alone."""

    first: int
    last: int
    tiles: Tiles


class Plan(NamedTuple):
    """A neighbour table, laid out for the kernels."""

    neighbors: Tensor  # [K, M] int32, natural row order, any strides
    shares: tuple[Share, ...]  # for the implicit GEMM
    memo: dict[Any, _Product]  # how products over this table are launched
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
    given: tuple[Any, ...]  # the same with addresses
    bits: int  # all addresses, or-ed
    kind: tuple[Any, ...]  # dtypes and activation: equal kinds have equal flags

    @property
    def flags(self) -> dict[str, Any]:
        """Options of the kernels."""
        bias, mean, gamma, residual, act = (self.kind[place] for place in (0, 1, 3, 5, 6))
        norm = 0 if mean is None else 1 if gamma is None else 2
        return {"BIAS": bias is not None, "NORM": norm, "RESIDUAL": residual is not None,
                "ACT": act}  # fmt: skip


def _end(bias: Tensor | None, epilogue: Epilogue | None) -> _End:
    # Written out: this runs for every convolution.
    a = r = m = v = p = q = 0
    bias_type = mean_type = var_type = gamma_type = beta_type = residual_type = None
    mean = var = gamma = beta = None
    eps = 0.0
    norm, residual, slope = epilogue or NOTHING
    if bias is not None:
        bias = bias.contiguous()
        a, bias_type = bias.data_ptr(), bias.dtype
    if norm is not None:
        mean, var, gamma, beta, eps = norm
        eps = float(eps)
        mean, var = mean.contiguous(), var.contiguous()
        m, v, mean_type, var_type = mean.data_ptr(), var.data_ptr(), mean.dtype, var.dtype
        if gamma is not None and beta is not None:
            gamma, beta = gamma.contiguous(), beta.contiguous()
            p, q, gamma_type, beta_type = (
                gamma.data_ptr(), beta.data_ptr(), gamma.dtype, beta.dtype
            )  # fmt: skip
    if residual is not None:
        residual = residual.contiguous()
        r, residual_type = residual.data_ptr(), residual.dtype
    act = 0 if slope is None else 1 if slope == 0 else 2
    slope = float(slope or 0.0)
    return _End(
        (bias, mean, var, gamma, beta, eps, residual, slope),
        (a or None, m or None, v or None, p or None, q or None, eps, r or None, slope),
        a | m | v | p | q | r,
        (bias_type, mean_type, var_type, gamma_type, beta_type, residual_type, act),
    )


NOTHING = Epilogue()
NO_END = _end(None, None)


def finish(feats: Tensor, epilogue: Epilogue) -> Tensor:
    """Apply an epilogue to features in one pass.  [M, C] -> [M, C] in the same dtype."""
    out = torch.empty_like(feats, memory_format=torch.contiguous_format)
    m, channels = out.shape
    if m and channels:
        end = _end(None, epilogue)
        name = ("finish", feats.get_device(), feats.dtype, channels, end.kind)
        step = _sum(m, channels, 1, end, known=_known.get(name))
        _run(step, feats.contiguous(), None, out, end, name)
    return out


def dense(feats: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """``feats @ weight + bias``, then an epilogue, in one pass.

    Args:
        feats: [M, C_in] float16 or bfloat16, C_in a multiple of 8.
        weight: [C_in, C_out] in the same dtype, any strides.
        bias: [C_out] in the same dtype, or None.
        epilogue: Applied to the float32 sums.
    """
    m, (c_in, c_out) = feats.shape[0], weight.shape
    out = feats.new_empty(m, c_out)
    if m and c_out:
        end = _end(bias, epilogue)
        tile = dense_tile(m, c_in, c_out)
        name = (
            "dense", feats.get_device(), feats.dtype, tile, weight.shape, weight.stride(), end.kind
        )  # fmt: skip
        options = {
            "CI": c_in, "CO": c_out, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, **end.flags,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        grid = (cdiv(m, tile.BM) * cdiv(c_out, tile.BN), 1)
        step = Repeated(
            dense_kernel, grid, (None,), (m, *weight.stride()), options, _known.get(name)
        )
        _run(step, feats.contiguous(), weight, out, end, name)
    return out


_known: dict[Any, Resolved] = {}  # kernels by name: another cloud need not look for them


def _run(
    step: Repeated, x: Tensor, w: Tensor | None, out: Tensor, end: _End, name: Any = None
) -> None:
    """Launch a kernel whose parameters are ``x, [w,] out, ..., *end, ...``; what it is found to
    be is remembered under ``name``."""
    if w is None:
        first, pointers = (x, out), (x.data_ptr(), out.data_ptr())
        bits = end.bits | pointers[0] | pointers[1]
    else:
        first, pointers = (x, w, out), (x.data_ptr(), w.data_ptr(), out.data_ptr())
        bits = end.bits | pointers[0] | pointers[1] | pointers[2]
    if not step.again(x.get_device(), pointers, end.given, bits):
        known = launch(
            step.kernel, step.grid, x, *first, *step.middle, *end.tensors, *step.last,
            **step.options,
        )  # fmt: skip
        if known is not None and step.learn(known, bits) and name is not None:
            _known[name] = known


def _sum(
    m: int, channels: int, parts: int, end: _End, limit: Tensor | None = None,
    known: Resolved | None = None,
) -> Repeated:  # fmt: skip
    width = min(max(next_power(channels), 16), 128)
    options = {"CO": channels, "PARTS": parts, "BM": 32, "BN": width, **end.flags}
    grid = cdiv(m, 32), cdiv(channels, width)
    return Repeated(sum_kernel, grid, (limit,), (m,), options, known)


class _Product(NamedTuple):
    """The launches of one kind of product over one plan."""

    rows: int  # of the result
    channels: int
    pad: bool  # channels to 16 bytes
    turn: bool  # the weight, so that its summed axis is innermost
    splits: int
    gemm: Repeated
    add: Repeated | None  # up the shares of the taps
    name: Any = None  # what determines the kernel of ``gemm``, and after "sum" that of ``add``


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
    end = _end(bias, epilogue)
    key = (
        feats.dtype, weight.shape, weight.stride(), precision, plan.reverse, generation(), end.kind
    )  # fmt: skip
    known = plan.memo.get(key)
    if known is not None:
        return _multiply(known, feats.contiguous(), weight, end)
    m, (_, c_in, c_out) = plan.neighbors.shape[1], weight.shape
    out = feats.new_empty((m, c_out))
    if out.numel() == 0:
        return out
    if feats.shape[0] == 0 or c_in == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return out if epilogue is None else finish(out, epilogue)
    feats = feats.contiguous()
    precision = precision if feats.dtype == torch.float32 else "ieee"
    if plan.pairs is not None:
        feats, weight = _aligned(feats, weight)
        _fetch(feats, weight, end, plan.pairs, plan.reverse, precision, out)
    elif len(plan.shares) > 1:
        _by_shares(feats, weight, end, plan, precision, out)
    else:
        known = plan.memo[key] = _plan_product(feats, weight, end, plan, precision, key)
        return _multiply(known, feats, weight, end)
    return out


def _multiply(known: _Product, feats: Tensor, weight: Tensor, end: _End) -> Tensor:
    out = feats.new_empty(known.rows, known.channels)  # a tuple would take longer
    if known.pad:
        feats, weight = _aligned(feats, weight)
    if known.turn:
        weight = _turned(weight)
    if known.add is None:
        _run(known.gemm, feats, weight, out, end, known.name)
    else:
        parts = feats.new_empty((known.splits, *out.shape), dtype=torch.float32)
        _run(known.gemm, feats, weight, parts, NO_END, known.name)
        _run(known.add, parts, None, out, end, ("sum", *known.name))
    return out


def _turned(weight: Tensor) -> Tensor:
    """The same weight with its summed axis innermost."""
    volume, c_in, c_out = weight.shape
    out = weight.new_empty(volume, c_out, c_in)
    launch(
        turn_kernel, (volume, cdiv(c_in, 32), cdiv(c_out, 64)), weight, weight, out,
        *weight.stride(), CI=c_in, CO=c_out, BI=32, BO=64,
    )  # fmt: skip
    return out.transpose(1, 2)


def _must_turn(weight: Tensor, precision: str) -> bool:
    """The tensor cores take float32 operands only with the summed axis innermost."""
    return weight.dtype == torch.float32 and weight.stride(1) != 1 and precision != "ieee"


def _tile(feats: Tensor, weight: Tensor, m: int, precision: str) -> GemmTile:
    volume, c_in, c_out = weight.shape
    swapped = weight.stride(1) == 1 and weight.stride(2) != 1
    return gemm_tile(m, c_in, c_out, volume, feats.dtype, precision, swapped, feats.device)


def _plan_product(
    feats: Tensor, weight: Tensor, end: _End, plan: Plan, precision: str, key: Any
) -> _Product:
    """Choose tiles for a plan of one share. ``key`` is that of `Plan.memo`."""
    m = plan.neighbors.shape[1]
    volume, c_in, c_out = weight.shape
    narrow = narrow_tile(c_in, c_out, volume, feats.dtype, precision)
    if narrow is not None:
        step = _narrow(weight, end, plan, narrow, precision)
        return _Product(m, c_out, False, False, 1, step, None)
    padded, weight = _aligned(feats, weight)
    turn = _must_turn(weight, precision)
    if turn:  # as it will lie: nothing is read of it here
        size = weight.shape[1] * weight.shape[2]
        lies = (size, 1, weight.shape[1])
        weight = torch.empty_strided(weight.shape, lies, dtype=weight.dtype, device="meta")
    tile = _tile(feats, weight, m, precision)
    own_end = end if tile.splits == 1 else NO_END
    tiles = plan.shares[0].tiles
    name = (feats.get_device(), tile, tiles.order is None, tiles.limit is None, *key)
    known = _known.get(name)
    step = _gemm(weight, own_end, tiles, plan.reverse, tile, precision, known)
    add = None
    if tile.splits > 1:
        add = _sum(m, c_out, tile.splits, end, tiles.limit, _known.get(("sum", *name)))
    return _Product(m, c_out, padded is not feats, turn, tile.splits, step, add, name)


def _by_shares(
    feats: Tensor, weight: Tensor, end: _End, plan: Plan, precision: str, out: Tensor
) -> None:
    """Shares of the taps one after another, then their sum."""
    feats, weight = _aligned(feats, weight)
    if _must_turn(weight, precision):
        weight = _turned(weight)
    volume, (m, c_out) = weight.shape[0], out.shape
    tile = _tile(feats, weight, m, precision)._replace(splits=1)
    parts = feats.new_empty((len(plan.shares), m, c_out), dtype=torch.float32)
    for part, (first, last, tiles) in zip(parts, plan.shares):
        taps = slice(volume - last, volume - first) if plan.reverse else slice(first, last)
        step = _gemm(weight[taps], NO_END, tiles, plan.reverse, tile, precision)
        _run(step, feats, weight[taps], part, NO_END)
    _run(_sum(m, c_out, len(plan.shares), end, plan.limit), parts, None, out, end)


def _gemm(
    weight: Tensor, end: _End, tiles: Tiles, reverse: bool, tile: GemmTile, precision: str,
    known: Resolved | None = None,
) -> Repeated:  # fmt: skip
    volume, c_in, c_out = weight.shape
    m = tiles.table.shape[1]
    grid = (cdiv(m, tile.BM) * cdiv(c_out, tile.BN), tile.splits)
    options = {
        "K": volume, "CI": c_in, "CO": c_out,
        "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "SPLITS": tile.splits,
        "SORTED": tiles.order is not None, "REVERSE": reverse, "PRECISION": precision,
        **end.flags, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    middle = (tiles.table, tiles.order, tiles.masks, tiles.limit)
    last = (m, tiles.masks.shape[1], *weight.stride())
    return Repeated(gemm_kernel, grid, middle, last, options, known)


def _narrow(weight: Tensor, end: _End, plan: Plan, tile: NarrowTile, precision: str) -> Repeated:
    volume, c_in, c_out = weight.shape
    table = plan.neighbors
    m = table.shape[1]
    options = {
        "K": volume, "CI": c_in, "CO": c_out, "BM": tile.BM, "BN": tile.BN,
        "BK": tile.BK, "REVERSE": plan.reverse, "PRECISION": precision, **end.flags,
        "num_warps": tile.warps, "num_stages": 3,
    }  # fmt: skip
    last = (m, table.stride(1), table.stride(0), *weight.stride())
    return Repeated(
        narrow_kernel, (cdiv(m, tile.BM), cdiv(c_out, tile.BN)), (table, plan.limit), last, options
    )


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
    _run(_sum(m, c_out, 1, end), total, None, out, end)


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
    key = (
        feats.dtype, feats.shape[1], grad.shape[1], precision, pairs.swap, generation()
    )  # fmt: skip
    known = pairs.memo.get(key)
    c_in, c_out, volume = feats.shape[1], grad.shape[1], pairs.volume
    out = feats.new_empty((volume, c_in, c_out), dtype=torch.float32)
    if known is None:
        if out.numel() == 0 or pairs.inputs.shape[0] == 0:
            return out.zero_()
        known = pairs.memo[key] = _plan_grad(feats, grad, pairs, precision, key)
    partial = out.new_empty(known.chunks, c_in, c_out)
    _run(known.chunk, feats.contiguous(), grad.contiguous(), partial, NO_REST, known.name)
    _run(known.add, partial, None, out, NO_REST, ("sum", *known.name))
    return out


NO_REST = _End((), (), 0, ())


class _Grad(NamedTuple):
    """The launches of one kind of weight gradient over one list of pairs."""

    chunks: int  # how many there may be
    chunk: Repeated
    add: Repeated
    name: Any  # what determines the kernel of ``chunk``, and after "sum" that of ``add``


def _plan_grad(feats: Tensor, grad: Tensor, pairs: Pairs, precision: str, key: Any) -> _Grad:
    c_in, c_out, volume = feats.shape[1], grad.shape[1], pairs.volume
    precision = precision if feats.dtype == torch.float32 else "ieee"
    listed = pairs.inputs.shape[0]
    tile = grad_tile(listed, c_in, c_out, feats.dtype, precision, volume, feats.device)
    blocks, taps = pairs.ends.shape[1], next_power(volume)
    most = tile.target + volume  # every tap may end with a short chunk
    numbers = (blocks, pairs.lists, tile.target)
    name = (
        "grad", feats.get_device(), tile, volume, pairs.lists, pairs.ends.dtype, *key,
    )  # fmt: skip
    chunk = Repeated(
        wgrad_kernel,
        (most, cdiv(c_in, tile.BM) * cdiv(c_out, tile.BN)),
        (pairs.inputs, pairs.outputs, pairs.ends),
        numbers,
        {
            "K": volume, "KP": taps, "CI": c_in, "CO": c_out,
            "BM": tile.BM, "BN": tile.BN, "BK": tile.BK,
            "SWAP": pairs.swap, "PRECISION": precision,
            "num_warps": tile.warps, "num_stages": tile.stages,
        },
        _known.get(name),
    )  # fmt: skip
    size = c_in * c_out
    rows, width = (4, 1024) if size >= 1 << 14 else (16, 128)
    add = Repeated(
        sum_chunks_kernel,
        (volume, cdiv(size, width)),
        (pairs.ends,),
        (*numbers, size),
        {"K": volume, "KP": taps, "BK": tile.BK, "ROWS": rows, "BLOCK": width},
        _known.get(("sum", *name)),
    )
    return _Grad(most, chunk, add, name)
