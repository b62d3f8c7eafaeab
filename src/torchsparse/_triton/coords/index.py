"""Levels on the device: search structures, neighbour tables and the sites that layers create."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import Growth, growth, mark_rows, row_count
from torchsparse._flags import Complaint, pending_word, raise_found
from torchsparse._geometry import Geometry, tap_list
from torchsparse._triton.conv.order import (
    SortKeys,
    key_bits,
    new_sort_keys,
    row_sort_keys,
    sort_bins,
)
from torchsparse._triton.coords.bins import (
    BIN_BLOCK,
    bin_start_kernel,
    bin_sum_kernel,
    bucket_kernel,
    rank_kernel,
)
from torchsparse._triton.coords.layout import bounds_kernel, check_kernel, fit_kernel, numbers
from torchsparse._triton.coords.neighbors import blank_kernel, find_kernel, invert_kernel
from torchsparse._triton.coords.sites import (
    assign_kernel,
    begin_kernel,
    collect_kernel,
    create_kernel,
    insert_kernel,
    level_kernel,
    unpack_kernel,
)
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.zeros import Zeros

__all__ = [
    "CoordIndex",
    "build_index",
    "check_sites",
    "find_taps",
    "generative_sites",
    "invert_taps",
    "strided_sites",
]

# Cells around the bounding box: kernels up to 9 taps wide then share one index per level.
USUAL_MARGIN = 8
# Half as many slots double the longest probe sequence among the lanes of a warp.
SLOTS_PER_KEY = 3
MOST_STEPS = 512  # of an insertion, before the table counts as too small
MOST_BINS = 1 << 20  # 4 MB of counts
SUMMED_BINS = 1 << 14  # more are added up in two steps
INT32 = torch.iinfo(torch.int32)
Bounds = tuple[int | None, ...]


class CoordIndex(NamedTuple):
    """A hash table over the rows of one coordinate tensor."""

    coords: Tensor  # [N, 1 + D] int32
    keys: Tensor  # [slots] int64, -1 = unused
    values: Tensor  # [slots] int32, the row of the key in that slot
    layout: Tensor  # int64 on the device: see `layout.py`
    margin: tuple[int, ...]  # D ints: how far searches may leave the bounding box
    zeros: Zeros  # for the searches
    rows: None = None  # positions are rows

    @property
    def probe(self) -> tuple[int, int]:
        """(shift, mask) of `primitives.first_slot`."""
        slots = self.keys.shape[0]
        return 64 - (slots.bit_length() - 1 - 2), slots - 1


@lru_cache(maxsize=256)
def _relation(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """dilation * tap [K, D], and stride, offset, reach [3, D], int64 on the device."""
    taps = [[d * t for d, t in zip(geometry.dilation, tap)] for tap in
            tap_list(geometry.kernel_size)]  # fmt: skip
    rows = [geometry.stride, geometry.offset, geometry.reach]
    with torch.inference_mode(False):
        return (
            torch.tensor(taps, dtype=torch.int64, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
        )


@lru_cache(maxsize=256)
def _backwards(geometry: Geometry, device: torch.device) -> Tensor:
    """How far the sites of an input may lie below the last of them, per axis: [sites, D] int64."""
    counts = [-(-k // s) for k, s in zip(geometry.kernel_size, geometry.stride)]
    with torch.inference_mode(False):
        return torch.tensor(
            list(itertools.product(*map(range, counts))), dtype=torch.int64, device=device
        )


class _Filled(NamedTuple):
    """The sites that a layer creates, in no order."""

    made: CoordIndex  # without its coordinates and values
    info: Tensor  # [4] int64: see `create_kernel`
    counts: Tensor  # [bins] int32, keys in each bin: see `bins.py`


def _new_table(room: int, ndim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a table of at least so many slots, and zeros for the sort keys of two
    searches, with 3^D and with 2^D taps. All is still to be cleared."""
    slots = next_power(max(room, 16))
    zeros = sort_bins(3**ndim) + sort_bins(2**ndim)
    return (
        torch.empty(slots, dtype=torch.int64, device=device),
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(zeros, dtype=torch.int32, device=device),
    )


