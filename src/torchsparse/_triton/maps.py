"""The tables and tiles of several maps in a dozen launches.

A U-Net has nine maps, most of them small: each kernel of `coords.neighbors` and `conv.order` ends
before the next one is there. Here one launch serves all maps with equally many taps. `_described`
writes a record for each table to the device; a program looks up whose rows it has.
"""

# The checker does not see what Triton's compiler makes of these functions.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._asked import Asked, Made
from torchsparse._capacity import row_count
from torchsparse._flags import Complaint, pending_word
from torchsparse._geometry import Geometry
from torchsparse._triton.conv.order import (
    TILE_ROWS,
    Tiles,
    count_keys,
    key_bits,
    key_block,
    place_block,
    tile_block,
    untile,
)
from torchsparse._triton.conv.plan import Plan
from torchsparse._triton.coords.index import SEARCHED, CoordIndex, Search, searching
from torchsparse._triton.coords.neighbors import find_block, find_half_block, invert_block
from torchsparse._triton.launch import Step, cdiv, launch, next_power, only_noted
from torchsparse._triton.primitives import fours_below

__all__ = ["build_together", "together"]

MOST_TABLES = 32
MOST_TAPS = 32  # one word of a tile's mask
MOST_ENTRIES = 1 << 31  # of a table
# Words of tables as they are found, 40 MB, beside what is kept of them: more are built in several
# goes, each of which takes seven or eight launches and gives its tables up before the next.
MOST_FOUND = 10 << 20
# Where a record has what. Addresses are 0 for what there is not.
FIELDS = 23
FIRST, ROWS, LIMIT, NEIGHBORS, KEYS, COUNTS, STARTS, ORDER, TABLE, MASKS = map(
    tl.constexpr, range(10)
)
COORDS, LAYOUT, SLOTS, VALUES, SHIFT, TAPS_AT, RELATION, BITS, INVERSE, WORDS = map(
    tl.constexpr, range(10, 20)
)
FIRST_SHARED, SHARES, BINS = map(tl.constexpr, range(20, FIELDS))
RECORD = tl.constexpr(FIELDS)
TABLES = tl.constexpr(MOST_TABLES)
BLOCK_ROWS = tl.constexpr(TILE_ROWS)
# Numbers are sent as 2 (n + BIAS) + 1: each needs 64 bits and none is a multiple of 16, so that
# one kernel serves them all.
BIAS = 1 << 40
PLACED = 32  # rows of a program
ALIGNED = 32  # words: pieces of a buffer begin at 128 bytes
FEWER = 4  # there are kernels for multiples of so many records


# ------------------------------------------------------------------ kernels
@triton.jit(do_not_specialize=["values"])
def describe_kernel(records, values, N: tl.constexpr, ADDED: tl.constexpr):
    """Write numbers to the device."""
    for i in tl.static_range(N):
        tl.store(records + i, (values[i] >> 1) - ADDED)


@triton.jit(do_not_specialize=["n_zeros", "n_absent"])
def clear_kernel(zeros, absent, n_zeros, n_absent, BLOCK: tl.constexpr):
    """Counts of no rows, and tables without neighbours; sizes are multiples of four."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(zeros + at, tl.zeros((BLOCK,), tl.int32), mask=fours_below(at, n_zeros))
    tl.store(absent + at, tl.full((BLOCK,), -1, tl.int32), mask=fours_below(at, n_absent))


@triton.jit
def _place(field, record, dtype: tl.constexpr):
    """A pointer from a record."""
    return tl.multiple_of(tl.load(record + field).to(tl.pointer_type(dtype)), 16)  # pyright: ignore


@triton.jit
def _found(records, tables, block, FIELD: tl.constexpr):
    """The record of the table that a block belongs to, and the place of the block in there."""
    at = tl.arange(0, TABLES)
    first = tl.load(records + at * RECORD + FIELD, mask=at < tables, other=1 << 62)
    table = tl.sum((first <= block).to(tl.int32), axis=0) - 1
    record = records + table * RECORD
    return record, (block - tl.load(record + FIELD)).to(tl.int32)


@triton.jit
def _own(records, tables, block):
    """The record of the table that a block of 64 rows belongs to, and the block's first row."""
    record, place = _found(records, tables, block, FIRST)
    return record, place * BLOCK_ROWS


@triton.jit
def _own_share(records, tables, block):
    """The same where the blocks of a table come once for each of its shares; and the share, and
    how many blocks there are in one."""
    record, place = _found(records, tables, block, FIRST_SHARED)
    blocks = (tl.load(record + ROWS).to(tl.int32) + BLOCK_ROWS - 1) // BLOCK_ROWS
    share = place * 0
    if place >= blocks:  # a division takes as long as the rest, and most tables have one share
        share = place // blocks
        place -= share * blocks
    return record, place * BLOCK_ROWS, share, blocks


