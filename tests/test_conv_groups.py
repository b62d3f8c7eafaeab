"""Grouped and depthwise convolution: against one judged convolution per group, against a dense
grouped one, and against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import clouds, oracles
from tests.cases import TOLERANCES, assert_close, assert_rows, sparse
from tests.oracles import Layer
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

F64 = torch.float64
DATAFLOWS = [F.Dataflow.ImplicitGEMM, F.Dataflow.GatherScatter, F.Dataflow.FetchOnDemand]
# (C_in, C_out, groups): depthwise, with two and three outputs per input, general groups, one.
CHANNELS = [(4, 4, 4), (3, 6, 3), (2, 6, 2), (6, 4, 2), (4, 8, 2), (5, 3, 1)]
LAYERS = [
    Layer.of(1),
    Layer.of(3),
    Layer.of(2),
    Layer.of((3, 1, 2)),
    Layer.of(3, 1, 0, (1, 2, 3)),
    Layer.of(1, 2),
    Layer.of(2, 2),
    Layer.of(3, 2, 1),
    Layer.of(3, (1, 2, 1), 1, 2),
    Layer.of(2, 2, transposed=True, generative=True),
    Layer.of(3, 2, 1, transposed=True, generative=True),
    Layer.of(5, 1),
]

channels = pytest.mark.parametrize("sizes", CHANNELS, ids=str)


def leaf(device: torch.device, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    values = clouds.rng(f"groups{shape}").standard_normal(shape) / np.sqrt(shape[0])
    return torch.from_numpy(values).to(device, dtype).requires_grad_()


def convolve(layer: Layer, x: SparseTensor, weight: Tensor, *args: Any, **more: Any) -> Any:
    size, stride, padding, dilation = (
        layer.kernel_size, layer.stride, layer.padding, layer.dilation,
    )  # fmt: skip
    bias = args[0] if args else None
    more.setdefault("transposed", layer.transposed)
    return F.conv3d(
        x, weight, size, bias, stride, padding, dilation, generative=layer.generative, **more
    )


def by_group(
    relation: oracles.Relation, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients to features and weight: the search, on each group's channels."""
    outs, to_feats, to_weight = [], [], []
    arrays = [t.detach().double().cpu().numpy() for t in (x, weight, bias, grad)]
    parts = zip(
        np.split(arrays[0], groups, 1),
        np.split(arrays[1], groups, 2),
        np.split(arrays[2], groups),
        np.split(arrays[3], groups, 1),
    )
    for xs, ws, bs, gs in parts:
        outs.append(oracles.convolve(xs, ws, relation, bs))
        of_feats, of_weight, _ = oracles.gradients(xs, ws, relation, gs)
        to_feats.append(of_feats)
        to_weight.append(of_weight)
    return (
        torch.from_numpy(np.concatenate(outs, 1)),
        torch.from_numpy(np.concatenate(to_feats, 1)),
        torch.from_numpy(np.concatenate(to_weight, 2)),
    )