def build_index(coords: Tensor, reach: tuple[int, ...]) -> CoordIndex:
    """A hash table over coordinate rows; duplicates are complained about.

    Args:
        coords: [N, 1 + D] int32.
        reach: D ints, how far searches will leave the bounding box.
    """
    n, ndim = coords.shape[0], coords.shape[1] - 1
    device = coords.device
    coords = coords.contiguous()
    table, values, zeros = _new_table(SLOTS_PER_KEY * n, ndim, device)
    bounds = torch.empty((2, ndim + 1), dtype=torch.int32, device=device)
    limit = row_count(coords)
    layout = torch.empty(numbers(ndim), dtype=torch.int64, device=device)
    need = max(reach, default=0)
    usual = max(need, USUAL_MARGIN)
    index = CoordIndex(coords, table, values, layout, (usual,) * ndim, Zeros(zeros))
    flags = pending_word(device)
    steps = max(cdiv(n, 264 * 256), 1)
    slots, n_zeros = table.shape[0], zeros.shape[0]
    launch(
        begin_kernel, (cdiv(max(slots, n_zeros), 2048),), coords, table, values, zeros, bounds,
        slots, n_zeros, COLUMNS=ndim + 1, BLOCK=2048,
    )  # fmt: skip
    launch(
        bounds_kernel, (cdiv(n, steps * 256),), coords, coords, bounds, limit, n, steps,
        D=ndim, BR=256,
    )  # fmt: skip
    launch(
        fit_kernel, (1,), coords, bounds, layout, flags, usual, need, Complaint.BOX.bit,
        D=ndim, num_warps=1,
    )  # fmt: skip
    launch(
        insert_kernel, (cdiv(n, 128),), coords, coords, layout, table, flags, limit, n,
        *index.probe, Complaint.DUPLICATE.bit, slots, D=ndim, BR=128, num_warps=1,
    )  # fmt: skip
    launch(
        assign_kernel, (cdiv(n, 128),), coords, coords, layout, table, values, limit, n,
        *index.probe, D=ndim, BR=128, num_warps=1,
    )  # fmt: skip
    return index


def check_sites(
    index: CoordIndex, spatial_range: tuple[int, ...] | None, allow_negative: bool
) -> None:
    """Complain about coordinates outside the range that holds for them."""
    ndim = len(index.margin)
    limits = (spatial_range or ())[: ndim + 1]
    limits = tuple(min(r, INT32.max) for r in limits) + (0,) * (5 - len(limits))
    launch(
        check_kernel, (1,), index.layout, index.layout, pending_word(index.layout.device), *limits,
        Complaint.BATCH.bit, Complaint.NEGATIVE.bit, Complaint.RANGE.bit,
        D=ndim, RANGED=spatial_range is not None, NEGATIVE=allow_negative, num_warps=1,
    )  # fmt: skip


def find_taps(
    index: CoordIndex, coarse: Tensor | None, geometry: Geometry
) -> tuple[Tensor, SortKeys | None]:
    """Rows of the fine sites under every tap of every coarse site.

    Args:
        index: The fine sites, with a margin of at least ``geometry.reach``.
        coarse: [M, 1 + D] int32; None for the submanifold relation, where they are the fine ones.
        geometry: Its taps; K is their number.

    Returns:
        [K, M] int32, -1 where no fine site is (a view of rows); the sort keys of its rows.
    """
    coords = index.coords if coarse is None else coarse.contiguous()
    m, ndim, volume = coords.shape[0], geometry.ndim, geometry.volume
    width = cdiv(volume, 4) * 4  # rows of 16 bytes
    device = coords.device
    table = coords.new_empty(m, width)
    keys = new_sort_keys(m, volume, device, index.zeros.take(sort_bins(volume)))
    taps, relation = _relation(geometry, device)
    taps_each = min(max(next_power(volume), 8), 32)
    rows_each = 128 // taps_each  # one warp a program: nobody waits for another's long search
    launch(
        find_kernel, (cdiv(m, rows_each),), coords, coords, index.layout, taps, relation,
        key_bits(geometry, device), index.keys, index.values, table, *keys, pending_word(device),
        m, *index.probe, Complaint.BOX.bit,
        D=ndim, K=volume, WIDTH=width, TAPS=taps_each, BR=rows_each, num_warps=1,
    )  # fmt: skip
    return table[:, :volume].t(), keys


