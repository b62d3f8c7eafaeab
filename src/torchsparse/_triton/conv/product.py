"""The convolutions themselves: pick tiles, allocate, launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import expected_rows
from torchsparse._frozen import current, made
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
from torchsparse._triton.launch import Blocks, Step, cdiv, launch, next_power, only_noted
from torchsparse._triton.tiles import (
    WIDE_TURN,
    GemmTile,
    GradTile,
    Limits,
    NarrowTile,
    alike,
    dense_tile,
    fitting,
    gemm_tile,
    grad_tile,
    has_blocks,
    loop_step,
    narrow_tile,
    registers,
)
from torchsparse._tuned import generation

__all__ = ["Plan", "dense", "finish", "gather_gemm", "weight_grad"]


class Plan(NamedTuple):
    """A neighbour table, laid out for the kernels."""

    rows: int  # of the result
    tiles: Tiles | None  # for the implicit GEMM
    memo: dict[Any, Any]  # how products over this table are launched, and where it lies
    pairs: Pairs | None = None  # for the fetch-on-demand dataflow, in place of tiles
    reverse: bool = False  # tap k of the table multiplies weight K - 1 - k
    limit: Tensor | None = None  # [1] int64, how many rows are real; None: all (`_capacity`)


def _aligned(feats: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Channels padded to 16 bytes, without which no row can be copied asynchronously."""
    step = 16 // feats.element_size()
    missing = -feats.shape[1] % step
    if missing:
        feats = torch.nn.functional.pad(feats, (0, missing))
        weight = made(weight, missing, _widened)
    return feats, weight


