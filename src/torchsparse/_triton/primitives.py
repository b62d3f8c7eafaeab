"""Small device functions that several kernels share.

Bit counts are written in integer arithmetic: the compiler finds the machine instruction, and the
interpreter and other GPU makers need no special case.
"""

import triton
import triton.language as tl

__all__ = [
    "bit_count",
    "bit_or",
    "first_slot",
    "fours_below",
    "lowest_bit",
    "mix",
    "real_rows",
    "row_key",
]


@triton.jit
def bit_count(word):
    """Number of ones in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bit_or(a, b):
    """For reductions."""
    return a | b


@triton.jit
def fours_below(at, size):
    """``at < size`` where ``size`` is a multiple of four: the compiler sees that four neighbours
    are alike, and writes them at once."""
    return at // 4 < size // 4


@triton.jit
def lowest_bit(word):
    """Place of the lowest one in each uint32; 32 for 0."""
    return bit_count((word & (0 - word)) - 1)


@triton.jit
def first_slot(key, shift, slots_mask):
    """Where the search for a key begins.

    Four consecutive keys share a sector of 32 bytes, so the neighbours of a voxel along the last
    axis are fetched together. The rest is multiplicative hashing by 2^64 / golden ratio (Knuth,
    The Art of Computer Programming 3, 6.4).
    """
    mixed = ((key >> 2) * -7046029254386353131) >> shift
    return ((mixed << 2) | (key & 3)) & slots_mask


@triton.jit
def mix(key):
    """The finaliser of SplitMix64: every bit of a key reaches the low bits."""
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return key ^ ((key >> 31) & 0x1FFFFFFFF)


@triton.jit
def real_rows(rows, limit):
    """How many of ``rows`` count: all, or the number that ``limit`` points at (`_capacity`)."""
    if limit is not None:
        rows = tl.minimum(rows, tl.load(limit)).to(tl.int32)
    return rows


@triton.jit
def row_key(coords, row, inside, layout, D: tl.constexpr):
    """Keys of coordinate rows: sum over columns of (c - origin) * stride."""
    key = tl.zeros_like(row).to(tl.int64)
    for column in tl.static_range(D + 1):
        c = tl.load(coords + row.to(tl.int64) * (D + 1) + column, mask=inside, other=0)
        origin = tl.load(layout + column)
        stride = tl.load(layout + (D + 1) + column)
        key += (c.to(tl.int64) - origin) * stride
    return key
