"""The sites that strided and generative layers create, in order, with a table to find them."""

from __future__ import annotations

import itertools
import math
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import Growth, Planned, growth, mark_rows, row_count
from torchsparse._flags import Complaint, pending_word, raise_found
from torchsparse._geometry import Geometry
from torchsparse._triton.coords.bins import (
    BIN_BLOCK,
    bin_start_kernel,
    bin_sum_kernel,
    bucket_kernel,
    rank_kernel,
)
from torchsparse._triton.coords.index import (
    SLOTS_PER_KEY,
    USUAL_MARGIN,
    CoordIndex,
    new_table,
    relation_of,
)
from torchsparse._triton.coords.sites import (
    collect_kernel,
    create_kernel,
    level_kernel,
    unpack_kernel,
)
from torchsparse._triton.launch import Step, cdiv, next_power
from torchsparse._triton.zeros import Zeros

__all__ = ["generative_sites", "strided_sites"]

MOST_STEPS = 512  # of an insertion, before the table counts as too small
MOST_BINS = 1 << 20  # 4 MB of counts
# Sites that a program, which is one warp, tries to create: of rows with one candidate each, and of
# others; and those that it orders.
CREATED, CREATED_FROM_FEW, RANKED = 32, 64, 32
SUMMED_BINS = 1 << 14  # more are added up in two steps
INT32 = torch.iinfo(torch.int32)
Bounds = tuple[int | None, ...]


@cache
def _backwards(geometry: Geometry, device: torch.device) -> Tensor:
    """How far the sites of an input may lie below the last of them, per axis: [sites, D] int64.

    Kept for good, as `relation_of`.
    """
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
    n, each = coords.shape[0], _most_each(geometry, generative)
    growing = growth()
    fill = partial(_fill, source, coords, geometry, lower, upper, generative)
    if growing is not None and growing.padded:
        room = growing.plan(each * n)
        return _unpack_padded(fill(SLOTS_PER_KEY * room.rows, MOST_STEPS, False), growing, room)
    room = min(each, 8 if generative else 2) * n
    filled = fill(2 * room, MOST_STEPS, True)
    count, lost, flags, cells = filled.info.tolist()  # the one synchronisation
    raise_found(flags, coords.device)
    if lost:  # more sites than expected, rare: a table that holds whatever may come
        filled = fill(2 * each * n, INT32.max, True)
        count, lost, flags, cells = filled.info.tolist()
        raise_found(flags, coords.device)
    if growing is not None:
        growing.note(count, cells, each)
    return _unpack(filled, count, cells <= INT32.max, None)


