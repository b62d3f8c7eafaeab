"""Coordinates in plain PyTorch: indexing, neighbour search, output sites.

Everything works on sorted 64-bit keys. Neighbours along the last axis have consecutive keys, so
one binary search serves a whole line of taps ("z-delta search", Spira, arXiv 2511.20834).
"""

from __future__ import annotations

import itertools
import math
from operator import mul
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
TOGETHER = 1 << 17  # queries of a piece: few calls, and what they write stays in the cache
MOST_LINES = 16  # of a piece: those of a 3x3x3 kernel on a small level are one
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


class _Line(NamedTuple):
    """Taps that follow one another along the last axis."""

    delta: int  # from the key under tap 0 of the kernel to that under the first of the line
    taps: list[int]  # their weight indices


def _lines(geometry: Geometry, layout: KeyLayout) -> list[_Line]:
    """All taps in lines."""
    *front, last = geometry.kernel_size
    strides = _tap_strides(geometry.kernel_size)
    steps = [s * d for s, d in zip(layout.stride.tolist()[1:], geometry.dilation)]
    lines = []
    for start in itertools.product(*map(range, front)):
        first = sum(t * s for t, s in zip(start, strides))
        delta = sum(t * s for t, s in zip(start, steps))
        lines.append(_Line(delta, [first + j * strides[-1] for j in range(last)]))
    return lines


class _Piece(NamedTuple):
    """Some lines of some coarse sites, which are searched together."""

    lines: list[_Line]
    begin: int  # first site
    end: int


