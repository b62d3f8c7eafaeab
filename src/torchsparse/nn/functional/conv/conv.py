"""``conv3d`` and its siblings: check, resolve, find the map, one call, wrap."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse import _validate
from torchsparse._autograd.conv import (
    deferred_conv,
    deferred_pointwise,
    pointwise,
    sparse_conv,
)
from torchsparse._autograd.depthwise import grouped_conv, grouped_pointwise
from torchsparse._cache import Stamp, TensorCache
from torchsparse._compat import old_conv3d_arguments
from torchsparse._compiling import left_to_python
from torchsparse._geometry import Geometry, as_tuple
from torchsparse._kernel_map import KernelMap
from torchsparse._lazy import Lazy
from torchsparse._ops.dispatch import is_served
from torchsparse._recipe import ConvRecipe
from torchsparse._settings import settings
from torchsparse.nn.functional.conv import lead
from torchsparse.nn.functional.conv.ahead import look_ahead
from torchsparse.nn.functional.conv.choices import compute_dtype, resolve_for
from torchsparse.nn.functional.conv.mapping import (
    Level,
    back_onto,
    coarser,
    downsampled,
    finer,
    generated,
    int32_coords,
    onto,
    same_sites,
    upsampled,
)
from torchsparse.tensor import SparseTensor, check_sparse, may_put_off, site_stride, wrap

__all__ = ["conv1d", "conv2d", "conv3d", "conv4d"]


def conv3d(
    input: SparseTensor,
    weight: Tensor,
    kernel_size: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    config: Mapping[str, Any] | None = None,
    transposed: bool = False,
    generative: bool = False,
    training: bool = False,
    coordinates: SparseTensor | Tensor | None = None,
    groups: int = 1,
) -> SparseTensor:
    """Sparse convolution. Fine and coarse sites meet where, per axis,

        fine = coarse * stride - offset + dilation * tap,   0 <= tap < kernel_size

    Stride 1 keeps the sites (submanifold, offset d (k - 1) / 2, or 0 for an even volume); a larger
    stride creates coarse sites (offset = padding; in "minkowski" mode the centre tap);
    ``transposed`` returns to the fine sites of an earlier level; ``transposed`` and ``generative``
    create all fine sites that a tap reaches.

    Args:
        input: [N, C_in] features on [N, 4] coordinates (b, x, y, z).
        weight: [K, C_in / groups, C_out], K = the product of kernel_size; without its first axis
            it is understood for K = 1. For odd K the taps run x fastest, for even K z fastest.
        kernel_size, stride, padding, dilation: One int or three.
        bias: [C_out] or None.
        config: Mapping that overrides the global configuration key by key, or None.
        transposed, generative: As above.
        training: Accepted for compatibility; has no effect.
        coordinates: Sites to convolve onto, a tensor or its [M, 4] coordinates, in place of those
            that the layer would create; for a transposed layer the fine sites, in place of an
            earlier level. Not for generative layers.
        groups: G. Output channel j reads only the C_in / G input channels of group
            j // (C_out / G), as in ``torch.nn.functional.conv3d``. With G = C_in the layer is
            depthwise and only scales and sums rows; else each group is a convolution.

    Returns:
        [M, C_out] in the dtype of the computation: the autocast dtype if autocast is on (and no
        operand is float64), else fp16 or bf16 if an operand is, else the promoted dtype.

    Raises:
        ValueError: Shapes, devices or parameters that do not fit; duplicate, negative or
            out-of-range coordinates; an unknown fine level; channels that G does not divide.
        TypeError: Wrong dtypes, float16 mixed with bfloat16, a bool as padding.
        NotImplementedError: Dataflow.CodedCSR.
    """
    padding, dilation, transposed = old_conv3d_arguments(padding, dilation, transposed)
    return convolve(
        3, input, weight, kernel_size, bias, stride, padding, dilation, config,
        transposed, generative, coordinates, groups,
    )  # fmt: skip


def conv1d(
    input: SparseTensor,
    weight: Tensor,
    kernel_size: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    config: Mapping[str, Any] | None = None,
    transposed: bool = False,
    generative: bool = False,
    coordinates: SparseTensor | Tensor | None = None,
    groups: int = 1,
) -> SparseTensor:
    """`conv3d` over one spatial axis: coordinates (b, x), ``weight`` [K, C_in / groups, C_out]."""
    return convolve(
        1, input, weight, kernel_size, bias, stride, padding, dilation, config,
        transposed, generative, coordinates, groups,
    )  # fmt: skip


def conv2d(
    input: SparseTensor,
    weight: Tensor,
    kernel_size: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    config: Mapping[str, Any] | None = None,
    transposed: bool = False,
    generative: bool = False,
    coordinates: SparseTensor | Tensor | None = None,
    groups: int = 1,
) -> SparseTensor:
    """`conv3d` over two spatial axes: coordinates (b, x, y), ``weight`` [K, C_in / groups,
    C_out]."""
    return convolve(
        2, input, weight, kernel_size, bias, stride, padding, dilation, config,
        transposed, generative, coordinates, groups,
    )  # fmt: skip


def conv4d(
    input: SparseTensor,
    weight: Tensor,
    kernel_size: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    config: Mapping[str, Any] | None = None,
    transposed: bool = False,
    generative: bool = False,
    coordinates: SparseTensor | Tensor | None = None,
    groups: int = 1,
) -> SparseTensor:
    """`conv3d` over four spatial axes: coordinates (b, x, y, z, t), ``weight`` [K, C_in / groups,
    C_out]."""
    return convolve(
        4, input, weight, kernel_size, bias, stride, padding, dilation, config,
        transposed, generative, coordinates, groups,
    )  # fmt: skip


def convolve(
    ndim: int,
    x: SparseTensor,
    weight: Tensor,
    kernel_size: Any,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    config: Mapping[str, Any] | None,
    transposed: bool,
    generative: bool,
    coordinates: SparseTensor | Tensor | None = None,
    groups: int = 1,
) -> SparseTensor:
    """`conv3d` over ``ndim`` spatial axes."""
    if torch.compiler.is_compiling():
        sizes = check_parameters(
            ndim, kernel_size, stride, padding, dilation, transposed, generative
        )
        traced = lead.Layer(*sizes, transposed, generative, groups)
        return run_traced(traced, x, weight, bias, config, coordinates)
    layer = layer_of(ndim, kernel_size, stride, padding, dilation, transposed, generative, groups)
    return run_layer(layer, x, weight, bias, config, coordinates)


@dataclass(frozen=True, eq=False)
class Layer:
    """The checked parameters of a layer. Equal ones are one object: see `layer_of`."""

    ndim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    generative: bool
    volume: int
    pointwise: bool  # 1x1 at stride 1: no map
    groups: int = 1


_layers: dict[tuple[Any, ...], Layer] = {}


def layer_of(
    ndim: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    generative: bool,
    groups: int = 1,
) -> Layer:
    """The record of a layer's parameters.

    Raises:
        ValueError, TypeError: Parameters outside their range.
    """
    sizes = check_parameters(ndim, kernel_size, stride, padding, dilation, transposed, generative)
    if groups != 1:
        groups = check_groups(groups)
    key = (*sizes, transposed, generative, groups)
    layer = _layers.get(key)
    if layer is None:
        volume = math.prod(sizes[0])
        pointwise = volume == 1 and math.prod(sizes[1]) == 1
        layer = Layer(ndim, *sizes, transposed, generative, volume, pointwise, groups)
        layer = _layers.setdefault(key, layer)
    return layer


class _Path(NamedTuple):
    """Where a layer led from given coordinates, kept among the kernel maps of their cache so that
    it goes with them."""

    start: Stamp
    ends: tuple[Stamp, ...]  # of the map, where they are other tensors
    kmap: KernelMap
    level: Level

    @staticmethod
    def of(coords: Tensor, kmap: KernelMap, level: Level) -> _Path:
        fine, coarse = kmap.in_coords, kmap.out_coords
        ends = () if fine is coords else (Stamp(fine),)
        if coarse is not coords and coarse is not fine:
            ends = (*ends, Stamp(coarse))
        return _Path(Stamp(coords), ends, kmap, level)

    def holds(self, x: SparseTensor) -> bool:
        """Whether ``x`` starts there, nothing was written to, and the cache knows both levels."""
        start, ends, _, level = self
        cmaps = x._caches.cmaps
        if not start.fits(x.coords) or x.stride not in cmaps or level.stride not in cmaps:
            return False
        for end in ends:
            if not end.unchanged():
                return False
        return True

    def leads(self, x: SparseTensor) -> bool:
        """Whether the level that a transposed layer reached is still the one under its stride."""
        level = self.level
        known = x._caches.level(level.stride, level.coords.device)
        return known is not None and known[0] is level.coords


def run_layer(
    layer: Layer,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None,
    config: Mapping[str, Any] | None,
    coordinates: SparseTensor | Tensor | None = None,
) -> SparseTensor:
    """Convolve ``x``: check, resolve, find the map, one call, wrap."""
    feats: Any = x.feats if isinstance(x, SparseTensor) else None
    if not _fits(layer, feats, x, weight, bias):
        weight = _check_operands(layer, x, weight, bias)
        feats = x.feats
    recipe = resolve_for(config, compute_dtype(feats, weight, bias), feats.device)
    if layer.pointwise and coordinates is None:
        matrix = weight if weight.dim() == 2 else weight[0]
        if layer.groups == 1:
            product = deferred_pointwise if may_put_off(x) else pointwise
            feats = product(feats, matrix, bias, recipe.dtype)
        else:
            feats = grouped_pointwise(feats, matrix, bias, recipe.dtype, layer.groups)
        coords = int32_coords(x._caches, x.coords)
        return wrap(feats, x, coords, x.stride, x.spatial_range)
    key = (
        layer,
        x.stride,
        x.spatial_range,
        recipe.downsample_mode,
        settings.allow_negative_coordinates,
        settings.infer_spatial_range,
    )
    paths = x._caches.kmaps.get("paths")
    path = paths.get(key) if paths and coordinates is None else None
    late = may_put_off(x)
    if path is not None and path.holds(x) and (not layer.transposed or path.leads(x)):
        feats = _product(layer, feats, weight, bias, path.kmap, recipe, late)
        if not layer.generative:
            return wrap(feats, x, *path.level)
        return on_level(feats, x, path.level, True)
    kmap, level = find_map(
        layer.ndim, x, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        recipe.downsample_mode, layer.transposed, layer.generative, coordinates, id(weight),
    )  # fmt: skip
    if weight.dim() == 2:
        weight = weight[None]
    if coordinates is None:
        paths = x._caches.kmaps.setdefault("paths", {})
        paths[key] = _Path.of(x.coords, kmap, level)
    feats = _product(layer, feats, weight, bias, kmap, recipe, late)
    return on_level(feats, x, level, layer.generative)


def run_traced(
    traced: lead.Layer,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None,
    config: Mapping[str, Any] | None,
    coordinates: SparseTensor | Tensor | None = None,
) -> SparseTensor:
    """The same in a program that is being traced."""
    if lead.can_trace(traced, x, coordinates is not None):
        return lead.trace_layer(traced, x, weight, bias, config, coordinates)
    return _untraced(traced, x, weight, bias, config, coordinates)


@left_to_python
def _untraced(
    traced: lead.Layer,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None,
    config: Mapping[str, Any] | None,
    coordinates: SparseTensor | Tensor | None,
) -> SparseTensor:
    layer = layer_of(
        len(traced.kernel_size), traced.kernel_size, traced.step, traced.padding, traced.dilation,
        traced.transposed, traced.generative, traced.groups,
    )  # fmt: skip
    return run_layer(layer, x, weight, bias, config, coordinates)


def _product(
    layer: Layer,
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kmap: KernelMap,
    recipe: ConvRecipe,
    late: bool,
) -> Tensor | Lazy:
    """Features along a map; ``late``: they may be computed when somebody needs them."""
    if layer.groups > 1:
        return grouped_conv(feats, weight, bias, kmap, layer.transposed, recipe, layer.groups)
    if late:
        return deferred_conv(feats, weight, bias, kmap, layer.transposed, recipe)
    return sparse_conv(feats, weight, bias, kmap, layer.transposed, recipe)


def _fits(layer: Layer, feats: Any, x: SparseTensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether everything is as usual; if not, `_check_operands` says what is wrong."""
    if not isinstance(feats, Tensor) or not isinstance(coords := x.coords, Tensor):
        return False
    shape, sites, kernel = feats.shape, coords.shape, weight.shape
    if len(shape) != 2 or len(sites) != 2:
        return False
    if len(kernel) == 3:
        volume, c_in, c_out = kernel
    elif len(kernel) == 2 and layer.pointwise:
        volume, (c_in, c_out) = 1, kernel
    else:
        return False
    groups = layer.groups
    return (
        volume == layer.volume
        and shape[0] == sites[0]
        and sites[1] == 1 + layer.ndim
        and c_in * groups == shape[1]
        and (groups == 1 or c_out % groups == 0)
        and coords.dtype is torch.int32
        and feats.dtype.is_floating_point
        and weight.dtype.is_floating_point
        and _together(feats, coords, weight)
        and (bias is None or (bias.shape == kernel[-1:] and _together(bias, feats, weight)))
    )