def check(
    layer: Layer,
    cloud: str,
    sizes: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype = F64,
    **more: Any,
) -> None:
    """Sites, output and all gradients of a layer are those of the search."""
    c_in, c_out, groups = sizes
    coords = clouds.CLOUDS[cloud]()
    relation = oracles.relate(coords, layer)
    feats = leaf(device, len(coords), c_in, dtype=dtype)
    weight = leaf(device, layer.volume, c_in // groups, c_out, dtype=dtype)
    bias = leaf(device, c_out, dtype=dtype)
    x = SparseTensor(feats, torch.from_numpy(coords).to(device), 4)
    y = convolve(layer, x, weight, bias, groups=groups, **more)
    assert_rows(y.coords, relation.coords)
    assert y.feats.dtype == dtype
    grad = torch.from_numpy(np.cos(np.arange(y.feats.numel()))).to(dtype).view(y.feats.shape)
    want = by_group(relation, feats, weight, bias, grad, groups)
    assert_close(y.feats, want[0], dtype)
    y.feats.backward(grad.to(device))
    for tensor, expected in ((feats, want[1]), (weight, want[2]), (bias, grad.double().sum(0))):
        assert tensor.grad is not None and tensor.grad.dtype == dtype
        assert_close(tensor.grad, expected, dtype)


# ------------------------------------------------------------------ numbers
@channels
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_each_group_is_a_convolution(
    layer: Layer, sizes: tuple[int, int, int], device: torch.device
) -> None:
    check(layer, "batch_gap", sizes, device)


@channels
@pytest.mark.parametrize("cloud", ["empty", "single", "origin", "plane", "block", "odd"])
def test_on_every_cloud(cloud: str, sizes: tuple[int, int, int], device: torch.device) -> None:
    for layer in (Layer.of(3), Layer.of(2, 2), Layer.of(1)):
        check(layer, cloud, sizes, device)


@pytest.mark.parametrize("dataflow", DATAFLOWS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", CHANNELS[:4], ids=str)
def test_every_dataflow_in_every_format(
    sizes: tuple[int, int, int], dtype: torch.dtype, dataflow: Any, device: torch.device
) -> None:
    """Rounded inputs, float64 search: what remains is the one rounding at the end."""
    for layer in (Layer.of(3), Layer.of(3, 2, 1), Layer.of(1)):
        check(layer, "odd", sizes, device, dtype, config={"dataflow": dataflow})


@channels
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_a_transposed_layer_returns_by_group(
    kernel_size: int, sizes: tuple[int, int, int], device: torch.device
) -> None:
    """Down without groups, and back with them."""
    c_in, c_out, groups = sizes
    coords = clouds.batch_gap()
    fine = SparseTensor(leaf(device, len(coords), 2), torch.from_numpy(coords).to(device))
    coarse = F.conv3d(fine, leaf(device, kernel_size**3, 2, c_in), kernel_size, None, 2)
    layer = Layer.of(kernel_size, 2, transposed=True)
    relation = oracles.relate(coarse.coords.cpu().numpy(), layer, fine=coords)
    coarse.feats = feats = coarse.feats.detach().requires_grad_()
    weight, bias = leaf(device, layer.volume, c_in // groups, c_out), leaf(device, c_out)
    y = convolve(layer, coarse, weight, bias, groups=groups)
    grad = torch.sin(torch.arange(y.feats.numel(), dtype=F64)).view(y.feats.shape)
    y.feats.backward(grad.to(device))
    want = by_group(relation, feats, weight, bias, grad, groups)
    for got, expected in zip((y.feats, feats.grad, weight.grad), want):
        assert got is not None
        assert_close(got, expected, F64)


@channels
@pytest.mark.parametrize("kernel_size", [3, (5, 3, 1)], ids=str)
def test_a_dense_grouped_convolution_agrees(
    kernel_size: Any, sizes: tuple[int, int, int], device: torch.device
) -> None:
    """The grouping is that of torch.nn.functional.conv3d: the very same weight, group and all."""
    c_in, c_out, groups = sizes
    size, d = oracles.triple(kernel_size), (2, 1, 1)
    volume = int(np.prod(size))
    coords = torch.from_numpy(clouds.batch_gap()).to(device)
    room = (clouds.BATCH, *clouds.ROOM)
    x = SparseTensor(leaf(device, len(coords), c_in).detach(), coords, 1, room)
    weight = leaf(device, volume, c_in // groups, c_out).detach()
    dense = torch.nn.functional.conv3d(
        x.dense().permute(0, 4, 1, 2, 3),
        oracles.dense_weight(weight, size).permute(4, 3, 0, 1, 2),
        padding=[a * (k - 1) // 2 for a, k in zip(d, size)],
        dilation=d,
        groups=groups,
    )
    y = F.conv3d(x, weight, size, dilation=d, groups=groups)
    b, i, j, k = coords.long().unbind(1)
    assert_close(y.feats, dense.permute(0, 2, 3, 4, 1)[b, i, j, k], F64)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 2), (4, 4, 2)], ids=str)
@pytest.mark.parametrize(
    "layer", [Layer.of(1), Layer.of(3), Layer.of(2), Layer.of(3, 2, 1)], ids=str
)
def test_finite_differences(
    layer: Layer, sizes: tuple[int, int, int], device: torch.device
) -> None:
    c_in, c_out, groups = sizes
    coords = torch.from_numpy(clouds.scatter("few", 7, (3, 3, 2))).to(device)

    def forward(*args: Tensor) -> Tensor:
        feats, weight, bias = args
        return convolve(layer, SparseTensor(feats, coords), weight, bias, groups=groups).feats

    inputs = leaf(device, 7, c_in), leaf(device, layer.volume, c_in // groups, c_out)
    assert torch.autograd.gradcheck(forward, (*inputs, leaf(device, c_out)))


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_each_gradient_alone(kernel_size: int, wanted: int, device: torch.device) -> None:
    coords = torch.from_numpy(clouds.odd()).to(device)
    tensors = [leaf(device, 61, 2), leaf(device, kernel_size**3, 1, 4), leaf(device, 4)]

    def gradients() -> list[Tensor | None]:
        feats, weight, bias = tensors
        y = F.conv3d(SparseTensor(feats, coords), weight, kernel_size, bias, groups=2)
        y.feats.square().sum().backward()
        found = [t.grad for t in tensors]
        for t in tensors:
            t.grad = None
        return found

    every = gradients()
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place == wanted)
    alone = gradients()
    for place, (one, full) in enumerate(zip(alone, every)):
        assert (one is not None) == (place == wanted)
        if one is not None:
            assert full is not None
            assert_close(one, full, F64)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 4, 2)], ids=str)
