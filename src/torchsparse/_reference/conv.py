"""Convolution in plain PyTorch: gather rows, multiply per tap, add to output rows.

Output rows are cut into chunks, which threads share. In each, tap by tap, input rows are gathered
and multiplied; an embedding bag then sums the products of each output row, which costs a quarter
of index_add_ for 32 columns and half for 128. A tap that ties every row to itself (the centre of a
submanifold map) needs no gathering. Sums run in a fixed order: every run gives the same bits.
"""

from __future__ import annotations

import itertools
import math
import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchsparse import _tuned
from torchsparse._recipe import Epilogue, sum_dtype
from torchsparse._reference.coords import flat_nonzero
from torchsparse._reference.threads import for_each

__all__ = [
    "Chunk",
    "Layout",
    "Plan",
    "choose_layout",
    "dense",
    "finish",
    "gather_gemm",
    "make_plan",
    "scratch",
    "sum_bags",
    "weight_grad",
]


class Chunk(NamedTuple):
    """The pairs of R consecutive output rows, listed by tap.

    1-D, kernel 3, rows at [4, 5, 9]: neighbors = [[-1, 0, -1], [0, 1, 2], [1, -1, -1]] give
        inputs = [0, 0, 1, 2, 1]    outputs = [1, 0, 1, 2, 0]    sizes = [1, 3, 1]
        tap_ends = [1, 4, 5]
        order = [1, 4, 0, 2, 3]    offsets = [0, 2, 4, 5]
    """

    begin: int  # first output row
    end: int  # begin + R
    inputs: Tensor  # [P] int32, input row of each pair; by tap, then output row
    outputs: Tensor  # [P] int32, output row of each pair
    sizes: list[int]  # [K], pairs per tap
    tap_ends: Tensor  # [K] int32, where each tap's pairs end
    order: Tensor  # [P] int32, pairs by output row, then tap
    offsets: Tensor  # [R + 1] int32, where each output row starts in `order`


class Plan(NamedTuple):
    """A neighbour table, cut into chunks."""

    chunks: list[Chunk]
    volume: int  # K
    num_outputs: int  # M
    identity: int | None  # the tap that ties every row to itself; not among the pairs
    reverse: bool = False  # tap k of the table multiplies weight K - 1 - k
    apart: bool = True  # whether chunks go to a thread each


class Layout(NamedTuple):
    """What a plan depends on besides its table."""

    pairs: int  # of a chunk: few products stay in the cache, many make long matrix products
    apart: int = 1  # 1: chunks on a thread each; 0: in turn, each on all threads


LAYOUT = Layout(32768)
TRIED = (
    Layout(8192), Layout(16384), LAYOUT, Layout(65536), Layout(131072), Layout(32768, 0),
    Layout(131072, 0), Layout(524288, 0),
)  # fmt: skip
# Chunks that are laid out at once. Threads of a chunk each would mostly wait for the interpreter.
TOGETHER = 16
WIDEST_GROUPED = 64  # channels up to which one call multiplies the rows of all taps


def choose_layout(out_channels: int, device: torch.device | None = None) -> Layout:
    """The same for all layers of a map, unless it was measured.

    Args:
        out_channels: Of the product.
        device: Whose measurements may count; None: the shipped choice alone.
    """
    if device is None or device.type != "cpu":
        return LAYOUT
    name = _tuned.key("layout", 0, 0, out_channels, 0, "any", "ieee", "cpu")
    pairs, apart = _tuned.choose(name, device, tuple(LAYOUT), lambda: list(map(tuple, TRIED)))
    return Layout(max(pairs, 1), min(apart, 1))


def make_plan(
    neighbors: Tensor,
    identity: int | None,
    layout: Layout,
) -> Plan:
    """Lay out a neighbour table for `gather_gemm` and `weight_grad`.

    Args:
        neighbors: [K, M] int32, input rows, -1 = none.
        identity: The tap with ``neighbors[k, m] = m``, or None.
        layout: From `choose_layout`.
    """
    volume, m = neighbors.shape
    present = neighbors >= 0
    if identity is not None:
        present[identity] = False
    ranks = _ranks(present)
    starts = torch.zeros(m + 1, dtype=torch.int32, device=neighbors.device)
    if volume:
        torch.cumsum(ranks[-1], 0, out=starts[1:])
    cuts = _cuts(starts[1:], layout.pairs)
    chunks: list[Chunk] = []
    for first in range(0, len(cuts), TOGETHER):
        some = cuts[first : first + TOGETHER]
        chunks += _chunks(neighbors, present, ranks, starts, some)
    return Plan(chunks, volume, m, identity, apart=layout.apart == 1)


