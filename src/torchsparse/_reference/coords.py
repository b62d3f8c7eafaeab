"""Coordinates in plain PyTorch: indexing, neighbour search, output sites.

Everything works on sorted 64-bit keys. Neighbours along the last axis have consecutive keys, so
one binary search serves a whole line of taps ("z-delta search", Spira, arXiv 2511.20834).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchsparse._flags import Complaint, complain_if
from torchsparse._geometry import Geometry, conv_range
from torchsparse._keys import KeyLayout, fit_layout, pack, unpack

__all__ = [
    "CoordIndex",
    "bounds",
    "build_index",
    "check_sites",
    "find_taps",
    "flat_nonzero",
    "generative_sites",
    "invert_taps",
    "sorted_values",
    "strided_sites",
]

INT32 = torch.iinfo(torch.int32)
# Cells around the bounding box: kernels up to 9 taps wide then share one index per level.
USUAL_MARGIN = 8
CELLS_PER_KEY = 4  # buckets of a search, for each key
CROWDED = 63  # with more keys in a bucket, a search among all of them is as fast


class CoordIndex(NamedTuple):
    """Rows of one coordinate tensor in key order."""

    keys: Tensor  # [N] int32 or int64 (the layout says), ascending
    rows: Tensor | None  # [N] int32, keys[i] is the key of row rows[i]; None: rows[i] = i
    layout: KeyLayout
    margin: tuple[int, ...]  # D ints: how far searches may leave the bounding box
    lower: Tensor  # [1 + D] int64, smallest coordinate
    upper: Tensor  # [1 + D] int64, largest coordinate


def bounds(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest coordinate per column.  [N, 1 + D] -> 2 x [1 + D] int64; 0 if empty."""
    if coords.shape[0] == 0:
        zero = torch.zeros(coords.shape[1], dtype=torch.int64, device=coords.device)
        return zero, zero
    lower, upper = torch.aminmax(coords, dim=0)
    return lower.to(torch.int64), upper.to(torch.int64)


def _layout(
    lower: Tensor, upper: Tensor, reach: tuple[int, ...]
) -> tuple[KeyLayout, tuple[int, ...]]:
    """A layout with a margin of at least ``reach`` around the box, and that margin."""
    usual = tuple(max(r, USUAL_MARGIN) for r in reach)
    try:
        return _fit(lower, upper, usual), usual
    except ValueError:  # a huge box may fit with no more than it needs
        return _fit(lower, upper, reach), reach


def _fit(lower: Tensor, upper: Tensor, margin: tuple[int, ...]) -> KeyLayout:
    around = torch.tensor((0, *margin), dtype=torch.int64, device=lower.device)
    return fit_layout(lower - around, upper + around)


def build_index(coords: Tensor, reach: tuple[int, ...]) -> CoordIndex:
    """Sort coordinate rows by key; equal rows are complained about.

    Args:
        coords: [N, 1 + D] int32.
        reach: D ints, how far searches will leave the bounding box.

    Raises:
        ValueError: The widened box has 2^62 cells or more.
    """
    lower, upper = bounds(coords)
    layout, margin = _layout(lower, upper, reach)
    keys = pack(coords, layout)
    if bool((keys[1:] >= keys[:-1]).all()):
        order = None
    else:
        keys, order = torch.sort(keys, stable=True)
        order = order.to(torch.int32)
    complain_if((keys[1:] == keys[:-1]).any(), Complaint.DUPLICATE)
    return CoordIndex(keys, order, layout, margin, lower, upper)


def check_sites(
    index: CoordIndex, spatial_range: tuple[int, ...] | None, allow_negative: bool
) -> None:
    """Complain about coordinates outside the range that holds for them."""
    lower, upper = index.lower, index.upper
    complain_if(lower[0] < 0, Complaint.BATCH, lambda: f"smallest: {int(lower[0])}")
    if not allow_negative:
        complain_if(
            (lower[1:] < 0).any(),
            Complaint.NEGATIVE,
            lambda: f"smallest (x, y, z): {lower[1:].tolist()}",
        )
    if spatial_range is not None and index.keys.shape[0]:
        extents = spatial_range[: upper.shape[0]]
        limit = torch.tensor(extents, device=upper.device)
        complain_if(
            (upper >= limit).any(),
            Complaint.RANGE,
            lambda: f"range {extents}, coordinates from {lower.tolist()} to {upper.tolist()}",
        )


