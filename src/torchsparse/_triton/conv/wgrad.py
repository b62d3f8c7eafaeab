"""Weight gradient: a product of gathered rows for every tap, over its list of pairs.

Lists differ in length by a factor of thirty between the centre and the corners, so they are cut
into chunks of equal length; a program adds one chunk for one block of the weight, and a second
kernel sums the chunks of a tap in their order. Every run gives the same bits.
"""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["find_chunk", "sum_chunks_kernel", "wgrad_kernel"]


@triton.jit
def _chunks(ends, blocks, K, lists, target, KP: tl.constexpr, BK: tl.constexpr):
    """Per tap: where its list begins and ends, its number of chunks; and the chunk length."""
    taps = tl.arange(0, KP)
    real = taps < K
    own = tl.where(taps < lists, taps, K - 1 - taps)
    end = tl.load(ends + (own + 1) * blocks - 1, mask=real, other=0).to(tl.int64)
    begin = tl.load(ends + own * blocks - 1, mask=real & (own > 0), other=0).to(tl.int64)
    size = tl.where(real, end - begin, 0)
    length = (tl.sum(size, axis=0) + target - 1) // target
    length = tl.maximum((length + BK - 1) // BK * BK, 4 * BK)
    return begin, end, (size + length - 1) // length, length


@triton.jit
def find_chunk(
    chunk, inputs, outputs, ends, blocks, lists, target,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """The tap of a chunk, where its pairs begin and stop, and the two ends of the pairs.

    Programs beyond the last chunk find tap >= K and an empty range.
    """
    begins, stops, chunks, length = _chunks(ends, blocks, K, lists, target, KP, BK)
    after = tl.cumsum(chunks, axis=0)
    tap = tl.sum((after <= chunk).to(tl.int32), axis=0)
    here = tl.arange(0, KP) == tap
    first = tl.sum(tl.where(here, after - chunks, 0), axis=0)
    begin = tl.sum(tl.where(here, begins, 0), axis=0) + (chunk - first) * length
    stop = tl.minimum(tl.sum(tl.where(here, stops, 0), axis=0), begin + length)
    # The other end of a list gives the opposite tap.
    if SWAP:
        flip = tap < lists
    else:
        flip = tap >= lists
    left, right = inputs, outputs
    if flip:
        left, right = outputs, inputs
    return tap, begin, stop, left, right


@triton.jit(do_not_specialize=["blocks", "target"])
def wgrad_kernel(
    x, g, partial, inputs, outputs, ends, blocks, lists, target,
    K: tl.constexpr, KP: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[c] = sum over the pairs (i, o) of chunk c of x[i]^T g[o]."""
    COLS: tl.constexpr = (CO + BN - 1) // BN
    chunk = tl.program_id(0)
    tap, begin, stop, left, right = find_chunk(
        chunk, inputs, outputs, ends, blocks, lists, target, K, KP, BK, SWAP
    )
    block = tl.program_id(1)
    ci = (block // COLS) * BM + tl.arange(0, BM)
    co = (block % COLS) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    at = begin + rk
    i = tl.load(left + at, mask=at < stop, other=-1)
    o = tl.load(right + at, mask=at < stop, other=-1)
    for _ in range(((stop - begin + BK - 1) // BK).to(tl.int32)):
        a = tl.load(
            x + i.to(tl.int64)[:, None] * CI + ci[None, :],
            mask=(i >= 0)[:, None] & (ci < CI)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            g + o.to(tl.int64)[:, None] * CO + co[None, :],
            mask=(o >= 0)[:, None] & (co < CO)[None, :], other=0.0,
        )  # fmt: skip
        at += BK
        i = tl.load(left + at, mask=at < stop, other=-1)
        o = tl.load(right + at, mask=at < stop, other=-1)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    there = (ci < CI)[:, None] & (co < CO)[None, :] & (tap < K)
    block_of = partial + chunk.to(tl.int64) * CI * CO + ci[:, None] * CO + co[None, :]
    tl.store(block_of, acc, mask=there)


@triton.jit(do_not_specialize=["blocks", "target"])
def sum_chunks_kernel(
    partial, out, ends, blocks, lists, target, SIZE,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k] = sum over the chunks of tap k, in a fixed order."""
    tap = tl.program_id(0)
    _begins, _stops, chunks, _length = _chunks(ends, blocks, K, lists, target, KP, BK)
    here = tl.arange(0, KP) == tap
    count = tl.sum(tl.where(here, chunks, 0), axis=0)
    first = tl.sum(tl.where(here, tl.cumsum(chunks, axis=0) - chunks, 0), axis=0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        source = partial + (first + row).to(tl.int64)[:, None] * SIZE + at[None, :]
        acc += tl.load(source, mask=(row < count)[:, None] & (at < SIZE)[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    tl.store(out + tap.to(tl.int64) * SIZE + at, total.to(out.dtype.element_ty), mask=at < SIZE)
