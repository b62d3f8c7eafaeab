"""Convolution in plain PyTorch: gather rows, multiply per tap, sum per output row.

Output rows are cut into chunks. For each chunk, the input rows of all its pairs are gathered in
tap order, one matrix product per tap fills a buffer, and an embedding bag sums the buffer's rows
into output rows (an index_add_ of single rows takes five times as long). Every output row is
summed by one thread in a fixed order: results have the same bits for any number of threads.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from torchsparse._reference.parallel import run_pieces

__all__ = ["Pairs", "Plan", "chunk_pairs", "gather_gemm", "make_pairs", "make_plan", "weight_grad"]


class Plan(NamedTuple):
    """A neighbour table, cut into chunks of R output rows and listed pair by pair.

    1-D, kernel 3, rows at [4, 5, 9]: neighbors = [[-1, 0, -1], [0, 1, 2], [1, -1, -1]], one chunk:
        inputs = [0, 0, 1, 2, 1]    order = [1, 4, 0, 2, 3]    offsets = [[0, 2, 4, 5]]
        sizes = [[1, 3, 1]]         starts = [0, 5]
    """

    inputs: Tensor  # [P] int32, input row of each pair; by chunk, then tap, then output row
    order: Tensor  # [P] int32, a pair's position in its chunk; by chunk, then output row, then tap
    offsets: Tensor  # [chunks, R + 1] int32, where each row starts in its chunk's part of `order`
    sizes: list[list[int]]  # [chunks][K], pairs per tap
    starts: list[int]  # [chunks + 1], first pair of each chunk
    rows: int  # R
    num_outputs: int  # M
    inverse: Tensor | None = None  # [M] int32, where each output row lies in the plan's order
    reverse: bool = False  # tap k of the table multiplies weight K - 1 - k


def chunk_pairs(in_channels: int, out_channels: int) -> int:
    """Pairs of a chunk: enough for products of hundreds of rows, few enough for its buffers to
    stay in the cache (two sizes, so that layers of one map share their plans)."""
    return 32768 if in_channels + out_channels <= 96 else 16384


def make_plan(neighbors: Tensor, order: Tensor | None, size: int) -> Plan:
    """Lay out a neighbour table for `gather_gemm`.

    Args:
        neighbors: [K, M] int32, -1 = none.
        order: [M] int32, the order in which output rows are visited; None = as they are. In a
            spatial order neighbouring rows are still cached when their neighbours need them.
        size: Pairs of a chunk, from `chunk_pairs`.
    """
    volume, m = neighbors.shape
    device = neighbors.device
    inverse = None
    if order is not None:
        inverse = torch.empty_like(order)
        inverse[order.long()] = torch.arange(m, dtype=torch.int32, device=device)
        neighbors = neighbors.index_select(1, order)
    pairs = int(torch.count_nonzero(neighbors >= 0))
    # Some chunks for every thread, unless they would become tiny.
    chunks = max(-(-pairs // size), min(8, -(-pairs // 2048)), 1)
    rows = max(-(-m // chunks), 1)
    chunks = -(-m // rows)
    table = torch.nn.functional.pad(neighbors, (0, chunks * rows - m), value=-1)
    table = table.view(volume, chunks, rows).transpose(0, 1).contiguous()
    present = table >= 0
    counts = present.sum(2)  # [chunks, K]
    position = present.flatten(1).cumsum(1, dtype=torch.int32).sub_(1).view_as(table)
    offsets = torch.zeros((chunks, rows + 1), dtype=torch.int32, device=device)
    torch.cumsum(present.sum(1, dtype=torch.int32), 1, dtype=torch.int32, out=offsets[:, 1:])
    return Plan(
        inputs=table[present],
        order=position.transpose(1, 2)[present.transpose(1, 2)],
        offsets=offsets,
        sizes=counts.tolist(),
        starts=[0, *counts.sum(1).cumsum(0).tolist()],
        rows=rows,
        num_outputs=m,
        inverse=inverse,
    )


class _Workspace(threading.local):
    """Buffers of one thread for one call; fresh memory would cost a page fault per 4 KB."""

    gathered: Tensor | None = None
    products: Tensor | None = None


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
    largest = max((b - a for a, b in zip(plan.starts, plan.starts[1:])), default=0)
    own = _Workspace()

    def chunk(c: int) -> None:
        if own.gathered is None or own.products is None:
            own.gathered = feats.new_empty((largest, in_channels))
            own.products = feats.new_empty((largest, out_channels))
        first, last = plan.starts[c], plan.starts[c + 1]
        begin, end = c * plan.rows, min((c + 1) * plan.rows, plan.num_outputs)
        gathered, products = own.gathered[: last - first], own.products[: last - first]
        torch.index_select(feats, 0, plan.inputs[first:last], out=gathered)
        sizes = plan.sizes[c]
        for x, tap, y in zip(gathered.split(sizes), taps, products.split(sizes)):
            if x.shape[0]:
                torch.mm(x, tap, out=y)
        total = _bag_sum(products, plan.order[first:last], plan.offsets[c, : end - begin + 1])
        out[begin:end] = total if bias is None else total.add_(bias)

    run_pieces(chunk, range(len(plan.sizes)))
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


# Pairs whose products one piece of work sums, and pairs per matrix product.
GRAD_PAIRS, GRAD_BLOCK = 16384, 4096


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
    pieces = [
        (k, begin, min(begin + GRAD_PAIRS, starts[k + 1]))
        for k in range(len(starts) - 1)
        for begin in range(starts[k], starts[k + 1], GRAD_PAIRS)
    ]
    out = torch.zeros(
        (len(starts) - 1, feats.shape[1], grad.shape[1]), dtype=compute, device=feats.device
    )
    sums: list[Tensor | None] = [None] * len(pieces)
    feats, grad = feats.to(compute).contiguous(), grad.to(compute).contiguous()
    own = _Workspace()

    def piece(index: int) -> None:
        if own.gathered is None or own.products is None:
            own.gathered = feats.new_empty((GRAD_BLOCK, feats.shape[1]))
            own.products = feats.new_empty((GRAD_BLOCK, grad.shape[1]))
        _, begin, end = pieces[index]
        total = feats.new_zeros((feats.shape[1], grad.shape[1]))
        for i in range(begin, end, GRAD_BLOCK):
            j = min(i + GRAD_BLOCK, end)
            x, y = own.gathered[: j - i], own.products[: j - i]
            torch.index_select(feats, 0, pairs.inputs[i:j], out=x)
            torch.index_select(grad, 0, pairs.outputs[i:j], out=y)
            total.addmm_(x.t(), y)
        sums[index] = total

    # Longest first, so that no thread is left with a large piece at the end.
    run_pieces(piece, sorted(range(len(pieces)), key=lambda p: pieces[p][1] - pieces[p][2]))
    for (k, _, _), total in zip(pieces, sums):
        if total is not None:
            out[k] += total
    return out
