"""Levels on the device: search structures and neighbour tables."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import row_count
from torchsparse._flags import Complaint, pending_word
from torchsparse._geometry import Geometry, tap_list
from torchsparse._triton.conv.order import (
    SortKeys,
    key_bits,
    new_sort_keys,
    row_sort_keys,
    row_width,
    sort_bins,
)
from torchsparse._triton.coords.layout import bounds_kernel, check_kernel, fit_kernel, numbers
from torchsparse._triton.coords.neighbors import blank_kernel, find_kernel, invert_kernel
from torchsparse._triton.coords.sites import assign_kernel, begin_kernel, insert_kernel
from torchsparse._triton.launch import Step, cdiv, launch, next_power
from torchsparse._triton.zeros import Zeros

__all__ = [
    "USUAL_MARGIN",
    "CoordIndex",
    "Search",
    "build_index",
    "check_sites",
    "find_taps",
    "invert_taps",
    "new_table",
    "relation_of",
    "searching",
]

# Cells around the bounding box: kernels up to 9 taps wide then share one index per level.
USUAL_MARGIN = 8
# Half as many slots double the longest probe sequence among the lanes of a warp.
SLOTS_PER_KEY = 3
# Of a program, which is one warp: rows that it inserts, pairs of row and tap that it looks up.
INSERTED, SEARCHED = 32, 128
BLANKED = 4096  # words of a program
INT32 = torch.iinfo(torch.int32)


class CoordIndex(NamedTuple):
    """A hash table over the rows of one coordinate tensor."""

    coords: Tensor  # [N, 1 + D] int32
    keys: Tensor  # [slots] int64, -1 = unused
    values: Tensor  # [slots] int32, the row of the key in that slot
    layout: Tensor  # int64 on the device: see `layout.py`
    margin: tuple[int, ...]  # D ints: how far searches may leave the bounding box
    zeros: Zeros  # for the searches

    @property
    def probe(self) -> tuple[int, int]:
        """(shift, mask) of `primitives.first_slot`."""
        slots = self.keys.shape[0]
        return 64 - (slots.bit_length() - 1 - 2), slots - 1


@cache
def relation_of(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """dilation * tap [K, D], and stride, offset, reach [3, D], int64 on the device.

    Kept for good: captured graphs read them where they lie.
    """
    taps = [[d * t for d, t in zip(geometry.dilation, tap)] for tap in
            tap_list(geometry.kernel_size)]  # fmt: skip
    rows = [geometry.stride, geometry.offset, geometry.reach]
    with torch.inference_mode(False):
        return (
            torch.tensor(taps, dtype=torch.int64, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
        )


def new_table(room: int, ndim: int, coords: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a table of at least so many slots, and zeros for the sort keys of two
    searches, with 3^D and with 2^D taps; on the device of ``coords`` (int32). All is still to be
    cleared; the sizes are multiples of four."""
    slots = next_power(max(room, 16))
    zeros = sort_bins(3**ndim) + sort_bins(2**ndim)
    return (
        coords.new_empty(slots, dtype=torch.int64),
        coords.new_empty(slots),
        coords.new_empty(zeros),
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
    table, values, zeros = new_table(SLOTS_PER_KEY * n, ndim, coords)
    bounds = coords.new_empty(2, ndim + 1)
    limit = row_count(coords)
    layout = table.new_empty(numbers(ndim))
    need = max(reach, default=0)
    usual = max(need, USUAL_MARGIN)
    index = CoordIndex(coords, table, values, layout, (usual,) * ndim, Zeros(zeros))
    flags = pending_word(device)
    steps = max(cdiv(n, 264 * 256), 1)
    slots, n_zeros = table.shape[0], zeros.shape[0]
    begin, find_bounds, fit, insert, assign = _entry(ndim, limit is None)
    begin((cdiv(max(slots, n_zeros), 2048), 1), (table, values, zeros, bounds), (slots, n_zeros))
    find_bounds((cdiv(n, steps * 256), 1), (coords, bounds, limit), (n, steps))
    fit((1, 1), (bounds, layout, flags), (usual, need, Complaint.BOX.bit))
    insert(
        (cdiv(n, INSERTED), 1), (coords, layout, table, flags, limit),
        (n, *index.probe, Complaint.DUPLICATE.bit, slots),
    )  # fmt: skip
    assign((cdiv(n, INSERTED), 1), (coords, layout, table, values, limit), (n, *index.probe))
    return index


@cache
def _entry(ndim: int, whole: bool) -> tuple[Step, Step, Step, Step, Step]:
    """What fills a table with given coordinates; ``whole``: all rows are real."""
    return (
        Step(begin_kernel, COLUMNS=ndim + 1, BLOCK=2048),
        Step(bounds_kernel, D=ndim, BR=256),
        Step(fit_kernel, D=ndim, num_warps=1),
        Step(insert_kernel, D=ndim, BR=INSERTED, num_warps=1),
        Step(assign_kernel, D=ndim, BR=INSERTED, num_warps=1),
    )


def check_sites(
    index: CoordIndex, spatial_range: tuple[int, ...] | None, allow_negative: bool
) -> None:
    """Complain about coordinates outside the range that holds for them."""
    ndim = len(index.margin)
    limits = (spatial_range or ())[: ndim + 1]
    limits = tuple(min(r, INT32.max) for r in limits) + (0,) * (5 - len(limits))
    check = _check(ndim, spatial_range is not None, allow_negative)
    check(
        (1, 1), (index.layout, pending_word(index.layout.device)),
        (*limits, Complaint.BATCH.bit, Complaint.NEGATIVE.bit, Complaint.RANGE.bit),
    )  # fmt: skip


@cache
def _check(ndim: int, ranged: bool, allow_negative: bool) -> Step:
    return Step(check_kernel, D=ndim, RANGED=ranged, NEGATIVE=allow_negative, num_warps=1)


class Search(NamedTuple):
    """What all searches of one geometry on one device share."""

    taps: Tensor  # of `relation_of`
    relation: Tensor
    bits: Tensor  # of `key_bits`
    volume: int
    width: int  # of a row of the table
    tried: int  # taps of a program at a time
    rows: int  # of a program
    bins: int  # of the sort keys
    find: Step


@lru_cache(maxsize=256)
def searching(geometry: Geometry, device: torch.device) -> Search:
    """How a geometry is searched for on a device."""
    volume = geometry.volume
    width = row_width(volume)
    taps_each = min(max(next_power(volume), 8), 32)
    rows = SEARCHED // taps_each  # one warp a program: nobody waits for another's long search
    find = Step(
        find_kernel, D=geometry.ndim, K=volume, WIDTH=width, TAPS=taps_each, BR=rows, num_warps=1
    )
    return Search(
        *relation_of(geometry, device),
        key_bits(geometry, device),
        volume,
        width,
        taps_each,
        rows,
        sort_bins(volume),
        find,
    )


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
    m, device = coords.shape[0], coords.device
    taps, relation, bits, volume, width, _, rows, bins, find = searching(geometry, device)
    table = coords.new_empty(m, width)
    keys = new_sort_keys(table, m, volume, index.zeros.take(bins))
    find(
        (cdiv(m, rows), 1),
        (
            coords, index.layout, taps, relation, bits, index.keys, index.values, table, *keys,
            pending_word(device),
        ),
        (m, *index.probe, Complaint.BOX.bit),
    )  # fmt: skip
    return table.as_strided((volume, m), (1, width)), keys


def invert_taps(
    neighbors: Tensor, num_inputs: int, geometry: Geometry
) -> tuple[Tensor, SortKeys | None]:
    """The same pairs seen from the inputs: result[k, neighbors[k, m]] = m.

    Returns:
        [K, num_inputs] int32, -1 = none (a view of rows); the sort keys of its rows.
    """
    volume, m = neighbors.shape
    blank, invert, width, bins = _inversion(volume)
    table = neighbors.new_empty(num_inputs, width)
    counts = neighbors.new_empty(bins)
    size = num_inputs * width
    grid = (cdiv(max(size, bins), BLANKED), 1)
    if size <= INT32.max:
        blank(grid, (table, counts), (size, bins))
    else:
        launch(blank_kernel, grid, table, table, counts, size, bins, **blank.options)
    n_tap, n_row = neighbors.stride()
    invert((cdiv(m, 64), cdiv(volume, 32)), (neighbors, table), (m, n_row, n_tap))
    inverse = table.as_strided((volume, num_inputs), (1, width))
    # Inputs of a strided map have taps by their place in a cell: there are few different keys.
    bits = key_bits(geometry, neighbors.device)
    return inverse, row_sort_keys(inverse, bits, counts, few=True)


@cache
def _inversion(volume: int) -> tuple[Step, Step, int, int]:
    """Two launches for a table of so many taps, the width of its rows, and its sort keys."""
    width = row_width(volume)
    return (
        Step(blank_kernel, BLOCK=BLANKED),
        Step(invert_kernel, K=volume, WIDTH=width, BR=64),
        width,
        sort_bins(volume),
    )