def _ranks(present: Tensor) -> Tensor:
    """How many of the taps up to each one a row has.  [K, M] bool -> [K, M] uint8 or int32"""
    volume = present.shape[0]
    short = torch.uint8 if volume <= torch.iinfo(torch.uint8).max else torch.int32
    ranks = present.view(torch.uint8).to(short, copy=True)
    for tap in range(1, volume):  # ten times as fast as `cumsum`
        torch.add(ranks[tap - 1], ranks[tap], out=ranks[tap])
    return ranks


def _cuts(ends: Tensor, pairs: int) -> list[tuple[int, int]]:
    """First output row of each chunk, and the one behind its last: equal shares of the pairs.

    Args:
        ends: [M] int32, pairs up to each output row.
        pairs: Of a chunk, about.
    """
    m = ends.shape[0]
    if m == 0:
        return []
    total = int(ends[-1])
    count = max(round(total / pairs), 1)
    shares = torch.arange(1, count, device=ends.device) * total // count
    edges = [0, *torch.searchsorted(ends, shares, right=True).tolist(), m]
    return [(begin, end) for begin, end in itertools.pairwise(edges) if begin < end]


def _chunks(
    neighbors: Tensor, present: Tensor, ranks: Tensor, starts: Tensor, cuts: list[tuple[int, int]]
) -> list[Chunk]:
    """The chunks of cuts that follow one another.

    Args:
        neighbors, present, ranks: [K, M].
        starts: [M + 1] int32, pairs before each output row.
        cuts: First output row of each, and the one behind its last.
    """
    volume, device = neighbors.shape[0], neighbors.device
    numbers = torch.arange(cuts[0][0], cuts[-1][1], dtype=torch.int32, device=device)
    rows = numbers.expand(volume, -1)
    # Chunk after chunk, in each tap after tap.
    within = [(begin - cuts[0][0], end - cuts[0][0]) for begin, end in cuts]
    pairs = flat_nonzero(_in_turn(present, cuts))
    inputs = _in_turn(neighbors, cuts).index_select(0, pairs)
    outputs = _in_turn(rows, within).index_select(0, pairs)
    # In the order of the rows, a pair stands behind those of rows before, and of taps before.
    places = starts.index_select(0, outputs)
    places += _in_turn(ranks, cuts).index_select(0, pairs)
    places -= starts[cuts[0][0]] + 1
    order = torch.empty_like(inputs)
    numbers = torch.arange(pairs.shape[0], dtype=torch.int32, device=device)
    order.scatter_(0, places.to(torch.int64), numbers)
    sizes = torch.tensor([end - begin for begin, end in cuts], device=device)
    before = (sizes.cumsum(0) - sizes)[:, None] * volume
    tap_ends = before + sizes[:, None] * torch.arange(1, volume + 1, device=device)
    tap_ends = torch.searchsorted(pairs, tap_ends.view(-1), out_int32=True).view(-1, volume)
    firsts = torch.cat([tap_ends.new_zeros(1), tap_ends[:-1, -1]])
    tap_ends = tap_ends - firsts[:, None]
    per_tap = torch.diff(tap_ends, dim=1, prepend=tap_ends.new_zeros((len(cuts), 1))).tolist()
    edges = [*firsts.tolist(), pairs.shape[0]]
    return [
        Chunk(
            begin, end, inputs[first:last], outputs[first:last], per_tap[i], tap_ends[i],
            order[first:last].sub_(first), starts[begin : end + 1] - starts[begin],
        )
        for i, ((begin, end), (first, last)) in enumerate(zip(cuts, itertools.pairwise(edges)))
    ]  # fmt: skip


