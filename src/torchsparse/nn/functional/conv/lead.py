"""Where a layer leads while a program is traced: levels as variables of the program.

What `conv` and `mapping` find at run time in the cache of a tensor is decided here from the
`Trail` of levels that the program has come through; the rest is left to the operators of
`traced`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._autograd.conv import pointwise
from torchsparse._autograd.depthwise import grouped_pointwise
from torchsparse._cache import Step, Traced, Trail
from torchsparse._settings import settings
from torchsparse._validate import check_coords, check_feats, check_rows, check_same_device
from torchsparse.nn.functional.conv import traced
from torchsparse.nn.functional.conv.choices import compute_dtype
from torchsparse.tensor import SparseTensor, wrap

__all__ = ["Layer", "can_trace", "trace_layer"]

Sizes = tuple[int, ...]
Extents = tuple[int, ...] | None


class Layer(NamedTuple):
    """The parameters of a layer that decide where it leads; D-tuples."""

    kernel_size: Sizes
    step: Sizes  # its stride
    padding: Sizes
    dilation: Sizes
    transposed: bool
    generative: bool
    groups: int


def can_trace(layer: Layer, x: SparseTensor, onto: bool) -> bool:
    """Whether what `trace_layer` must know of ``x`` is known while a program is traced.

    A transposed layer returns along the way on which compiled layers came, not onto sites that
    are given.
    """
    if layer.transposed and onto:
        return False
    if not layer.transposed or layer.generative or math.prod(layer.step) == 1:
        return True
    if not isinstance(x._caches, Trail):
        return False
    return any(level.coords is x.coords for level in x._caches.levels)


def trace_layer(
    layer: Layer,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None,
    config: Mapping[str, Any] | None,
    coordinates: SparseTensor | Tensor | None,
) -> SparseTensor:
    """Convolve ``x`` in a program that is being traced.

    Args:
        layer: Its parameters.
        x: [N, C_in] features on [N, 1 + D] coordinates.
        weight: [K, C_in / groups, C_out], or without its first axis for K = 1.
        bias, config, coordinates: As in `conv3d`.

    Returns:
        As `conv3d`. Its cache is a `Trail`, not that of ``x``.

    Raises:
        ValueError, TypeError: As `conv3d`, for what is known without data.
    """
    feats, groups = x.feats, layer.groups
    _check(layer, feats, x.coords, weight, bias)
    dtype = compute_dtype(feats, weight, bias)
    if math.prod(layer.kernel_size) * math.prod(layer.step) == 1 and coordinates is None:
        matrix = weight if weight.dim() == 2 else weight[0]
        if groups == 1:
            feats = pointwise(feats, matrix, bias, dtype)
        else:
            feats = grouped_pointwise(feats, matrix, bias, dtype, groups)
        return wrap(feats, x, _int32(x.coords), x.stride, x.spatial_range)
    trail, here = _arrive(x)
    trail, fine, coarse, plan = _lead(layer, trail, here, coordinates, config)
    feats = traced.conv(
        feats.to(dtype),
        weight[None] if weight.dim() == 2 else weight,
        bias,
        fine.token,
        fine.coords,
        list(fine.spatial_range or ()),
        coarse.token,
        coarse.coords,
        list(coarse.spatial_range or ()),
        plan,
    )
    there = fine if layer.transposed else coarse
    out = wrap(feats, x, there.coords, there.stride, there.spatial_range)
    out._caches = trail
    return out


def _lead(
    layer: Layer,
    trail: Trail,
    here: Traced,
    coordinates: SparseTensor | Tensor | None,
    config: Mapping[str, Any] | None,
) -> tuple[Trail, Traced, Traced, str]:
    """The trail behind a layer, its fine and its coarse level, and what its operators are told."""
    still = math.prod(layer.step) == 1 and not layer.generative
    rule = _downsample_mode(config)
    offset = _offset(layer, still, rule)
    kind = "submanifold" if still else "generative" if layer.generative else "strided"
    fine = coarse = here
    if coordinates is not None:
        coarse = _target(here, coordinates, layer.step)
        trail = _joined(trail, coarse)
        return trail, fine, coarse, _told(kind, layer, offset, rule, here, config)
    if layer.transposed and kind == "strided":
        fine, offset = _back(layer, trail, here, offset)
        return trail, fine, coarse, _told(kind, layer, offset, rule, here, config)
    plan = _told(kind, layer, offset, rule, here, config)
    if layer.generative:
        fine = _created(here, _finer(here.stride, layer.step), _times(here, layer.step), plan)
        trail = _joined(Trail(trail.levels), fine)
    elif not still:
        stride = tuple([a * b for a, b in zip(here.stride, layer.step)])
        coarse = _created(here, stride, _over(here, layer, offset, rule), plan)
        step = Step(layer.kernel_size, layer.step, layer.dilation, offset, here, coarse)
        trail = _joined(Trail(trail.levels, (*trail.steps, step)), coarse)
    return trail, fine, coarse, plan


def _told(
    kind: str,
    layer: Layer,
    offset: Sizes,
    rule: str,
    here: Traced,
    config: Mapping[str, Any] | None,
) -> str:
    return traced.encode(
        kind, layer.kernel_size, layer.step, layer.dilation, offset, rule, here.stride,
        layer.transposed, layer.groups, config,
    )  # fmt: skip


# ------------------------------------------------------------------ checks and choices
def _check(
    layer: Layer, feats: Tensor, coords: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    check_feats(feats)
    check_coords(coords, len(layer.kernel_size))
    check_rows(feats, coords)
    check_same_device(feats=feats, coords=coords, weight=weight, bias=bias)
    volume, groups, shape = math.prod(layer.kernel_size), layer.groups, list(weight.shape)
    if volume == 1 and len(shape) == 2:
        shape = [1, *shape]
    if len(shape) != 3 or shape[0] != volume or shape[1] * groups != feats.shape[1]:
        raise ValueError(
            f"`weight` must have shape [{volume}, {feats.shape[1] // groups}, C_out], "
            f"got {list(weight.shape)}"
        )
    if shape[2] % groups:
        raise ValueError(f"C_out must be divisible by groups = {groups}, got {shape[2]}")
    if bias is not None and list(bias.shape) != shape[2:]:
        raise ValueError(f"`bias` must have shape [{shape[2]}], got {list(bias.shape)}")


def _downsample_mode(config: Mapping[str, Any] | None) -> str:
    for source in (config, settings.conv_config):
        if source is not None and "downsample_mode" in source:
            return source["downsample_mode"]
    return settings.downsample_mode


def _offset(layer: Layer, still: bool, rule: str) -> Sizes:
    """The offset of `Geometry.submanifold` or `Geometry.strided`."""
    pairs = zip(layer.kernel_size, layer.dilation)
    if still:
        odd = math.prod(layer.kernel_size) % 2
        return tuple([d * (k - 1) // 2 if odd else 0 for k, d in pairs])
    if rule == "minkowski":
        return tuple([d * ((k - 1) // 2) for k, d in pairs])
    return layer.padding


# ------------------------------------------------------------------ levels
def _arrive(x: SparseTensor) -> tuple[Trail, Traced]:
    """The levels that ``x`` came through, and its own."""
    coords, trail = x.coords, x._caches
    axes = coords.shape[1] - 1
    # Plain numbers: for others, another program is traced.
    stride = tuple([operator.index(entry) for entry in x.stride[:axes]])
    extents = None if x.spatial_range is None else x.spatial_range[: 1 + axes]
    if extents is not None and len(extents) < 1 + axes:
        raise ValueError(f"`spatial_range` must have {1 + axes} entries, got {len(extents)}")
    if not isinstance(trail, Trail):
        trail = Trail()
    for level in trail.levels:
        if level.coords is coords and level.stride == stride:
            return trail, Traced(coords, stride, extents, level.token)
    coords = _int32(coords)
    here = Traced(coords, stride, extents, traced.begin(coords))
    return _joined(trail, here), here


def _int32(coords: Tensor) -> Tensor:
    return coords if coords.dtype == torch.int32 else traced.as_int32(coords)


def _joined(trail: Trail, level: Traced) -> Trail:
    """The trail with a level, in place of another one of its stride."""
    others = [other for other in trail.levels if other.stride != level.stride]
    return Trail((*others, level), trail.steps)


def _created(here: Traced, stride: Sizes, extents: Extents, plan: str) -> Traced:
    """The level that a layer creates."""
    token, coords = traced.sites(here.token, here.coords, list(here.spatial_range or ()), plan)
    return Traced(coords, stride, extents, token)


def _target(here: Traced, coordinates: SparseTensor | Tensor, step: Sizes) -> Traced:
    """The level that ``coordinates`` describes."""
    expected = tuple([a * b for a, b in zip(here.stride, step)])
    if not isinstance(coordinates, SparseTensor):
        check_coords(coordinates, len(step), "coordinates")
        coords = _int32(coordinates)
        return Traced(coords, expected, None, traced.begin(coords))
    check_coords(coordinates.coords, len(step), "coordinates")
    _, level = _arrive(coordinates)
    if level.stride != expected:
        raise ValueError(
            f"`coordinates` must have stride {expected} for an input of stride {here.stride} and "
            f"a convolution of stride {step}, got {coordinates.stride}"
        )
    return level


def _back(layer: Layer, trail: Trail, here: Traced, own: Sizes) -> tuple[Traced, Sizes]:
    """The fine level that a transposed layer returns to, and its offset there.

    The rules are those of `mapping.upsampled`.
    """
    if any(a % b for a, b in zip(here.stride, layer.step)):
        raise ValueError(
            f"the tensor's stride must be divisible by the stride of a transposed convolution, "
            f"got {here.stride} and {layer.step}"
        )
    stride = _finer(here.stride, layer.step)
    fine = offset = None
    for step in trail.steps:
        if step.fine.stride == stride and step.stride == layer.step:
            ends_here = step.coarse.coords is here.coords
            if ends_here and fine is None:
                fine = step.fine
            if step.kernel_size == layer.kernel_size and step.dilation == layer.dilation:
                if ends_here or offset is None:
                    offset = step.offset
    for level in trail.levels:
        if fine is None and level.stride == stride:
            fine = level
    if fine is None:
        raise ValueError(
            f"a transposed convolution from stride {here.stride} needs the coordinates at stride "
            f"{stride}, which this program has not been at. Use generative=True to create them"
        )
    return fine, own if offset is None else offset


def _finer(stride: Sizes, step: Sizes) -> Sizes:
    return tuple([max(1, a // b) for a, b in zip(stride, step)])


def _times(here: Traced, step: Sizes) -> Extents:
    """The range of a level whose lattice is finer."""
    if here.spatial_range is None:
        return None
    batch, *extents = here.spatial_range
    return (batch, *[r * s for r, s in zip(extents, step)])


def _over(here: Traced, layer: Layer, offset: Sizes, rule: str) -> Extents:
    """The range of a level that a strided layer creates."""
    if here.spatial_range is None:
        return None
    batch, *extents = here.spatial_range
    if rule == "minkowski":
        return (batch, *[(r - 1) // s + 1 for r, s in zip(extents, layer.step)])
    out = [
        (r + 2 * p - d * (k - 1) - 1) // s + 1
        for r, k, s, p, d in zip(extents, layer.kernel_size, layer.step, offset, layer.dilation)
    ]
    return (batch, *out)
