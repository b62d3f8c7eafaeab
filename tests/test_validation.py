"""Bad input is refused in words: what was expected, and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchsparse
from tests import clouds
from tests.cases import convolve, raises_on_data, sparse, weight
from tests.oracles import Layer
from torchsparse import SparseTensor, operators
from torchsparse import nn as spnn
from torchsparse.nn import functional as F
from torchsparse.nn.utils import fapply

LAYERS = [Layer.of(3), Layer.of(2), Layer.of(2, 2), Layer.of(3, 2, 1)]


def rows(device: torch.device, *values: tuple[int, int, int, int]) -> SparseTensor:
    coords = torch.tensor(values, dtype=torch.int32, device=device).reshape(-1, 4)
    return SparseTensor(torch.ones(len(values), 3, dtype=torch.float64, device=device), coords)


# Static: shapes and dtypes, at the call, both values in the message.


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(
    ("shape", "fragment"), [((61,), "[61]"), ((61, 3, 1), "[61, 3, 1]"), ((61, 4), "[61, 4]")]
)
def test_shape_of_feats(
    shape: tuple[int, ...], fragment: str, kernel_size: int, device: torch.device
) -> None:
    x = sparse(device)
    x.feats = torch.ones(shape, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="feat") as caught:
        F.conv3d(x, weight(device, kernel_size**3), kernel_size)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("kernel_size", "shape", "expected"),
    [
        (3, (27, 2, 3), "27, 3"),
        (3, (3, 2), "27, 3"),
        (3, (8, 3, 2), "27, 3"),
        (2, (27, 3, 2), "8, 3"),
        (1, (2, 3, 2), "1, 3"),
        ((3, 1, 2), (3, 1, 2, 3, 2), "6, 3"),
    ],
)
def test_shape_of_weight(
    kernel_size: Any, shape: tuple[int, ...], expected: str, device: torch.device
) -> None:
    kernel = torch.ones(shape, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="weight") as caught:
        F.conv3d(sparse(device), kernel, kernel_size)
    text = str(caught.value)
    assert ", ".join(str(v) for v in shape) in text  # what came
    assert expected in text  # K and C_in, as they should be


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_shape_of_bias(kernel_size: int, device: torch.device) -> None:
    bias = torch.ones(3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="bias") as caught:
        F.conv3d(sparse(device), weight(device, kernel_size**3), kernel_size, bias)
    assert "2" in str(caught.value) and "3" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int64], ids=str)
def test_feats_must_be_floating(dtype: torch.dtype, device: torch.device) -> None:
    x = sparse(device)
    x.feats = torch.ones(61, 3, dtype=dtype, device=device)
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        F.conv3d(x, weight(device, 27), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_coords_must_be_integers(dtype: torch.dtype, device: torch.device) -> None:
    """The hint: feats come first; floor and cast."""
    x = sparse(device)
    x.coords = x.coords.to(dtype)
    with pytest.raises(TypeError, match="feats") as caught:
        F.conv3d(x, weight(device, 27), 3)
    assert "floor" in str(caught.value)
    assert str(dtype).removeprefix("torch.") in str(caught.value)


def test_swapped_arguments_get_the_hint(device: torch.device) -> None:
    x = sparse(device)
    with pytest.raises((TypeError, ValueError), match="feats"):
        F.conv3d(SparseTensor(x.coords, x.feats), weight(device, 27), 3)


INTEGERS = [
    torch.uint8, torch.int8, torch.int16, torch.int64, torch.uint16, torch.uint32, torch.uint64
]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, Layer.of(1)], ids=str)
def test_other_integers_are_converted(
    layer: Layer, dtype: torch.dtype, device: torch.device
) -> None:
    x = sparse(device)
    want = convolve(layer, x, weight(device, layer.volume))
    other = SparseTensor(x.feats, x.coords.to(dtype))
    y = convolve(layer, other, weight(device, layer.volume))
    assert y.coords.dtype == torch.int32 and torch.equal(y.coords, want.coords)
    assert torch.equal(y.feats, want.feats)


def _samples(x: SparseTensor) -> Tensor:
    return torch.cat(x.decompose()[1])


# What reads coordinates without a convolution.
READERS: dict[str, Callable[[SparseTensor], Tensor]] = {
    "dense": lambda x: x.dense(),
    "coo": lambda x: x.to_sparse_coo().to_dense(),
    "decompose": _samples,
    "samples": lambda x: x.samples([1, 0]).feats,
    "spcrop": lambda x: F.spcrop(x, 1, 5).feats,
    "global_avg_pool": F.global_avg_pool,
    "GroupNorm": lambda x: spnn.GroupNorm(3, 3).to(x.feats.device, x.feats.dtype)(x).feats,
    "align": lambda x: operators.align(x, x)[0].feats,
    "prune": lambda x: operators.prune(x, x.feats[:, 0] > 0).feats,
    "spdownsample": lambda x: F.spdownsample(x.coords),
    "build_kernel_map": lambda x: F.build_kernel_map(x.coords, len(x.coords), 3, 1)["nbmaps"],
    "spcount": lambda x: F.spcount(x.coords[:, 1], 8),
    "spvoxelize": lambda x: F.spvoxelize(
        x.feats, x.coords[:, 0], torch.full((2,), 2, dtype=torch.int32, device=x.feats.device)
    ),
    "coordinates": lambda x: F.conv3d(
        SparseTensor(x.feats, x.coords.int()), weight(x.feats.device, 8), 2, stride=2,
        coordinates=x.coords,
    ).feats,
}  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_other_integers_are_read(reader: str, dtype: torch.dtype, device: torch.device) -> None:
    coords = torch.tensor(
        [(0, 0, 0, 0), (0, 2, 3, 4), (1, 6, 1, 5), (1, 2, 3, 4)], dtype=torch.int32, device=device
    )
    feats = torch.arange(-5.0, 7.0, dtype=torch.float64, device=device).reshape(4, 3)
    want = READERS[reader](SparseTensor(feats, coords, 1, (2, 8, 8, 8)))
    got = READERS[reader](SparseTensor(feats, coords.to(dtype), 1, (2, 8, 8, 8)))
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_dense_has_a_gradient_on_other_integers(dtype: torch.dtype, device: torch.device) -> None:
    feats = torch.ones(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    coords = torch.tensor([(0, 1, 2, 3), (0, 3, 2, 1)], device=device).to(dtype)
    grid = SparseTensor(feats, coords, 1, (1, 4, 4, 4)).dense()
    factor = torch.arange(grid.numel(), dtype=torch.float64, device=device).view_as(grid)
    (grid * factor).sum().backward()
    assert feats.grad is not None
    assert torch.equal(feats.grad, torch.stack([factor[0, 1, 2, 3], factor[0, 3, 2, 1]]))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int64, 2**31),
        (torch.int64, -(2**31) - 1),
        (torch.int64, 2**32 + 1),
        (torch.uint32, 2**31),
        (torch.uint32, 2**32 - 1),
        (torch.uint64, 2**31),
        (torch.uint64, 2**63 - 1),
        (torch.uint64, 2**63 + 5),
        (torch.uint64, 2**64 - 1),  # as int64 it would be -1
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_integers_that_do_not_fit(
    dtype: torch.dtype, value: int, kernel_size: int, device: torch.device
) -> None:
    numbers = np.array([(0, 1, 2, 3), (0, 1, 2, value)], str(dtype).removeprefix("torch."))
    coords = torch.from_numpy(numbers).to(device)
    x = SparseTensor(torch.ones(2, 3, dtype=torch.float64, device=device), coords)
    detail = str(value) if device.type == "cpu" else ""
    with raises_on_data(ValueError, f"must fit into int32.*{detail}"):
        F.conv3d(x, weight(device, kernel_size**3), kernel_size)


def test_dense_of_integers_that_do_not_fit(device: torch.device) -> None:
    numbers = np.array([(0, 1, 2, 3), (0, 1, 2, 2**64 - 1)], np.uint64)
    x = SparseTensor(torch.ones(2, 3, device=device), torch.from_numpy(numbers).to(device))
    x.spatial_range = (1, 4, 4, 4)
    with raises_on_data(ValueError, "int32|inside the dense tensor's"):
        x.dense()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_coordinates_beyond_int32(layer: Layer, device: torch.device) -> None:
    x = sparse(device)
    x.coords = x.coords.long()
    x.coords[3, 2] = 2**32 + 1  # 1, when cut to 32 bits
    with raises_on_data(ValueError, "int32|32-bit"):
        convolve(layer, x, weight(device, layer.volume))


@pytest.mark.parametrize("shape", [(61, 3), (61, 5), (61,)])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_shape_of_coords(layer: Layer, shape: tuple[int, ...], device: torch.device) -> None:
    x = sparse(device)
    x.coords = torch.zeros(shape, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="coords") as caught:
        convolve(layer, x, weight(device, layer.volume))
    assert ", ".join(str(v) for v in shape) in str(caught.value)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_of_feats_and_coords(layer: Layer, device: torch.device) -> None:
    x = sparse(device)
    x.feats = x.feats[:60]
    with pytest.raises(ValueError) as caught:
        convolve(layer, x, weight(device, layer.volume))
    assert "60" in str(caught.value) and "61" in str(caught.value)


@pytest.mark.parametrize("which", ["coords", "weight", "feats"])
def test_devices_must_agree(which: str) -> None:
    """The meta device stands for any other one."""
    x, kernel = sparse(torch.device("cpu")), weight(torch.device("cpu"), 27)
    if which == "weight":
        kernel = kernel.to("meta")
    else:
        setattr(x, which, getattr(x, which).to("meta"))
    with pytest.raises(ValueError, match="device") as caught:
        F.conv3d(x, kernel, 3)
    assert "meta" in str(caught.value) and "cpu" in str(caught.value)


# Static: sizes.


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [(1, 2), (1, 2, 3, 4), (), 1.5, "3", (1.5, 2, 2), None])
def test_sizes_are_one_or_three_ints(name: str, value: Any, device: torch.device) -> None:
    sizes: dict[str, Any] = {"kernel_size": 2, "stride": 1, "padding": 0, "dilation": 1}
    sizes[name] = value
    with pytest.raises(ValueError, match=name):
        F.conv3d(sparse(device), weight(device, 8), **sizes)
    with pytest.raises(ValueError, match=name):
        spnn.Conv3d(3, 2, **sizes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel_size", 0),
        ("kernel_size", (2, -1, 2)),
        ("stride", 0),
        ("stride", (1, 1, -2)),
        ("dilation", 0),
        ("dilation", (1, 0, 1)),
        ("padding", -1),
        ("padding", (0, 0, -3)),
    ],
)
def test_sizes_have_a_least_value(name: str, value: Any, device: torch.device) -> None:
    sizes: dict[str, Any] = {"kernel_size": 2, "stride": 1, "padding": 0, "dilation": 1}
    sizes[name] = value
    worst = str(min(value) if isinstance(value, tuple) else value)
    for call in (
        lambda: F.conv3d(sparse(device), weight(device, 8), **sizes),
        lambda: spnn.Conv3d(3, 2, **sizes),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            call()
        assert worst in str(caught.value)


FLOATS = [2.0, 2.5, (2, 2.0, 2), np.float64(2), np.full(3, 2.0), torch.tensor(2.0)]


@pytest.mark.parametrize("value", FLOATS, ids=repr)
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_sizes_are_no_floats(name: str, value: Any, device: torch.device) -> None:
    """Not even whole ones: they come out of a division that was meant to be another."""
    sizes: dict[str, Any] = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1}
    sizes[name] = value
    for call in (
        lambda: F.conv3d(sparse(device), weight(device, 8), **sizes),
        lambda: F.max_pool3d(sparse(device), **sizes),
        lambda: spnn.Conv3d(3, 2, **sizes),
        lambda: spnn.MaxPool3d(**sizes),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must be one int or .*, got 2\.[05]"):
            call()


@pytest.mark.parametrize(
    "value",
    [np.int64(2), np.uint8(2), np.full(3, 2), torch.tensor(2), torch.full((3,), 2), [2, 2, 2],
     (np.int32(2), torch.tensor(2), 2)],
    ids=repr,
)  # fmt: skip
def test_sizes_may_be_ints_of_any_kind(value: Any, device: torch.device) -> None:
    layer = spnn.Conv3d(3, 2, value, value, padding=value, dilation=value)
    assert layer.kernel_size == layer.stride == layer.padding == layer.dilation == (2, 2, 2)
    assert type(layer.kernel_size[0]) is type(layer.stride[0]) is int
    x, kernel = sparse(device), weight(device, 8)
    want = F.conv3d(x, kernel, 2, stride=2, padding=2, dilation=2)
    got = F.conv3d(x, kernel, value, stride=value, padding=value, dilation=value)
    assert got.stride == (2, 2, 2) and torch.equal(got.feats, want.feats)


@pytest.mark.parametrize("padding", [True, False, (True, 0, 0)])
def test_padding_is_no_bool(padding: Any, device: torch.device) -> None:
    with pytest.raises(TypeError, match="padding"):
        F.conv3d(sparse(device), weight(device, 27), 3, None, 2, padding)
    with pytest.raises(TypeError, match="padding"):
        spnn.Conv3d(3, 2, 3, 2, padding)


def test_a_range_smaller_than_the_kernel(device: torch.device) -> None:
    """r' = (3 + 0 - 4 - 1) // 2 + 1 = 0 along z."""
    x = rows(device, (0, 1, 1, 1))
    x.spatial_range = (1, 9, 9, 3)
    with pytest.raises(ValueError, match="range") as caught:
        F.conv3d(x, weight(device, 125), 5, None, 2)
    assert "3" in str(caught.value)


