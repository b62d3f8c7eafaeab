"""Searching the fine sites under every tap, and inverting what was found."""

import triton
import triton.language as tl

from torchsparse._triton.conv.order import sort_key
from torchsparse._triton.coords.table import find_slots
from torchsparse._triton.primitives import bit_or

__all__ = ["blank_kernel", "find_block", "find_kernel", "invert_block", "invert_kernel"]


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
    A reach beyond the margin of the layout, which a huge box may have given up, is complained
    about: there, a key would carry into another column.
    """
    inside = rows < M
    ok = inside
    base = tl.zeros((BR,), dtype=tl.int64)
    farthest = tl.full((), 0, tl.int64)
    for column in tl.static_range(D + 1):
        c = tl.load(coords + rows.to(tl.int64) * (D + 1) + column, mask=inside, other=0)
        c = c.to(tl.int64)
        reach = tl.full((), 0, tl.int64)
        if column > 0:
            step = tl.load(relation + column - 1)
            offset = tl.load(relation + D + column - 1)
            reach = tl.load(relation + 2 * D + column - 1)
            c = c * step - offset
            farthest = tl.maximum(farthest, reach)
        lower = tl.load(layout + 2 * (D + 1) + column)
        upper = tl.load(layout + 3 * (D + 1) + column)
        ok &= (c >= lower - reach) & (c <= upper)
        base += (c - tl.load(layout + column)) * tl.load(layout + (D + 1) + column)
    if farthest > tl.load(layout + 4 * (D + 1)):
        tl.atomic_or(flags, tl.cast(box_bit, tl.int64), sem="relaxed")
    word = tl.zeros((BR,), dtype=tl.int32)
    for first in range(0, K, TAPS):
        taps = first + tl.arange(0, TAPS)
        real = taps < K
        delta = tl.zeros((TAPS,), dtype=tl.int64)
        for axis in tl.static_range(D):
            step = tl.load(layout + (D + 1) + 1 + axis)
            delta += tl.load(taps_at + taps * D + axis, mask=real, other=0) * step
        query = base[:, None] + delta[None, :]
        slots = find_slots(query, ok[:, None] & real[None, :], table, shift, slots_mask)
        idx = tl.load(values + slots, mask=slots >= 0, other=-1)
        at = rows.to(tl.int64)[:, None] * WIDTH + taps[None, :]
        tl.store(neighbors + at, idx, mask=inside[:, None] & (taps < WIDTH)[None, :])
        bit = tl.load(bits + taps, mask=real, other=0)
        word |= tl.reduce(tl.where(idx >= 0, bit[None, :], 0), 1, bit_or)
    key = sort_key(word)
    tl.store(keys + rows, key.to(tl.int16), mask=inside)
    tl.atomic_add(counts + key, 1, mask=inside & (key > 0), sem="relaxed")


@triton.jit(do_not_specialize=["size", "bins"])
def blank_kernel(inverse, counts, size, bins, BLOCK: tl.constexpr):
    """A table without neighbours, and counts of no rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(inverse + at, tl.full((BLOCK,), -1, tl.int32), mask=at < size)
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