def _in_turn(table: Tensor, cuts: list[tuple[int, int]]) -> Tensor:
    """The columns of a [K, M] table, cut after cut, each as it lies.  -> [K R], R rows of them"""
    volume, columns = table.shape[0], cuts[-1][1] - cuts[0][0]
    if len(cuts) == 1:
        return table[:, cuts[0][0] : cuts[0][1]].reshape(-1)
    out = table.new_empty(volume * columns)
    at = 0
    for begin, end in cuts:
        stop = at + volume * (end - begin)
        out[at:stop].view(volume, -1).copy_(table[:, begin:end])
        at = stop
    return out


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
        feats: [N, C_in] floating.
        weight: [K, C_in, C_out] in the dtype of feats; any strides.
        bias: [C_out] in the dtype of feats, or None.
        plan: Of the neighbour table, from `make_plan`.
        precision: Of float32 products; here they are always exact to 24 bits.
        epilogue: Applied to the sums of a chunk while they are in the cache, or None.

    Returns:
        [M, C_out] in the dtype of feats; half types are summed in float32 and rounded once.
    """
    compute = sum_dtype(feats.dtype)
    weight = weight.to(compute)
    if plan.reverse:
        weight = weight.flip(0)
    if not (weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()):
        weight = weight.contiguous()  # products of groups take no other strides
    xs = feats.to(compute).contiguous()
    end = None if epilogue is None else _end(epilogue, compute)
    centre = None if plan.identity is None else weight[plan.identity]
    bias = None if bias is None else bias.to(compute)

    def sums_of(chunk: Chunk) -> Tensor:
        sums = _sum_products(xs, weight, chunk)
        if centre is not None:
            sums.addmm_(xs[chunk.begin : chunk.end], centre)
        if bias is not None:
            sums.add_(bias)
        return sums

    if len(plan.chunks) == 1:
        out = sums_of(plan.chunks[0])
        if end is not None:
            _finish(out, end, slice(None), out)
    else:
        out = feats.new_empty((plan.num_outputs, weight.shape[2]), dtype=compute)

        def fill(chunk: Chunk) -> None:
            where = slice(chunk.begin, chunk.end)
            if end is None:
                out[where] = sums_of(chunk)
            else:
                _finish(sums_of(chunk), end, where, out[where])

        for_each(fill, plan.chunks, out.device, plan.apart)
    return out.to(feats.dtype)


class _End(NamedTuple):
    """An epilogue with the normalisation as one multiplication and one addition."""

    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    slope: float | None


def _end(epilogue: Epilogue, dtype: torch.dtype) -> _End:
    norm, residual, slope = epilogue
    scale = shift = None
    if norm is not None:
        scale = torch.rsqrt(norm.var.to(dtype) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.to(dtype)
        shift = -norm.mean.to(dtype) * scale
        if norm.bias is not None:
            shift = shift + norm.bias.to(dtype)
    return _End(scale, shift, residual, slope)


def _finish(rows: Tensor, end: _End, where: slice, out: Tensor) -> None:
    """Apply an epilogue to the rows ``where`` of a result, and write them to ``out``."""
    if end.scale is not None and end.shift is not None:
        torch.addcmul(end.shift, rows, end.scale, out=out)
    elif out is not rows:
        out.copy_(rows)
    if end.residual is not None:
        out.add_(end.residual[where].to(out.dtype))
    if end.slope is not None:
        torch.nn.functional.leaky_relu_(out, end.slope) if end.slope else out.relu_()


def dense(feats: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """``feats @ weight + bias``, then an epilogue.  [M, C_in] -> [M, C_out] in the same dtype."""
    dtype, given = sum_dtype(feats.dtype), feats.dtype
    feats, weight = feats.to(dtype), weight.to(dtype)
    scale, shift, residual, slope = _end(epilogue, dtype)
    bias = None if bias is None else bias.to(dtype)
    if scale is not None and shift is not None:  # of the product: rows are not passed over again
        weight = weight * scale
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
    # Into given rows, which autocast leaves as they are.
    rows = feats.new_empty((feats.shape[0], weight.shape[1]))
    if bias is None:
        torch.mm(feats, weight, out=rows)
    else:
        torch.addmm(bias, feats, weight, out=rows)
    _finish(rows, _End(None, None, residual, slope), slice(None), rows)
    return rows.to(given)


def finish(feats: Tensor, epilogue: Epilogue) -> Tensor:
    """Apply an epilogue to features.  [M, C] -> [M, C] in the same dtype."""
    rows = feats.to(sum_dtype(feats.dtype), copy=True)
    _finish(rows, _end(epilogue, rows.dtype), slice(None), rows)
    return rows.to(feats.dtype)


def _sum_products(xs: Tensor, weight: Tensor, chunk: Chunk) -> Tensor:
    """[R, C_out], each output row's sum of products."""
    pairs, sizes = chunk.inputs.shape[0], chunk.sizes
    c_in, c_out = weight.shape[1:]
    if pairs == 0:
        return xs.new_zeros((chunk.end - chunk.begin, c_out))
    grouped = max(c_in, c_out) <= WIDEST_GROUPED and c_in % 4 == c_out % 4 == 0
    if (
        grouped
        and c_in
        and c_out
        and xs.dtype == torch.float32
        and xs.device.type == "cpu"
        and _has_grouped_mm()
    ):
        # Threads whose calls are short wait for each other in between.
        gathered = scratch.take("gathered", xs, (pairs, c_in))
        torch.index_select(xs, 0, chunk.inputs, out=gathered)
        products = torch.nn.functional.grouped_mm(gathered, weight, offs=chunk.tap_ends)
        return sum_bags(products, chunk)
    gathered = scratch.take("gathered", xs, (max(sizes), c_in))
    products = scratch.take("products", xs, (pairs, c_out))
    for inputs, tap, y, n in zip(chunk.inputs.split(sizes), weight, products.split(sizes), sizes):
        if n:
            x = gathered[:n]
            torch.index_select(xs, 0, inputs, out=x)
            torch.mm(x, tap, out=y)
    return sum_bags(products, chunk)