@pytest.mark.parametrize("room", [(13, 14, 15), (1,), ()])
def test_a_range_needs_four_entries(room: Any, device: torch.device) -> None:
    x = sparse(device)
    x.spatial_range = room
    for layer in (Layer.of(3), Layer.of(2, 2)):
        with pytest.raises(ValueError, match="range") as caught:
            convolve(layer, x, weight(device, layer.volume))
        assert "4" in str(caught.value)


def test_generative_needs_transposed(device: torch.device) -> None:
    with pytest.raises(ValueError, match="transposed"):
        F.conv3d(sparse(device), weight(device, 8), 2, None, 2, generative=True)
    with pytest.raises(ValueError, match="transposed"):
        spnn.Conv3d(3, 2, 2, 2, generative=True)(sparse(device))


# Static: modes and configs.


@pytest.mark.parametrize(
    ("setter", "value", "known"),
    [
        (F.set_kmap_mode, "hash", "hashmap_on_the_fly"),
        (F.set_downsample_mode, "Spconv", "minkowski"),
        (F.set_conv_mode, 3, "0"),
        (F.set_conv_mode, "fast", "0"),
    ],
)
def test_unknown_modes(setter: Any, value: Any, known: str) -> None:
    with pytest.raises(ValueError, match=str(value)) as caught:
        setter(value)
    assert known in str(caught.value)