def _pieces(lines: list[_Line], sites: int) -> list[_Piece]:
    """Pieces of about `TOGETHER` queries."""
    pieces = []
    for first in range(0, len(lines), MOST_LINES):
        some = lines[first : first + MOST_LINES]
        count = max(round(len(some) * sites / TOGETHER), 1)
        edges = [sites * i // count for i in range(count + 1)]
        pieces += [_Piece(some, *edge) for edge in itertools.pairwise(edges)]
    return pieces


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
        self.starts = counts.new_zeros(counts.shape[0] + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, dtype=torch.int32, out=self.starts[1:])
        # Sentinels behind the end keep every position readable. (`pad` would round them.)
        behind = self.keys.new_full((self.most + 1,), index.layout.above)
        self.padded = torch.cat([self.keys, behind])

    def run(self, base: Tensor, lines: list[_Line], step: int) -> tuple[Tensor, Tensor]:
        """Search some lines.

        Args:
            base: [R], the keys under tap 0 of R sites.
            lines: G lines of J taps. (If one has fewer, those behind are searched, too.)
            step: From one tap to the next.

        Returns:
            (positions [J, G, R] int32, hits [J, G, R] bool).
        """
        count, rows = len(lines[0].taps), base.shape[0]
        deltas = torch.tensor([line.delta for line in lines], dtype=base.dtype).to(base.device)
        queries = (base + deltas[:, None]).view(-1)
        positions = queries.new_empty((count, queries.shape[0]), dtype=torch.int32)
        hits = torch.empty_like(positions, dtype=torch.bool)
        found = torch.empty_like(queries)
        for j in range(count):
            if j:
                queries += step
            if j and step == 1:  # the next key is the next entry or absent
                torch.add(positions[j - 1], hits[j - 1], out=positions[j])
            else:
                self._position(queries, found, hits[j], positions[j])
            torch.index_select(self.padded, 0, positions[j], out=found)
            _compare("eq", found, queries, hits[j])
        shape = (count, len(lines), rows)
        return positions.view(shape), hits.view(shape)

    def _position(self, queries: Tensor, found: Tensor, less: Tensor, out: Tensor) -> None:
        """How many keys are smaller.

        Args:
            queries: [P].
            found, less: [P] in the dtype of the keys and boolean, overwritten.
            out: [P] int32.
        """
        if self.most > CROWDED:
            torch.searchsorted(self.keys, queries, out_int32=True, out=out)
            return
        buckets = torch.bitwise_right_shift(queries, self.shift, out=found)
        buckets.clamp_(0, self.starts.shape[0] - 2)
        torch.index_select(self.starts, 0, buckets, out=out)
        for bit in reversed(range(self.most.bit_length())):
            torch.index_select(self.padded[(1 << bit) - 1 :], 0, out, out=found)
            _compare("lt", found, queries, less)
            out.add_(less, alpha=1 << bit)


def _compare(how: str, a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a == b`` if ``how`` is "eq", ``out = a < b`` if it is "lt"."""
    if out.device.type == "cpu":  # NumPy compares with vector instructions
        compare = {"eq": np.equal, "lt": np.less}[how]
        compare(a.numpy(), b.numpy(), out=out.numpy())
    else:
        getattr(torch, how)(a, b, out=out)


def _find_symmetric(index: CoordIndex, geometry: Geometry) -> Tensor:
    """Half of the taps by search; the other half follows, for k sees i from j as K-1-k sees j
    from i."""
    n, volume = index.keys.shape[0], geometry.volume
    table = torch.full((volume, n), -1, dtype=torch.int32, device=index.keys.device)
    table[volume // 2] = torch.arange(n, dtype=torch.int32, device=table.device)
    search = _LineSearch(index)
    lines = _lines(geometry, index.layout)
    lines = lines[: len(lines) // 2 + 1]
    lines[-1] = lines[-1]._replace(taps=lines[-1].taps[: geometry.kernel_size[-1] // 2])

    for piece in _pieces([line for line in lines if line.taps], n):
        base = _base_keys(index, None, geometry, piece)
        found = search.run(base, piece.lines, geometry.dilation[-1])
        _enter_both(table, index.rows, *found, piece)
    return table


def _enter_both(
    table: Tensor, rows: Tensor | None, positions: Tensor, hits: Tensor, piece: _Piece
) -> None:
    """Write what a piece of a symmetric search found: each pair, seen from both ends.

    Args:
        table: [K, N] int32.
        rows: [N] int32, row of each key; None: in order.
        positions, hits: [J, G, R], as `_LineSearch.run` returns them; changed.
        piece: Of which sites and lines.
    """
    volume, n = table.shape
    count, _, width = hits.shape
    for g, line in enumerate(piece.lines):
        hits[len(line.taps) :, g] = False  # the centre of the kernel, and behind it
    taps = [(*line.taps, *[0] * count)[j] for j in range(count) for line in piece.lines]
    pairs = flat_nonzero(hits)
    edges = torch.arange(len(taps) + 1, device=pairs.device) * width
    counts = torch.searchsorted(pairs, edges).diff()
    there = positions.view(-1).index_select(0, pairs)
    here = pairs + _repeated([piece.begin - i * width for i in range(len(taps))], counts)
    if rows is not None:
        here, there = (rows.index_select(0, keys) for keys in (here, there))
    forth = _repeated([tap * n for tap in taps], counts)
    back = _repeated([(volume - 1 - tap) * n for tap in taps], counts)
    flat = table.view(-1)
    flat.scatter_(0, forth.add_(here), there)
    flat.scatter_(0, back.add_(there), here.to(torch.int32))


def _repeated(values: list[int], counts: Tensor) -> Tensor:
    """Each value as often as its count says.  L values, [L] int64 -> [sum of counts] int64"""
    if counts.device.type == "cpu":  # NumPy's is five times as fast
        return torch.from_numpy(np.repeat(np.array(values, np.int64), counts.numpy()))
    return torch.tensor(values, device=counts.device).repeat_interleave(counts)


def _find_all(index: CoordIndex, coarse: Tensor | None, geometry: Geometry) -> Tensor:
    """Every tap by search, for any relation and any order of the coarse sites."""
    m = (index.keys if coarse is None else coarse).shape[0]
    table = torch.empty((geometry.volume, m), dtype=torch.int32, device=index.keys.device)
    search = _LineSearch(index)
    # One more, for positions behind the last key.
    rows = None if index.rows is None else torch.cat([index.rows, index.rows.new_zeros(1)])

    for piece in _pieces(_lines(geometry, index.layout), m):
        base = _base_keys(index, coarse, geometry, piece)
        positions, hits = search.run(base, piece.lines, geometry.dilation[-1])
        found = positions if rows is None else rows.index_select(0, positions.view(-1))
        found = found.view(hits.shape)
        absent = hits.view(torch.int8).sub_(1)  # 0 or -1; a "where" takes five times as long
        for g, line in enumerate(piece.lines):
            for j, tap in enumerate(line.taps):
                out = table[tap, piece.begin : piece.end]
                torch.bitwise_or(found[j, g], absent[j, g], out=out)
    if coarse is None and index.rows is not None:  # found in the order of the keys
        return torch.empty_like(table).index_copy_(1, index.rows.long(), table)
    return table


def _base_keys(
    index: CoordIndex, coarse: Tensor | None, geometry: Geometry, piece: _Piece
) -> Tensor:
    """Key of the fine site under tap 0 of some coarse sites; `below` if no tap can meet one.

    Args:
        index, coarse, geometry: As in `find_taps`.
        piece: Which sites: R of them, from ``begin`` to ``end``.

    Returns:
        [R] in the dtype of the keys.
    """
    layout = index.layout
    strides, origin = layout.stride.tolist(), layout.origin.tolist()
    offset = (0, *geometry.offset)
    if coarse is None:
        return index.keys[piece.begin : piece.end] - sum(map(mul, offset, strides))
    coarse = coarse[piece.begin : piece.end]
    reach = (0, *geometry.reach)
    stride = (1, *geometry.stride)
    lower, upper = index.lower.tolist(), index.upper.tolist()
    keys = torch.zeros(coarse.shape[0], dtype=torch.int64, device=coarse.device)
    outside = torch.zeros(coarse.shape[0], dtype=torch.bool, device=coarse.device)
    for column in range(coarse.shape[1]):
        base = coarse[:, column].to(torch.int64) * stride[column] - offset[column]
        outside |= (base < lower[column] - reach[column]) | (base > upper[column])
        keys += (base - origin[column]) * strides[column]
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
