"""Levels on the device: search structures and neighbour tables."""

from __future__ import annotations

from functools import lru_cache
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
    sort_bins,
)
from torchsparse._triton.coords.layout import bounds_kernel, check_kernel, fit_kernel, numbers
from torchsparse._triton.coords.neighbors import blank_kernel, find_kernel, invert_kernel
from torchsparse._triton.coords.sites import assign_kernel, begin_kernel, insert_kernel
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.zeros import Zeros

__all__ = [
    "USUAL_MARGIN",
    "CoordIndex",
    "build_index",
    "check_sites",
    "find_taps",
    "invert_taps",
    "new_table",
    "relation_of",
]

# Cells around the bounding box: kernels up to 9 taps wide then share one index per level.
USUAL_MARGIN = 8
# Half as many slots double the longest probe sequence among the lanes of a warp.
SLOTS_PER_KEY = 3
INT32 = torch.iinfo(torch.int32)


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
def relation_of(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """dilation * tap [K, D], and stride, offset, reach [3, D], int64 on the device."""
    taps = [[d * t for d, t in zip(geometry.dilation, tap)] for tap in
            tap_list(geometry.kernel_size)]  # fmt: skip
    rows = [geometry.stride, geometry.offset, geometry.reach]
    with torch.inference_mode(False):
        return (
            torch.tensor(taps, dtype=torch.int64, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
        )


def new_table(room: int, ndim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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
    table, values, zeros = new_table(SLOTS_PER_KEY * n, ndim, device)
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
    taps, relation = relation_of(geometry, device)
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