@pytest.mark.parametrize("where", ["config", "global"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataflow", "fastest"),
        ("dataflow", 17),
        ("kmap_mode", "grid"),
        ("downsample_mode", "max"),
        ("split_mask_num", 0),
        ("split_mask_num_bwd", -1),
    ],
)
def test_config_values_outside_their_set(
    key: str, value: Any, where: str, device: torch.device
) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        if where == "global":
            F.set_global_conv_config({key: value})
        config = {key: value} if where == "config" else None
        F.conv3d(sparse(device), weight(device, 27), 3, config=config)
    assert str(value) in str(caught.value)


def test_coded_csr_is_not_implemented(device: torch.device) -> None:
    config = {"dataflow": F.Dataflow.CodedCSR}
    with pytest.raises(NotImplementedError, match="CodedCSR"):
        F.conv3d(sparse(device), weight(device, 27), 3, config=config)


# Joining.


def test_cat_of_nothing() -> None:
    with pytest.raises(ValueError, match="cat"):
        torchsparse.cat([])


@pytest.mark.parametrize("join", [lambda a, b: torchsparse.cat([a, b]), lambda a, b: a + b])
def test_joining_needs_equal_coordinates(join: Any, device: torch.device) -> None:
    a = sparse(device)
    with pytest.raises(ValueError) as caught:
        join(a, SparseTensor(a.feats[:9], a.coords[:9]))
    assert "61" in str(caught.value) and "9" in str(caught.value)
    with raises_on_data(ValueError, "coord"):
        join(a, SparseTensor(a.feats, a.coords.flip(0)))
    join(a, SparseTensor(a.feats, a.coords.clone()))


