"""Levels: the sites that layers create, their ranges, search structures over them, and checks.

With `mapping`, the only writer of ``x._caches.hashmaps``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._cache import Stamp, TensorCache
from torchsparse._flags import Complaint, complain_if
from torchsparse._geometry import Geometry, conv_range
from torchsparse._kernel_map import KernelMapKey
from torchsparse._ops import coords as ops
from torchsparse._settings import settings
from torchsparse._validate import wide_ints
from torchsparse.tensor import SparseTensor

__all__ = [
    "Indexed",
    "Level",
    "Range",
    "generative_sites",
    "index_of",
    "int32_coords",
    "minkowski_range",
    "scaled_range",
    "site_coords",
    "spconv_range",
    "strided_level",
]

Range = tuple[int, ...] | None
INT32 = torch.iinfo(torch.int32)


class Level(NamedTuple):
    """Sites that features live on."""

    coords: Tensor  # [N, 1 + D] int32
    stride: tuple[int, ...]
    spatial_range: Range


# ------------------------------------------------------------------ sites
def site_coords(
    x: SparseTensor, coords: Tensor, geometry: Geometry, rule: str, out_range: Range
) -> Tensor:
    """The sites alone that a layer would create, bounded by a range of the output."""
    index = index_of(x._caches, coords, x.stride, geometry.reach, None)
    upper = None if out_range is None else tuple(n - 1 for n in out_range[1:])
    if rule == "generative":
        return generative_sites(index, coords, geometry, upper)[0]
    infer = upper is None and settings.infer_spatial_range
    return strided_sites(index, coords, geometry, rule, upper, infer)[0]


def strided_level(
    index: Any, coords: Tensor, geometry: Geometry, key: KernelMapKey
) -> tuple[Tensor, Any, Range]:
    """Coordinates, index and range of the level that a strided layer creates."""
    if key.sites == "minkowski":
        out_range = minkowski_range(key.spatial_range, geometry.stride)
        upper = None
    else:
        out_range = spconv_range(key.spatial_range, geometry)
        upper = None if out_range is None else tuple(n - 1 for n in out_range[1:])
    infer = out_range is None and key.infer_range
    return *strided_sites(index, coords, geometry, key.sites, upper, infer), out_range


def strided_sites(
    index: Any,
    coords: Tensor,
    geometry: Geometry,
    rule: str,
    upper: tuple[int, ...] | None,
    infer: bool,
) -> tuple[Tensor, Any]:
    """The coarse sites of a rule, and their index.

    Without a range the "spconv" rule has no upper bound, or (``infer``) TorchSparse 2.1's.
    """
    ndim = geometry.ndim
    unbounded = (None,) * ndim
    if rule == "minkowski":
        cell = Geometry("strided", geometry.stride, geometry.stride, (1,) * ndim, (0,) * ndim)
        return ops.strided_sites(index, coords, cell, unbounded, unbounded)
    lower = unbounded if settings.allow_negative_coordinates else (0,) * ndim
    bound = None if infer else upper or unbounded
    return ops.strided_sites(index, coords, geometry, lower, bound)


def spconv_range(spatial_range: Range, geometry: Geometry) -> Range:
    """Output range of a strided layer, or None; ValueError if it would be empty."""
    if spatial_range is None:
        return None
    extents = spatial_range[1 : 1 + geometry.ndim]
    out = conv_range(
        extents, geometry.kernel_size, geometry.stride, geometry.offset, geometry.dilation
    )
    if min(out) < 1:
        raise ValueError(
            f"the output range must be at least 1 on every axis, got {out}: input range "
            f"{extents}, kernel size {geometry.kernel_size}, stride {geometry.stride}, padding "
            f"{geometry.offset}, dilation {geometry.dilation}"
        )
    return (spatial_range[0], *out)


def minkowski_range(spatial_range: Range, stride: tuple[int, ...]) -> Range:
    """Output range in "minkowski" mode: it contains every ``in // stride``."""
    if spatial_range is None:
        return None
    extents = spatial_range[1 : 1 + len(stride)]
    return (spatial_range[0], *((r - 1) // s + 1 for r, s in zip(extents, stride)))


def scaled_range(spatial_range: Range, stride: tuple[int, ...]) -> Range:
    if spatial_range is None:
        return None
    extents = spatial_range[1 : 1 + len(stride)]
    return (spatial_range[0], *(r * s for r, s in zip(extents, stride)))


def generative_sites(
    index: Any, coords: Tensor, geometry: Geometry, upper: tuple[int, ...] | None
) -> tuple[Tensor, Any]:
    """The fine sites that some tap ties to a coarse one, and their index."""
    unbounded = (None,) * geometry.ndim
    lower = unbounded if settings.allow_negative_coordinates else (0,) * geometry.ndim
    return ops.generative_sites(index, coords, geometry, lower, upper or unbounded)


# ------------------------------------------------------------------ search structures and checks
class Indexed(NamedTuple):
    """A search structure, and the coordinates it belongs to."""

    stamp: Stamp
    index: Any
    sound: set[tuple[Range, bool]]  # ranges and signs that were checked against

    @staticmethod
    def created(coords: Tensor, index: Any, limits: Range) -> Indexed:
        """Of a level that a layer created: it keeps its bounds, nothing is left to check."""
        return Indexed(Stamp(coords), index, {(limits, settings.allow_negative_coordinates)})


def index_of(
    cache: TensorCache,
    coords: Tensor,
    stride: tuple[int, ...],
    reach: tuple[int, ...],
    spatial_range: Range,
) -> Any:
    """A search structure over a level that can look ``reach`` cells around it, once its
    coordinates are known to lie in their range."""
    known = cache.hashmaps.get(stride)
    if not (
        isinstance(known, Indexed)
        and known.stamp.fits(coords)
        and all(a >= b for a, b in zip(known.index.margin, reach))
    ):
        known = Indexed(Stamp(coords), ops.build_index(coords, reach), set())
        cache.hashmaps[stride] = known
    demand = (spatial_range, settings.allow_negative_coordinates)
    if demand not in known.sound:
        ops.check_sites(known.index, *demand)
        known.sound.add(demand)
    return known.index


def int32_coords(cache: TensorCache, coords: Tensor) -> Tensor:
    """Coordinates as int32; a conversion is remembered, so that layers share their maps."""
    if coords.dtype == torch.int32:
        return coords
    known = cache.hashmaps.get("int32")
    if known is not None and known[0].fits(coords):
        return known[1]
    wide = wide_ints(coords)
    if wide.dtype == torch.int64 and wide.numel():
        low, high = torch.aminmax(wide)
        complain_if(
            (low < INT32.min) | (high > INT32.max),
            Complaint.OVERFLOW,
            lambda: f"from {int(low)} to {int(high)}",
        )
    converted = wide.to(torch.int32)
    cache.hashmaps["int32"] = (Stamp(coords), converted)
    return converted
