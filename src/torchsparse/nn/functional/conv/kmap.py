"""From a sparse tensor and a layer's geometry to a kernel map: cached, checked, built.

The one writer of ``x._caches.kmaps`` and ``x._caches.hashmaps``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._cache import Stamp, Step, TensorCache, Trail
from torchsparse._flags import Complaint, complain_if
from torchsparse._geometry import Geometry, conv_range
from torchsparse._kernel_map import KernelMap, KernelMapKey
from torchsparse._ops import coords as ops
from torchsparse._settings import settings
from torchsparse.tensor import SparseTensor

__all__ = [
    "Level",
    "back_onto",
    "between",
    "downsampled",
    "finer",
    "generated",
    "int32_coords",
    "onto",
    "same_sites",
    "site_coords",
    "upsampled",
]

Range = tuple[int, ...] | None
INT32 = torch.iinfo(torch.int32)


class Level(NamedTuple):
    """Sites that features live on."""

    coords: Tensor  # [N, 1 + D] int32
    stride: tuple[int, ...]
    spatial_range: Range


@dataclass
class _Entry:
    """A cached map with the coordinates it belongs to, as they were."""

    kmap: KernelMap
    inputs: Stamp
    outputs: Stamp

    @staticmethod
    def of(kmap: KernelMap) -> _Entry:
        inputs = Stamp(kmap.in_coords)
        same = kmap.in_coords is kmap.out_coords
        return _Entry(kmap, inputs, inputs if same else Stamp(kmap.out_coords))

    def serves(self, fine: Tensor | None = None, coarse: Tensor | None = None) -> bool:
        """Whether the given ends are the ones it was built for, and neither was written to."""
        inputs, outputs = self.inputs, self.outputs
        if not (inputs.unchanged() if fine is None else inputs.fits(fine)):
            return False
        return outputs.unchanged() if coarse is None else outputs.fits(coarse)

    def start(self) -> tuple[Tensor, Range]:
        """Coordinates and range of the fine level."""
        return self.kmap.in_coords, self.kmap.in_range


class _Told:
    """What a compiled program tells of a strided layer, in place of an entry with its map."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.geometry = Geometry(
            "strided", step.kernel_size, step.stride, step.dilation, step.offset
        )

    def serves(self, fine: Tensor | None = None, coarse: Tensor | None = None) -> bool:
        """Whether the given ends are those of the layer."""
        ends = ((self.step.fine, fine), (self.step.coarse, coarse))
        return all(coords is None or coords is level.coords for level, coords in ends)

    def start(self) -> tuple[Tensor, Range]:
        """Coordinates and range of the fine level."""
        return self.step.fine.coords, self.step.fine.spatial_range


# Maps under one key, for different coordinates: enough for the tensors of a batch that share a
# cache, few enough not to hoard the memory of coordinates that nobody will bring again.
KEPT = 8


def _find(
    cache: TensorCache, key: KernelMapKey, fine: Tensor | None = None, coarse: Tensor | None = None
) -> KernelMap | None:
    """The cached map between the given ends, if it still fits them."""
    for entry in cache.kmaps.get(key, ()):
        if entry.serves(fine, coarse):
            return entry.kmap
    return None


def _remember(cache: TensorCache, key: KernelMapKey, kmap: KernelMap) -> None:
    """Cache a map, and forget those whose coordinates were written to."""
    known = cache.kmaps.get(key)
    valid = [entry for entry in known if entry.serves()] if known else []
    cache.kmaps[key] = [_Entry.of(kmap), *valid[: KEPT - 1]]


# ------------------------------------------------------------------ the four kinds
def same_sites(x: SparseTensor, coords: Tensor, geometry: Geometry) -> KernelMap:
    """The submanifold map on the sites of ``x``."""
    key = KernelMapKey(
        x.stride, geometry, "same", True, x.spatial_range, settings.allow_negative_coordinates
    )
    kmap = _find(x._caches, key, coords, coords)
    if kmap is None:
        index = _index(x._caches, coords, x.stride, geometry.reach, x.spatial_range)
        neighbors, keys = ops.find_taps(index, None, geometry)
        limit, rows = x.spatial_range, index.rows
        kmap = KernelMap(neighbors, coords, coords, geometry, limit, limit, rows, rows, keys)
        _remember(x._caches, key, kmap)
    return kmap