def test_autocast(
    sizes: tuple[int, int, int], kernel_size: int, half: torch.dtype, device: torch.device
) -> None:
    """As in conv3d: computed and returned in the autocast dtype, gradients in their own."""
    c_in, c_out, groups = sizes
    coords = torch.from_numpy(clouds.odd()).to(device)
    feats = leaf(device, 61, c_in, dtype=torch.float32)
    weight = leaf(device, kernel_size**3, c_in // groups, c_out, dtype=torch.float32)
    x = SparseTensor(feats, coords)
    with torch.autocast(device.type, half):
        y = F.conv3d(x, weight, kernel_size, groups=groups)
    assert y.feats.dtype == half
    rounded = SparseTensor(feats.detach().to(half).double(), coords)
    want = F.conv3d(rounded, weight.detach().to(half).double(), kernel_size, groups=groups)
    assert_close(y.feats, want.feats, half)
    y.feats.sum().backward()
    assert feats.grad is not None and feats.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_halves_are_summed_in_float32_and_rounded_once(device: torch.device) -> None:
    """2048 + 1 + 1 loses both ones when each partial sum is rounded."""
    coords = torch.tensor([[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]], dtype=torch.int32)
    feats = torch.tensor([[1.0], [2048.0], [1.0]], dtype=torch.float16).expand(3, 2)
    weight = torch.ones(3, 1, 2, dtype=torch.float16, device=device)
    x = SparseTensor(feats.to(device), coords.to(device))
    assert F.conv3d(x, weight, (3, 1, 1), groups=2).feats[1].tolist() == [2050.0] * 2


def test_the_same_bits_every_time(device: torch.device) -> None:
    x = sparse(device, "block", channels=8, dtype=torch.float32)
    found = []
    for _ in range(3):
        feats = x.feats.detach().clone().requires_grad_()
        weight = leaf(device, 27, 1, 8, dtype=torch.float32)
        y = F.conv3d(SparseTensor(feats, x.coords), weight, 3, groups=8)
        found.append([y.feats, *torch.autograd.grad(y.feats.square().sum(), (feats, weight))])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))