@triton.jit
def _keys_of(record, share, blocks):
    """Where a share has its sort keys."""
    return _place(KEYS, record, tl.int16) + share * blocks * BLOCK_ROWS


@triton.jit
def _bins_of(field, record, share):
    """Where it has a number for each of its sort keys."""
    return _place(field, record, tl.int32) + share * tl.load(record + BINS).to(tl.int32)


@triton.jit
def _real_rows(record):
    """How many rows of a table are real."""
    rows = tl.load(record + ROWS)
    limit = tl.load(record + LIMIT)
    if limit != 0:
        rows = tl.minimum(rows, tl.load(limit.to(tl.pointer_type(tl.int64))))
    return rows.to(tl.int32)


@triton.jit(do_not_specialize=["tables", "first"])
def find_together_kernel(
    records, flags, tables, first, box_bit,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """`find_kernel` for the tables from block ``first`` on; ``HALF``: `find_half_block`."""
    each: tl.constexpr = BLOCK_ROWS // BR
    program = tl.program_id(0)
    record, row = _own(records, tables, first + program // each)
    row += program % each * BR
    M = tl.load(record + ROWS).to(tl.int32)
    if row < M:
        rows = row + tl.arange(0, BR)
        coords, layout = _place(COORDS, record, tl.int32), _place(LAYOUT, record, tl.int64)
        taps_at, relation = _place(TAPS_AT, record, tl.int64), _place(RELATION, record, tl.int64)
        slots, values = _place(SLOTS, record, tl.int64), _place(VALUES, record, tl.int32)
        neighbors = _place(NEIGHBORS, record, tl.int32)
        shift = tl.load(record + SHIFT).to(tl.int32)
        slots_mask = (tl.full((), 1, tl.int64) << (66 - shift)) - 1
        if HALF:
            find_half_block(
                rows, coords, layout, taps_at, relation, slots, values, neighbors,
                _place(WORDS, record, tl.int32), flags,
                M, shift, slots_mask, box_bit, D, K, WIDTH, TAPS, BR,
            )  # fmt: skip
        else:
            find_block(
                rows, coords, layout, taps_at, relation, _place(BITS, record, tl.int32), slots,
                values, neighbors, _place(KEYS, record, tl.int16),
                _place(COUNTS, record, tl.int32), flags,
                M, shift, slots_mask, box_bit, D, K, WIDTH, TAPS, BR,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tables", "first"])
def invert_together_kernel(
    records, tables, first, K: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr
):
    """`invert_kernel` for those tables from block ``first`` on that have an inverse."""
    record, row = _own(records, tables, first + tl.program_id(0))
    if tl.load(record + INVERSE) != 0:
        invert_block(
            row + tl.arange(0, BR), tl.arange(0, 32), _place(NEIGHBORS, record, tl.int32),
            _place(INVERSE, record, tl.int32), tl.load(record + ROWS).to(tl.int32), WIDTH, 1,
            K, WIDTH, BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tables", "first"])
def key_together_kernel(
    records, tables, first, K: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr
):
    """`row_key_kernel` for the tables and shares from block ``first`` on."""
    record, row, share, blocks = _own_share(records, tables, first + tl.program_id(0))
    M = tl.load(record + ROWS).to(tl.int32)
    rows = row + tl.arange(0, BR)
    bits = _place(BITS, record, tl.int32) + share * 32
    keys, counts = _keys_of(record, share, blocks), _bins_of(COUNTS, record, share)
    if tl.load(record + WORDS) != 0:
        live = rows < M
        found = tl.load(_place(WORDS, record, tl.int32) + rows, mask=live, other=0)
        word = tl.zeros((BR,), tl.int32)
        for tap in tl.static_range(K):
            word |= tl.load(bits + tap) * ((found >> tap) & 1)
        count_keys(rows, live, word, keys, counts, K <= 8, BR)
    else:
        neighbors = _place(NEIGHBORS, record, tl.int32)
        key_block(rows, neighbors, bits, keys, counts, M, WIDTH, 1, K, K <= 8, BR)


@triton.jit(do_not_specialize=["table"])
def start_together_kernel(records, table, SIZE: tl.constexpr):
    """`start_kernel` for the tables from ``table`` on, and their shares."""
    record = records + (table + tl.program_id(0)) * RECORD
    share = tl.program_id(1)
    if share < tl.load(record + SHARES):
        at = share * SIZE + tl.arange(0, SIZE)
        count = tl.load(_place(COUNTS, record, tl.int32) + at)
        starts = tl.sum(count, axis=0) - tl.cumsum(count, axis=0)
        tl.store(_place(STARTS, record, tl.int32) + at, starts)


@triton.jit(do_not_specialize=["tables"])
def place_together_kernel(records, tables, BR: tl.constexpr):
    """`place_kernel` for all tables that are sorted."""
    each: tl.constexpr = BLOCK_ROWS // BR
    program = tl.program_id(0)
    record, row, share, blocks = _own_share(records, tables, program // each)
    if tl.load(record + ORDER) != 0:
        rows = row + program % each * BR + tl.arange(0, BR)
        order = _place(ORDER, record, tl.int32) + share * blocks * BLOCK_ROWS
        place_block(
            rows, rows < _real_rows(record), _keys_of(record, share, blocks),
            _bins_of(STARTS, record, share), order, BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tables", "first"])
def tile_together_kernel(
    records, tables, first, K: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr
):
    """`tile_kernel` for the tables and shares from block ``first`` on."""
    record, row, share, blocks = _own_share(records, tables, first + tl.program_id(0))
    places = row + tl.arange(0, BR)
    live = places < _real_rows(record)
    rows = places
    if tl.load(record + ORDER) != 0:
        order = _place(ORDER, record, tl.int32) + share * blocks * BLOCK_ROWS
        rows = tl.load(order + places, mask=live, other=0)
    first_tap, last_tap = row * 0, row * 0 + K
    shares = tl.load(record + SHARES).to(tl.int32)
    if shares > 1:
        first_tap, last_tap = K * share // shares, K * (share + 1) // shares
    word = tl.full((BR,), -1, tl.int32)
    if tl.load(record + WORDS) != 0:
        word = tl.load(_place(WORDS, record, tl.int32) + rows, mask=live, other=0)
    M = tl.load(record + ROWS).to(tl.int32)
    tile_block(
        places, rows.to(tl.int64), live, places < M, 0, first_tap, last_tap, word,
        _place(NEIGHBORS, record, tl.int32), _place(TABLE, record, tl.int32),
        _place(MASKS, record, tl.int32) + share * blocks + row // BLOCK_ROWS,
        M, WIDTH, 1, K, BR,
    )  # fmt: skip


# ------------------------------------------------------------------ launches
class _Group(NamedTuple):
    """What tables with equally many taps share."""

    find_rows: int  # of a program
    find: Step
    half_rows: int
    find_half: Step
    invert: Step
    key: Step
    start: Step
    tile: Step


@cache
def _group(ndim: int, volume: int, width: int, taps: int, rows: int, bins: int) -> _Group:
    half = max(next_power(volume // 2 + 1), 8)
    half_rows = min(SEARCHED // half, TILE_ROWS)
    return _Group(
        rows,
        Step(
            find_together_kernel, D=ndim, K=volume, WIDTH=width, TAPS=taps, BR=rows, HALF=False,
            num_warps=1,
        ),
        half_rows,
        Step(
            find_together_kernel, D=ndim, K=volume, WIDTH=width, TAPS=half, BR=half_rows,
            HALF=True, num_warps=1,
        ),
        Step(invert_together_kernel, K=volume, WIDTH=width, BR=TILE_ROWS),
        Step(key_together_kernel, K=volume, WIDTH=width, BR=TILE_ROWS),
        Step(start_together_kernel, SIZE=bins, num_warps=16 if bins >= 4096 else 4),
        Step(tile_together_kernel, K=volume, WIDTH=width, BR=TILE_ROWS),
    )  # fmt: skip


_clear = Step(clear_kernel, BLOCK=2048)
_put = Step(place_together_kernel, BR=PLACED, num_warps=1)


def together(geometry: Geometry, layout: Any, rows: int) -> bool:
    """Whether a map can be built together with others: one word of taps; several shares of them
    where half of the taps are searched for, as keys are counted apart from the search then."""
    kind, _, shares = layout
    few = geometry.volume <= MOST_TAPS and rows * geometry.volume < MOST_ENTRIES
    return few and kind == "gemm" and (shares == 1 or geometry.is_symmetric)


@dataclass
class _Table:
    """A table to build: of a map, or the same seen from its inputs. Pieces of three buffers are
    its own; what it says of them is where they begin, in words of 4 bytes."""

    number: int  # of the map
    inverse: bool
    half: bool  # only half of its taps are searched for, the others mirrored
    index: CoordIndex
    search: Search
    coords: Tensor  # of its rows
    bits: Tensor  # of `key_bits`
    sort: bool
    shares: int  # of the taps, each sorted apart
    counts: int = 0
    starts: int = 0
    keys: int = 0
    neighbors: int = 0
    order: int = 0
    masks: int = 0
    tiles: int = 0
    words: int = 0

    @property
    def rows(self) -> int:
        return self.coords.shape[0]

    @property
    def blocks(self) -> int:
        """Of 64 rows."""
        return cdiv(self.rows, TILE_ROWS)


class _Pieces:
    """Where pieces of one buffer begin."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, words: int) -> int:
        """A piece of so many words."""
        begin = self.size
        self.size += cdiv(words, ALIGNED) * ALIGNED
        return begin


class _Buffers(NamedTuple):
    """[words] int32 each."""

    small: Tensor  # counts of all tables, their starts, their keys
    found: Tensor  # inverted tables, then the others; a row after another
    kept: Tensor  # what plans consist of
    zeros: int  # words at the beginning of ``small``
    absent: int  # and of ``found``


def build_together(asked: Sequence[Asked]) -> list[Made]:
    """What `find_taps`, `invert_taps` and `make_plan` make of each, `together` with the others.

    Tables are given up, as plans hold what is in them.

    Args:
        asked: At most MOST_TABLES / 2, on one device, with equally many axes.
    """
    maps = [list(_tables(number, one)) for number, one in enumerate(asked)]
    made: dict[tuple[int, bool], tuple[Tensor | None, Plan]] = {}
    for tables in _goes(maps):
        made |= _built(tables)
    return [
        Made(*made[number, False], *made.get((number, True), (None, None)))
        for number in range(len(asked))
    ]


def _goes(maps: list[list[_Table]]) -> Iterator[list[_Table]]:
    """The tables of all maps in shares of about equal size, to be built one after another."""
    sizes = [sum(table.rows * table.search.width for table in own) for own in maps]
    ends = [0, *itertools.accumulate(sizes)]
    goes = max(cdiv(ends[-1], MOST_FOUND), 1)
    cuts = [bisect.bisect_left(ends, ends[-1] * go // goes) for go in range(goes)]
    for begin, end in itertools.pairwise([*cuts, len(maps)]):
        if begin < end:
            yield [table for own in maps[begin:end] for table in own]


def _built(tables: list[_Table]) -> dict[tuple[int, bool], tuple[Tensor | None, Plan]]:
    """What is handed out of tables that are built in one go, by number of the map and side."""
    # One group after another; in each first what is searched for under all taps, then under half.
    tables.sort(key=lambda table: (table.search.volume, table.inverse, table.half))
    buffers = _buffers(tables)
    _launch_all(tables, buffers)
    return {(t.number, t.inverse): _handed_out(t, buffers) for t in tables}


def _tables(number: int, asked: Asked) -> Iterator[_Table]:
    index, coarse, geometry, layout, back = asked
    search = searching(geometry, index.layout.device)
    coords = index.coords if coarse is None else coarse.contiguous()
    half = coarse is back is None and geometry.is_symmetric
    for inverse, rows, plan in ((False, coords, layout), (True, index.coords, back)):
        if plan is not None:
            _, sort, shares = plan
            bits = key_bits(geometry, rows.device, shares)
            own = half and not inverse
            yield _Table(number, inverse, own, index, search, rows, bits, sort, shares)


def _buffers(tables: list[_Table]) -> _Buffers:
    """Room for all tables; says where each has its pieces."""
    small, found, kept = _Pieces(), _Pieces(), _Pieces()
    for table in tables:
        table.counts = small.take(table.search.bins * table.shares)
        table.words = small.take(table.rows) if table.half else 0
    zeros = small.size
    for table in tables:
        places = table.shares * table.blocks * TILE_ROWS
        table.starts = small.take(table.search.bins * table.shares)
        table.keys = small.take(places // 2)
        table.order = kept.take(places)
        table.masks = kept.take(table.shares * table.blocks)
        table.tiles = kept.take(table.rows * table.search.volume)
    absent = 0
    for table in sorted(tables, key=lambda table: not table.inverse):
        table.neighbors = found.take(table.rows * table.search.width)
        absent = found.size if table.inverse else absent
    like = tables[0].coords
    small, found, kept = (like.new_empty(pieces.size) for pieces in (small, found, kept))
    return _Buffers(small, found, kept, zeros, absent)


def _launch_all(tables: list[_Table], buffers: _Buffers) -> None:
    device, ndim = buffers.small.device, tables[0].coords.shape[1] - 1
    firsts = [0, *itertools.accumulate(table.blocks for table in tables)]
    shared = [0, *itertools.accumulate(table.blocks * table.shares for table in tables)]
    records = _described(tables, buffers, firsts, shared)
    count, flags = len(tables), pending_word(device)
    most = max(buffers.zeros, buffers.absent)
    _clear((cdiv(most, 2048), 1), (buffers.small, buffers.found), (buffers.zeros, buffers.absent))
    # And where its parts begin, and it ends.
    groups: list[tuple[_Group, int, int, int, int]] = []
    begin = 0
    for volume, members in itertools.groupby(tables, lambda table: table.search.volume):
        own = list(members)
        _, _, _, volume, width, taps, rows, bins, _ = own[0].search
        group = _group(ndim, volume, width, taps, rows, bins)
        inverted = sum(table.inverse for table in own)
        end = begin + len(own)
        halved = end - inverted - sum(table.half for table in own)
        groups.append((group, begin, halved, end - inverted, end))
        begin = end
    for group, begin, halved, inverted, end in groups:
        first, middle, behind = (firsts[at] for at in (begin, halved, inverted))
        box = Complaint.BOX.bit
        if begin < halved:
            grid = (middle - first) * (TILE_ROWS // group.find_rows)
            group.find((grid, 1), (records, flags), (count, first, box))
        if halved < inverted:
            grid = (behind - middle) * (TILE_ROWS // group.half_rows)
            group.find_half((grid, 1), (records, flags), (count, middle, box))
        if inverted < end:
            group.invert((middle - first, 1), (records,), (count, first))
        if halved < end:
            group.key((shared[end] - shared[halved], 1), (records,), (count, shared[halved]))
        most = max(table.shares for table in tables[begin:end])
        group.start((end - begin, most), (records,), (begin,))
    _put((shared[-1] * (TILE_ROWS // PLACED), 1), (records,), (count,))
    for group, begin, _, _, end in groups:
        first, last = shared[begin], shared[end]
        group.tile((last - first, 1), (records,), (count, first))


def _described(
    tables: list[_Table], buffers: _Buffers, firsts: list[int], shared: list[int]
) -> Tensor:
    """The records of all tables, on the device."""
    small, found, kept = (buffer.data_ptr() for buffer in buffers[:3])
    inverses = {table.number: found + 4 * table.neighbors for table in tables if table.inverse}
    values: list[int] = []
    for table, first, first_shared in zip(tables, firsts, shared):
        index, search = table.index, table.search
        limit = row_count(table.coords)
        values += (
            first,
            table.rows,
            0 if limit is None else limit.data_ptr(),
            found + 4 * table.neighbors,
            small + 4 * table.keys,
            small + 4 * table.counts,
            small + 4 * table.starts,
            kept + 4 * table.order if table.sort else 0,
            kept + 4 * table.tiles,
            kept + 4 * table.masks,
            table.coords.data_ptr(),
            index.layout.data_ptr(),
            index.keys.data_ptr(),
            index.values.data_ptr(),
            index.probe[0],
            search.taps.data_ptr(),
            search.relation.data_ptr(),
            table.bits.data_ptr(),
            0 if table.inverse else inverses.get(table.number, 0),
            small + 4 * table.words if table.half else 0,
            first_shared,
            table.shares,
            search.bins,
        )
    values += [0] * (-len(tables) % FEWER * FIELDS)
    records = buffers.small.new_empty(len(values), dtype=torch.int64)
    numbers = tuple([2 * (value + BIAS) + 1 for value in values])
    launch(
        describe_kernel, (1,), records, records, numbers, N=len(numbers), ADDED=BIAS, num_warps=1
    )
    return records


def _handed_out(table: _Table, buffers: _Buffers) -> tuple[Tensor | None, Plan]:
    """The plan; and the table, where nothing was written to the plan."""
    volume, m, limit = table.search.volume, table.rows, row_count(table.coords)
    shares, blocks, kept = table.shares, table.blocks, buffers.kept
    places = blocks * TILE_ROWS
    tiles = Tiles(
        kept.as_strided((shares, places), (places, 1), table.order) if table.sort else None,
        kept.as_strided((volume, m), (m, 1), table.tiles),
        kept.as_strided((shares, 1, blocks), (blocks, blocks, 1), table.masks),
        limit,
    )
    neighbors = None
    if only_noted():
        width = table.search.width
        neighbors = buffers.found.as_strided((volume, m), (1, width), table.neighbors)
        if torch.is_grad_enabled() and not table.inverse:
            untile(tiles)  # as lists of pairs will ask for
    return neighbors, Plan(m, tiles, {}, limit=limit)