def downsampled(
    x: SparseTensor, coords: Tensor, geometry: Geometry, downsample_mode: str
) -> KernelMap:
    """The strided map from the sites of ``x`` to the sites it creates."""
    key = KernelMapKey(
        x.stride,
        geometry,
        downsample_mode,
        settings.infer_spatial_range,
        x.spatial_range,
        settings.allow_negative_coordinates,
    )
    kmap = _find(x._caches, key, fine=coords)
    if kmap is None:
        index = _index(x._caches, coords, x.stride, geometry.reach, x.spatial_range)
        out_coords, coarse, out_range = _strided_level(index, coords, geometry, key)
        stride = tuple([a * b for a, b in zip(x.stride, geometry.stride)])
        # What a layer creates keeps its bounds: nothing is left to check.
        sound = {(out_range, settings.allow_negative_coordinates)}
        x._caches.hashmaps[stride] = _Indexed(Stamp(out_coords), coarse, sound)
        neighbors, keys = ops.find_taps(index, out_coords, geometry)
        kmap = KernelMap(
            neighbors,
            coords,
            out_coords,
            geometry,
            x.spatial_range,
            out_range,
            index.rows,
            None,
            keys,
        )
        _remember(x._caches, key, kmap)
    return kmap


def upsampled(
    x: SparseTensor,
    coords: Tensor,
    geometry: Geometry,
) -> tuple[KernelMap, Level]:
    """The map that a transposed convolution of ``x`` reads backwards, and the level it reaches.

    Args:
        x: The coarse tensor.
        coords: Its coordinates, int32.
        geometry: Of the layer; its own offset counts only if no strided layer with the same
            kernel, stride and dilation was cached.

    Raises:
        ValueError: The fine level is unknown, or the stride does not divide.
    """
    fine = _fine_level(x, coords, geometry.stride)
    geometry = _encoder_geometry(x._caches, coords, fine.stride, geometry)
    return between(x._caches, fine, Level(coords, x.stride, x.spatial_range), geometry), fine


def between(cache: TensorCache, fine: Level, coarse: Level, geometry: Geometry) -> KernelMap:
    """The map between two known levels, whichever layer asked for it first."""
    for key, entry in _strided_entries(cache, fine.stride):
        same = key.geometry is geometry or key.geometry == geometry
        if same and entry.serves(fine.coords, coarse.coords):
            return entry.kmap
    return _between(cache, fine, coarse, geometry)


def onto(x: SparseTensor, coords: Tensor, geometry: Geometry, target: Level) -> KernelMap:
    """The map from the sites of ``x`` to given coarse sites."""
    key = KernelMapKey(x.stride, geometry, "given")
    kmap = _find(x._caches, key, coords, target.coords)
    if kmap is not None:
        return kmap
    return _between(x._caches, Level(coords, x.stride, x.spatial_range), target, geometry)


def back_onto(x: SparseTensor, coords: Tensor, geometry: Geometry, target: Level) -> KernelMap:
    """The map from given fine sites to the sites of ``x``, which a transposed layer reads
    backwards; its own offset counts as in `upsampled`."""
    geometry = _encoder_geometry(x._caches, coords, target.stride, geometry)
    return between(x._caches, target, Level(coords, x.stride, x.spatial_range), geometry)


def _between(cache: TensorCache, fine: Level, coarse: Level, geometry: Geometry) -> KernelMap:
    """Build and remember the map between two known levels."""
    index = _index(cache, fine.coords, fine.stride, geometry.reach, fine.spatial_range)
    # Only for its checks: an input that met one tap twice could not be inverted.
    _index(cache, coarse.coords, coarse.stride, (0,) * geometry.ndim, coarse.spatial_range)
    neighbors, keys = ops.find_taps(index, coarse.coords, geometry)
    kmap = KernelMap(
        neighbors,
        fine.coords,
        coarse.coords,
        geometry,
        fine.spatial_range,
        coarse.spatial_range,
        index.rows,
        sort_keys=keys,
    )
    _remember(cache, KernelMapKey(fine.stride, geometry, "given"), kmap)
    return kmap