def find_taps(
    index: CoordIndex, coarse: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """Rows of the fine sites under every tap of every coarse site.

    Args:
        index: The fine sites, with a margin of at least ``geometry.reach``.
        coarse: [M, 1 + D] int32; None for the submanifold relation, where they are the fine ones.
        geometry: Its taps; K is their number.

    Returns:
        [K, M] int32, -1 where no fine site is; no sort keys.
    """
    if coarse is None and geometry.is_symmetric:
        return _find_symmetric(index, geometry), None
    return _find_all(index, coarse, geometry), None


def _lines(geometry: Geometry) -> list[tuple[tuple[int, ...], list[int]]]:
    """Taps in lines along the last axis: (first tap of the line, weight indices along it)."""
    *front, last = geometry.kernel_size
    strides = _tap_strides(geometry.kernel_size)
    lines = []
    for start in itertools.product(*map(range, front)):
        first = sum(t * s for t, s in zip(start, strides))
        lines.append(((*start, 0), [first + j * strides[-1] for j in range(last)]))
    return lines


def flat_nonzero(mask: Tensor) -> Tensor:
    """[P] int64, places of the True elements of a boolean tensor, in memory order."""
    if mask.device.type == "cpu":  # NumPy's search is three times as fast
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def sorted_values(values: Tensor) -> Tensor:
    """Ascending.  [N] -> [N]"""
    if values.device.type == "cpu":  # without indices, NumPy's vector instructions win
        return torch.from_numpy(np.sort(values.numpy()))
    return torch.sort(values).values


def _tap_strides(kernel_size: tuple[int, ...]) -> list[int]:
    """Weight index of a tap = sum of tap_i * stride_i (the order of `_geometry.tap_list`)."""
    if math.prod(kernel_size) % 2:
        return [math.prod(kernel_size[:axis]) for axis in range(len(kernel_size))]
    return [math.prod(kernel_size[axis + 1 :]) for axis in range(len(kernel_size))]


class _LineSearch:
    """Positions of ``queries + j * step`` among ascending keys, for j = 0, 1, ...

    Keys are counted in buckets of 2^shift cells, so that a search begins where the bucket of its
    query does: with keys [1, 2, 9, 11] in buckets of 4 cells, starts = [0, 2, 2, 4, ...].
    """

    def __init__(self, index: CoordIndex) -> None:
        self.keys = index.keys
        n = self.keys.shape[0]
        cells = int(index.layout.extent.prod())
        self.shift = max((cells - 1).bit_length() - (CELLS_PER_KEY * n).bit_length(), 0)
        counts = torch.bincount(self.keys >> self.shift, minlength=(cells >> self.shift) + 1)
        self.most = int(counts.max())
        self.starts = counts.cumsum(0, dtype=torch.int32).sub_(counts)
        # Sentinels behind the end keep every position readable. (`pad` would round them.)
        behind = self.keys.new_full((self.most + 1,), index.layout.above)
        self.padded = torch.cat([self.keys, behind])

    def run(self, queries: Tensor, count: int, step: int) -> list[tuple[Tensor, Tensor]]:
        """(positions [M] int32, hit [M] bool) for each of ``count`` taps along the line."""
        found = []
        position = self._position(queries)
        for j in range(count):
            if j:
                queries = queries + step
                if step == 1:  # the next key is the next entry or absent
                    position = position + found[-1][1]
                else:
                    position = self._position(queries)
            hit = self.padded.index_select(0, position) == queries
            found.append((position, hit))
        return found

    def _position(self, queries: Tensor) -> Tensor:
        """How many keys are smaller.  [M] int32"""
        if self.most > CROWDED:
            return torch.searchsorted(self.keys, queries, out_int32=True)
        buckets = (queries >> self.shift).clamp_(0, self.starts.shape[0] - 1)
        position = self.starts.index_select(0, buckets)
        for bit in reversed(range(self.most.bit_length())):
            last = self.padded.index_select(0, position + ((1 << bit) - 1))
            position.add_(last < queries, alpha=1 << bit)
        return position


def _find_symmetric(index: CoordIndex, geometry: Geometry) -> Tensor:
    """Half of the taps by search; the other half follows, for k sees i from j as K-1-k sees j
    from i."""
    n, volume = index.keys.shape[0], geometry.volume
    centre = volume // 2
    table = torch.full((volume, n), -1, dtype=torch.int32, device=index.keys.device)
    table[centre] = torch.arange(n, dtype=torch.int32, device=table.device)
    search = _LineSearch(index)
    offset = torch.tensor(geometry.offset, device=table.device)
    dilation = torch.tensor(geometry.dilation, device=table.device)
    half = math.prod(geometry.kernel_size[:-1]) // 2
    for start, taps in _lines(geometry)[: half + 1]:
        first = torch.tensor(start, device=table.device) * dilation - offset
        delta = int(index.layout.delta(first[None])[0])
        if centre in taps:
            taps = taps[: taps.index(centre)]
        found = search.run(index.keys + delta, len(taps), geometry.dilation[-1])
        for tap, (position, hit) in zip(taps, found):
            here = flat_nonzero(hit)
            there = position.index_select(0, here)
            if index.rows is not None:
                here, there = (index.rows.index_select(0, keys) for keys in (here, there))
            table[tap].index_copy_(0, here.long(), there)
            table[volume - 1 - tap].index_copy_(0, there.long(), here.to(torch.int32))
    return table


def _find_all(index: CoordIndex, coarse: Tensor | None, geometry: Geometry) -> Tensor:
    """Every tap by search, for any relation and any order of the coarse sites."""
    device = index.keys.device
    offset = torch.tensor((0, *geometry.offset), device=device)
    if coarse is None:
        base = index.keys - index.layout.delta(offset[None, 1:])[0]
    else:
        base = _base_keys(index, coarse, geometry, offset)
    table = torch.empty((geometry.volume, base.shape[0]), dtype=torch.int32, device=device)
    search = _LineSearch(index)
    dilation = torch.tensor(geometry.dilation, device=device)
    for start, taps in _lines(geometry):
        delta = index.layout.delta((torch.tensor(start, device=device) * dilation)[None])[0]
        found = search.run(base + delta, len(taps), geometry.dilation[-1])
        for tap, (position, hit) in zip(taps, found):
            if index.rows is None:
                table[tap] = torch.where(hit, position, -1)
            else:
                here = flat_nonzero(hit)
                there = index.rows.index_select(0, position.index_select(0, here))
                table[tap].fill_(-1).index_copy_(0, here, there)
    if coarse is None and index.rows is not None:  # found in the order of the keys
        return torch.empty_like(table).index_copy_(1, index.rows.long(), table)
    return table


def _base_keys(index: CoordIndex, coarse: Tensor, geometry: Geometry, offset: Tensor) -> Tensor:
    """Key of the fine site under tap 0 of each coarse site; `below` if no tap can meet one."""
    layout = index.layout
    reach = (0, *geometry.reach)
    stride = (1, *geometry.stride)
    keys = torch.zeros(coarse.shape[0], dtype=torch.int64, device=coarse.device)
    outside = torch.zeros(coarse.shape[0], dtype=torch.bool, device=coarse.device)
    for column in range(coarse.shape[1]):
        base = coarse[:, column].to(torch.int64) * stride[column] - offset[column]
        outside |= (base < index.lower[column] - reach[column]) | (base > index.upper[column])
        keys += (base - layout.origin[column]) * layout.stride[column]
    return keys.masked_fill_(outside, layout.below).to(layout.dtype)


def invert_taps(
    neighbors: Tensor, num_inputs: int, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """The same pairs seen from the inputs: result[k, neighbors[k, m]] = m.

    Args:
        neighbors: [K, M] int32; each input meets a tap at most once.
        num_inputs: N.
        geometry: Not needed here.

    Returns:
        [K, N] int32, -1 = none; no sort keys.
    """
    volume, m = neighbors.shape
    # One column more takes the absent ones, which index -1 addresses after the shift.
    inverse = torch.full((volume, num_inputs + 1), -1, dtype=torch.int32, device=neighbors.device)
    outputs = torch.arange(m, dtype=torch.int32, device=neighbors.device).expand(volume, m)
    inverse.scatter_(1, (neighbors + 1).to(torch.int64), outputs)
    return inverse[:, 1:].contiguous(), None


Candidates = list[tuple[Tensor, Tensor | None]]  # sites on one axis [N], which of them are valid
Bounds = tuple[int | None, ...]


def strided_sites(
    index: CoordIndex,
    coords: Tensor,
    geometry: Geometry,
    lower: Bounds,
    upper: Bounds | None,
) -> tuple[Tensor, CoordIndex]:
    """All coarse sites that some tap ties to a fine site.

    Args:
        index: Of the fine sites.
        coords: Fine sites, [N, 1 + D] int32.
        geometry: The relation.
        lower, upper: Inclusive bounds of the coarse coordinates per axis; None for an axis =
            unbounded, None for ``upper`` = from the largest coordinates of the batch.

    Returns:
        [M, 1 + D] int32 in lexicographic order, and their index.
    """
    if upper is None:
        upper = _inferred_upper(index, geometry)
    axes, low, high = [], index.lower.clone(), index.upper.clone()
    for i in range(geometry.ndim):
        o, s, r = geometry.offset[i], geometry.stride[i], geometry.reach[i]
        low[1 + i] = torch.div(low[1 + i] + o - r, s, rounding_mode="floor")
        high[1 + i] = torch.div(high[1 + i] + o, s, rounding_mode="floor")
        axes.append(_coarse_candidates(coords[:, 1 + i], geometry, i))
    return _sites(coords[:, 0], axes, low, high, lower, upper)


def _inferred_upper(index: CoordIndex, geometry: Geometry) -> Bounds:
    """TorchSparse 2.1's bound where no range is given."""
    extents = tuple(int(v) + 1 for v in index.upper.tolist()[1:])
    limits = conv_range(
        extents, geometry.kernel_size, geometry.stride, geometry.offset, geometry.dilation
    )
    return tuple(n - 1 for n in limits)


def generative_sites(
    index: CoordIndex, coords: Tensor, geometry: Geometry, lower: Bounds, upper: Bounds
) -> tuple[Tensor, CoordIndex]:
    """All fine sites that some tap ties to a coarse site; else as `strided_sites`."""
    axes, low, high = [], index.lower.clone(), index.upper.clone()
    for i in range(geometry.ndim):
        o, s, r = geometry.offset[i], geometry.stride[i], geometry.reach[i]
        low[1 + i] = low[1 + i] * s - o
        high[1 + i] = high[1 + i] * s - o + r
        first = coords[:, 1 + i].to(torch.int64) * s - o
        taps = range(geometry.kernel_size[i])
        axes.append([(first + tap * geometry.dilation[i], None) for tap in taps])
    return _sites(coords[:, 0], axes, low, high, lower, upper)


def _sites(
    batch: Tensor,
    axes: list[Candidates],
    low: Tensor,
    high: Tensor,
    lower: Bounds,
    upper: Bounds,
) -> tuple[Tensor, CoordIndex]:
    """The distinct combinations of per-axis candidates that are valid and within bounds.

    Args:
        batch: [N] batch index of each row of candidates.
        axes: Candidates per axis.
        low, high: [1 + D] int64, a box that holds all candidates; changed in place.
        lower, upper: Inclusive bounds per axis; None = unbounded.
    """
    for i, (bottom, top) in enumerate(zip(lower, upper)):
        axes[i] = [(site, _within(site, valid, bottom, top)) for site, valid in axes[i]]
        low[1 + i] = low[1 + i].clamp(min=bottom) if bottom is not None else low[1 + i]
        high[1 + i] = high[1 + i].clamp(max=top) if top is not None else high[1 + i]
    layout, margin = _layout(low, torch.maximum(low, high), (0,) * len(axes))
    keys = _unique(_combine(batch, axes, layout))
    if keys.shape[0]:
        wide = (low < INT32.min) | (high > INT32.max)
        complain_if(
            wide.any(), Complaint.OVERFLOW, lambda: f"from {low.tolist()} to {high.tolist()}"
        )
    coords = unpack(keys, layout)
    return coords, CoordIndex(keys, None, layout, margin, *bounds(coords))


def _unique(keys: Tensor) -> Tensor:
    """Ascending distinct values; sorting beats torch.unique on the CPU."""
    if keys.shape[0] == 0:
        return keys
    keys = sorted_values(keys)
    first = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
    torch.ne(keys[1:], keys[:-1], out=first[1:])
    return keys.index_select(0, flat_nonzero(first))


def _coarse_candidates(fine: Tensor, geometry: Geometry, axis: int) -> Candidates:
    """Coarse coordinates on one axis from which some tap reaches the fine one.

    The taps that fit a residue of ``fine + offset`` modulo s are t0, t0 + s/g, ... with
    g = gcd(s, d); going one further along them moves the coarse site back by d/g.

    Returns:
        A list of (site [N] int64, valid [N] bool or None for all).
    """
    k, s = geometry.kernel_size[axis], geometry.stride[axis]
    d, o = geometry.dilation[axis], geometry.offset[axis]
    step = s // math.gcd(s, d)
    first_tap = [
        next((t for t in range(min(k, step)) if (r - d * t) % s == 0), k) for r in range(s)
    ]
    counts = [len(range(t, k, step)) for t in first_tap]
    shifted = fine.to(torch.int64) + o
    if s == 1:
        base, count = shifted, None
    else:
        residue = _divide(shifted, s)[1]
        base = shifted - torch.tensor(first_tap, device=fine.device).index_select(0, residue) * d
        base = _divide(base, s)[0]
        count = (
            None
            if min(counts) == max(counts)
            else torch.tensor(counts, device=fine.device).index_select(0, residue)
        )
    found = []
    for j in range(max(counts)):
        site = base - j * (d * step // s) if j else base
        found.append((site, None if count is None else count > j))
    return found


def _divide(values: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient, rounded down, and remainder of [N] int64."""
    shift = divisor.bit_length() - 1
    if divisor == 1 << shift:  # ten times as fast
        return values >> shift, values & (divisor - 1)
    return torch.div(values, divisor, rounding_mode="floor"), values.remainder(divisor)


def _within(
    site: Tensor, valid: Tensor | None, lower: int | None, upper: int | None
) -> Tensor | None:
    """``valid`` and ``lower <= site <= upper``; None stands for "all" and "unbounded"."""
    if lower is not None:
        valid = site >= lower if valid is None else valid & (site >= lower)
    if upper is not None:
        valid = site <= upper if valid is None else valid & (site <= upper)
    return valid


def _column_keys(values: Tensor, layout: KeyLayout, column: int) -> Tensor:
    """What one column's coordinates add to a key."""
    keys = (values.to(torch.int64) - layout.origin[column]) * layout.stride[column]
    return keys.to(layout.dtype)


def _combine(batch: Tensor, axes: list[Candidates], layout: KeyLayout) -> Tensor:
    """Keys of every combination of candidates that is valid on all axes."""
    # Invalid sites may have any key; they are dropped below.
    keyed = [
        [(_column_keys(site, layout, 1 + i), valid) for site, valid in candidates]
        for i, candidates in enumerate(axes)
    ]
    first = _column_keys(batch, layout, 0)
    parts = []
    for combination in itertools.product(*keyed):
        keys, valid = first, None
        for site, mask in combination:
            keys = keys + site
            if mask is not None:
                valid = mask if valid is None else valid & mask
        parts.append(keys if valid is None else keys.index_select(0, flat_nonzero(valid)))
    return torch.cat(parts) if parts else first[:0]
