"""The sites that strided and generative layers create, in order, with a table to find them."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import Growth, growth, mark_rows, row_count
from torchsparse._flags import Complaint, pending_word, raise_found
from torchsparse._geometry import Geometry
from torchsparse._triton.coords.bins import (
    BIN_BLOCK,
    bin_start_kernel,
    bin_sum_kernel,
    bucket_kernel,
    rank_kernel,
)
from torchsparse._triton.coords.index import USUAL_MARGIN, CoordIndex, new_table, relation_of
from torchsparse._triton.coords.sites import (
    collect_kernel,
    create_kernel,
    level_kernel,
    unpack_kernel,
)
from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.zeros import Zeros

__all__ = ["generative_sites", "strided_sites"]

MOST_STEPS = 512  # of an insertion, before the table counts as too small
MOST_BINS = 1 << 20  # 4 MB of counts
SUMMED_BINS = 1 << 14  # more are added up in two steps
INT32 = torch.iinfo(torch.int32)
Bounds = tuple[int | None, ...]


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
    table, values, zeros = new_table(2 * room, ndim, device)
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
    taps, relation = relation_of(geometry, device)
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
