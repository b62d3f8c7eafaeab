"""Searching the fine sites under every tap, and inverting what was found."""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchsparse._triton.conv.order import sort_key
from torchsparse._triton.coords.table import find_slots
from torchsparse._triton.primitives import bit_or, fours_below

__all__ = [
    "blank_kernel",
    "find_block",
    "find_half_block",
    "find_kernel",
    "invert_block",
    "invert_kernel",
]


@triton.jit(do_not_specialize=["M", "shift", "slots_mask"])
def find_kernel(
    coords, layout, taps_at, relation, bits, table, values, neighbors, keys, counts, flags,
    M, shift, slots_mask, box_bit,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`find_block` for every row."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    find_block(
        rows, coords, layout, taps_at, relation, bits, table, values, neighbors, keys, counts,
        flags, M, shift, slots_mask, box_bit, D, K, WIDTH, TAPS, BR,
    )  # fmt: skip


@triton.jit
def find_block(
    rows, coords, layout, taps_at, relation, bits, table, values, neighbors, keys, counts, flags,
    M, shift, slots_mask, box_bit,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Rows of the fine sites under every tap of some coarse sites, and the sort keys of these.

    neighbors[m, k] is the row at ``coords[m] * stride - offset + dilation * tap_k``, where
    ``relation`` [3, D] holds stride, offset and reach, ``taps_at`` [K, D] dilation * tap.
    """
    inside = rows < M
    base, ok = _queries(rows, inside, coords, layout, relation, flags, box_bit, D)
    word = tl.zeros((BR,), dtype=tl.int32)
    for first in range(0, K, TAPS):
        taps = first + tl.arange(0, TAPS)
        real = taps < K
        query = base[:, None] + _steps_of(taps, real, taps_at, layout, D, TAPS)[None, :]
        slots = find_slots(query, ok[:, None] & real[None, :], table, shift, slots_mask)
        idx = tl.load(values + slots, mask=slots >= 0, other=-1)
        at = rows.to(tl.int64)[:, None] * WIDTH + taps[None, :]
        tl.store(neighbors + at, idx, mask=inside[:, None] & (taps < WIDTH)[None, :])
        bit = tl.load(bits + taps, mask=real, other=0)
        word |= tl.reduce(tl.where(idx >= 0, bit[None, :], 0), 1, bit_or)
    key = sort_key(word)
    tl.store(keys + rows, key.to(tl.int16), mask=inside)
    tl.atomic_add(counts + key, 1, mask=inside & (key > 0), sem="relaxed")


@triton.jit
def find_half_block(
    rows, coords, layout, taps_at, relation, table, values, neighbors, words, flags,
    M, shift, slots_mask, box_bit,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The same where the relation is symmetric, K <= 32: if m finds j under tap k, j has m under
    K - 1 - k, so that the taps up to the centre suffice.

    Bit k of words[m], zeros before, tells whether m has tap k; other neighbors[m, k] are left as
    they are.
    """
    inside = rows < M
    base, ok = _queries(rows, inside, coords, layout, relation, flags, box_bit, D)
    taps = tl.arange(0, TAPS)
    real = taps <= K // 2
    query = base[:, None] + _steps_of(taps, real, taps_at, layout, D, TAPS)[None, :]
    slots = find_slots(query, ok[:, None] & real[None, :], table, shift, slots_mask)
    there = slots >= 0
    idx = tl.load(values + slots, mask=there, other=0)
    own = tl.broadcast_to(rows[:, None], (BR, TAPS))
    tl.store(neighbors + own.to(tl.int64) * WIDTH + taps[None, :], idx, mask=there)
    word = tl.sum(there.to(tl.int32) << taps[None, :], axis=1)
    tl.atomic_or(words + rows, word, mask=inside & (word != 0), sem="relaxed")
    mirrored = there & (taps < K // 2)[None, :]
    opposite = (K - 1 - taps)[None, :]
    tl.store(neighbors + idx.to(tl.int64) * WIDTH + opposite, own, mask=mirrored)
    bit = tl.broadcast_to(tl.full((), 1, tl.int32) << opposite, (BR, TAPS))
    tl.atomic_or(words + idx, bit, mask=mirrored, sem="relaxed")


@triton.jit
def _queries(rows, inside, coords, layout, relation, flags, box_bit, D: tl.constexpr):
    """Keys of the places that taps are seen from, and which of them may have a neighbour.

    A reach beyond the margin of the layout, which a huge box may have given up, is complained
    about: there, a key would carry into another column.
    """
    # All columns at once: their numbers come with a few loads in place of one each.
    column = tl.arange(0, triton.next_power_of_2(D + 1))
    real = column <= D
    axis = real & (column > 0)
    step = tl.load(relation + column - 1, mask=axis, other=1)
    offset = tl.load(relation + D + column - 1, mask=axis, other=0)
    reach = tl.load(relation + 2 * D + column - 1, mask=axis, other=0)
    origin = tl.load(layout + column, mask=real, other=0)
    weight = tl.load(layout + (D + 1) + column, mask=real, other=0)
    lower = tl.load(layout + 2 * (D + 1) + column, mask=real, other=0) - reach
    upper = tl.load(layout + 3 * (D + 1) + column, mask=real, other=0)
    at = rows.to(tl.int64)[:, None] * (D + 1) + column[None, :]
    c = tl.load(coords + at, mask=inside[:, None] & real[None, :], other=0).to(tl.int64)
    c = c * step[None, :] - offset[None, :]
    outside = (c < lower[None, :]) | (c > upper[None, :])
    ok = inside & (tl.max(outside.to(tl.int32), axis=1) == 0)
    base = tl.sum((c - origin[None, :]) * weight[None, :], axis=1)
    if tl.max(reach, axis=0) > tl.load(layout + 4 * (D + 1)):
        tl.atomic_or(flags, tl.cast(box_bit, tl.int64), sem="relaxed")
    return base, ok


@triton.jit
def _steps_of(taps, real, taps_at, layout, D: tl.constexpr, TAPS: tl.constexpr):
    """From the key of a place to those of its taps."""
    delta = tl.zeros((TAPS,), dtype=tl.int64)
    for axis in tl.static_range(D):
        step = tl.load(layout + (D + 1) + 1 + axis)
        delta += tl.load(taps_at + taps * D + axis, mask=real, other=0) * step
    return delta


@triton.jit(do_not_specialize=["size", "bins"])
def blank_kernel(inverse, counts, size, bins, BLOCK: tl.constexpr):
    """A table without neighbours, its size a multiple of four, and counts of no rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(inverse + at, tl.full((BLOCK,), -1, tl.int32), mask=fours_below(at, size))
    tl.store(counts + at, tl.zeros((BLOCK,), tl.int32), mask=at < bins)


@triton.jit(do_not_specialize=["M", "n_row", "n_tap"])
def invert_kernel(
    neighbors, inverse, M, n_row, n_tap, K: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """inverse[neighbors[m, k], k] = m, where there is a neighbour."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    taps = tl.program_id(1) * 32 + tl.arange(0, 32)
    invert_block(rows, taps, neighbors, inverse, M, n_row, n_tap, K, WIDTH, BR)


@triton.jit
def invert_block(
    rows, taps, neighbors, inverse, M, n_row, n_tap,
    K: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The same for some rows and 32 taps."""
    at = rows.to(tl.int64)[:, None] * n_row + taps.to(tl.int64)[None, :] * n_tap
    there = (rows < M)[:, None] & (taps < K)[None, :]
    idx = tl.load(neighbors + at, mask=there, other=-1)
    target = inverse + idx.to(tl.int64) * WIDTH + taps[None, :]
    tl.store(target, tl.broadcast_to(rows[:, None], (BR, 32)), mask=idx >= 0)
