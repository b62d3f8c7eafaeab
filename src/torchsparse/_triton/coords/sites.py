"""Kernels that fill tables: with given coordinates, or with the sites that a layer creates."""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchsparse._triton.coords.bins import bin_of, bin_shift
from torchsparse._triton.coords.layout import reset_upper, write_layout, write_sites
from torchsparse._triton.coords.table import FREE, find_slots, insert_keys
from torchsparse._triton.primitives import bit_count, fours_below, real_rows, row_key

__all__ = [
    "assign_kernel",
    "begin_kernel",
    "collect_kernel",
    "create_kernel",
    "insert_kernel",
    "level_kernel",
    "unpack_kernel",
]

INT_MAX = tl.constexpr(2147483647)
INT_MIN = tl.constexpr(-2147483648)


@triton.jit
def _clear(table, values, zeros, slots, n_zeros, NONE: tl.constexpr, BLOCK: tl.constexpr):
    """An empty table with values NONE, and zeros; numbers of both are multiples of four."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = fours_below(at, slots)
    tl.store(table + at, tl.full((BLOCK,), FREE, tl.int64), mask=inside)
    tl.store(values + at, tl.full((BLOCK,), NONE, tl.int32), mask=inside)
    tl.store(zeros + at, tl.zeros((BLOCK,), tl.int32), mask=fours_below(at, n_zeros))


@triton.jit(do_not_specialize=["slots", "n_zeros"])
def begin_kernel(
    table, values, zeros, bounds, slots, n_zeros, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """An empty table without values, empty bounds [2, COLUMNS], and zeros."""
    _clear(table, values, zeros, slots, n_zeros, INT_MAX, BLOCK)
    if tl.program_id(0) == 0:
        columns = tl.arange(0, 16)
        empty = tl.where(columns < COLUMNS, INT_MAX, INT_MIN)
        tl.store(bounds + columns, empty, mask=columns < 2 * COLUMNS)


@triton.jit(do_not_specialize=["N", "shift", "slots_mask", "most"])
def insert_kernel(
    coords, layout, table, flags, limit, N, shift, slots_mask, duplicate_bit, most,
    D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Put coordinate rows into a table, and complain about equal ones."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    live = rows < real_rows(N, limit)
    keys = row_key(coords, rows, live, layout, D)
    _, twice, _, _ = insert_keys(keys, live, table, shift, slots_mask, most)
    found = tl.max(twice.to(tl.int32), axis=0)
    if found > 0:
        tl.atomic_or(flags, tl.cast(duplicate_bit, tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["N", "shift", "slots_mask"])
def assign_kernel(
    coords, layout, table, values, limit, N, shift, slots_mask,
    D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The value of a key is its lowest row."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    live = rows < real_rows(N, limit)
    keys = row_key(coords, rows, live, layout, D)
    slots = find_slots(keys, live, table, shift, slots_mask)
    tl.atomic_min(values + slots, rows, mask=slots >= 0, sem="relaxed")


@triton.jit
def _floor(a, b):
    """Floor division by a positive number, however ``//`` rounds."""
    q = a // b
    return tl.where(q * b > a, q - 1, q)


@triton.jit
def _floor_by(a, step):
    """The same by one number, which is a power of 2 as a rule: no division of 64 bits then."""
    if (step & (step - 1)) == 0:
        q = a >> bit_count((step - 1).to(tl.uint32))
    else:
        q = _floor(a, step)
    return q


