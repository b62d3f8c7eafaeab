"""Convolution as operators, for programs that are compiled.

Coordinates and features are tensors of such a program, kernel maps are not. They live in a
`TensorCache` beside it, and its operators find them by tokens: empty tensors, one per level, which
go with the coordinates and carry the cache. A token is a shortcut and no part of what is computed:
an operator that gets one without a cache (a copy, say) builds the map from the coordinates.

    token           = begin(coords)                       once per scan
    token', coords' = sites(token, coords, layer)         for each layer that creates a level
    feats'          = conv(feats, weight, bias, fine end, coarse end, layer)

What belongs to a layer, and is known when the program is traced, is one string: see `Plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchsparse._autograd.conv import conv_feats_grad, conv_forward, conv_weight_grad
from torchsparse._autograd.depthwise import grouped_conv, grouped_feats_grad, grouped_weight_grad
from torchsparse._cache import TensorCache
from torchsparse._compiling import operator, with_gradient, without_second_gradient
from torchsparse._geometry import Geometry
from torchsparse._kernel_map import KernelMap
from torchsparse._recipe import Dataflow, sum_dtype
from torchsparse.nn.functional.conv.choices import resolve_for
from torchsparse.nn.functional.conv.mapping import (
    Level,
    between,
    downsampled,
    generated,
    int32_coords,
    same_sites,
)
from torchsparse.tensor import SparseTensor

__all__ = [
    "as_int32",
    "begin",
    "conv",
    "conv_feats_grad_op",
    "conv_weight_grad_op",
    "encode",
    "sites",
]


# ------------------------------------------------------------------ what a layer is
class Plan(NamedTuple):
    """A layer on a level, as far as it is known when a program is traced."""

    geometry: Geometry
    rule: str  # of the coarse sites: "spconv", "minkowski", "given"
    stride: tuple[int, ...]  # tensor stride of the layer's input
    transposed: bool
    groups: int
    config: dict[str, Any]


# What a configuration may hold that matters, and how it is read from a word.
_READERS: dict[str, Any] = {
    "dataflow": lambda word: Dataflow(int(word)),
    "ifsort": lambda word: word == "True",
    "split_mask_num": int,
    "split_mask_num_bwd": int,
    "kmap_mode": str,
    "downsample_mode": str,
    "auto": lambda word: word == "True",
}


def encode(
    kind: str,
    kernel_size: tuple[int, ...],
    step: tuple[int, ...],
    dilation: tuple[int, ...],
    offset: tuple[int, ...],
    rule: str,
    stride: tuple[int, ...],
    transposed: bool,
    groups: int,
    config: Mapping[str, Any] | None,
) -> str:
    """A `Plan` as a string, in operations that a compiler can follow."""
    sizes = [
        "x".join([str(index(n)) for n in entries])  # others than plain numbers: another program
        for entries in (kernel_size, step, dilation, offset, stride)
    ]
    words = [kind, *sizes, rule, "transposed" if transposed else "plain", str(groups)]
    if config is not None:
        for name in _READERS:
            if name in config:
                value = config[name]
                words.append(f"{name}={value.value if name == 'dataflow' else value}")
    return " ".join(words)


@lru_cache(maxsize=4096)
def _decode(layer: str) -> Plan:
    kind, *sizes, rule, transposed, groups = layer.split()[:9]
    kernel_size, step, dilation, offset, stride = (
        tuple(map(int, entries.split("x"))) for entries in sizes
    )
    pairs = (word.partition("=") for word in layer.split()[9:])
    config = {name: _READERS[name](value) for name, _, value in pairs}
    geometry = Geometry(kind, kernel_size, step, dilation, offset)  # pyright: ignore[reportArgumentType]
    return Plan(geometry, rule, stride, transposed == "transposed", int(groups), config)


# ------------------------------------------------------------------ where maps are found
class _Place(NamedTuple):
    """A level of a scan, in the cache of its maps.

    The compiler may use the memory of coordinates again once the program has read them. So these
    are copies, which no program ever sees.
    """

    cache: TensorCache
    coords: Tensor


# Scans whose maps are kept for another run over them, as long as their coordinates live. Few: a
# data set that stays in memory would keep the maps of all its scans.
MOST_SCANS = 4
_scans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _token(place: _Place) -> Tensor:
    token = torch.empty(0, dtype=torch.int64)
    token._torchsparse_place = place  # pyright: ignore[reportAttributeAccessIssue]
    return token


def _place(token: Tensor, coords: Tensor) -> _Place:
    """Where a level is, by its token; a new place for coordinates whose token is a copy."""
    return getattr(token, "_torchsparse_place", None) or _Place(TensorCache(), coords)


def _at(place: _Place, stride: tuple[int, ...], limits: list[int]) -> SparseTensor:
    """A tensor without features there."""
    out = object.__new__(SparseTensor)
    out.coords, out.stride, out._caches = place.coords, stride, place.cache
    out.spatial_range = tuple(limits) or None
    return out


def _map(plan: Plan, ends: _Ends) -> KernelMap:
    """The map of a layer; built by the first that asks."""
    fine = _place(ends.fine_token, ends.fine)
    same = ends.fine_token is ends.coarse_token or ends.fine is ends.coarse
    coarse = fine if same else _place(ends.coarse_token, ends.coarse)
    maps = fine.cache.kmaps
    key = (plan.geometry, id(fine.coords), id(coarse.coords))
    kmap = maps.get(key)
    if kmap is None:
        step, stride = plan.geometry.stride, plan.stride
        if plan.transposed:
            stride = tuple(max(1, a // b) for a, b in zip(stride, step))
        if plan.geometry.kind == "submanifold" and coarse.coords is fine.coords:
            kmap = same_sites(_at(fine, stride, ends.fine_limits), fine.coords, plan.geometry)
        else:
            below = Level(fine.coords, stride, tuple(ends.fine_limits) or None)
            stride = tuple(a * b for a, b in zip(stride, step))
            above = Level(coarse.coords, stride, tuple(ends.coarse_limits) or None)
            kmap = between(fine.cache, below, above, plan.geometry)
        maps[key] = kmap
    return kmap


class _Ends(NamedTuple):
    """The two levels of a layer, as operators get them."""

    fine_token: Tensor
    fine: Tensor
    fine_limits: list[int]  # its spatial range; [] = None
    coarse_token: Tensor
    coarse: Tensor
    coarse_limits: list[int]


_ENDS = (
    "Tensor fine_token, Tensor fine, SymInt[] fine_limits, "
    "Tensor coarse_token, Tensor coarse, SymInt[] coarse_limits"
)


# ------------------------------------------------------------------ levels
def _fake_begin(coords: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@operator("begin(Tensor coords) -> Tensor", _fake_begin)
def begin(coords: Tensor) -> Tensor:
    """A token for the level that a program starts with.

    Args:
        coords: [N, 1 + D] int32.

    Returns:
        [0] int64 on the CPU. The maps of an earlier run over this very tensor are found again.
    """
    known = _scans.pop(coords, None)
    # Somebody may have written to it: a program, too, whose memory is used again, uncounted.
    if known is None or not torch.equal(known.coords, coords):
        known = _Place(TensorCache(), coords.clone())
    while len(_scans) >= MOST_SCANS:
        _scans.pop(next(iter(_scans)), None)  # the one that was not used for longest
    _scans[coords] = known
    return _token(known)


def _fake_int32(coords: Tensor) -> Tensor:
    return torch.empty_like(coords, dtype=torch.int32)


@operator("as_int32(Tensor coords) -> Tensor", _fake_int32)
def as_int32(coords: Tensor) -> Tensor:
    """Coordinates as int32, once they are known to fit.

    Args:
        coords: [N, 1 + D] integers of another type.

    Raises:
        ValueError: A coordinate that does not fit (noticed later on a GPU).
    """
    return int32_coords(TensorCache(), coords)


def _fake_sites(
    token: Tensor, coords: Tensor, limits: list[int], layer: str
) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(0, dtype=torch.int64), coords.new_empty((rows, coords.shape[1]))


@operator(
    "sites(Tensor token, Tensor coords, SymInt[] limits, str layer) -> (Tensor, Tensor)",
    _fake_sites,
)
def sites(token: Tensor, coords: Tensor, limits: list[int], layer: str) -> tuple[Tensor, Tensor]:
    """The level that a strided or generative layer creates. Waits for the device.

    Args:
        token, coords: Of its input, [0] and [N, 1 + D] int32.
        limits: The spatial range of its input; [] = None.
        layer: From `encode`.

    Returns:
        Token and coordinates of that level, [0] int64 and [M, 1 + D] int32.

    Raises:
        ValueError: Duplicate, negative or out-of-range coordinates (noticed later on a GPU).
    """
    plan, place = _decode(layer), _place(token, coords)
    x = _at(place, plan.stride, limits)
    if plan.geometry.kind == "generative":
        kmap, _ = generated(x, place.coords, plan.geometry)
        created = kmap.in_coords
    else:
        kmap = downsampled(x, place.coords, plan.geometry, plan.rule)
        created = kmap.out_coords
    place.cache.kmaps[plan.geometry, id(kmap.in_coords), id(kmap.out_coords)] = kmap
    return _token(_Place(place.cache, created)), created.clone()


# ------------------------------------------------------------------ features
def _fake_conv(feats: Tensor, weight: Tensor, bias: Tensor | None, *ends_and_layer: Any) -> Tensor:
    ends, transposed = _Ends(*ends_and_layer[:-1]), _decode(ends_and_layer[-1]).transposed
    rows = (ends.fine if transposed else ends.coarse).shape[0]
    return feats.new_empty((rows, weight.shape[2]))


@operator(
    f"conv(Tensor feats, Tensor weight, Tensor? bias, {_ENDS}, str layer) -> Tensor", _fake_conv
)
def conv(feats: Tensor, weight: Tensor, bias: Tensor | None, *ends_and_layer: Any) -> Tensor:
    """Convolve features from one level to another.

    Args:
        feats: [N, C_in] floating, in the dtype of the result.
        weight: [K, C_in / G, C_out] floating.
        bias: [C_out] or None.
        *ends_and_layer: Token, coordinates [., 1 + D] int32 and spatial range of the fine level,
            the same of the coarse one, the layer from `encode`.

    Returns:
        [M, C_out] in the dtype of feats. Differentiable in feats, weight and bias.

    Raises:
        ValueError: Coordinates that do not fit (noticed later on a GPU).
    """
    plan = _decode(ends_and_layer[-1])
    kmap = _map(plan, _Ends(*ends_and_layer[:-1]))
    recipe = resolve_for(plan.config or None, feats.dtype, feats.device)
    with torch.no_grad():
        if plan.groups == 1:
            return conv_forward(feats, weight, bias, kmap, plan.transposed, recipe)
        return grouped_conv(feats, weight, bias, kmap, plan.transposed, recipe, plan.groups)


def _fake_feats_grad(grad: Tensor, weight: Tensor, *ends_and_layer: Any) -> Tensor:
    ends, plan = _Ends(*ends_and_layer[:-1]), _decode(ends_and_layer[-1])
    rows = (ends.coarse if plan.transposed else ends.fine).shape[0]
    return grad.new_empty((rows, weight.shape[1] * plan.groups))


@operator(
    f"conv_feats_grad(Tensor grad, Tensor weight, {_ENDS}, str layer) -> Tensor", _fake_feats_grad
)
def conv_feats_grad_op(grad: Tensor, weight: Tensor, *ends_and_layer: Any) -> Tensor:
    """The gradient of `conv` with respect to its features, from that of its result.

    Args:
        grad: [M, C_out].
        weight: [K, C_in / G, C_out].
        *ends_and_layer: Of the call.

    Returns:
        [N, C_in] in the dtype of grad.
    """
    plan = _decode(ends_and_layer[-1])
    kmap = _map(plan, _Ends(*ends_and_layer[:-1]))
    recipe = resolve_for(plan.config or None, grad.dtype, grad.device)
    with torch.no_grad():
        if plan.groups == 1:
            found = conv_feats_grad(grad, weight, kmap, plan.transposed, recipe)
        else:
            found = grouped_feats_grad(grad, weight, kmap, plan.transposed, recipe, plan.groups)
    return found.to(grad.dtype)


def _fake_weight_grad(feats: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    *_, layer, dtype = rest
    plan = _decode(layer)
    channels = feats.shape[1] // plan.groups
    return feats.new_empty((plan.geometry.volume, channels, grad.shape[1]), dtype=dtype)


@operator(
    f"conv_weight_grad(Tensor feats, Tensor grad, {_ENDS}, str layer, ScalarType dtype) -> Tensor",
    _fake_weight_grad,
)
def conv_weight_grad_op(feats: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    """The gradient of `conv` with respect to its weight, from that of its result.

    Args:
        feats: [N, C_in].
        grad: [M, C_out], in the dtype of feats.
        *rest: Ends and layer of the call, and the dtype of the weight.

    Returns:
        [K, C_in / G, C_out] in that dtype, summed in float32 or better.
    """
    *ends, layer, dtype = rest
    plan = _decode(layer)
    kmap = _map(plan, _Ends(*ends))
    recipe = resolve_for(plan.config or None, feats.dtype, feats.device)
    with torch.no_grad():
        if plan.groups == 1:
            found = conv_weight_grad(feats, grad, kmap, plan.transposed, recipe)
        else:
            found = grouped_weight_grad(feats, grad, kmap, plan.transposed, recipe, plan.groups)
    return found.to(dtype).contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, weight, bias, *ends, layer = inputs
    tensors = [end for end in ends if isinstance(end, Tensor)]
    by_feats, by_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(feats if by_weight else None, weight if by_feats else None, *tensors)
    ctx.limits = [end for end in ends if not isinstance(end, Tensor)]
    ctx.layer, ctx.weight_dtype = layer, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    feats, weight, fine_token, fine, coarse_token, coarse = ctx.saved_tensors
    ends = _Ends(fine_token, fine, ctx.limits[0], coarse_token, coarse, ctx.limits[1])
    grad_feats = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_feats = conv_feats_grad_op(grad, weight, *ends, ctx.layer)
    if ctx.needs_input_grad[1]:
        grad_weight = conv_weight_grad_op(feats, grad, *ends, ctx.layer, ctx.weight_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0, dtype=sum_dtype(grad.dtype)).to(ctx.bias_dtype)
    return grad_feats, grad_weight, grad_bias, *(None,) * len(ends), None


with_gradient(conv, _backward, _save)
without_second_gradient(conv_feats_grad_op)
without_second_gradient(conv_weight_grad_op)
