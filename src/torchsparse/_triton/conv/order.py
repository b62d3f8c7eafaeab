"""Row order and tiles: which rows share a tile, and which taps a tile needs.

A tile of the implicit GEMM visits every tap that one of its rows has. Rows are therefore sorted
by a key made of their taps: the rare taps, far from the centre, are its high bits (rows that own
a rare tap gather in few tiles), neighbouring keys differ in few taps (Gray code), and heavy rows
come first, so that no long tile runs alone at the end. Fourteen bits let the sort count instead of
compare; where there are more taps, rare ones share a bit. docs/how-it-works has the measurements.

Rows of equal keys come in any order. Results do not depend on it: each row sums its own taps in
ascending order, and a tap that it lacks adds an exact zero.
"""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._geometry import Geometry, tap_list
from torchsparse._triton.launch import Step, cdiv
from torchsparse._triton.primitives import bit_or, real_rows

__all__ = [
    "SortKeys",
    "Tiles",
    "TILE_ROWS",
    "count_keys",
    "key_bits",
    "key_block",
    "make_tiles",
    "new_sort_keys",
    "place_block",
    "row_sort_keys",
    "row_width",
    "sort_bins",
    "sort_key",
    "tile_block",
    "untile",
]

TILE_ROWS = 64  # the smallest tile; taller ones unite the masks of several
KEY_BITS = 14
OWN_BITS = 10  # frequent taps that have a bit of their own where not all taps have one


def row_width(volume: int) -> int:
    """Entries of a row of a table that lies row by row: 16 bytes and multiples."""
    return cdiv(volume, 4) * 4


class SortKeys(NamedTuple):
    """Keys of rows, and how many rows have each; rows of key 0 are not counted."""

    keys: Tensor  # [M] int16, 0 <= key < bins
    counts: Tensor  # [bins] int32


def sort_bins(volume: int) -> int:
    """Number of keys that rows over so many taps may have."""
    return 1 << min(volume, KEY_BITS)


def new_sort_keys(like: Tensor, rows: int, volume: int, counts: Tensor | None = None) -> SortKeys:
    """Room for the keys of so many rows over so many taps, on the device of ``like``; ``counts``,
    if given, are zeros."""
    keys = like.new_empty(rows, dtype=torch.int16)
    if counts is None:
        counts = like.new_zeros(sort_bins(volume), dtype=torch.int32)
    return SortKeys(keys, counts)


class Tiles(NamedTuple):
    """A neighbour table in tile order; with S shares of its taps, each in an order of its own.

    1-D, kernel 3, rows at [4, 5, 9], tiles of 2, one share:  order = [[1, 0, 2, .]],
        table = [[0, -1, -1], [1, 0, 2], [-1, 1, -1]],  masks = [[[0b111, 0b010]]]
    """

    order: Tensor | None  # [S, 64 T] int32, the output row at each place; None: they are equal
    table: Tensor  # [K, M] int32, input row under tap k at place m, -1 = none
    masks: Tensor  # [S, ceil(K / 32), T] int32, T = ceil(M / 64), bit k: a row of it has the tap
    limit: Tensor | None = None  # [1] int64, how many places are real; None: all (`_capacity`)

    @property
    def shares(self) -> int:
        """S; share s has the taps from K s // S to K (s + 1) // S - 1."""
        return self.masks.shape[0]


def bit_of_taps(geometry: Geometry, first: int, last: int) -> list[int]:
    """The key bit of each tap from first to last - 1, -1 for the one that every row has.

    High bits are rare taps.
    """
    taps = tap_list(geometry.kernel_size)[first:last]
    # Ground is flat: a step along the last axis (z) is rarer than one along the others.
    weights = [1.0] * (geometry.ndim - 1) + [1.6 if geometry.ndim == 3 else 1.0]
    distance = [
        sum(w * abs(d * t - o) for w, d, t, o in zip(weights, geometry.dilation, tap, offset))
        for tap in taps
        for offset in (geometry.offset,)
    ]
    ranked = sorted(range(len(taps)), key=lambda k: (distance[k], k))
    bits = [-1] * len(taps)
    if geometry.is_symmetric:
        centre = geometry.volume // 2 - first
        ranked = [k for k in ranked if k != centre]
    if len(ranked) <= KEY_BITS:
        own, shared = len(ranked), 1
    else:
        own = OWN_BITS
        shared = KEY_BITS - OWN_BITS
    for place, tap in enumerate(ranked):
        if place < own:
            bits[tap] = place
        else:
            bits[tap] = own + (place - own) * shared // (len(ranked) - own)
    return bits