@triton.jit(
    do_not_specialize=[
        "slots", "n_zeros", "bins", "l0", "l1", "l2", "l3", "u0", "u1", "u2", "u3", "usual", "need"
    ]
)  # fmt: skip
def level_kernel(
    table, values, zeros, counts, info, fine, layout, relation, flags, slots, n_zeros, bins,
    l0, l1, l2, l3, u0, u1, u2, u3, usual, need, box_bit, overflow_bit,
    D: tl.constexpr, GENERATIVE: tl.constexpr, INFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Begin the level that a layer creates: an empty table, zeros, counts of no keys in ``bins``,
    the zeros of ``info``; one program makes the layout from that of the layer's input.

    ``l`` and ``u`` bound the sites per axis. INFER: the upper bound is TorchSparse 2.1's, from
    the largest coordinates of the batch.
    """
    _clear(table, values, zeros, slots, n_zeros, -1, BLOCK)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + at, tl.zeros((BLOCK,), tl.int32), mask=at < bins)
    if tl.program_id(0) == 0:
        tl.store(info + tl.arange(0, 4), tl.zeros((4,), tl.int64))
        _write_level(
            fine, layout, relation, flags, l0, l1, l2, l3, u0, u1, u2, u3,
            usual, need, box_bit, overflow_bit, D, GENERATIVE, INFER,
        )  # fmt: skip


@triton.jit
def _write_level(
    fine, layout, relation, flags, l0, l1, l2, l3, u0, u1, u2, u3,
    usual, need, box_bit, overflow_bit,
    D: tl.constexpr, GENERATIVE: tl.constexpr, INFER: tl.constexpr,
):  # fmt: skip
    """The layout of a level from that of the layer's input."""
    columns = tl.arange(0, 8)
    real = columns <= D
    spatial = real & (columns > 0)
    lower = tl.load(fine + 2 * (D + 1) + columns, mask=real, other=0)
    upper = tl.load(fine + 3 * (D + 1) + columns, mask=real, other=0)
    stride = tl.load(relation + columns - 1, mask=spatial, other=1)
    offset = tl.load(relation + D + columns - 1, mask=spatial, other=0)
    reach = tl.load(relation + 2 * D + columns - 1, mask=spatial, other=0)
    bottom = tl.where(columns == 1, l0, tl.where(columns == 2, l1, tl.where(
        columns == 3, l2, l3))).to(tl.int64)  # fmt: skip
    top = tl.where(columns == 1, u0, tl.where(columns == 2, u1, tl.where(
        columns == 3, u2, u3))).to(tl.int64)  # fmt: skip
    if GENERATIVE:
        low = lower * stride - offset
        high = upper * stride - offset + reach
    else:
        low = _floor(lower + offset - reach, stride)
        high = _floor(upper + offset, stride)
        if INFER:
            top = _floor(upper + 2 * offset - reach, stride)
    low = tl.where(spatial, low, lower)
    high = tl.where(spatial, high, upper)
    outside = ((low < INT_MIN) & (bottom == INT_MIN)) | ((high > INT_MAX) & (top == INT_MAX))
    lost = tl.max((spatial & outside).to(tl.int32), axis=0)
    tl.atomic_or(flags, tl.where(lost > 0, overflow_bit, 0).to(tl.int64), sem="relaxed")
    low = tl.where(spatial, tl.maximum(low, bottom), low)
    high = tl.where(spatial, tl.minimum(high, top), high)
    # An empty range keeps bounds that no site fulfils; the box itself has at least one cell.
    box = tl.maximum(low, high)
    write_layout(low, box, real, layout, flags, usual, need, box_bit, D)
    tl.store(layout + 3 * (D + 1) + columns, high, mask=real)


@triton.jit(do_not_specialize=["N", "shift", "slots_mask", "most", "bins"])
def create_kernel(
    coords, layout, taps_at, relation, table, counts, flags, info, limit,
    N, shift, slots_mask, most, bins,
    D: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr,
    GENERATIVE: tl.constexpr, NEAR: tl.constexpr, REPORT: tl.constexpr,
):  # fmt: skip
    """Insert every site that some tap ties to a given one, and count the keys of each bin.

    ``taps_at`` [K, D] holds dilation * tap; NEAR: distances from the last site that one has.
    info = [number of sites, rows that found no slot, pending complaints, cells of the layout].
    Complaints move there if the host reads it next (REPORT).
    """
    N = real_rows(N, limit)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    taps = tl.program_id(1) * TAPS + tl.arange(0, TAPS)
    live = (rows < N)[:, None] & (taps < K)[None, :]
    key = tl.zeros((BR, TAPS), dtype=tl.int64)
    for column in tl.static_range(D + 1):
        at = rows.to(tl.int64) * (D + 1) + column
        c = tl.load(coords + at, mask=rows < N, other=0).to(tl.int64)[:, None]
        origin = tl.load(layout + column)
        weight = tl.load(layout + (D + 1) + column)
        if column > 0:
            step = tl.load(relation + column - 1)
            offset = tl.load(relation + D + column - 1)
            tap = tl.load(taps_at + taps * D + column - 1, mask=taps < K, other=0)[None, :]
            if GENERATIVE:
                site = c * step - offset + tap
            elif NEAR:
                site = _floor_by(c + offset, step) - tap
                reach = tl.load(relation + 2 * D + column - 1)
                live &= c + offset - site * step <= reach
            else:
                shifted = c + offset - tap
                site = _floor_by(shifted, step)
                live &= site * step == shifted
            live &= site >= tl.load(layout + 2 * (D + 1) + column)
            live &= site <= tl.load(layout + 3 * (D + 1) + column)
            key += (site - origin) * weight
        else:
            key += (c - origin) * weight
    key = tl.reshape(key, (BR * TAPS,))
    live = tl.reshape(live, (BR * TAPS,))
    key = tl.where(live, key, 0)
    new, twice, lost, moved = insert_keys(key, live, table, shift, slots_mask, most)
    # A chain that left out another key than it brought did add its own.
    other = (twice | lost) & (moved != key)
    width = bin_shift(layout, bins, D)
    tl.atomic_add(counts + bin_of(key, width, bins), 1, mask=new | other, sem="relaxed")
    tl.atomic_add(counts + bin_of(moved, width, bins), -1, mask=other, sem="relaxed")
    tl.atomic_add(info, tl.sum(new.to(tl.int64), axis=0), sem="relaxed")
    gone = tl.sum(lost.to(tl.int64), axis=0)
    if gone > 0:
        tl.atomic_add(info + 1, gone, sem="relaxed")
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        if REPORT:
            tl.store(info + 2, tl.load(flags))
            tl.store(flags, tl.full((), 0, tl.int64))
        tl.store(info + 3, tl.load(layout + 4 * (D + 1) + 1))


@triton.jit(do_not_specialize=["slots", "room"])
def collect_kernel(
    table, keys, count, layout, slots, room, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys of a table, in any order: they are sorted next. ``room`` of them at most; ``count`` is
    0 at first."""
    if tl.program_id(0) == 0:
        reset_upper(layout, D)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(table + at, mask=at < slots, other=FREE)
    there = (key != FREE).to(tl.int32)
    begin = tl.atomic_add(count, tl.sum(there, axis=0).to(tl.int64), sem="relaxed")
    place = begin + tl.cumsum(there, axis=0) - 1
    tl.store(keys + place, key, mask=(there > 0) & (place < room))


@triton.jit(do_not_specialize=["M", "shift", "slots_mask"])
def unpack_kernel(
    keys, coords, layout, table, values, limit, M, shift, slots_mask,
    D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Coordinates of sorted keys, PAD behind them; the value of a key is its place."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < M
    live = inside & (rows < real_rows(M, limit))
    key = tl.load(keys + rows, mask=live, other=0)
    write_sites(key, live, rows, inside, coords, layout, D)
    slots = find_slots(key, live, table, shift, slots_mask)
    tl.store(values + slots, rows, mask=slots >= 0)