@pytest.mark.parametrize(("stride", "channels", "came"), [(2, 3, "2, 2, 2"), (1, 4, "4")])
def test_generative_add_needs_one_lattice(
    stride: int, channels: int, came: str, device: torch.device
) -> None:
    with pytest.raises(ValueError) as caught:
        torchsparse.generative_add(sparse(device), sparse(device, "plane", channels, stride))
    assert came in str(caught.value)


def test_fapply_keeps_the_rows(device: torch.device) -> None:
    with pytest.raises(ValueError) as caught:
        fapply(sparse(device), lambda feats: feats[:5])
    assert "61" in str(caught.value) and "5" in str(caught.value)


# Data: what coordinates hold.


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_negative_coordinates(layer: Layer, axis: int, device: torch.device) -> None:
    x = sparse(device)
    x.coords[5, axis] = -1
    kernel = weight(device, layer.volume)
    hint = r"torchsparse\.tensor\.set_allow_negative_coordinates\(True\)"
    with raises_on_data(ValueError, hint):
        convolve(layer, x, kernel)
    fresh = SparseTensor(x.feats, x.coords)
    allowed = Layer.of(layer.kernel_size, layer.stride, layer.padding, allow_negative=True)
    assert len(convolve(allowed, fresh, kernel).coords) > 0


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_negative_samples(layer: Layer, allowed: bool, device: torch.device) -> None:
    """A batch index is never negative, flag or not; the message names the column order."""
    x = sparse(device)
    x.coords[5, 0] = -1
    layer = Layer.of(layer.kernel_size, layer.stride, layer.padding, allow_negative=allowed)
    with raises_on_data(ValueError, r"\(b, ?x, ?y, ?z\)"):
        convolve(layer, x, weight(device, layer.volume))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_coordinates_outside_their_range(layer: Layer, column: int, device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, *clouds.ROOM))
    x.coords[5, column] = (1, *clouds.ROOM)[column]
    with raises_on_data(ValueError, r"\(b, ?x, ?y, ?z\)"):
        convolve(layer, x, weight(device, layer.volume))