def generated(x: SparseTensor, coords: Tensor, geometry: Geometry) -> tuple[KernelMap, Level]:
    """The map of a generative layer, read backwards, and the fine level that it creates."""
    key = KernelMapKey(
        x.stride,
        geometry,
        "generative",
        spatial_range=x.spatial_range,
        allow_negative=settings.allow_negative_coordinates,
    )
    stride = tuple(max(1, a // b) for a, b in zip(x.stride, geometry.stride))
    fine_range = _scaled_range(x.spatial_range, geometry.stride)
    kmap = _find(x._caches, key, coarse=coords)
    if kmap is None:
        zero = (0,) * geometry.ndim
        coarse = _index(x._caches, coords, x.stride, zero, x.spatial_range)
        upper = None if fine_range is None else tuple(n - 1 for n in fine_range[1:])
        fine_coords, index = _generative_sites(coarse, coords, geometry, upper)
        neighbors, keys = ops.find_taps(index, coords, geometry)
        kmap = KernelMap(
            neighbors,
            fine_coords,
            coords,
            geometry,
            fine_range,
            x.spatial_range,
            sort_keys=keys,
        )
        _remember(x._caches, key, kmap)
    return kmap, Level(kmap.in_coords, stride, fine_range)


# ------------------------------------------------------------------ sites
def site_coords(
    x: SparseTensor, coords: Tensor, geometry: Geometry, rule: str, out_range: Range
) -> Tensor:
    """The sites alone that a layer would create, bounded by a range of the output."""
    index = _index(x._caches, coords, x.stride, geometry.reach, None)
    upper = None if out_range is None else tuple(n - 1 for n in out_range[1:])
    if rule == "generative":
        return _generative_sites(index, coords, geometry, upper)[0]
    infer = upper is None and settings.infer_spatial_range
    return _strided_sites(index, coords, geometry, rule, upper, infer)[0]


def _strided_level(
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
    return *_strided_sites(index, coords, geometry, key.sites, upper, infer), out_range


def _strided_sites(
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


def _scaled_range(spatial_range: Range, stride: tuple[int, ...]) -> Range:
    if spatial_range is None:
        return None
    extents = spatial_range[1 : 1 + len(stride)]
    return (spatial_range[0], *(r * s for r, s in zip(extents, stride)))


def _generative_sites(
    index: Any, coords: Tensor, geometry: Geometry, upper: tuple[int, ...] | None
) -> tuple[Tensor, Any]:
    """The fine sites that some tap ties to a coarse one, and their index."""
    unbounded = (None,) * geometry.ndim
    lower = unbounded if settings.allow_negative_coordinates else (0,) * geometry.ndim
    return ops.generative_sites(index, coords, geometry, lower, upper or unbounded)


# ------------------------------------------------------------------ upsampling: the fine level
def _strided_entries(
    cache: TensorCache, fine_stride: tuple[int, ...]
) -> Iterator[tuple[KernelMapKey, _Entry]]:
    """Cached strided maps that start at a level."""
    for key, entries in cache.kmaps.items():
        if isinstance(key, KernelMapKey) and key.geometry.kind == "strided":
            if key.stride == fine_stride:
                for entry in entries:
                    yield key, entry


def _strided_layers(
    cache: TensorCache, fine_stride: tuple[int, ...]
) -> Iterator[tuple[Geometry, _Entry | _Told]]:
    """Layers that created a coarser level from a level."""
    for key, entry in _strided_entries(cache, fine_stride):
        if key.sites != "given":
            yield key.geometry, entry
    if isinstance(cache, Trail):
        for step in cache.steps:
            if step.fine.stride == fine_stride:
                told = _Told(step)
                yield told.geometry, told


def finer(stride: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of the level that a transposed layer reaches.

    Raises:
        ValueError: It is not a whole number on every axis.
    """
    if any(a % b for a, b in zip(stride, step)):
        raise ValueError(
            f"the tensor's stride must be divisible by the stride of a transposed convolution, "
            f"got {stride} and {step}"
        )
    return tuple([a // b for a, b in zip(stride, step)])


def _fine_level(x: SparseTensor, coords: Tensor, stride: tuple[int, ...]) -> Level:
    fine = finer(x.stride, stride)
    for geometry, layer in _strided_layers(x._caches, fine):
        if geometry.stride == stride and layer.serves(coarse=coords):
            level_coords, level_range = layer.start()
            return Level(level_coords, fine, level_range)
    known = x._caches.level(fine, coords.device)
    if known is None:
        raise ValueError(
            f"a transposed convolution from stride {x.stride} needs the coordinates at stride "
            f"{fine}; the strides known to this tensor are {sorted(x._caches.cmaps, key=str)}. "
            f"Give them as `coordinates`, or use generative=True to create them"
        )
    level_coords, level_range = known
    return Level(int32_coords(x._caches, level_coords), fine, level_range)


def _encoder_geometry(
    cache: TensorCache, coords: Tensor, fine_stride: tuple[int, ...], geometry: Geometry
) -> Geometry:
    """That of the strided layer which a transposed one inverts; else the layer's own."""
    found = None
    for known, layer in _strided_layers(cache, fine_stride):
        same = (
            known.kernel_size == geometry.kernel_size
            and known.stride == geometry.stride
            and known.dilation == geometry.dilation
        )
        if same and layer.serves(coarse=coords):
            return known
        if same and found is None:
            found = known
    return geometry if found is None else found


# ------------------------------------------------------------------ search structures and checks
class _Indexed(NamedTuple):
    """A search structure, and the coordinates it belongs to."""

    stamp: Stamp
    index: Any
    sound: set[tuple[Range, bool]]  # ranges and signs that were checked against


def _index(
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
        isinstance(known, _Indexed)
        and known.stamp.fits(coords)
        and all(a >= b for a, b in zip(known.index.margin, reach))
    ):
        known = _Indexed(Stamp(coords), ops.build_index(coords, reach), set())
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
    if coords.numel():
        low, high = (v.to(torch.int64) for v in torch.aminmax(coords))
        complain_if(
            (low < INT32.min) | (high > INT32.max),
            Complaint.OVERFLOW,
            lambda: f"from {int(low)} to {int(high)}",
        )
    converted = coords.to(torch.int32)
    cache.hashmaps["int32"] = (Stamp(coords), converted)
    return converted