def _together(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether tensors are on one device. Numbers of GPUs are read faster than devices."""
    if a.is_cpu:
        return b.is_cpu and c.is_cpu
    index = a.get_device()
    if index >= 0:
        return b.get_device() == index and c.get_device() == index
    return a.device == b.device == c.device


def find_map(
    ndim: int,
    x: SparseTensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    downsample_mode: str,
    transposed: bool = False,
    generative: bool = False,
    coordinates: SparseTensor | Tensor | None = None,
    network: Hashable = None,
) -> tuple[KernelMap, Level]:
    """The kernel map of a layer on ``x``, and the level that it reaches.

    Layers of one geometry share it, whatever they compute. The level of ``x`` is recorded in its
    cache.

    Args:
        ndim: Spatial axes.
        x: Features [N, C] on [N, 1 + ndim] coordinates, both checked.
        kernel_size, stride, padding, dilation: From `check_parameters`.
        downsample_mode: "spconv" or "minkowski".
        transposed, generative, coordinates: As in `conv3d`.
        network: If given, tells the network that begins here: see `look_ahead`.

    Raises:
        ValueError: Coordinates, a range or a stride that do not fit; an unknown fine level.
    """
    coords = int32_coords(x._caches, x.coords)
    spatial_range = _needed_range(x.spatial_range, ndim)
    x = wrap(x._feats, x, coords, site_stride(x), spatial_range)
    x._caches.record(x.stride, coords, spatial_range)
    if coordinates is not None:
        if generative:
            raise ValueError("`coordinates` cannot be given to a generative convolution")
        geometry = _relation(kernel_size, stride, padding, dilation, downsample_mode)
        if transposed:
            level = _target(x, coordinates, finer(x.stride, stride), stride, ndim)
            return back_onto(x, coords, geometry, level), level
        level = _target(x, coordinates, coarser(x.stride, stride), stride, ndim)
        return onto(x, coords, geometry, level), level
    if network is not None and "ahead" not in x._caches.kmaps and is_served("maps", coords):
        look_ahead(x, coords, network)
    if math.prod(stride) == 1 and not generative:
        kmap = same_sites(x, coords, Geometry.submanifold(kernel_size, dilation))
        return kmap, Level(coords, x.stride, spatial_range)
    kind = "generative" if generative else "strided"
    geometry = Geometry.strided(kernel_size, stride, padding, dilation, downsample_mode, kind)
    if generative:
        return generated(x, coords, geometry)
    if transposed:
        return upsampled(x, coords, geometry)
    kmap = downsampled(x, coords, geometry, downsample_mode)
    return kmap, Level(kmap.out_coords, coarser(x.stride, stride), kmap.spatial_range)


def on_level(
    feats: Tensor | Lazy, like: SparseTensor, level: Level, generative: bool = False
) -> SparseTensor:
    """Features on a level that a map of ``like`` reaches; the cache knows it from now on."""
    out = wrap(feats, like, *level)
    if generative:
        out._caches = _generated_cache(like._caches, level)
    else:
        out._caches.record(*_cmap(level))
    return out


def _relation(
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    downsample_mode: str,
) -> Geometry:
    if math.prod(stride) == 1:
        return Geometry.submanifold(kernel_size, dilation)
    return Geometry.strided(kernel_size, stride, padding, dilation, downsample_mode)


def _target(
    x: SparseTensor,
    coordinates: SparseTensor | Tensor,
    expected: tuple[int, ...],
    stride: tuple[int, ...],
    ndim: int,
) -> Level:
    """The level of the ``expected`` stride that ``coordinates`` describes."""
    if not isinstance(coordinates, SparseTensor):
        _validate.check_coords(coordinates, ndim, "coordinates")
        return Level(int32_coords(TensorCache(), coordinates), expected, None)
    _validate.check_coords(coordinates.coords, ndim, "coordinates")
    if site_stride(coordinates) != expected:
        raise ValueError(
            f"`coordinates` must have stride {expected} for an input of stride {x.stride} and a "
            f"convolution of stride {stride}, got {coordinates.stride}"
        )
    sites = int32_coords(coordinates._caches, coordinates.coords)
    return Level(sites, expected, coordinates.spatial_range)


def _cmap(level: Level) -> tuple[tuple[int, ...], Tensor, tuple[int, ...] | None]:
    return level.stride, level.coords, level.spatial_range


def _generated_cache(cache: TensorCache, level: Level) -> TensorCache:
    """The cache of a generative layer's output: other levels are kept, maps are not."""
    out = TensorCache()
    vars(out).update(cache.extras())
    out.cmaps.update(cache.cmaps)
    out._recorded.update(cache._recorded)
    out.cmaps.pop(level.stride, None)
    out.record(*_cmap(level))
    return out


def check_parameters(
    ndim: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    generative: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The four as D-tuples of valid ints."""
    if isinstance(padding, bool) or (
        isinstance(padding, (list, tuple)) and any(isinstance(p, bool) for p in padding)
    ):
        raise TypeError(f"`padding` must hold ints, got {padding!r}")
    given = {
        "kernel_size": (kernel_size, 1),
        "stride": (stride, 1),
        "padding": (padding, 0),
        "dilation": (dilation, 1),
    }
    found = []
    for name, (value, least) in given.items():
        entries = as_tuple(value, ndim, name, floats=False)
        if min(entries) < least:
            raise ValueError(f"`{name}` must be at least {least} on every axis, got {value!r}")
        found.append(entries)
    if generative and not transposed:
        raise ValueError("generative=True needs transposed=True: it creates finer coordinates")
    return tuple(found)  # pyright: ignore[reportReturnType]


def check_groups(groups: Any, **channels: int) -> int:
    """``groups``, if it is an int of at least 1 that divides each of ``channels``."""
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"`groups` must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"`groups` must be at least 1, got {groups}")
    for name, number in channels.items():
        if number % groups:
            raise ValueError(f"`{name}` must be divisible by groups = {groups}, got {number}")
    return int(groups)


def _check_operands(layer: Layer, x: SparseTensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight as [K, C_in / G, C_out], once everything fits."""
    check_sparse(x)
    _validate.check_feats(x.feats)
    _validate.check_coords(x.coords, layer.ndim)
    _validate.check_rows(x.feats, x.coords)
    _validate.check_same_device(feats=x.feats, coords=x.coords, weight=weight, bias=bias)
    volume, groups = layer.volume, layer.groups
    check_groups(groups, C_in=x.feats.shape[1])
    in_channels = x.feats.shape[1] // groups
    shape = list(weight.shape)
    if volume == 1 and len(shape) == 2:
        weight = weight[None]
    if weight.dim() != 3 or weight.shape[0] != volume or weight.shape[1] != in_channels:
        raise ValueError(
            f"`weight` must have shape [{volume}, {in_channels}, C_out] for kernel size "
            f"{layer.kernel_size} and `feats` {list(x.feats.shape)}"
            f"{f' in {groups} groups' if groups > 1 else ''}, got {shape}"
        )
    check_groups(groups, C_out=weight.shape[2])
    if not weight.is_floating_point():
        raise TypeError(f"`weight` must be floating, got {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[2:]:
        raise ValueError(f"`bias` must have shape [{weight.shape[2]}], got {list(bias.shape)}")
    return weight


def _needed_range(spatial_range: tuple[int, ...] | None, ndim: int) -> tuple[int, ...] | None:
    if spatial_range is None:
        return None
    if len(spatial_range) < 1 + ndim:
        raise ValueError(
            f"`spatial_range` must have {1 + ndim} entries (batch first), got {spatial_range}"
        )
    return spatial_range[: 1 + ndim]