@pytest.mark.parametrize("layer", [*LAYERS, Layer.of(3, 2, minkowski=True)], ids=str)
def test_duplicate_rows(layer: Layer, device: torch.device) -> None:
    coords = torch.from_numpy(clouds.duplicates()).to(device)
    x = SparseTensor(torch.ones(len(coords), 3, dtype=torch.float64, device=device), coords)
    with raises_on_data(ValueError, "sparse_quantize"):
        convolve(layer, x, weight(device, layer.volume))


def test_duplicates_in_a_generative_layer(device: torch.device) -> None:
    x = rows(device, (0, 1, 2, 3), (0, 4, 5, 6), (0, 1, 2, 3))
    layer = Layer.of(2, 2, transposed=True, generative=True)
    with raises_on_data(ValueError, "sparse_quantize"):
        convolve(layer, x, weight(device, 8))


def test_box_limit(device: torch.device) -> None:
    """B X Y Z below 2^62 works, above it is refused."""
    side = 2**20
    fits = rows(device, (0, 0, 0, 0), (2, side, side, side))
    y = F.conv3d(fits, weight(device, 27), 3)
    assert y.feats.shape == (2, 2)
    side = 2**22  # B X Y Z = 2^67, which 64 bits would take for 0
    large = rows(device, (0, 0, 0, 0), (1, side, side, side))
    for layer in LAYERS:
        fresh = SparseTensor(large.feats, large.coords)
        with raises_on_data(ValueError, r"2\^62|2\*\*62|62"):
            convolve(layer, fresh, weight(device, layer.volume))


