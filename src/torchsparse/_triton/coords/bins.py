"""The rows of a table's keys in ascending order: a bucket sort without a pass per digit.

Keys are numbers of cells, so their high bits spread them over bins. `create_kernel` counts the
keys of each bin while it inserts them; `bin_start_kernel` adds up the counts, `bucket_kernel`
brings the keys into their bins, and `rank_kernel` counts how many of its bin are smaller: that is
the order within the bin, whatever the order of arrival. Bins are as many as keys, about; clustered
voxels share some, and at worst a key is compared with the 2^shift keys that a bin can hold.

It serves keys of at most 31 bits: one number holds such a key above its slot.
"""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchsparse._triton.coords.layout import MOST_NARROW, reset_upper, write_sites
from torchsparse._triton.coords.table import FREE
from torchsparse._triton.primitives import real_rows

__all__ = [
    "BIN_BLOCK",
    "bin_of",
    "bin_shift",
    "bin_start_kernel",
    "bin_sum_kernel",
    "bucket_kernel",
    "rank_kernel",
]

BIN_BLOCK = 1024  # bins of a program; there is a multiple of it
AHEAD = tl.constexpr(4)  # keys of a bin whose loads are in flight together


@triton.jit
def _log2(n):
    """Of integers, rounded down; one more where float32 rounds up to a power of two."""
    return (n.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bin_shift(layout, bins, D: tl.constexpr):
    """A shift that brings every key of the layout into one of ``bins``, a power of two."""
    last = tl.load(layout + 4 * (D + 1) + 1) - 1
    return tl.maximum(_log2(last) - _log2(bins) + 1, 0)


@triton.jit
def bin_of(key, shift, bins):
    """The bin of int64 keys; one that exists, also where the layout overflowed."""
    return tl.minimum(tl.maximum(key >> shift, 0), bins - 1).to(tl.int32)


@triton.jit
def bin_sum_kernel(counts, sums, BLOCK: tl.constexpr):
    """Keys in every BLOCK bins."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(counts + at), axis=0))


@triton.jit(do_not_specialize=["grain"])
def bin_start_kernel(
    counts, before, starts, grain, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """starts[bin] = keys in the bins before; ``before`` has the sums of every ``grain`` bins."""
    first = tl.program_id(0) * BLOCK
    parts = first // grain
    total = tl.zeros((STEP,), dtype=tl.int32)
    for begin in range(0, parts, STEP):
        at = begin + tl.arange(0, STEP)
        total += tl.load(before + at, mask=at < parts, other=0)
    bins = first + tl.arange(0, BLOCK)
    count = tl.load(counts + bins)
    tl.store(starts + bins, tl.sum(total, axis=0) + tl.cumsum(count, axis=0) - count)


@triton.jit(do_not_specialize=["slots", "bins", "room"])
def bucket_kernel(
    table, starts, layout, bucketed, slots, bins, room, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys above their slots, in the order of their bins, as far as there is ``room``.

    ``starts`` counts up: in the end, each bin has the start of the next.
    """
    if tl.program_id(0) == 0:
        reset_upper(layout, D)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(table + at, mask=at < slots, other=FREE)
    live = key != FREE
    own = bin_of(key, bin_shift(layout, bins, D), bins)
    place = tl.atomic_add(starts + own, 1, mask=live, sem="relaxed")
    tl.store(bucketed + place, (key << 32) | at.to(tl.int64), mask=live & (place < room))


@triton.jit(do_not_specialize=["M", "bins", "slots_mask"])
def rank_kernel(
    bucketed, ends, coords, layout, values, limit, M, bins, slots_mask,
    D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Coordinates of bucketed keys in ascending order, PAD behind them; the value of a key is its
    row, the start of its bin and the number of smaller keys there.

    Where keys turn out wider than was planned for, all rows are PAD.
    """
    places = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = places < M
    narrow = tl.load(layout + 4 * (D + 1) + 1) <= MOST_NARROW
    live = inside & (places < real_rows(M, limit)) & narrow
    entry = tl.load(bucketed + places, mask=live, other=0)
    own = bin_of(entry >> 32, bin_shift(layout, bins, D), bins)
    begin = tl.load(ends + own - 1, mask=live & (own > 0), other=0)
    end = tl.minimum(tl.load(ends + own, mask=live, other=0), M)
    row = begin
    most = tl.max(end - begin, axis=0)
    for first in range(0, most, AHEAD):
        for ahead in tl.static_range(AHEAD):
            at = begin + first + ahead
            other = tl.load(bucketed + at, mask=at < end, other=(1 << 63) - 1)
            row += (other < entry).to(tl.int32)
    row = tl.where(live, row, places)
    write_sites((entry >> 32).to(tl.int32), live, row, row < M, coords, layout, D)
    slot = (entry & slots_mask).to(tl.int32)
    tl.store(values + slot, row, mask=live)