def invert_taps(
    neighbors: Tensor, num_inputs: int, geometry: Geometry
) -> tuple[Tensor, SortKeys | None]:
    """The same pairs seen from the inputs: result[k, neighbors[k, m]] = m.

    Returns:
        [K, num_inputs] int32, -1 = none (a view of rows); the sort keys of its rows.
    """
    volume, m = neighbors.shape
    width = cdiv(volume, 4) * 4  # rows of 16 bytes
    table = neighbors.new_empty(num_inputs, width)
    counts = neighbors.new_empty(sort_bins(volume))
    size, bins = table.numel(), counts.shape[0]
    launch(
        blank_kernel, (cdiv(max(size, bins), 1024),), table, table, counts, size, bins, BLOCK=1024
    )
    launch(
        invert_kernel, (cdiv(m, 64), cdiv(volume, 32)), neighbors, neighbors, table, m,
        neighbors.stride(1), neighbors.stride(0), K=volume, WIDTH=width, BR=64,
    )  # fmt: skip
    inverse = table[:, :volume].t()
    return inverse, row_sort_keys(inverse, key_bits(geometry, neighbors.device), counts)


def strided_sites(
    index: CoordIndex,
    coords: Tensor,
    geometry: Geometry,
    lower: Bounds,
    upper: Bounds | None,
) -> tuple[Tensor, CoordIndex]:
    """All coarse sites that some tap ties to a fine site. Waits for their number.

    Args:
        index: Of the fine sites.
        coords: Fine sites, [N, 1 + D] int32.
        geometry: The relation.
        lower, upper: Inclusive bounds of the coarse coordinates per axis; None for an axis =
            unbounded, None for ``upper`` = from the largest coordinates of the batch.

    Returns:
        [M, 1 + D] int32 in lexicographic order, and their index.
    """
    return _create(index, coords, geometry, lower, upper, False)


def generative_sites(
    index: CoordIndex, coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds
) -> tuple[Tensor, CoordIndex]:
    """All fine sites that some tap ties to a coarse site; else as `strided_sites`."""
    return _create(index, coords, geometry, lower, upper, True)


