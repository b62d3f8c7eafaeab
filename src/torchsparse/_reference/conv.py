"""Convolution in plain PyTorch: gather rows, multiply per tap, sum per output row.

Output rows are cut into chunks. For each chunk, the input rows of all its pairs are gathered in
tap order, one matrix product per tap fills a buffer, and an embedding bag sums the buffer's rows
into output rows (an index_add_ of single rows takes five times as long). Sums run in a fixed
order: every run gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Chunk",
    "Pairs",
    "Plan",
    "chunk_pairs",
    "gather_gemm",
    "make_pairs",
    "make_plan",
    "weight_grad",
]


class Chunk(NamedTuple):
    """The pairs of some consecutive output rows, listed by tap.

    1-D, kernel 3, rows at [4, 5, 9]: neighbors = [[-1, 0, -1], [0, 1, 2], [1, -1, -1]] give
        inputs = [0, 0, 1, 2, 1]    sizes = [1, 3, 1]
        order = [1, 4, 0, 2, 3]     offsets = [0, 2, 4, 5]
    """

    inputs: Tensor  # [P] int32, input row of each pair; by tap, then output row
    sizes: list[int]  # [K], pairs per tap
    order: Tensor  # [P] int32, pairs by output row, then tap
    offsets: Tensor  # [R + 1] int32, where each output row starts in `order`


class Plan(NamedTuple):
    """A neighbour table, cut into chunks."""

    chunks: list[Chunk]
    num_outputs: int  # M = sum of R over the chunks
    inverse: Tensor | None = None  # [M] int32, where each output row lies in the plan's order
    reverse: bool = False  # tap k of the table multiplies weight K - 1 - k


def chunk_pairs(in_channels: int, out_channels: int) -> int:
    """Pairs of a chunk: enough for products of hundreds of rows, few enough for its buffers to
    stay in a cache of some megabytes (few sizes, so that layers of one map share plans)."""
    channels = in_channels + out_channels
    return 65536 if channels <= 32 else 32768 if channels <= 96 else 16384


def make_plan(neighbors: Tensor, order: Tensor | None, size: int) -> Plan:
    """Lay out a neighbour table for `gather_gemm`.

    Args:
        neighbors: [K, M] int32, -1 = none.
        order: [M] int32, the order in which output rows are visited; None = as they are. In a
            spatial order neighbouring rows are still cached when their neighbours need them.
        size: Pairs of a chunk, from `chunk_pairs`.
    """
    m = neighbors.shape[1]
    inverse = None
    if order is not None:
        inverse = torch.empty_like(order)
        inverse[order.long()] = torch.arange(m, dtype=torch.int32, device=order.device)
    pairs = int(torch.count_nonzero(neighbors >= 0))
    rows = max(-(-m // max(-(-pairs // size), 1)), 1)
    chunks = []
    for begin in range(0, m, rows):
        if order is None:
            part = neighbors[:, begin : begin + rows].contiguous()
        else:
            part = neighbors.index_select(1, order[begin : begin + rows])
        chunks.append(_chunk(part))
    return Plan(chunks, m, inverse)


def _chunk(neighbors: Tensor) -> Chunk:
    present = neighbors >= 0
    inputs = neighbors[present]
    sizes = present.sum(1).tolist()
    position = present.view(-1).cumsum(0, dtype=torch.int32).sub_(1).view_as(present)
    by_row = present.t().contiguous()
    offsets = torch.zeros(by_row.shape[0] + 1, dtype=torch.int32, device=neighbors.device)
    torch.cumsum(by_row.sum(1, dtype=torch.int32), 0, dtype=torch.int32, out=offsets[1:])
    return Chunk(inputs, sizes, position.t()[by_row], offsets)


def gather_gemm(feats: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """``out[m] = bias + sum over taps k of feats[neighbors[k, m]] @ weight[k]``.

    Args:
        feats: [N, C_in] floating.
        weight: [K, C_in, C_out] in the dtype of feats; any strides.
        bias: [C_out] in the dtype of feats, or None.
        plan: Of the neighbour table, from `make_plan`.

    Returns:
        [M, C_out] in the dtype of feats; half types are summed in float32 and rounded once.
    """
    compute = _compute_dtype(feats)
    in_channels, out_channels = weight.shape[1:]
    out = feats.new_empty((plan.num_outputs, out_channels))
    taps = weight.to(compute).unbind(0)
    if plan.reverse:
        taps = taps[::-1]
    bias = None if bias is None else bias.to(compute)
    feats = feats.to(compute).contiguous()
    # Buffers are kept over the chunks: fresh memory costs a page fault per 4 KB.
    largest = max((chunk.inputs.shape[0] for chunk in plan.chunks), default=0)
    gathered = feats.new_empty((largest, in_channels))
    products = feats.new_empty((largest, out_channels))
    begin = 0
    for chunk in plan.chunks:
        pairs, rows = chunk.inputs.shape[0], chunk.offsets.shape[0] - 1
        xs, ys = gathered[:pairs], products[:pairs]
        torch.index_select(feats, 0, chunk.inputs, out=xs)
        for x, tap, y in zip(xs.split(chunk.sizes), taps, ys.split(chunk.sizes)):
            if x.shape[0]:
                torch.mm(x, tap, out=y)
        total = _bag_sum(ys, chunk.order, chunk.offsets)
        out[begin : begin + rows] = total if bias is None else total.add_(bias)
        begin += rows
    return out if plan.inverse is None else out.index_select(0, plan.inverse)


def _compute_dtype(feats: Tensor) -> torch.dtype:
    return torch.float64 if feats.dtype == torch.float64 else torch.float32


def _bag_sum(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Row m of the result sums ``values[order[offsets[m] : offsets[m + 1]]]`` in that order."""
    if order.shape[0] == 0:
        return values.new_zeros((offsets.shape[0] - 1, values.shape[1]))
    return torch.nn.functional.embedding_bag(
        order, values, offsets, mode="sum", include_last_offset=True
    )


