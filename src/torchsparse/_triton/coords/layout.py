"""Where each column of a coordinate row lies in its key, decided on the device.

The numbers are those of `_keys.KeyLayout`, in one int64 tensor, so that nothing waits for the
coordinates' bounding box to reach the host:

    origin [1 + D] | stride [1 + D] | lower [1 + D] | upper [1 + D] | margin, cells

``lower`` and ``upper`` are the smallest and largest coordinate (of a level that is still to be
created: their bounds); keys cover the box widened by ``margin`` on every spatial axis.
"""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchsparse._triton.primitives import real_rows

__all__ = [
    "bounds_kernel",
    "check_kernel",
    "fit_kernel",
    "numbers",
    "reset_upper",
    "write_layout",
    "write_sites",
]

INT_MAX = tl.constexpr(2147483647)
INT_MIN = tl.constexpr(-2147483648)
MOST_CELLS = tl.constexpr(1 << 62)
MOST_NARROW = INT_MAX  # cells of a layout whose keys fit into 32 bits


def numbers(ndim: int) -> int:
    """Length of a layout."""
    return 4 * (ndim + 1) + 2


@triton.jit(do_not_specialize=["N", "steps"])
def bounds_kernel(coords, bounds, limit, N, steps, D: tl.constexpr, BR: tl.constexpr):
    """Smallest and largest coordinate per column, into bounds [2, 1 + D]."""
    N = real_rows(N, limit)
    first = tl.program_id(0) * steps * BR
    for column in tl.static_range(D + 1):
        low = tl.full((BR,), INT_MAX, tl.int32)
        high = tl.full((BR,), INT_MIN, tl.int32)
        for step in range(steps):
            rows = first + step * BR + tl.arange(0, BR)
            inside = rows < N
            at = coords + rows.to(tl.int64) * (D + 1) + column
            low = tl.minimum(low, tl.load(at, mask=inside, other=INT_MAX))
            high = tl.maximum(high, tl.load(at, mask=inside, other=INT_MIN))
        tl.atomic_min(bounds + column, tl.min(low, axis=0), sem="relaxed")
        tl.atomic_max(bounds + (D + 1) + column, tl.max(high, axis=0), sem="relaxed")


@triton.jit
def _cells(extent, columns, D: tl.constexpr):
    """Product of the extents as float64: good enough to see that it is far too large."""
    cells = tl.full((), 1.0, tl.float64)
    for column in tl.static_range(D + 1):
        cells *= tl.sum(tl.where(columns == column, extent, 0), axis=0).to(tl.float64)
    return cells


@triton.jit
def write_layout(lower, upper, real, layout, flags, usual, reach, overflow, D: tl.constexpr):
    """Write the layout of the box ``lower <= c <= upper``, [8] int64 over columns."""
    columns = tl.arange(0, 8)
    spatial = real & (columns > 0)
    wide = tl.where(spatial, upper - lower + 1 + 2 * usual, tl.where(real, upper - lower + 1, 1))
    margin = tl.where(_cells(wide, columns, D) < MOST_CELLS, usual, reach)
    extent = tl.where(
        spatial, upper - lower + 1 + 2 * margin, tl.where(real, upper - lower + 1, 1)
    )
    exact = _cells(extent, columns, D)
    stride = tl.full((8,), 1, tl.int64)
    cells = tl.full((), 1, tl.int64)
    for column in tl.static_range(D + 1):
        one = tl.sum(tl.where(columns == column, extent, 0), axis=0)
        stride = tl.where(columns < column, stride * one, stride)
        cells *= one
    too_many = (exact > 5e18) | (cells >= MOST_CELLS) | (cells < 0)
    tl.atomic_or(flags, tl.where(too_many, overflow, 0).to(tl.int64), sem="relaxed")
    origin = tl.where(spatial, lower - margin, lower)
    tl.store(layout + columns, origin, mask=real)
    tl.store(layout + (D + 1) + columns, stride, mask=real)
    tl.store(layout + 2 * (D + 1) + columns, lower, mask=real)
    tl.store(layout + 3 * (D + 1) + columns, upper, mask=real)
    tl.store(layout + 4 * (D + 1), margin.to(tl.int64))
    tl.store(layout + 4 * (D + 1) + 1, cells)


@triton.jit(do_not_specialize=["usual", "reach"])
def fit_kernel(bounds, layout, flags, usual, reach, overflow, D: tl.constexpr):
    """The layout of the bounds that `bounds_kernel` found."""
    columns = tl.arange(0, 8)
    real = columns <= D
    lower = tl.load(bounds + columns, mask=real, other=0).to(tl.int64)
    upper = tl.load(bounds + (D + 1) + columns, mask=real, other=0).to(tl.int64)
    empty = lower > upper
    lower = tl.where(empty, 0, lower)
    upper = tl.where(empty, 0, upper)
    write_layout(lower, upper, real, layout, flags, usual, reach, overflow, D)


@triton.jit(do_not_specialize=["r0", "r1", "r2", "r3", "r4"])
def check_kernel(
    layout, flags, r0, r1, r2, r3, r4, batch_bit, negative_bit, range_bit,
    D: tl.constexpr, RANGED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Complain about coordinates outside the range that holds for them."""
    columns = tl.arange(0, 8)
    real = columns <= D
    lower = tl.load(layout + 2 * (D + 1) + columns, mask=real, other=0)
    found = tl.where((columns == 0) & (lower < 0), batch_bit, 0)
    if not NEGATIVE:
        found |= tl.where((columns > 0) & (lower < 0), negative_bit, 0)
    if RANGED:
        upper = tl.load(layout + 3 * (D + 1) + columns, mask=real, other=-1)
        limit = tl.where(columns == 0, r0, tl.where(columns == 1, r1, tl.where(
            columns == 2, r2, tl.where(columns == 3, r3, r4))))  # fmt: skip
        found |= tl.where(real & (upper >= limit), range_bit, 0)
    word = tl.full((), 0, tl.int64)
    for column in tl.static_range(D + 1):
        word |= tl.sum(tl.where(columns == column, found, 0), axis=0).to(tl.int64)
    tl.atomic_or(flags, word, sem="relaxed")


@triton.jit
def reset_upper(layout, D: tl.constexpr):
    """Let the upper bounds, of what a layer may create, begin at the lower ones: `write_sites`
    finds those of what it did create."""
    columns = tl.arange(0, 8)
    low = tl.load(layout + 2 * (D + 1) + columns, mask=columns <= D, other=0)
    tl.store(layout + 3 * (D + 1) + columns, low, mask=columns <= D)


@triton.jit
def write_sites(key, live, rows, inside, coords, layout, D: tl.constexpr):
    """The coordinates of keys (int32 or int64) at ``rows`` where ``inside``, PAD where not
    ``live``; upper bounds grow to hold them."""
    rest = key
    for column in tl.static_range(D + 1):
        weight = tl.maximum(tl.load(layout + (D + 1) + column).to(key.dtype), 1)
        digit = rest // weight
        rest -= digit * weight
        c = (digit.to(tl.int64) + tl.load(layout + column)).to(tl.int32)
        c = tl.where(live, c, INT_MIN)
        tl.store(coords + rows.to(tl.int64) * (D + 1) + column, c, mask=inside)
        upper = layout + 3 * (D + 1) + column
        top = tl.max(c, axis=0).to(tl.int64)
        # What is read may be old, but never larger than what is there.
        tl.atomic_max(upper, top, mask=top > tl.load(upper), sem="relaxed")