def test_sites_below_zero_inside_a_range_are_legal_when_allowed(device: torch.device) -> None:
    """Padding 2 puts site -1 beside voxel 0; the next layers must take what the first one gave."""
    x = rows(device, (0, 0, 0, 0), (0, 6, 6, 6))
    x.spatial_range = (1, 8, 8, 8)
    layer = Layer.of(5, 2, 2, allow_negative=True)
    y = convolve(layer, x, weight(device, 125))
    assert y.spatial_range == (1, 4, 4, 4) and y.coords[:, 1:].min().item() == -1
    for after in (Layer.of(3, allow_negative=True), Layer.of(2, 2, allow_negative=True)):
        z = convolve(after, y, weight(device, after.volume, 2, 3))
        assert len(z.coords) > 0


# Not errors.


@pytest.mark.parametrize("layer", [*LAYERS, Layer.of(1), Layer.of(3, 2, minkowski=True)], ids=str)
def test_no_rows_at_all(layer: Layer, device: torch.device) -> None:
    for room in (None, (2, *clouds.ROOM)):
        x = sparse(device, "empty", spatial_range=room)
        y = convolve(layer, x, weight(device, layer.volume))
        assert y.feats.shape == (0, 2) and y.feats.dtype == torch.float64
        assert y.coords.shape == (0, 4) and y.coords.dtype == torch.int32


def test_infinite_features_pass(device: torch.device) -> None:
    x = rows(device, (0, 1, 1, 1), (0, 9, 9, 9))
    x.feats[0] = float("inf")
    y = F.conv3d(x, torch.ones(27, 3, 2, dtype=torch.float64, device=device), 3)
    assert y.feats[0].isinf().all() and y.feats[1].isfinite().all()


@pytest.mark.parametrize("channels", [(1, 1), (7, 13), (33, 5)])
def test_any_number_of_channels(channels: tuple[int, int], device: torch.device) -> None:
    x = sparse(device, channels=channels[0])
    assert F.conv3d(x, weight(device, 27, *channels), 3).feats.shape == (61, channels[1])


def test_a_failed_call_leaves_no_trace(device: torch.device) -> None:
    """After an error the same tensor, mended, gives the right answer."""
    x = sparse(device)
    good = x.coords.clone()
    x.coords[5] = x.coords[6]
    with raises_on_data(ValueError, "sparse_quantize"):
        F.conv3d(x, weight(device, 27), 3)
    x.coords.copy_(good)
    want = F.conv3d(sparse(device), weight(device, 27), 3)
    assert torch.equal(F.conv3d(x, weight(device, 27), 3).feats, want.feats)
