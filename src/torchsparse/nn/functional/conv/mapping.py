"""From a sparse tensor and a layer's geometry to a kernel map: cached, checked, built.

The one writer of ``x._caches.kmaps`` and ``x._caches.hashmaps``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from torchsparse._cache import Stamp, Step, TensorCache, Trail
from torchsparse._geometry import Geometry
from torchsparse._kernel_map import KernelMap, KernelMapKey
from torchsparse._ops import coords as ops
from torchsparse._settings import settings
from torchsparse.nn.functional.conv.ahead import Ahead
from torchsparse.nn.functional.conv.levels import (
    Indexed,
    Level,
    Range,
    generative_sites,
    index_of,
    int32_coords,
    scaled_range,
    site_coords,
    strided_level,
)
from torchsparse.nn.functional.conv.replaced import warn_if_replaced
from torchsparse.tensor import SparseTensor

__all__ = [
    "Level",
    "back_onto",
    "between",
    "coarser",
    "downsampled",
    "finer",
    "generated",
    "int32_coords",
    "onto",
    "same_sites",
    "site_coords",
    "upsampled",
]


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


def _from_shelf(cache: TensorCache, key: KernelMapKey, coords: Tensor) -> KernelMap | None:
    """The map from given sites that was built before a layer asked for it: see `ahead`."""
    ahead: Ahead | None = cache.kmaps.get("ahead")
    found = None if ahead is None else ahead.take(key, coords)
    if found is None:
        return None
    kmap, coarse = found
    if coarse is not None:
        cache.hashmaps[coarser(key.stride, key.geometry.stride)] = coarse
    _remember(cache, key, kmap)
    return kmap


def _remember(cache: TensorCache, key: KernelMapKey, kmap: KernelMap) -> None:
    """Cache a map, and forget those whose coordinates were written to."""
    ahead: Ahead | None = cache.kmaps.get("ahead")
    if ahead is not None:
        ahead.note(key, kmap)
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
        warn_if_replaced("build_kernel_map")
        kmap = _from_shelf(x._caches, key, coords)
    if kmap is None:
        index = index_of(x._caches, coords, x.stride, geometry.reach, x.spatial_range)
        neighbors, keys = ops.find_taps(index, None, geometry)
        limit = x.spatial_range
        kmap = KernelMap(neighbors, coords, coords, geometry, limit, limit, keys)
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
        warn_if_replaced("build_kernel_map", "spdownsample")
        kmap = _from_shelf(x._caches, key, coords)
    if kmap is None:
        index = index_of(x._caches, coords, x.stride, geometry.reach, x.spatial_range)
        out_coords, coarse, out_range = strided_level(index, coords, geometry, key)
        stride = coarser(x.stride, geometry.stride)
        x._caches.hashmaps[stride] = Indexed.created(out_coords, coarse, out_range)
        neighbors, keys = ops.find_taps(index, out_coords, geometry)
        kmap = KernelMap(
            neighbors,
            coords,
            out_coords,
            geometry,
            x.spatial_range,
            out_range,
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
    index = index_of(cache, fine.coords, fine.stride, geometry.reach, fine.spatial_range)
    # Only for its checks: an input that met one tap twice could not be inverted.
    index_of(cache, coarse.coords, coarse.stride, (0,) * geometry.ndim, coarse.spatial_range)
    neighbors, keys = ops.find_taps(index, coarse.coords, geometry)
    kmap = KernelMap(
        neighbors,
        fine.coords,
        coarse.coords,
        geometry,
        fine.spatial_range,
        coarse.spatial_range,
        keys,
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
    fine_range = scaled_range(x.spatial_range, geometry.stride)
    kmap = _find(x._caches, key, coarse=coords)
    if kmap is None:
        warn_if_replaced("build_kernel_map", "spupsample_generative")
        zero = (0,) * geometry.ndim
        coarse = index_of(x._caches, coords, x.stride, zero, x.spatial_range)
        upper = None if fine_range is None else tuple(n - 1 for n in fine_range[1:])
        fine_coords, index = generative_sites(coarse, coords, geometry, upper)
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


def coarser(stride: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of the level that a strided layer reaches."""
    return tuple([a * b for a, b in zip(stride, step)])


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
        if fine in x._caches.cmaps:
            why = "those of this tensor's cache were written to since, or are on another device"
        else:
            why = f"the strides known to this tensor are {sorted(x._caches.cmaps, key=str)}"
        raise ValueError(
            f"a transposed convolution from stride {x.stride} needs the coordinates at stride "
            f"{fine}; {why}. Give them as `coordinates`, or use generative=True to create them"
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