class Pairs(NamedTuple):
    """The valid neighbours of a map, grouped by tap.

    For neighbors = [[-1, 0, -1], [0, 1, 2], [1, -1, -1]]:
        inputs = [0, 0, 1, 2, 1]    outputs = [1, 0, 1, 2, 0]    starts = [0, 1, 4, 5]
    """

    inputs: Tensor  # [P] int32 = neighbors[k, outputs[p]] for p in starts[k] : starts[k + 1]
    outputs: Tensor  # [P] int32, ascending within a tap
    starts: Tensor  # [K + 1] int64 = [0] + cumsum(counts)


def make_pairs(neighbors: Tensor) -> Pairs:
    """List the valid neighbours of a table [K, M] by tap, then by output row."""
    present = neighbors >= 0
    outputs = torch.arange(neighbors.shape[1], dtype=torch.int32, device=neighbors.device)
    starts = torch.zeros(neighbors.shape[0] + 1, dtype=torch.int64, device=neighbors.device)
    torch.cumsum(present.sum(1), 0, out=starts[1:])
    return Pairs(neighbors[present], outputs.expand_as(neighbors)[present], starts)


# Pairs per product: enough for the BLAS, few enough for the two gathered blocks to stay cached.
GRAD_PAIRS = 8192


def weight_grad(feats: Tensor, grad: Tensor, pairs: Pairs) -> Tensor:
    """``out[k] = sum over pairs (i, m) of tap k of feats[i]^T grad[m]``.

    Args:
        feats: [N, C_in] floating.
        grad: [M, C_out] in the same dtype.
        pairs: Of the neighbour table, from `make_pairs`.

    Returns:
        [K, C_in, C_out] float32, or float64 for float64 inputs.
    """
    compute = _compute_dtype(feats)
    starts = pairs.starts.tolist()
    shape = (len(starts) - 1, feats.shape[1], grad.shape[1])
    out = torch.zeros(shape, dtype=compute, device=feats.device)
    feats, grad = feats.to(compute).contiguous(), grad.to(compute).contiguous()
    largest = min(GRAD_PAIRS, pairs.inputs.shape[0])
    gathered = feats.new_empty((largest, shape[1]))
    gradient = feats.new_empty((largest, shape[2]))
    for tap, first, last in zip(out, starts, starts[1:]):
        for i in range(first, last, GRAD_PAIRS):
            j = min(i + GRAD_PAIRS, last)
            x, y = gathered[: j - i], gradient[: j - i]
            torch.index_select(feats, 0, pairs.inputs[i:j], out=x)
            torch.index_select(grad, 0, pairs.outputs[i:j], out=y)
            tap.addmm_(x.t(), y)
    return out
