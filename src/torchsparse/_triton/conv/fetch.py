"""Fetch on demand: one launch per tap multiplies its pairs and adds them to their output rows."""

import triton
import triton.language as tl

__all__ = ["fetch_kernel"]


@triton.jit(do_not_specialize=["listed"])
def fetch_kernel(
    x, w, out, inputs, outputs, ends, listed, blocks, w_in, w_out,
    CI: tl.constexpr, CO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[o] += x[i] @ w over the pairs (i, o) of one tap."""
    stop = tl.load(ends + (listed + 1) * blocks - 1).to(tl.int64)
    begin = tl.load(ends + listed * blocks - 1, mask=listed > 0, other=0).to(tl.int64)
    at = begin + tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    if SWAP:
        i = tl.load(outputs + at, mask=at < stop, other=-1)
        o = tl.load(inputs + at, mask=at < stop, other=-1)
    else:
        i = tl.load(inputs + at, mask=at < stop, other=-1)
        o = tl.load(outputs + at, mask=at < stop, other=-1)
    there = (o >= 0)[:, None] & (cols < CO)[None, :]
    place = out + o.to(tl.int64)[:, None] * CO + cols[None, :]
    acc = tl.load(place, mask=there, other=0.0)
    for start in range(0, CI, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(
            x + i.to(tl.int64)[:, None] * CI + k[None, :],
            mask=(i >= 0)[:, None] & (k < CI)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            w + k[:, None] * w_in + cols[None, :] * w_out,
            mask=(k < CI)[:, None] & (cols < CO)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(place, acc, mask=there)
