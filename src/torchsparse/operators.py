"""Joining sparse tensors, over equal or different sites; keeping some rows; one vector per sample.

Tensors of different sites are first put on common ones (`align`); what they do there is a plain
operation on features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchsparse._autograd.reduce import segment_sum
from torchsparse._autograd.rows import move_rows, repeat_rows
from torchsparse._cache import TensorCache
from torchsparse._compiling import left_to_python
from torchsparse._flags import Complaint, complain_if, raise_pending
from torchsparse._ops.sets import unique_rows
from torchsparse._validate import (
    check_coords,
    check_feats,
    check_rows,
    check_same_device,
    one_of,
)
from torchsparse.nn.functional.conv.mapping import int32_coords
from torchsparse.nn.functional.pooling import samples
from torchsparse.tensor import (
    SparseTensor,
    check_same_sites,
    check_sparse,
    site_stride,
    wrap,
)

__all__ = [
    "add",
    "align",
    "broadcast",
    "broadcast_add",
    "broadcast_cat",
    "broadcast_mul",
    "cat",
    "generative_add",
    "intersection",
    "mul",
    "prune",
    "sub",
    "union",
]

SITES = ("union", "intersection", "first")


# ------------------------------------------------------------------ different sites
@left_to_python
def align(
    *inputs: SparseTensor, sites: str = "union", fill: float = 0.0
) -> tuple[SparseTensor, ...]:
    """Put tensors of one stride on common sites.

    Args:
        *inputs: At least one tensor, features [N_i, C_i], any numbers of channels.
        sites: "union": all sites of all tensors; "intersection": those that every tensor has;
            "first": those of the first tensor, in its row order.
        fill: The features of a tensor at sites that it lacks.

    Returns:
        One tensor per input, in the dtype of its features, all on the same coordinates. Sorted by
        (b, x, y, z), unless the inputs share their coordinates or ``sites`` is "first"; then
        order, range and cache are those of the first. Otherwise the range is the elementwise
        maximum for a union (None if one has none), the minimum of the known ones for an
        intersection, and a new cache knows the other levels of all inputs and no maps.
        Differentiable.

    Raises:
        ValueError: No tensors, different strides or devices; coordinates that do not fit into
            int32; duplicate coordinates (noticed later on a GPU).
    """
    one_of(sites, SITES, "sites")
    _check_levels(inputs)
    first = inputs[0]
    if all(x.coords is first.coords for x in inputs):
        return tuple(wrap(x.feats, first) for x in inputs)
    coords, sources, places = _meet([int32_coords(x._caches, x.coords) for x in inputs])
    if sites == "first":
        # Rows of the first tensor are the sites now.
        sources, places = (
            [source.index_select(0, places[0]) for source in sources],
            [_at(sources[0], place) for place in places],
        )
        like = first
    else:
        if sites == "intersection":
            coords, sources, places = _common(coords, sources, places)
        like = _joined(inputs, coords, sites)
    return tuple(
        wrap(move_rows(x.feats, source, place, fill), like)
        for x, source, place in zip(inputs, sources, places)
    )


@left_to_python
def union(*inputs: SparseTensor) -> SparseTensor:
    """Sum any number of tensors of one stride over the union of their sites.

    Args:
        *inputs: At least one tensor, features [N_i, C].

    Returns:
        Features [M, C], summed per site in float32 (float64 in float64), on [M, 4] sites sorted by
        (b, x, y, z); the stride of the first tensor; the elementwise maximum of the ranges, None
        if one has none. Its own cache knows the coordinates of the other strides (those of the
        first tensor that has them) and no maps. Differentiable.

    Raises:
        ValueError: No tensors, different strides, devices or numbers of channels; coordinates
            that do not fit into int32.
    """
    _check_levels(inputs)
    _check_channels(inputs)
    coords = torch.cat([int32_coords(x._caches, x.coords) for x in inputs])
    raise_pending(coords.device)  # the next line waits for the device anyway
    coords, place = unique_rows(coords)
    feats = segment_sum(torch.cat([x.feats for x in inputs]), place, coords.shape[0])
    return wrap(feats, _joined(inputs, coords, "union"))


def generative_add(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """Add two tensors of one stride over the union of their sites; see `union`.

    Args:
        a, b: Features [N_a, C] and [N_b, C].

    Returns:
        Features [M, C], summed per site, on [M, 4] sites sorted by (b, x, y, z); the stride of
        ``a``; the elementwise maximum of both ranges, None if one has none. Its own cache knows
        the coordinates of the other strides (those of ``a``, then of ``b``) and no maps.
        Differentiable.

    Raises:
        ValueError: Different strides or numbers of channels.
    """
    return union(a, b)


def intersection(*inputs: SparseTensor) -> tuple[SparseTensor, ...]:
    """The rows of each tensor, [N_i, C_i], at the M sites that all of them have: [M, C_i] each.

    The rest as in `align` with ``sites="intersection"``.
    """
    return align(*inputs, sites="intersection")


def add(a: SparseTensor, b: SparseTensor, sites: str = "union", fill: float = 0.0) -> SparseTensor:
    """``a + b`` for tensors of different sites.

    Args:
        a, b: Tensors of one stride, features [N_a, C] and [N_b, C].
        sites, fill: As in `align`: where the result lives, and what an absent row counts as.

    Returns:
        The elementwise result on the common sites, [M, C]; the rest as in `align`.

    Raises:
        ValueError: As `align`; also different numbers of channels.
    """
    a, b = _operands(a, b, sites, fill)
    return wrap(a.feats + b.feats, a)


def sub(a: SparseTensor, b: SparseTensor, sites: str = "union", fill: float = 0.0) -> SparseTensor:
    """``a - b`` for tensors of different sites, [N_a, C] and [N_b, C] -> [M, C]; the rest as in
    `add`."""
    a, b = _operands(a, b, sites, fill)
    return wrap(a.feats - b.feats, a)


def mul(a: SparseTensor, b: SparseTensor, sites: str = "union", fill: float = 0.0) -> SparseTensor:
    """``a * b`` for tensors of different sites, [N_a, C] and [N_b, C] -> [M, C]; the rest as in
    `add`.

    Where only one tensor has a row, the product is 0; with ``fill=1`` it is that row.
    """
    a, b = _operands(a, b, sites, fill)
    return wrap(a.feats * b.feats, a)


def cat(inputs: Sequence[SparseTensor], fill: float | None = None) -> SparseTensor:
    """Join features along the channels.

    Args:
        inputs: Tensors with the same coordinates in the same row order.
        fill: Allow different coordinates: the result lives on their union, and this number stands
            for features that a tensor lacks there (see `align`).

    Returns:
        Features [N, C_1 + C_2 + ...]; coordinates, stride, range and caches of ``inputs[0]``, or
        of the union.

    Raises:
        ValueError: No tensors, or coordinates that disagree (noticed later on a GPU).
    """
    inputs = list(inputs)
    if not inputs:
        raise ValueError("cat() needs at least one sparse tensor, got none")
    if fill is not None:
        inputs = align(*inputs, fill=fill)
    for x in inputs:
        check_sparse(x)
        check_same_sites(inputs[0], x)
    return wrap(torch.cat([x.feats for x in inputs], dim=1), inputs[0])


# ------------------------------------------------------------------ some of the rows
@left_to_python
def prune(input: SparseTensor, mask: Tensor) -> SparseTensor:
    """Keep the rows where a mask is true. Waits for the device.

    Args:
        input: Features [N, C].
        mask: [N] bool.

    Returns:
        The kept rows in their order, with the stride and range of ``input``. Its own cache knows
        the coordinates of the other strides and no maps, like that of a generative layer.
        Differentiable.

    Raises:
        TypeError: A mask that is not bool.
        ValueError: A mask of another shape or on another device.
    """
    _check_levels((input,))
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"`mask` must be a bool tensor, got {found}")
    if mask.shape != input.coords.shape[:1]:
        raise ValueError(
            f"`mask` must have shape [{input.coords.shape[0]}], one entry per row, "
            f"got {list(mask.shape)}"
        )
    check_same_device(feats=input.feats, mask=mask)
    raise_pending(mask.device)  # the next line waits for the device anyway
    rows = mask.nonzero().squeeze(1)
    feats = move_rows(input.feats, rows, _ranks(mask))
    coords = input.coords.index_select(0, rows)
    out = wrap(feats, input, coords, input.stride, input.spatial_range)
    out._caches = _joined_levels((input,))
    out._caches.record(site_stride(out), coords, out.spatial_range)
    return out


# ------------------------------------------------------------------ one vector per sample
@left_to_python
def broadcast(input: SparseTensor, vectors: Tensor) -> SparseTensor:
    """Give every row the vector of its sample.

    Args:
        input: Its sites; the batch index is the first column of its coordinates.
        vectors: [B, C], from `global_avg_pool` or alike.

    Returns:
        Features [N, C] in the dtype of ``vectors``; the rest is shared with ``input``.
        Differentiable; gradients are summed in a fixed order.

    Raises:
        TypeError: Vectors that are not floating.
        ValueError: Another shape or device; a batch index below 0, or of B and more (noticed later
            on a GPU).
    """
    check_sparse(input)
    check_feats(vectors, "vectors")
    check_same_device(feats=input.feats, vectors=vectors)
    batch, num = samples(input, vectors.shape[0])
    # Complaints about samples that are not there come later on a GPU: they read nothing.
    index = torch.where((batch >= 0) & (batch < num), batch.to(torch.int64), -1)
    return wrap(repeat_rows(vectors, index), input)


def broadcast_add(input: SparseTensor, vectors: Tensor) -> SparseTensor:
    """Add to every row the vector of its sample, [B, C]; the rest as in `broadcast`."""
    _check_width(input, vectors)
    return wrap(input.feats + broadcast(input, vectors).feats, input)


def broadcast_mul(input: SparseTensor, vectors: Tensor) -> SparseTensor:
    """Multiply every row by the vector of its sample, [B, C]; the rest as in `broadcast`."""
    _check_width(input, vectors)
    return wrap(input.feats * broadcast(input, vectors).feats, input)


def broadcast_cat(input: SparseTensor, vectors: Tensor) -> SparseTensor:
    """Append to every row, [N, C], the vector of its sample, [B, C']: features [N, C + C']."""
    return wrap(torch.cat([input.feats, broadcast(input, vectors).feats], dim=1), input)


# ------------------------------------------------------------------ how sites meet
def _meet(levels: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The union of the rows of several coordinate tensors.

    Returns:
        [M, 1 + D] int32, sorted; per tensor [M] int64, the row at each site (-1 = none), and
        [N] int64, the site of each row.
    """
    joined = torch.cat(levels)
    raise_pending(joined.device)  # the next line waits for the device anyway
    coords, place = unique_rows(joined)
    places = list(place.split([level.shape[0] for level in levels]))
    sources = []
    for place in places:
        rows = torch.arange(place.shape[0], device=place.device)
        source = torch.full((coords.shape[0],), -1, dtype=torch.int64, device=place.device)
        sources.append(source.index_copy_(0, place, rows))
        # Of two equal rows, one was overwritten.
        complain_if((source.index_select(0, place) != rows).any(), Complaint.DUPLICATE)
    return coords, sources, places