@cache
def key_bits(geometry: Geometry, device: torch.device, shares: int = 1) -> Tensor:
    """[S, 32 ceil(K / 32)] int32 on the device: the key bit of each tap as a number, 0 for none
    and for taps of other shares.

    Kept for good: captured graphs read it where it lies.
    """
    volume = geometry.volume
    table: list[list[int]] = []
    for share in range(shares):
        first, last = volume * share // shares, volume * (share + 1) // shares
        own = [0 if bit < 0 else 1 << bit for bit in bit_of_taps(geometry, first, last)]
        table.append([0] * first + own + [0] * (cdiv(volume, 32) * 32 - last))
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int32, device=device)


@triton.jit
def sort_key(word):
    """The place of a word of at most 16 bits in the Gray sequence."""
    word = word ^ (word >> 1)
    word = word ^ (word >> 2)
    word = word ^ (word >> 4)
    return word ^ (word >> 8)


@triton.jit(do_not_specialize=["M", "n_row", "n_tap"])
def row_key_kernel(
    neighbors, bits, keys, counts, M, n_row, n_tap,
    K: tl.constexpr, FEW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """keys[m] = the sort key of row m, from its taps."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    key_block(rows, neighbors, bits, keys, counts, M, n_row, n_tap, K, FEW, BR)


@triton.jit
def key_block(
    rows, neighbors, bits, keys, counts, M, n_row, n_tap,
    K: tl.constexpr, FEW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The same for some rows; ``FEW`` as for `count_keys`."""
    live = rows < M
    word = tl.zeros((BR,), dtype=tl.int32)
    for first in range(0, K, 32):
        taps = first + tl.arange(0, 32)
        at = rows.to(tl.int64)[:, None] * n_row + taps.to(tl.int64)[None, :] * n_tap
        idx = tl.load(neighbors + at, mask=live[:, None] & (taps < K)[None, :], other=-1)
        bit = tl.load(bits + taps)
        word |= tl.reduce(tl.where(idx >= 0, bit[None, :], 0), 1, bit_or)
    count_keys(rows, live, word, keys, counts, FEW, BR)


@triton.jit
def count_keys(rows, live, word, keys, counts, FEW: tl.constexpr, BR: tl.constexpr):
    """Sort keys of rows from the bits of their taps; ``FEW``: many rows have the same."""
    key = sort_key(word)
    tl.store(keys + rows, key.to(tl.int16), mask=live)
    counted = live & (key > 0)
    if FEW:
        same, rank = _alike(key, live, BR)
        tl.atomic_add(counts + key, same, mask=counted & (rank == 0), sem="relaxed")
    else:
        tl.atomic_add(counts + key, 1, mask=counted, sem="relaxed")


@triton.jit
def _alike(key, live, BR: tl.constexpr):
    """How many of the rows at hand have the same key, and how many of these stand before.

    One of them then speaks for all: a map of two by two taps has eight keys for all its rows, and
    atomic operations on one address take their turns.
    """
    i = tl.arange(0, BR)
    keys = tl.where(live, key, -1)
    equal = (keys[:, None] == keys[None, :]).to(tl.int32)
    before = tl.where(i[None, :] < i[:, None], equal, 0)
    return tl.sum(equal, axis=1), tl.sum(before, axis=1)


@triton.jit
def start_kernel(counts, starts, BINS: tl.constexpr):
    """starts[key] = rows with a larger key: where its rows begin."""
    keys = tl.arange(0, BINS)
    count = tl.load(counts + keys)
    tl.store(starts + keys, tl.sum(count, axis=0) - tl.cumsum(count, axis=0))


@triton.jit(do_not_specialize=["M"])
def place_kernel(keys, starts, order, limit, M, BR: tl.constexpr):
    """Put each row behind those of its key that came before; ``starts`` counts up."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    # What is no real row stays without a place.
    place_block(rows, rows < real_rows(M, limit), keys, starts, order, BR)


@triton.jit
def place_block(rows, live, keys, starts, order, BR: tl.constexpr):
    """The same for some rows, where ``live``."""
    key = tl.load(keys + rows, mask=live, other=0).to(tl.int32)
    same, rank = _alike(key, live, BR)
    first = tl.atomic_add(starts + key, same, mask=live & (rank == 0), sem="relaxed")
    # The place of the first of its kind, from wherever that row is in the block.
    kin = tl.where(live, key, -1)
    lead = (kin[:, None] == kin[None, :]) & (rank == 0)[None, :]
    place = tl.sum(tl.where(lead, first[None, :], 0), axis=1) + rank
    tl.store(order + place, rows, mask=live)


@triton.jit(do_not_specialize=["M", "T", "n_row", "n_tap"])
def tile_kernel(
    neighbors, order, table, masks, limit, M, T, n_row, n_tap,
    K: tl.constexpr, SHARES: tl.constexpr, BR: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Bring 64 rows into the order of a share and collect their taps."""
    WORDS: tl.constexpr = (K + 31) // 32
    tile = tl.program_id(0)
    part = tl.program_id(1) % WORDS
    share = tl.program_id(1) // WORDS
    places = tile * BR + tl.arange(0, BR)
    live = places < real_rows(M, limit)
    if SORTED:
        own = order + share.to(tl.int64) * T * BR
        rows = tl.load(own + places, mask=live, other=0).to(tl.int64)
    else:
        rows = places.to(tl.int64)
    every = tl.full((BR,), -1, tl.int32)
    tile_block(
        places, rows, live, places < M, part, K * share // SHARES, K * (share + 1) // SHARES,
        every, neighbors, table, masks + tl.program_id(1).to(tl.int64) * T + tile, M, n_row, n_tap,
        K, BR,
    )  # fmt: skip


@triton.jit
def tile_block(
    places, rows, live, inside, part, first, last, word, neighbors, table, mask_at, M, n_row,
    n_tap, K: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """32 taps of the rows that come to ``places``, as far as they are ``first`` to last - 1, and
    which of these taps there are.

    Places ``inside`` the table that are not ``live`` get no neighbours, so that whoever reads them
    need not know how many rows are real.

    ``word`` [BR]: bit k tells whether a row may have tap k; if not, nothing is read.
    """
    taps = part * 32 + tl.arange(0, 32)
    at = rows[:, None] * n_row + taps.to(tl.int64)[None, :] * n_tap
    # K on its own, though last is K or less: the compiler then drops the columns behind it.
    mine = (taps < K)[None, :] & ((taps >= first) & (taps < last))[None, :]
    known = ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) > 0
    idx = tl.load(neighbors + at, mask=live[:, None] & mine & known, other=-1)
    target = table + taps.to(tl.int64)[None, :] * M + places[:, None]
    tl.store(target, idx, mask=inside[:, None] & mine)
    own = tl.max((idx >= 0).to(tl.int32), axis=0)
    tl.store(mask_at, tl.sum(own << tl.arange(0, 32), axis=0))


def row_sort_keys(
    neighbors: Tensor, bits: Tensor, counts: Tensor | None = None, few: bool = False
) -> SortKeys:
    """The sort keys of the rows of a table [K, M] int32, any strides.

    Args:
        neighbors: The table.
        bits: From `key_bits`, of one share.
        counts: As for `new_sort_keys`.
        few: Many rows have the same key. Over at most eight taps they always have.
    """
    volume, m = neighbors.shape
    found = new_sort_keys(neighbors, m, volume, counts)
    n_tap, n_row = neighbors.stride()
    _row_keys(volume, few or volume <= 8)(
        (cdiv(m, 64), 1), (neighbors, bits, *found), (m, n_row, n_tap)
    )
    return found


@cache
def _row_keys(volume: int, few: bool) -> Step:
    return Step(row_key_kernel, K=volume, FEW=few, BR=64)


def _sort(found: SortKeys, order: Tensor, limit: Tensor | None) -> None:
    """Write rows to ``order``, by key, largest first: a counting sort. None behind ``limit``."""
    keys, counts = found
    m, bins = keys.shape[0], counts.shape[0]
    starts = counts.new_empty(bins)
    start, place = _sorting(bins, limit is None)
    start((1, 1), (counts, starts), ())
    place((cdiv(m, 32), 1), (keys, starts, order, limit), (m,))


@cache
def _sorting(bins: int, whole: bool) -> tuple[Step, Step]:
    """Two launches for so many keys; ``whole``: all rows are real."""
    return (
        Step(start_kernel, BINS=bins, num_warps=16 if bins >= 4096 else 4),
        Step(place_kernel, BR=32, num_warps=1),
    )


def make_tiles(
    neighbors: Tensor,
    keys: Sequence[SortKeys] | None,
    limit: Tensor | None = None,
    shares: int = 1,
) -> Tiles:
    """Sort the rows of a table by keys (largest first; None: leave them) and tile them.

    Args:
        neighbors: [K, M] int32, -1 = none; any strides.
        keys: Of its rows, for each share of the taps, or None.
        limit: [1] int64, how many of its rows are real; the others have no neighbours.
        shares: S of `Tiles`.
    """
    volume, m = neighbors.shape
    tiles, words = cdiv(m, TILE_ROWS), cdiv(volume, 32)
    order = None
    if keys is not None:
        order = neighbors.new_empty(shares, tiles * TILE_ROWS)
        for own, found in zip(order, keys):
            _sort(found, own, limit)
    table, masks = neighbors.new_empty(volume, m), neighbors.new_empty(shares, words, tiles)
    n_tap, n_row = neighbors.stride()
    tile = _tiling(volume, shares, order is not None, limit is None)
    grid = tiles, words * shares
    tile(grid, (neighbors, order, table, masks, limit), (m, tiles, n_row, n_tap))
    return Tiles(order, table, masks, limit)


@cache
def _tiling(volume: int, shares: int, ordered: bool, whole: bool) -> Step:
    return Step(tile_kernel, K=volume, SHARES=shares, BR=TILE_ROWS, SORTED=ordered)


@triton.jit(do_not_specialize=["M", "T"])
def untile_kernel(
    table, order, neighbors, limit, M, T,
    K: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, BR: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    """Write 32 taps of 64 places of a share back to their rows; no neighbours for what is no real
    row."""
    WORDS: tl.constexpr = (K + 31) // 32
    places = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = places < M
    live = inside & (places < real_rows(M, limit))
    share = tl.program_id(1) // WORDS
    rows = places
    if SORTED:
        own = order + share.to(tl.int64) * T * BR
        rows = tl.load(own + places, mask=live, other=0)
        rows = tl.where(live, rows, places)
    taps = tl.program_id(1) % WORDS * 32 + tl.arange(0, 32)
    if SHARES == 1:
        mine = taps < WIDTH  # whole 16 bytes
    else:
        last = tl.where(share == SHARES - 1, WIDTH, K * (share + 1) // SHARES)
        mine = (taps >= K * share // SHARES) & (taps < last)
    source = table + taps.to(tl.int64)[None, :] * M + places[:, None]
    idx = tl.load(source, mask=live[:, None] & (mine & (taps < K))[None, :], other=-1)
    at = rows.to(tl.int64)[:, None] * WIDTH + taps[None, :]
    tl.store(neighbors + at, idx, mask=inside[:, None] & mine[None, :])


def untile(tiles: Tiles) -> Tensor:
    """The table that was tiled: [K, M] int32, rows in their own order (a view of rows)."""
    order, table, _, limit = tiles
    if order is None and limit is None:
        return table
    volume, m = table.shape
    width = row_width(volume)
    neighbors = table.new_empty(m, width)
    back = _untiling(volume, width, tiles.shares, order is not None, limit is None)
    blocks = cdiv(m, TILE_ROWS)
    grid = blocks, cdiv(volume, 32) * tiles.shares
    back(grid, (table, order, neighbors, limit), (m, blocks))
    return neighbors.as_strided((volume, m), (1, width))


@cache
def _untiling(volume: int, width: int, shares: int, ordered: bool, whole: bool) -> Step:
    return Step(
        untile_kernel, K=volume, WIDTH=width, SHARES=shares, BR=TILE_ROWS, SORTED=ordered
    )  # fmt: skip