@lru_cache(maxsize=256)
def _most_each(geometry: Geometry, generative: bool) -> int:
    """Sites that one site can create: a fine one about k / s on an axis, a coarse one k."""
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation)
    return math.prod(k if generative else -(-k // (s // math.gcd(s, d))) for k, s, d in axes)


def _unpack_padded(filled: _Filled, growing: Growth, room: Planned) -> tuple[Tensor, CoordIndex]:
    """The sites of a table in as many rows as `Growth` plans; nothing waits."""
    rows, narrow = room
    if growing.guess:
        return _unpack(filled, rows, narrow, None)
    growing.created(filled.info)
    count = filled.info[:1]
    sites, index = _unpack(filled, rows, narrow, count)
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
    starts = counts.new_empty(bins)
    add, start, bucket, rank = _ordering(ndim, limit is None)
    before, grain = counts, 1
    if bins > SUMMED_BINS:
        before, grain = counts.new_empty(blocks), BIN_BLOCK
        add((blocks, 1), (counts, before), ())
    start((blocks, 1), (counts, before, starts), (grain,))
    bucketed = index.keys.new_empty(rows)
    bucket(
        (cdiv(slots, 512), 1), (index.keys, starts, index.layout, bucketed), (slots, bins, rows)
    )
    rank(
        (cdiv(rows, RANKED), 1), (bucketed, starts, sites, index.layout, index.values, limit),
        (rows, bins, slots - 1),
    )  # fmt: skip


@cache
def _ordering(ndim: int, whole: bool) -> tuple[Step, Step, Step, Step]:
    """The launches of `_by_bins`; ``whole``: sites fill their room."""
    return (
        Step(bin_sum_kernel, BLOCK=BIN_BLOCK),
        Step(bin_start_kernel, BLOCK=BIN_BLOCK, STEP=4096),
        Step(bucket_kernel, D=ndim, BLOCK=512),
        Step(rank_kernel, D=ndim, BR=RANKED, num_warps=1),
    )


def _by_sorting(filled: _Filled, sites: Tensor, limit: Tensor | None) -> None:
    """Write ``sites`` and values of any keys."""
    index, info, _ = filled
    rows, ndim, slots = sites.shape[0], len(index.margin), index.keys.shape[0]
    keys = index.keys.new_empty(rows)
    if limit is not None:
        keys.fill_(torch.iinfo(torch.int64).max)  # stands behind all keys
    collect, unpack = _sorting(ndim, limit is None)
    collect((cdiv(slots, 1024), 1), (index.keys, keys, info[2:], index.layout), (slots, rows))
    keys = torch.sort(keys).values
    unpack(
        (cdiv(rows, 128), 1), (keys, sites, index.layout, index.keys, index.values, limit),
        (rows, *index.probe),
    )  # fmt: skip


@cache
def _sorting(ndim: int, whole: bool) -> tuple[Step, Step]:
    """The launches of `_by_sorting`; ``whole``: sites fill their room."""
    return (
        Step(collect_kernel, D=ndim, BLOCK=1024),
        Step(unpack_kernel, D=ndim, BR=128),
    )


def _fill(
    source: CoordIndex,
    coords: Tensor,
    geometry: Geometry,
    lower: Bounds,
    upper: Bounds | None,
    generative: bool,
    slots: int,
    most: int,
    report: bool,
) -> _Filled:
    """A table, of at least so many slots, of the sites that a layer creates."""
    n, ndim = coords.shape[0], geometry.ndim
    limit, coords = row_count(coords), coords.contiguous()
    device = coords.device
    table, values, zeros = new_table(slots, ndim, coords)
    slots, n_zeros = table.shape[0], zeros.shape[0]
    bins = min(max(slots // 2, BIN_BLOCK), MOST_BINS)  # one or more for each key
    counts, info, layout = (
        coords.new_empty(bins),
        table.new_empty(4),
        torch.empty_like(source.layout),
    )
    making = _making(geometry, generative, upper is None, report, limit is None, device)
    made = CoordIndex(coords, table, values, layout, (making.usual,) * ndim, Zeros(zeros))
    flags = pending_word(device)
    making.level(
        (cdiv(max(slots, n_zeros, bins), 2048), 1),
        (table, values, zeros, counts, info, source.layout, layout, making.relation, flags),
        (
            slots, n_zeros, bins, *_limits(lower, upper, ndim), making.usual, making.need,
            Complaint.BOX.bit, Complaint.OVERFLOW.bit,
        ),
    )  # fmt: skip
    making.create(
        (max(cdiv(n, making.rows), 1), making.parts),
        (coords, layout, making.taps, making.relation, table, counts, flags, info, limit),
        (n, *made.probe, most, bins),
    )
    return _Filled(made, info, counts)


class _Making(NamedTuple):
    """What all levels that layers of one geometry create on one device share."""

    taps: Tensor  # [tries, D] int64: see `create_kernel`
    relation: Tensor  # of `relation_of`
    rows: int  # of a program
    parts: int  # of the tries
    need: int  # the margin for what will be looked for from there
    usual: int  # and the usual one
    level: Step
    create: Step


@lru_cache(maxsize=256)
def _making(
    geometry: Geometry, generative: bool, infer: bool, report: bool, whole: bool,
    device: torch.device,
) -> _Making:  # fmt: skip
    ndim = geometry.ndim
    # Without dilation the sites that an input has on an axis are neighbours, k / s of them.
    near = not generative and all(d == 1 for d in geometry.dilation)
    taps, relation = relation_of(geometry, device)
    if near:
        taps = _backwards(geometry, device)
    tried = taps.shape[0]
    taps_each = min(next_power(tried), 32)
    rows_each = CREATED if tried == 1 else CREATED_FROM_FEW // taps_each
    # A generative layer looks for what it created; others look on their input's side.
    need = max(geometry.reach, default=0) if generative else 0
    level = Step(level_kernel, D=ndim, GENERATIVE=generative, INFER=infer, BLOCK=2048)
    create = Step(
        create_kernel, D=ndim, K=tried, TAPS=taps_each, BR=rows_each,
        GENERATIVE=generative, NEAR=near, REPORT=report, num_warps=1,
    )  # fmt: skip
    usual = max(need, USUAL_MARGIN)
    return _Making(taps, relation, rows_each, cdiv(tried, taps_each), need, usual, level, create)


@lru_cache(maxsize=256)
def _limits(lower: Bounds, upper: Bounds | None, ndim: int) -> tuple[int, ...]:
    """Four lower and four upper bounds in int32, whatever the number of axes."""
    low = [INT32.min if v is None else v for v in lower]
    high = [INT32.max if v is None else min(v, INT32.max) for v in upper or (None,) * ndim]
    none = [0] * (4 - ndim)
    return (*low, *none, *high, *none)