def _common(
    coords: Tensor, sources: list[Tensor], places: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What `_meet` returned, on the sites that all tensors have."""
    shared = (torch.stack(sources) >= 0).all(0)
    keep = shared.nonzero().squeeze(1)
    ranks = _ranks(shared)
    return (
        coords.index_select(0, keep),
        [source.index_select(0, keep) for source in sources],
        [_at(ranks, place) for place in places],
    )


def _ranks(mask: Tensor) -> Tensor:
    """How many True came before each True; -1 at each False.  [N] bool -> [N] int64."""
    return torch.where(mask, mask.cumsum(0) - 1, -1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``; no values are asked for by no index."""
    return values.index_select(0, index) if values.shape[0] else index


def _joined(inputs: Sequence[SparseTensor], coords: Tensor, sites: str) -> SparseTensor:
    """A tensor without features on joined sites, with its range and cache."""
    known = [x.spatial_range for x in inputs if x.spatial_range is not None]
    extent = None
    if sites == "union" and len(known) == len(inputs):
        extent = tuple(map(max, *known)) if len(known) > 1 else known[0]
    elif sites == "intersection" and known:
        extent = tuple(map(min, *known)) if len(known) > 1 else known[0]
    out = wrap(None, inputs[0], coords, inputs[0].stride, extent)
    out._caches = _joined_levels(inputs)
    out._caches.record(site_stride(out), coords, extent)
    return out


def _joined_levels(inputs: Sequence[SparseTensor]) -> TensorCache:
    """A cache with the levels of all tensors but their own, and what users attached to theirs."""
    first = inputs[0]
    own = (first.stride, site_stride(first))
    cache = TensorCache()
    for source in (x._caches for x in inputs):
        for name, value in source.extras().items():
            vars(cache).setdefault(name, value)
        for stride in source.cmaps:
            level = source.level(stride, first.coords.device)
            if level is not None and stride not in own:
                cache.record(stride, *level)
    return cache


# ------------------------------------------------------------------ checks
def _check_levels(inputs: Sequence[SparseTensor]) -> None:
    """All inputs are tensors on one device, on lattices of one stride."""
    if not inputs:
        raise ValueError("at least one sparse tensor is needed, got none")
    for x in inputs:
        if not isinstance(x, SparseTensor):
            raise TypeError(f"expected a SparseTensor, got {type(x).__name__}")
        check_feats(x.feats)
        check_coords(x.coords, ndim=None)
        check_rows(x.feats, x.coords)
    a = inputs[0]
    for b in inputs:
        check_same_device(a=a.feats, a_coords=a.coords, b=b.feats, b_coords=b.coords)
        columns = a.coords.shape[1], b.coords.shape[1]
        if columns[0] != columns[1]:
            raise ValueError(
                f"tensors must have the same number of columns of coords, "
                f"got {columns[0]} and {columns[1]}"
            )
        if site_stride(a) != site_stride(b):
            raise ValueError(f"tensors must have the same stride, got {a.stride} and {b.stride}")


def _check_channels(inputs: Sequence[SparseTensor]) -> None:
    a = inputs[0]
    for b in inputs:
        if a.feats.shape[1] != b.feats.shape[1]:
            raise ValueError(
                f"tensors must have the same number of channels, "
                f"got {a.feats.shape[1]} and {b.feats.shape[1]}"
            )


def _operands(
    a: SparseTensor, b: SparseTensor, sites: str, fill: float
) -> tuple[SparseTensor, SparseTensor]:
    """Two tensors with the same number of channels, on common sites."""
    _check_levels((a, b))
    _check_channels((a, b))
    first, second = align(a, b, sites=sites, fill=fill)
    return first, second


def _check_width(input: SparseTensor, vectors: Tensor) -> None:
    """One entry of a vector per channel."""
    check_sparse(input)
    check_feats(input.feats)
    check_feats(vectors, "vectors")
    if vectors.shape[1] != input.feats.shape[1]:
        raise ValueError(
            f"`vectors` must have one entry per channel, [B, {input.feats.shape[1]}], "
            f"got {list(vectors.shape)}"
        )