def _widened(weight: Tensor, missing: int) -> Tensor:
    """With so many more input channels, of zeros."""
    return torch.nn.functional.pad(weight, (0, 0, 0, missing))


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
        _run(_sum(feats.dtype, out, 1, end), feats.contiguous(), None, out, end)
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
        tile = dense_tile(m, c_in, c_out, feats.device)
        strides = weight.stride()
        name = ("dense", feats.dtype, tile, weight.shape, strides, end.kind)
        step = _steps.get(name)
        if step is None:
            step = _steps[name] = Step(
                dense_kernel, CI=c_in, CO=c_out, BM=tile.BM, BN=tile.BN, BK=tile.BK, **end.flags,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        grid = (cdiv(m, tile.BM) * cdiv(c_out, tile.BN), 1)
        _run(_call(step, grid, (None,), (m, *strides)), feats.contiguous(), weight, out, end)
    return out


class _Matrix(NamedTuple):
    """All taps of a weight as one matrix, which a kernel reads in blocks."""

    shape: tuple[int, int]
    block: tuple[int, int]

    def of(self, weight: Tensor) -> Any:
        """That of a weight."""
        return Blocks(weight, list(self.shape), [self.shape[1], 1], list(self.block))


class _Call(NamedTuple):
    """A launch ``kernel[grid](x, [w,] out, *middle, *end, *last)``; see `_run`."""

    step: Step
    grid: tuple[int, int]
    middle: tuple[Tensor | None, ...]
    places: tuple[int | None, ...]  # their addresses
    bits: int  # or-ed
    last: tuple[int, ...]
    matrix: _Matrix | None = None  # how w is given, if not by its address


_steps: dict[Any, Step] = {}  # by all that determines the kernel: another cloud finds them here


def _call(
    step: Step, grid: tuple[int, int], middle: tuple[Tensor | None, ...], last: tuple[int, ...]
) -> _Call:
    places, bits = _places(middle)
    return _Call(step, grid, middle, places, bits, last)


def _places(tensors: tuple[Tensor | None, ...]) -> tuple[tuple[int | None, ...], int]:
    """Addresses, and all of them or-ed."""
    bits = 0
    places: list[int | None] = []
    for tensor in tensors:
        place = None if tensor is None else tensor.data_ptr()
        bits |= place or 0
        places.append(place)
    return tuple(places), bits


def _run(call: _Call, x: Tensor, w: Tensor | None, out: Tensor, end: _End) -> None:
    """Launch a kernel on given tensors."""
    step, grid, middle, places, bits, last, matrix = call
    a, c, device = x.data_ptr(), out.data_ptr(), x.get_device()
    bits |= end.bits | a | c
    if w is None:
        values = (a, c, *places, *end.given, *last)
    else:
        b = w.data_ptr()
        bits |= b
        if matrix is None:
            values = (a, b, c, *places, *end.given, *last)
        else:
            given = step.mapped(device, w, matrix.of)
            values = (a, *given, c, *places, *end.given, *last)
    if not step.again(device, grid, bits, values):
        given = w if matrix is None or w is None else matrix.of(w)
        first = (x, out) if w is None else (x, given, out)
        step.find(grid, x, (*first, *middle, *end.tensors, *last))


def _sum(
    dtype: torch.dtype, out: Tensor, parts: int, end: _End, limit: Tensor | None = None
) -> _Call:
    """The launch that writes ``out`` [M, C]: the sum of so many parts in ``dtype``, finished."""
    m, channels = out.shape
    return _adding(dtype, out.dtype, channels, parts, limit is None, end).over(m, limit)


SUMMED_ROWS = 32  # of a program


class _Adding(NamedTuple):
    """What adds up parts of so many channels."""

    step: Step
    columns: int  # blocks of them

    def over(self, rows: int, limit: Tensor | None) -> _Call:
        """The launch for so many rows, of which ``limit`` may be real."""
        return _call(self.step, (cdiv(rows, SUMMED_ROWS), self.columns), (limit,), (rows,))


def _adding(
    dtype: torch.dtype, out: torch.dtype, channels: int, parts: int, whole: bool, end: _End
) -> _Adding:
    """Of parts in ``dtype`` that become ``out``; ``whole``: all rows are real."""
    width = min(max(next_power(channels), 16), 128)
    name = ("sum", dtype, out, channels, parts, whole, end.kind)
    step = _steps.get(name)
    if step is None:
        step = _steps[name] = Step(
            sum_kernel, CO=channels, PARTS=parts, BM=SUMMED_ROWS, BN=width, **end.flags
        )
    return _Adding(step, cdiv(channels, width))


class _Product(NamedTuple):
    """The launches of one kind of product over one plan."""

    rows: int  # of the result
    channels: int
    pad: bool  # channels to 16 bytes
    turn: _Turn | None  # what brings the summed axis of the weight to its end
    splits: int  # shares of the taps
    gemm: _Call
    add: _Call | None = None  # what adds up the shares


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
    m, (_, c_in, c_out) = plan.rows, weight.shape
    empty = not (m and c_out and c_in and feats.shape[0])
    feats = feats.contiguous()
    precision = precision if feats.dtype == torch.float32 else "ieee"
    if plan.tiles is not None and not empty:
        known = plan.memo[key] = _plan_product(
            feats, weight, end, plan, plan.tiles, precision, key
        )
        return _multiply(known, feats, weight, end)
    out = feats.new_empty((m, c_out))
    if out.numel() == 0:
        return out
    if empty:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return out if epilogue is None else finish(out, epilogue)
    assert plan.pairs is not None
    feats, weight = _aligned(feats, weight)
    _fetch(feats, weight, end, plan.pairs, plan.reverse, precision, out)
    return out


def _multiply(known: _Product, feats: Tensor, weight: Tensor, end: _End) -> Tensor:
    out = feats.new_empty(known.rows, known.channels)  # a tuple would take longer
    if known.pad:
        feats, weight = _aligned(feats, weight)
    if known.turn is not None:
        store = current.store
        if store is None or only_noted():  # nothing is written then
            weight = known.turn.of(weight)
        else:
            weight = store.made(weight, known.turn, _turned)
    if known.gemm.matrix is not None and weight.data_ptr() & 15:
        weight = made(weight, "copy", _copied)  # a part of a larger one; maps want 16 bytes
    if known.add is None:
        _run(known.gemm, feats, weight, out, end)
    else:
        parts = feats.new_empty((known.splits, known.rows, known.channels), dtype=torch.float32)
        _run(known.gemm, feats, weight, parts, NO_END)
        _run(known.add, parts, None, out, end)
    return out


class _Turn(NamedTuple):
    """The launch that turns weights [K, C_in, C_out] of one layout."""

    step: Step
    grid: tuple[int, int]
    shape: tuple[int, int, int]  # of what comes out
    strides: tuple[int, ...]  # of what goes in

    def of(self, weight: Tensor) -> Tensor:
        """[K, C_out, C_in]: the summed axis innermost."""
        step, grid, (volume, c_out, c_in), strides = self
        out = weight.new_empty(volume, c_out, c_in)
        a, b = weight.data_ptr(), out.data_ptr()
        if not step.again(weight.get_device(), grid, a | b, (a, b, *strides)):
            step.find(grid, weight, (weight, out, *strides))
        return out


def _turned(weight: Tensor, turn: _Turn) -> Tensor:
    return turn.of(weight)


def _copied(weight: Tensor, _: str) -> Tensor:
    return weight.clone()


def _turn(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> _Turn:
    """For weights that lie like this."""
    volume, c_in, c_out = shape
    name = ("turn", dtype, shape, strides)
    step = _steps.get(name)
    if step is None:
        step = _steps[name] = Step(turn_kernel, CI=c_in, CO=c_out, BI=32, BO=64)
    grid = (volume, cdiv(c_in, 32) * cdiv(c_out, 64))
    return _Turn(step, grid, (volume, c_out, c_in), strides)


def _must_turn(dtype: torch.dtype, strides: tuple[int, ...], precision: str) -> bool:
    """The tensor cores take float32 operands only with the summed axis innermost."""
    return dtype == torch.float32 and strides[1] != 1 and precision != "ieee"


class _Form(NamedTuple):
    """What products of one kind have in common, whatever the map."""

    steps: dict[Any, Step]  # by tile, and whether rows are sorted, and all of them real
    chosen: dict[Any, _Chosen]  # by rows, about, device, and the same two
    narrow: NarrowTile | None
    pad: bool  # channels to 16 bytes
    turn: _Turn | None  # the weight, so that its summed axis is innermost
    shape: tuple[int, int, int]  # of the weight, padded
    strides: tuple[int, ...]  # as it lies then
    swapped: bool  # its input channels are innermost
    blocks: int  # as which matrix it may be read in blocks: BLOCKS of `gemm_kernel`


class _Chosen(NamedTuple):
    """How products of one kind are computed on maps of about one size."""

    tile: GemmTile
    step: Step
    matrix: _Matrix | None
    add: _Adding | None


_forms: dict[Any, _Form] = {}  # by the keys of `Plan.memo`: another cloud finds them here


def _form(weight: Tensor, precision: str, one: bool) -> _Form:
    """``precision`` as for `gather_gemm`; ``one``: all taps are in one order."""
    volume, c_in, c_out = weight.shape
    dtype, strides = weight.dtype, weight.stride()
    narrow = narrow_tile(c_in, c_out, volume, dtype, precision) if one else None
    if narrow is not None:
        return _Form({}, {}, narrow, False, None, (volume, c_in, c_out), strides, False, 0)
    missing = -c_in % (16 // dtype.itemsize)
    if missing:  # as `_aligned` leaves it
        c_in += missing
        strides = (c_in * c_out, c_out, 1)
    turn = None
    if _must_turn(dtype, strides, precision):
        turn = _turn((volume, c_in, c_out), strides, dtype)
        strides = (c_in * c_out, 1, c_in)
    swapped = strides[1] == 1 and strides[2] != 1
    blocks = _blocks(c_in, c_out, strides, dtype)
    shape = volume, c_in, c_out
    return _Form({}, {}, None, missing > 0, turn, shape, strides, swapped, blocks)


def _blocks(c_in: int, c_out: int, strides: tuple[int, ...], dtype: torch.dtype) -> int:
    """As which matrix a weight is read in blocks, 0 for none, as measured: half types in wide
    turns gain 2 to 13 %, columns that fill no block lose, and so does a gradient of 128."""
    if dtype.itemsize != 2 or c_in % WIDE_TURN or c_out % WIDE_TURN:
        return 0
    if strides == (c_in * c_out, c_out, 1):
        return 1
    return 2 if strides == (c_in * c_out, 1, c_in) and c_out != 128 else 0


def _plan_product(
    feats: Tensor, weight: Tensor, end: _End, plan: Plan, tiles: Tiles, precision: str, key: Any
) -> _Product:
    """Choose tiles for a plan. ``key`` is that of `Plan.memo`."""
    m, one = plan.rows, tiles.shares == 1
    form = _forms.get((key, one))
    if form is None:
        form = _forms[key, one] = _form(weight, precision, one)
    _, _, c_out = form.shape
    if form.narrow is not None:
        call = _narrow(form, form.narrow, end, tiles, plan, precision)
        return _Product(m, c_out, False, None, 1, call)
    rows = expected_rows(m, tiles.limit)
    kind = (
        alike(rows),
        feats.get_device(),
        tiles.order is None,
        tiles.limit is None,
        tiles.shares,
    )
    chosen = form.chosen.get(kind)
    if chosen is None:
        chosen = form.chosen[kind] = _choose(form, rows, feats, end, plan, tiles, precision)
    tile, step, matrix, add = chosen
    where = plan.memo.get("places")
    if where is None:
        where = plan.memo["places"] = _places(_masked(tiles))
    gemm = _gemm(form, tile, step, tiles, where, matrix)
    total = None if add is None else add.over(m, tiles.limit)
    return _Product(m, c_out, form.pad, form.turn, tile.splits, gemm, total)


def _choose(
    form: _Form, rows: int, feats: Tensor, end: _End, plan: Plan, tiles: Tiles, precision: str
) -> _Chosen:
    """Tile and kernels for a plan of which so many rows may be real."""
    (volume, c_in, c_out), dtype, device = form.shape, feats.dtype, feats.device
    blocks = form.blocks if form.blocks and has_blocks(device) else 0
    tile = gemm_tile(
        rows, c_in, c_out, volume, dtype, precision, form.swapped, device, blocks > 0,
        tiles.shares,
    )  # fmt: skip
    own, add = end, None
    if tile.splits > 1:
        own = NO_END
        add = _adding(torch.float32, dtype, c_out, tile.splits, plan.limit is None, end)
    most = registers(tile, dtype, Limits.of(device)) if has_blocks(device) else None
    step = _gemm_step(form, tile, own, tiles, plan.reverse, precision, blocks, most)
    matrix = None
    if blocks == 1:
        matrix = _Matrix((volume * c_in, c_out), (tile.BK, tile.BN))
    elif blocks == 2:
        matrix = _Matrix((volume * c_out, c_in), (tile.BN, tile.BK))
    return _Chosen(tile, step, matrix, add)


def _masked(tiles: Tiles) -> tuple[Tensor | None, ...]:
    """What a masked product reads of tiles, in the order of its parameters."""
    order, table, masks, limit = tiles
    return table, order, masks, limit


def _gemm(
    form: _Form, tile: GemmTile, step: Step, tiles: Tiles,
    where: tuple[tuple[int | None, ...], int], matrix: _Matrix | None = None,
) -> _Call:  # fmt: skip
    """The launch of a masked product over tiles that lie ``where``: see `_places`."""
    places, bits = where
    m, c_out = tiles.table.shape[1], form.shape[2]
    grid = (cdiv(m, tile.BM) * cdiv(c_out, tile.BN), tile.splits)
    last = (m, tiles.masks.shape[2], *form.strides)
    return _Call(step, grid, _masked(tiles), places, bits, last, matrix)


def _gemm_step(
    form: _Form, tile: GemmTile, end: _End, tiles: Tiles, reverse: bool, precision: str,
    blocks: int, most: int | None,
) -> Step:  # fmt: skip
    """The kernel of a masked product; ``most`` registers."""
    ordered, whole, own = tiles.order is not None, tiles.limit is None, tiles.shares > 1
    name = (tile, ordered, whole, own, blocks)
    step = form.steps.get(name)
    if step is None:
        volume, c_in, c_out = form.shape
        step = form.steps[name] = Step(
            gemm_kernel, K=volume, CI=c_in, CO=c_out,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, SPLITS=tile.splits, OWN=own,
            SORTED=ordered, REVERSE=reverse, PRECISION=precision, BLOCKS=blocks,
            **end.flags, num_warps=tile.warps, num_stages=tile.stages,
            **({} if most is None else {"maxnreg": most}),
        )  # fmt: skip
    return step


def _narrow(
    form: _Form, tile: NarrowTile, end: _End, tiles: Tiles, plan: Plan, precision: str
) -> _Call:
    """The launch of a product with few input channels."""
    (volume, c_in, c_out), strides = form.shape, form.strides
    order, table, _, limit = tiles
    name = (tile, order is None, limit is None)
    step = form.steps.get(name)
    if step is None:
        step = form.steps[name] = Step(
            narrow_kernel, K=volume, CI=c_in, CO=c_out, BM=tile.BM, BN=tile.BN, BK=tile.BK,
            SORTED=order is not None, REVERSE=plan.reverse, PRECISION=precision, **end.flags,
            num_warps=tile.warps, num_stages=3,
        )  # fmt: skip
    m = table.shape[1]
    grid = (cdiv(m, tile.BM), cdiv(c_out, tile.BN))
    return _call(step, grid, (table, order, limit), (m, *strides))


def _fetch(
    feats: Tensor, weight: Tensor, end: _End, pairs: Pairs, reverse: bool,
    precision: str, out: Tensor,
) -> None:  # fmt: skip
    """Tap after tap, each adding to its output rows: no row has a tap twice."""
    volume, c_in, c_out = weight.shape
    m = out.shape[0]
    total = torch.zeros_like(out, dtype=torch.float32)
    tile = gemm_tile(m, c_in, c_out, 1, feats.dtype, precision)
    tile = fitting(tile, feats.dtype, Limits.of(feats.device))
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
    _run(_sum(total.dtype, out, 1, end), total, None, out, end)


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
        known = pairs.memo[key] = _plan_grad(feats, grad, pairs, precision)
    partial = out.new_empty(known.chunks, c_in, c_out)
    _run(known.chunk, feats.contiguous(), grad.contiguous(), partial, NO_REST)
    _run(known.add, partial, None, out, NO_REST)
    return out


NO_REST = _End((), (), 0, ())
# Pairs that one accumulator adds up. Tensor cores cut their sums off, where others round: over
# millions of pairs a hundredth of a sum was lost that way.
LONGEST = 1 << 17


class _Grad(NamedTuple):
    """The launches of one kind of weight gradient over one list of pairs."""

    chunks: int  # how many there may be
    chunk: _Call
    add: _Call


def _plan_grad(feats: Tensor, grad: Tensor, pairs: Pairs, precision: str) -> _Grad:
    c_in, c_out, volume = feats.shape[1], grad.shape[1], pairs.volume
    precision = precision if feats.dtype == torch.float32 else "ieee"
    listed = pairs.inputs.shape[0]
    tile = grad_tile(listed, c_in, c_out, feats.dtype, precision, volume, feats.device)
    most_pairs = listed * volume // pairs.lists  # half of the lists may be read from both ends
    tile = tile._replace(target=max(tile.target, cdiv(most_pairs, LONGEST)))
    most = tile.target + volume  # every tap may end with a short chunk
    size = c_in * c_out
    rows, width = (4, 1024) if size >= 1 << 14 else (16, 128)
    chunk, add = _grad_steps(
        c_in, c_out, volume, pairs.lists, pairs.swap, precision, tile, rows, width,
        feats.dtype, pairs.ends.dtype,
    )  # fmt: skip
    numbers = (pairs.ends.shape[1], pairs.lists, tile.target)
    grid = (most, cdiv(c_in, tile.BM) * cdiv(c_out, tile.BN))
    return _Grad(
        most,
        _call(chunk, grid, (pairs.inputs, pairs.outputs, pairs.ends), numbers),
        _call(add, (volume, cdiv(size, width)), (pairs.ends,), (*numbers, size)),
    )


def _grad_steps(
    c_in: int, c_out: int, volume: int, lists: int, swap: bool, precision: str, tile: GradTile,
    rows: int, width: int, *dtypes: torch.dtype,
) -> tuple[Step, Step]:  # fmt: skip
    """Sums of chunks, and what adds these up; ``dtypes`` of the operands and of the ends."""
    # Without the target, which differs from cloud to cloud and is no part of the kernel.
    name = (c_in, c_out, volume, lists, swap, precision, tile[:-1], *dtypes)
    known = _grads.get(name)
    if known is None:
        taps = next_power(volume)
        chunk = Step(
            wgrad_kernel, K=volume, KP=taps, CI=c_in, CO=c_out,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, SWAP=swap, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        add = Step(sum_chunks_kernel, K=volume, KP=taps, BK=tile.BK, ROWS=rows, BLOCK=width)
        known = _grads[name] = chunk, add
    return known


_grads: dict[Any, tuple[Step, Step]] = {}  # as `_steps`
