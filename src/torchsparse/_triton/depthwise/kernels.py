"""Depthwise convolution: a program scales and sums the neighbours of BM rows in BC channels.

There is no product to feed, so bytes decide: every lane gathers 16 of them at a time, weights come
from the first-level cache, and taps that no row of a tile has are not visited. Rows, tiles and
masks are those of the implicit GEMM (`conv/order.py`): layers of one map share them.
"""

# pyright: reportGeneralTypeIssues=false
# A function of kernels has no type that a checker knows.

import triton
import triton.language as tl

from torchsparse._triton.conv.wgrad import find_chunk
from torchsparse._triton.primitives import bit_count, lowest_bit, real_rows

__all__ = ["depthwise_grad_kernel", "depthwise_kernel"]


@triton.jit(do_not_specialize=["M", "T"])
def depthwise_kernel(
    x, w, out, table, order, masks, limit, bias, M, T, w_tap, w_out,
    K: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, REPEAT: tl.constexpr,
    FOLD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    SORTED: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out[order[m], c] = bias[c] + sum over taps k of x[table[k, m], c // REPEAT] * w[k, c], with
    FOLD neighbouring channels c summed to one. Rows from ``limit`` on are padding, have no place
    in the order, and get zeros."""
    COLS: tl.constexpr = (CO + BC - 1) // BC
    WORDS: tl.constexpr = (K + 31) // 32
    pid = tl.program_id(0)
    tile = pid // COLS
    cols = (pid % COLS) * BC + tl.arange(0, BC)
    rm = tile * BM + tl.arange(0, BM)
    live = rm < real_rows(M, limit)
    inside = cols < CO
    last = K - 1
    acc = tl.zeros((BM, BC), dtype=tl.float32)
    for word in range(WORDS):
        # Masks describe 64 rows; BM divides that.
        m = tl.load(masks + word * T + tile * BM // 64).to(tl.uint32, bitcast=True)
        cnt = bit_count(m)
        tap = tl.minimum(word * 32 + lowest_bit(m), last)
        idx = tl.load(table + tap.to(tl.int64) * M + rm, mask=live, other=-1)
        for _ in tl.range(0, cnt, num_stages=STAGES):
            rows = x + idx.to(tl.int64)[:, None] * CI
            there = (idx >= 0)[:, None] & inside[None, :]
            slice_ = last - tap if REVERSE else tap
            weights = w + slice_.to(tl.int64) * w_tap
            # The rows of the next tap are under way while this one is summed.
            m &= m - 1
            tap = tl.minimum(word * 32 + lowest_bit(m), last)
            idx = tl.load(table + tap.to(tl.int64) * M + rm, mask=live, other=-1)
            for j in tl.static_range(FOLD):
                c = cols * FOLD + j
                a = tl.load(rows + (c // REPEAT)[None, :], mask=there, other=0.0)
                b = tl.load(weights + c * w_out, mask=inside, other=0.0)
                acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SORTED:
        target = tl.load(order + rm, mask=live, other=0).to(tl.int64)
    else:
        target = rm.to(tl.int64)
    if limit is not None:
        target = tl.where(live, target, rm.to(tl.int64))
        acc = tl.where(live[:, None], acc, 0.0)
    at = out + target[:, None] * CO + cols[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rm < M)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["blocks", "target"])
def depthwise_grad_kernel(
    x, g, partial, inputs, outputs, ends, blocks, lists, target,
    K: tl.constexpr, KP: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    REPEAT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """partial[p, c] = sum over the pairs (i, o) of chunk p of x[i, c // REPEAT] * g[o, c].

    The chunks of a tap are then summed by `sum_chunks_kernel`.
    """
    chunk = tl.program_id(0)
    tap, begin, stop, left, right = find_chunk(
        chunk, inputs, outputs, ends, blocks, lists, target, K, KP, BM, SWAP
    )
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = cols < CO
    acc = tl.zeros((BM, BC), dtype=tl.float32)
    at = begin + tl.arange(0, BM)
    i = tl.load(left + at, mask=at < stop, other=-1)
    o = tl.load(right + at, mask=at < stop, other=-1)
    for _ in tl.range(0, ((stop - begin + BM - 1) // BM).to(tl.int32), num_stages=STAGES):
        there = (i >= 0)[:, None] & inside[None, :]
        rows = x + i.to(tl.int64)[:, None] * CI + (cols // REPEAT)[None, :]
        grads = g + o.to(tl.int64)[:, None] * CO + cols[None, :]
        at += BM
        i = tl.load(left + at, mask=at < stop, other=-1)
        o = tl.load(right + at, mask=at < stop, other=-1)
        a = tl.load(rows, mask=there, other=0.0)
        b = tl.load(grads, mask=there, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    total = tl.sum(acc, axis=0)
    tl.store(partial + chunk.to(tl.int64) * CO + cols, total, mask=inside & (tap < K))