@cache
def _has_grouped_mm() -> bool:
    """Whether PyTorch multiplies groups of float32 rows on a CPU, as it does since 2.10."""
    rows, weight = torch.ones(2, 4), torch.ones(1, 4, 4)
    try:
        product = torch.nn.functional.grouped_mm(rows, weight, offs=torch.tensor([2]).int())
    except (AttributeError, RuntimeError):
        return False
    return product.dtype == torch.float32


def sum_bags(products: Tensor, chunk: Chunk) -> Tensor:
    """The sum of the pairs' rows for each output row.  [P, C] -> [R, C]"""
    return torch.nn.functional.embedding_bag(
        chunk.order, products, chunk.offsets, mode="sum", include_last_offset=True
    )


class _Scratch(threading.local):
    """Buffers that outlive a call, per thread; fresh memory costs a page fault per 4 KB."""

    LIMIT = 1 << 26  # bytes; larger buffers are not kept

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, shape: tuple[int, int]) -> Tensor:
        """An uninitialised tensor in the dtype and on the device of ``like``."""
        size = math.prod(shape)
        if like.device.type != "cpu" or size * like.element_size() > self.LIMIT:
            return like.new_empty(shape)
        buffer = self.buffers.get((name, like.dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = self.buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype)
        return buffer[:size].view(shape)


scratch = _Scratch()


def weight_grad(feats: Tensor, grad: Tensor, plan: Plan, precision: str = "ieee") -> Tensor:
    """``out[k] = sum over the pairs (i, m) of tap k of feats[i]^T grad[m]``.

    Args:
        feats: [N, C_in] floating.
        grad: [M, C_out] in the same dtype.
        plan: Of the neighbour table, from `make_plan`.
        precision: As in `gather_gemm`.

    Returns:
        [K, C_in, C_out] float32, or float64 for float64 inputs.
    """
    compute = sum_dtype(feats.dtype)
    xs, gs = feats.to(compute).contiguous(), grad.to(compute).contiguous()
    out = xs.new_zeros((plan.volume, xs.shape[1], gs.shape[1]))
    for chunk in plan.chunks:
        longest = max(chunk.sizes)
        x_rows = scratch.take("gathered", xs, (longest, xs.shape[1]))
        g_rows = scratch.take("products", xs, (longest, gs.shape[1]))
        sizes = chunk.sizes
        for inputs, outputs, tap, n in zip(
            chunk.inputs.split(sizes), chunk.outputs.split(sizes), out, sizes
        ):
            if n:
                x, g = x_rows[:n], g_rows[:n]
                torch.index_select(xs, 0, inputs, out=x)
                torch.index_select(gs, 0, outputs, out=g)
                tap.addmm_(x.t(), g)
        if plan.identity is not None:
            rows = slice(chunk.begin, chunk.end)
            out[plan.identity].addmm_(xs[rows].t(), gs[rows])
    return out.flip(0) if plan.reverse else out