def _create(
    source: CoordIndex,
    coords: Tensor,
    geometry: Geometry,
    lower: Bounds,
    upper: Bounds | None,
    generative: bool,
) -> tuple[Tensor, CoordIndex]:
    n = coords.shape[0]
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation)
    # A fine site has about k / s coarse sites on an axis, a coarse one k fine sites.
    each = math.prod(k if generative else -(-k // (s // math.gcd(s, d))) for k, s, d in axes)
    room = min(each, 8 if generative else 2) * n
    growing = growth()
    padded = growing is not None and growing.padded
    filled = _fill(
        source, coords, geometry, lower, upper, generative, room, MOST_STEPS, not padded
    )
    if growing is not None and padded:
        return _unpack_padded(filled, growing, each * n)
    count, lost, flags, cells = filled.info.tolist()  # the one synchronisation
    raise_found(flags, coords.device)
    if lost:  # more sites than expected, rare: a table that holds whatever may come
        room = each * n
        filled = _fill(source, coords, geometry, lower, upper, generative, room, INT32.max, True)
        count, lost, flags, cells = filled.info.tolist()
        raise_found(flags, coords.device)
    if growing is not None:
        growing.note(count, cells, each)
    return _unpack(filled, count, cells <= INT32.max, None)


def _unpack_padded(filled: _Filled, growing: Growth, most: int) -> tuple[Tensor, CoordIndex]:
    """The sites of a table in as many rows as `Growth` plans; nothing waits."""
    room = growing.plan(filled.info, most)
    rows = room.rows or 0
    if growing.guess:
        return _unpack(filled, rows, room.narrow, None)
    count = filled.info[:1]
    sites, index = _unpack(filled, rows, room.narrow, count)
    mark_rows(sites, count)
    return sites, index


def _unpack(
    filled: _Filled, rows: int, narrow: bool, limit: Tensor | None
) -> tuple[Tensor, CoordIndex]:
    """Sorted coordinates of the keys in a table, and their index.

    Args:
        filled: The table.
        rows: Room for them.
        narrow: Keys fit into 32 bits.
        limit: None if they fill it, else [1] int64, their number.
    """
    sites = filled.made.coords.new_empty(rows, len(filled.made.margin) + 1)
    unpack = _by_bins if narrow else _by_sorting
    unpack(filled, sites, limit)
    return sites, filled.made._replace(coords=sites)


def _by_bins(filled: _Filled, sites: Tensor, limit: Tensor | None) -> None:
    """Write ``sites`` and values of narrow keys: see `bins.py`."""
    index, _, counts = filled
    rows, ndim = sites.shape[0], len(index.margin)
    bins, slots = counts.shape[0], index.keys.shape[0]
    blocks = cdiv(bins, BIN_BLOCK)
    starts = torch.empty_like(counts)
    before, grain = counts, 1
    if bins > SUMMED_BINS:
        before, grain = counts.new_empty(blocks), BIN_BLOCK
        launch(bin_sum_kernel, (blocks,), counts, counts, before, BLOCK=BIN_BLOCK)
    launch(
        bin_start_kernel, (blocks,), counts, counts, before, starts, grain,
        BLOCK=BIN_BLOCK, STEP=4096,
    )  # fmt: skip
    bucketed = torch.empty(rows, dtype=torch.int64, device=sites.device)
    launch(
        bucket_kernel, (cdiv(slots, 512),), sites, index.keys, starts, index.layout, bucketed,
        slots, bins, rows, D=ndim, BLOCK=512,
    )  # fmt: skip
    launch(
        rank_kernel, (cdiv(rows, 64),), sites, bucketed, starts, sites, index.layout,
        index.values, limit, rows, bins, slots - 1, D=ndim, BR=64, num_warps=1,
    )  # fmt: skip


def _by_sorting(filled: _Filled, sites: Tensor, limit: Tensor | None) -> None:
    """Write ``sites`` and values of any keys."""
    index, info, _ = filled
    rows, ndim, slots = sites.shape[0], len(index.margin), index.keys.shape[0]
    keys = torch.empty(rows, dtype=torch.int64, device=sites.device)
    if limit is not None:
        keys.fill_(torch.iinfo(torch.int64).max)  # stands behind all keys
    launch(
        collect_kernel, (cdiv(slots, 1024),), sites, index.keys, keys, info[2:], index.layout,
        slots, rows, D=ndim, BLOCK=1024,
    )  # fmt: skip
    keys = torch.sort(keys).values
    launch(
        unpack_kernel, (cdiv(rows, 128),), sites, keys, sites, index.layout, index.keys,
        index.values, limit, rows, *index.probe, D=ndim, BR=128,
    )  # fmt: skip


def _fill(
    source: CoordIndex,
    coords: Tensor,
    geometry: Geometry,
    lower: Bounds,
    upper: Bounds | None,
    generative: bool,
    room: int,
    most: int,
    report: bool,
) -> _Filled:
    """A table of the sites that a layer creates."""
    n, ndim = coords.shape[0], geometry.ndim
    device = coords.device
    table, values, zeros = _new_table(2 * room, ndim, device)
    slots, n_zeros = table.shape[0], zeros.shape[0]
    bins = min(max(slots // 2, BIN_BLOCK), MOST_BINS)  # one or two for each of ``room`` keys
    counts = torch.empty(bins, dtype=torch.int32, device=device)
    info = torch.empty(4, dtype=torch.int64, device=device)
    layout = torch.empty_like(source.layout)
    # A generative layer looks for what it created; others look on their input's side.
    need = max(geometry.reach, default=0) if generative else 0
    usual = max(need, USUAL_MARGIN)
    made = CoordIndex(coords, table, values, layout, (usual,) * ndim, Zeros(zeros))
    flags = pending_word(device)
    taps, relation = _relation(geometry, device)
    low = [INT32.min if v is None else v for v in lower]
    high = [INT32.max if v is None else min(v, INT32.max) for v in upper or (None,) * ndim]
    low += [0] * (4 - ndim)
    high += [0] * (4 - ndim)
    launch(
        level_kernel, (cdiv(max(slots, n_zeros, bins), 2048),), coords, table, values, zeros,
        counts, info, slots, n_zeros, bins, source.layout, layout, relation, flags, *low, *high,
        usual, need, Complaint.BOX.bit, Complaint.OVERFLOW.bit,
        D=ndim, GENERATIVE=generative, INFER=upper is None, BLOCK=2048,
    )  # fmt: skip
    # Without dilation the sites that an input has on an axis are neighbours, k / s of them.
    near = not generative and all(d == 1 for d in geometry.dilation)
    if near:
        taps = _backwards(geometry, device)
    tried = taps.shape[0]
    taps_each = min(next_power(tried), 32)
    rows_each = 128 // taps_each  # one warp a program, as in `find_taps`
    grid = (max(cdiv(n, rows_each), 1), cdiv(tried, taps_each))
    launch(
        create_kernel, grid, coords, coords.contiguous(), layout, taps, relation, table, counts,
        flags, info, row_count(coords), n, *made.probe, most, bins,
        D=ndim, K=tried, TAPS=taps_each, BR=rows_each,
        GENERATIVE=generative, NEAR=near, REPORT=report, num_warps=1,
    )  # fmt: skip
    return _Filled(made, info, counts)