def test_what_is_absent_stays_out(device: torch.device) -> None:
    """A NaN reaches its neighbours, in its own channel alone."""
    coords = torch.tensor([[0, x, 0, 0] for x in (1, 2, 5)], dtype=torch.int32, device=device)
    feats = torch.ones(3, 4, dtype=F64, device=device)
    feats[0, 1] = torch.nan
    for groups, hit in ((4, [1]), (2, [0, 1])):
        weight = torch.ones(3, 4 // groups, 4, dtype=F64, device=device)
        y = F.conv3d(SparseTensor(feats, coords), weight, (3, 1, 1), groups=groups)
        want = torch.zeros(3, 4, dtype=torch.bool)
        want[:2, hit] = True
        assert torch.equal(y.feats.isnan().cpu(), want)


# ------------------------------------------------------------------ modules
@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_every_number_of_axes(ndim: int, device: torch.device) -> None:
    """A depthwise layer is a layer whose kernel is diagonal."""
    coords = torch.from_numpy(clouds.odd())[:, [0, *[1, 2, 3, 3][:ndim]]].unique(dim=0)
    make = getattr(spnn, f"Conv{ndim}d")
    x = SparseTensor(leaf(device, len(coords), 3).detach(), coords.to(device))
    layer = make(3, 3, 3, groups=3).to(device, F64)
    whole = make(3, 3, 3).to(device, F64)
    assert layer.kernel.shape == (3**ndim, 1, 3)
    whole.kernel.data = torch.diag_embed(layer.kernel.data[:, 0])
    assert_close(layer(x).feats, whole(x).feats, F64)
    function = getattr(F, f"conv{ndim}d")
    assert_close(function(x, layer.kernel, 3, groups=3).feats, layer(x).feats, F64)


def test_the_module() -> None:
    layer = spnn.Conv3d(8, 16, 3, stride=2, bias=True, groups=4)
    assert layer.kernel.shape == (27, 2, 16) and layer.groups == 4
    assert list(layer.state_dict()) == ["kernel", "bias"]
    assert "groups=4" in repr(layer) and "groups" not in repr(spnn.Conv3d(8, 16, 3))
    bound = 1 / np.sqrt(2 * 27)
    assert 0.9 * bound < layer.kernel.abs().max().item() <= bound
    back = spnn.Conv3d(8, 16, 3, stride=2, transposed=True, groups=4)
    bound = 1 / np.sqrt(4 * 27)
    assert 0.9 * bound < back.kernel.abs().max().item() <= bound
    pointwise = spnn.Conv3d(8, 16, 1, groups=8)
    assert pointwise.kernel.shape == (1, 16)
    pointwise.load_state_dict({"kernel": torch.ones(1, 1, 16)})


def test_assigning_groups_makes_another_layer() -> None:
    x = sparse(torch.device("cpu"), channels=4)
    layer = spnn.Conv3d(4, 4, 3).double()
    layer(x)
    layer.groups = 4
    layer.kernel = torch.nn.Parameter(torch.ones(27, 1, 4, dtype=F64))
    assert layer(x).feats.shape == x.feats.shape


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((6, 8, 3, 4), ValueError, "`in_channels` must be divisible by groups = 4, got 6"),
        ((8, 6, 3, 4), ValueError, "`out_channels` must be divisible by groups = 4, got 6"),
        ((8, 8, 3, 0), ValueError, "`groups` must be at least 1, got 0"),
        ((8, 8, 3, 2.0), TypeError, "`groups` must be an int, got 2.0"),
        ((8, 8, 3, True), TypeError, "`groups` must be an int, got True"),
    ],
)
def test_errors_of_the_module(arguments: Any, error: type[Exception], match: str) -> None:
    c_in, c_out, size, groups = arguments
    with pytest.raises(error, match=match):
        spnn.Conv3d(c_in, c_out, size, groups=groups)


def test_errors_of_the_function(device: torch.device) -> None:
    x = sparse(device, channels=6)
    with pytest.raises(ValueError, match="`C_in` must be divisible by groups = 4, got 6"):
        F.conv3d(x, leaf(device, 27, 1, 8), 3, groups=4)
    with pytest.raises(ValueError, match="`C_out` must be divisible by groups = 3, got 8"):
        F.conv3d(x, leaf(device, 27, 2, 8), 3, groups=3)
    with pytest.raises(ValueError, match=r"\[27, 2, C_out\].*in 3 groups, got \[27, 6, 9\]"):
        F.conv3d(x, leaf(device, 27, 6, 9), 3, groups=3)
    with pytest.raises(ValueError, match="at least 1"):
        F.conv3d(x, leaf(device, 27, 6, 9), 3, groups=-1)
