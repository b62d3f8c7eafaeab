"""The convolution against a search in Python dicts and against a dense convolution, in float64."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch

import torchsparse
from tests import clouds, oracles
from tests.cases import (
    DILATIONS,
    KERNEL_SIZES,
    LAYERS,
    PADDINGS,
    STRIDES,
    TOLERANCES,
    Case,
    assert_close,
    assert_rows,
    convolve,
    sparse,
    weight,
)
from tests.oracles import Layer, triple
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

SMALL_CLOUDS = ("empty", "single", "origin", "plane", "block")

# Every layer on the cloud with an empty sample; the other clouds see every kernel and stride.
CASES = [
    *(Case(layer, "batch_gap", ranged) for layer in LAYERS for ranged in (False, True)),
    *(
        Case(Layer.of(k, s, (1, 0, 2)), cloud, ranged=cloud == "plane")
        for cloud in SMALL_CLOUDS
        for k, s in itertools.product(KERNEL_SIZES, STRIDES)
    ),
    *(
        Case(Layer.of(k, s, p, d, allow_negative=True), "negative")
        for k, s, p, d in itertools.product(KERNEL_SIZES, STRIDES, (0, 1), DILATIONS)
    ),
    *(
        Case(Layer.of(k, s, p, infer_range=False), "odd")
        for k, s, p in itertools.product(KERNEL_SIZES, STRIDES[1:], PADDINGS)
    ),
    *(
        Case(Layer.of(k, s, 1, d, minkowski=True), cloud, ranged=cloud == "odd")
        for cloud in ("odd", "single", "empty")
        for k, s, d in itertools.product(KERNEL_SIZES, STRIDES, DILATIONS)
    ),
    Case(Layer.of(3, 1, 0, (1, 2, 3)), "odd"),
    Case(Layer.of((5, 3, 1), (2, 3, 1), (2, 1, 0), (2, 1, 1)), "odd"),
    Case(Layer.of((2, 3, 4), (2, 1, 3), (0, 1, 2), (3, 1, 2)), "batch_gap"),
    Case(Layer.of(7, 1), "odd"),
    *(
        Case(Layer.of(k, s, p, allow_negative=True), "negative", ranged=True)
        for k, s, p in ((2, 2, 0), (3, 2, 1), (3, (1, 2, 3), 2), (4, 3, 3), (3, 1, 0))
    ),
    Case(Layer.of(7, 2, 3), "odd", ranged=True),
]


# The judges, judged.


@pytest.mark.parametrize(
    ("kernel_size", "tap", "index"),
    [
        (3, (2, 1, 1), 14),
        (3, (1, 1, 2), 22),
        ((5, 3, 1), (1, 2, 0), 11),
        (2, (1, 0, 0), 4),
        ((3, 1, 2), (2, 0, 1), 5),
        (4, (0, 1, 0), 4),
    ],
)
def test_tap_order_by_hand(kernel_size: Any, tap: oracles.Triple, index: int) -> None:
    assert oracles.taps(triple(kernel_size))[index] == tap


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_the_two_oracles_agree(case: Case) -> None:
    """Values and both gradients, and the sites of strided layers."""
    problem, layer = case.build(), case.layer
    relation = oracles.relate(problem.coords, layer, problem.spatial_range)
    if layer.kind == "strided":
        dense_sites = oracles.dense_sites(problem.coords, layer, problem.spatial_range)
        assert oracles.as_sites(relation.coords) == dense_sites
    feats = torch.from_numpy(problem.feats).requires_grad_()
    kernel = torch.from_numpy(problem.kernel).requires_grad_()
    bias = torch.from_numpy(problem.bias)
    dense = oracles.dense_convolve(
        feats, problem.coords, kernel, layer, relation.coords, bias=bias
    )
    found = oracles.convolve(problem.feats, problem.kernel, relation, problem.bias)
    assert_close(dense, found, torch.float64)
    if dense.requires_grad:
        grad = torch.sin(torch.arange(dense.numel()).double()).reshape(dense.shape)
        got = torch.autograd.grad(dense, (feats, kernel), grad)
        want = oracles.gradients(problem.feats, problem.kernel, relation, grad.numpy())
        assert_close(got[0], want[0], torch.float64)
        assert_close(got[1], want[1], torch.float64)


def test_a_strided_layer_by_hand() -> None:
    """Kernel 2, stride 2 along x: sites 4 and 5 share the coarse site 2, 10 lies past U."""
    coords = np.array([[0, 10, 0, 0], [0, 4, 0, 0], [0, 5, 0, 0]])
    layer = Layer.of((2, 1, 1), (2, 1, 1))
    relation = oracles.relate(coords, layer)
    assert relation.coords.tolist() == [[0, 2, 0, 0]]
    assert relation.table.tolist() == [[1, 2]]
    unbounded = oracles.relate(coords, Layer.of((2, 1, 1), (2, 1, 1), infer_range=False))
    assert unbounded.coords.tolist() == [[0, 2, 0, 0], [0, 5, 0, 0]]
    assert unbounded.table.tolist() == [[1, 2], [0, -1]]


# F.conv3d against the search.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv3d_matches_the_search(case: Case, device: torch.device) -> None:
    """Sites, order, range, stride, values and the three gradients."""
    problem, layer = case.build(), case.layer
    want = oracles.relate(problem.coords, layer, problem.spatial_range)
    x = problem.tensor(device, stride=(2, 4, 1), requires_grad=True)
    kernel, bias = problem.parameters(device, requires_grad=True)
    y = convolve(layer, x, kernel, bias)
    assert type(y) is SparseTensor
    assert_rows(y.coords, want.coords)
    assert y.stride == oracles.output_stride((2, 4, 1), layer)
    assert y.spatial_range == want.spatial_range
    out = oracles.convolve(problem.feats, problem.kernel, want, problem.bias)
    assert_close(y.feats, out, torch.float64)
    grad = np.sin(np.arange(out.size)).reshape(out.shape)
    y.feats.backward(torch.from_numpy(grad).to(device))
    for leaf, expected in zip(
        (x.feats, kernel, bias), oracles.gradients(problem.feats, problem.kernel, want, grad)
    ):
        assert leaf.grad is not None
        assert_close(leaf.grad, expected, torch.float64)


@pytest.mark.parametrize("case", CASES[3::11], ids=str)
def test_conv3d_matches_the_dense_convolution(case: Case, device: torch.device) -> None:
    problem, layer = case.build(), case.layer
    kernel, bias = problem.parameters(device)
    y = convolve(layer, problem.tensor(device), kernel, bias)
    want = oracles.dense_convolve(
        torch.from_numpy(problem.feats),
        problem.coords,
        kernel.cpu(),
        layer,
        y.coords.cpu().numpy(),
        bias=bias.cpu(),
    )
    assert_close(y.feats, want, torch.float64)


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=str)
def test_a_ranged_strided_layer_is_torch_conv3d(
    kernel_size: Any, padding: Any, dilation: int, device: torch.device
) -> None:
    """dense(conv(x)) = conv3d(dense(x)) with the very same arguments, range and zeros included."""
    size, stride = triple(kernel_size), (2, 3, 2)
    x = sparse(device, "batch_gap", spatial_range=(clouds.BATCH, *clouds.ROOM))
    kernel = weight(device, int(np.prod(size)))
    y = F.conv3d(x, kernel, size, None, stride, padding, dilation)
    want = torch.conv3d(
        x.dense().permute(0, 4, 1, 2, 3),
        oracles.dense_weight(kernel, size).permute(4, 3, 0, 1, 2),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    got = y.dense().permute(0, 4, 1, 2, 3)
    assert got.shape == want.shape
    assert_close(got, want, torch.float64)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, (3, 1, 2), (1, 3, 5)], ids=str)
def test_a_submanifold_layer_is_torch_conv3d_at_its_sites(
    kernel_size: Any, device: torch.device
) -> None:
    """Odd volumes are padded on both sides, even ones on the right alone."""
    size, dilation = triple(kernel_size), 2
    x = sparse(device, "block", spatial_range=(1, *clouds.ROOM))
    kernel = weight(device, int(np.prod(size)))
    y = F.conv3d(x, kernel, size, None, 1, 0, dilation)
    odd = int(np.prod(size)) % 2 == 1
    pads = [
        (dilation * (k - 1) // 2,) * 2 if odd else (0, dilation * (k - 1)) for k in reversed(size)
    ]
    box = torch.nn.functional.pad(x.dense().permute(0, 4, 1, 2, 3), sum(pads, ()))
    dense = torch.conv3d(
        box,
        oracles.dense_weight(kernel, size).permute(4, 3, 0, 1, 2),
        dilation=dilation,
    )
    b, i, j, k = x.coords.long().unbind(1)
    assert_close(y.feats, dense.permute(0, 2, 3, 4, 1)[b, i, j, k], torch.float64)


# Speed switches change nothing.

FAST = [
    Layer.of(1),
    Layer.of(3),
    Layer.of(2),
    Layer.of(3, 2, 1),
    Layer.of(5, 2, 0),
    Layer.of(2, 2),
]


def by_default(layer: Layer, device: torch.device) -> tuple[SparseTensor, ...]:
    x = sparse(device, "batch_gap")
    return x, convolve(layer, x, weight(device, layer.volume))


@pytest.mark.parametrize("mode", [0, 1, 2, F.ConvMode.mode1])
@pytest.mark.parametrize("layer", FAST, ids=str)
def test_conv_modes_agree(layer: Layer, mode: Any, device: torch.device) -> None:
    x, want = by_default(layer, device)
    F.set_conv_mode(mode)
    fresh = SparseTensor(x.feats, x.coords)
    for tensor in (fresh, x):  # a new map, and one built under the other mode
        got = convolve(layer, tensor, weight(device, layer.volume))
        assert_rows(got.coords, want.coords.cpu().numpy())
        assert_close(got.feats, want.feats, torch.float64)


@pytest.mark.parametrize("infer", [True, False])
@pytest.mark.parametrize("minkowski", [False, True])
@pytest.mark.parametrize("layer", [*FAST, Layer.of(2, 1), Layer.of(4)], ids=str)
def test_kmap_modes_agree(
    layer: Layer, minkowski: bool, infer: bool, device: torch.device
) -> None:
    F.set_downsample_mode("minkowski" if minkowski else "spconv")
    torchsparse.backends.infer_spatial_range = infer
    x, kernel = sparse(device, "batch_gap"), weight(device, layer.volume)
    results = []
    for mode in ("hashmap_on_the_fly", "hashmap"):
        F.set_kmap_mode(mode)
        assert F.get_kmap_mode() == mode
        fresh = SparseTensor(x.feats, x.coords)
        args = (layer.kernel_size, None, layer.stride, layer.padding)
        results.append(F.conv3d(fresh, kernel, *args))
    assert_rows(results[0].coords, results[1].coords.cpu().numpy())
    assert_close(results[0].feats, results[1].feats, torch.float64)


DATAFLOWS = [F.Dataflow.ImplicitGEMM, F.Dataflow.GatherScatter, F.Dataflow.FetchOnDemand]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("dataflow", DATAFLOWS, ids=str)
@pytest.mark.parametrize("layer", FAST, ids=str)
def test_every_dataflow_in_every_format(
    layer: Layer, dataflow: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """Rounded inputs, float64 search: what remains is the one rounding at the end."""
    problem = Case(layer, "batch_gap", channels=(5, 7)).build()
    x = problem.tensor(device, dtype, requires_grad=True)
    kernel, bias = problem.parameters(device, dtype, requires_grad=True)
    y = convolve(layer, x, kernel, bias, config={"dataflow": dataflow})
    want = oracles.relate(problem.coords, layer)
    rounded = [t.detach().double().cpu().numpy() for t in (x.feats, kernel, bias)]
    assert y.feats.dtype == dtype
    assert_close(y.feats, oracles.convolve(rounded[0], rounded[1], want, rounded[2]), dtype)
    grad = torch.from_numpy(np.cos(np.arange(y.feats.numel()))).reshape(y.feats.shape).to(dtype)
    y.feats.backward(grad.to(device))
    expected = oracles.gradients(rounded[0], rounded[1], want, grad.double().numpy())
    for leaf, gradient in zip((x.feats, kernel, bias), expected):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert_close(leaf.grad, gradient, dtype)


# Number formats.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_products_are_summed_in_float32_and_rounded_once(
    dtype: torch.dtype, device: torch.device
) -> None:
    """big + 1 + 1 loses both ones when each partial sum is rounded; so does a late bias."""
    big = 2.0 ** (11 if dtype == torch.float16 else 8)  # big + 1 is no number of this dtype
    coords = torch.tensor([[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]], dtype=torch.int32)
    feats = torch.tensor([[big], [1.0], [1.0]], dtype=dtype)
    kernel = torch.ones(3, 1, 1, dtype=dtype)
    x = SparseTensor(feats.to(device), coords.to(device))
    y = F.conv3d(x, kernel.to(device), (3, 1, 1))
    assert y.feats[1].item() == big + 2
    bias = torch.ones(1, dtype=dtype).to(device)
    z = F.conv3d(x, kernel.to(device), (3, 1, 1), bias)
    assert z.feats[0].item() == big + 2  # (big + 1) + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [2, 3])
def test_a_pointwise_bias_is_added_before_the_rounding(
    channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    """(big + 1) + 1, over channels and a bias."""
    big = 2.0 ** (11 if dtype == torch.float16 else 8)
    feats = torch.tensor([[big, 1.0, 0.0][:channels]], dtype=dtype, device=device)
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    one = torch.ones(1, channels, 1, dtype=dtype, device=device)
    y = F.conv3d(SparseTensor(feats, coords), one, 1, one[0, 0])
    assert y.feats.item() == big + 2


def test_an_infinite_partial_sum_of_halves_does_not_overflow(device: torch.device) -> None:
    """60000 + 60000 - 60000 fits float16 although the first sum does not."""
    coords = torch.tensor([[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]], dtype=torch.int32)
    feats = torch.full((3, 1), 60000.0, dtype=torch.float16)
    kernel = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float16).reshape(3, 1, 1)
    x = SparseTensor(feats.to(device), coords.to(device))
    y = F.conv3d(x, kernel.to(device), (3, 1, 1))
    assert y.feats[1].item() == 60000.0


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(
    ("of_feats", "of_weight", "of_output"),
    [
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float16, torch.float16),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(
    kernel_size: int,
    of_feats: torch.dtype,
    of_weight: torch.dtype,
    of_output: torch.dtype,
    device: torch.device,
) -> None:
    """A half operand decides, else promotion; gradients have the dtype of their tensor."""
    x = sparse(device, dtype=of_feats)
    x.feats.requires_grad_()
    kernel = weight(device, kernel_size**3, dtype=of_weight).requires_grad_()
    y = F.conv3d(x, kernel, kernel_size)
    assert y.feats.dtype == of_output
    y.feats.sum().backward()
    assert x.feats.grad is not None and x.feats.grad.dtype == of_feats
    assert kernel.grad is not None and kernel.grad.dtype == of_weight


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_float16_does_not_meet_bfloat16(kernel_size: int, device: torch.device) -> None:
    x = sparse(device, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"float16.*bfloat16|bfloat16.*float16"):
        F.conv3d(x, weight(device, kernel_size**3, dtype=torch.bfloat16), kernel_size)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dataflow", DATAFLOWS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_autocast(
    kernel_size: int, dataflow: Any, half: torch.dtype, device: torch.device
) -> None:
    """The output is half; gradients keep the dtype of their tensors; float64 is left alone."""
    layer = Layer.of(kernel_size)
    problem = Case(layer, "odd").build()
    x = problem.tensor(device, torch.float32, requires_grad=True)
    kernel, bias = problem.parameters(device, torch.float32, requires_grad=True)
    with torch.autocast(device.type, dtype=half):
        y = convolve(layer, x, kernel, bias, config={"dataflow": dataflow})
        exact = convolve(layer, x, kernel.double(), bias)
    assert y.feats.dtype == half
    assert exact.feats.dtype == torch.float64
    y.feats.float().square().sum().backward()
    rounded = [t.detach().to(half).double().cpu().numpy() for t in (x.feats, kernel, bias)]
    want = oracles.relate(problem.coords, layer)
    out = oracles.convolve(rounded[0], rounded[1], want, rounded[2])
    assert_close(y.feats, out, half)
    grad = (2 * y.feats.detach().float()).to(half).double().cpu().numpy()
    expected = oracles.gradients(rounded[0], rounded[1], want, grad)
    for leaf, gradient in zip((x.feats, kernel, bias), expected):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        scale = max(1.0, float(np.abs(gradient).max()))
        assert_close(leaf.grad / scale, gradient / scale, half)


# The kernel map of the functional API.


@pytest.mark.parametrize("mode", ["hashmap", "hashmap_on_the_fly"])
@pytest.mark.parametrize(
    "layer",
    [
        *FAST,
        Layer.of((3, 1, 2), (1, 2, 1), (1, 0, 2), 2),
        Layer.of(3, 2, 0, minkowski=True),
        Layer.of(2, 2, 0, transposed=True, generative=True),
        Layer.of(3, 2, 1, transposed=True, generative=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("cloud", ["empty", "single", "batch_gap"])
def test_build_kernel_map(layer: Layer, cloud: str, mode: str, device: torch.device) -> None:
    coords = clouds.CLOUDS[cloud]()
    spatial_range = (clouds.BATCH, *clouds.ROOM)
    want = oracles.relate(coords, layer, spatial_range)
    kmap = F.build_kernel_map(
        torch.from_numpy(coords).to(device),
        len(coords),
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        spatial_range=spatial_range,
        mode=mode,
        downsample_mode="minkowski" if layer.minkowski else "spconv",
        generative=layer.generative,
        dilation=layer.dilation,
    )
    assert_rows(kmap["coords"], want.coords)
    assert tuple(kmap["sizes"]) == (len(coords), len(want.coords))
    assert kmap["spatial_range"] == want.spatial_range
    table = kmap["out_in_map"]
    rows = -(-len(want.coords) // 128) * 128
    assert table.dtype == torch.int32 and tuple(table.shape) == (rows, layer.volume)
    np.testing.assert_array_equal(table[: len(want.coords)].cpu().numpy(), want.table)
    assert (table[len(want.coords) :] == -1).all()
    assert kmap["nbmaps"].dtype == kmap["nbsizes"].dtype == torch.int32
    pairs = [(n, m) for n, m, _ in want.pairs]
    assert kmap["nbmaps"].cpu().tolist() == [list(pair) for pair in pairs]
    assert kmap["nbsizes"].cpu().tolist() == (want.table >= 0).sum(0).tolist()

    both = F.transpose_kernel_map(kmap)
    back = np.full((-(-len(coords) // 128) * 128, layer.volume), -1)
    for n, m, t in want.pairs:
        back[n, t] = m
    assert both["out_in_map_t"].dtype == torch.int32
    np.testing.assert_array_equal(both["out_in_map_t"].cpu().numpy(), back)
    np.testing.assert_array_equal(both["out_in_map"].cpu().numpy(), table.cpu().numpy())


def test_build_kernel_map_by_default_halves_the_lattice(device: torch.device) -> None:
    coords = torch.from_numpy(clouds.odd()).to(device)
    kmap = F.build_kernel_map(coords, len(coords))
    want = oracles.relate(clouds.odd(), Layer.of(2, 2))
    assert_rows(kmap["coords"], want.coords)
    assert "out_in_map" in kmap and "no such entry" not in kmap


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "minkowski", "ranged"),
    [
        (2, 2, 0, False, False),
        (3, (1, 3, 1), 1, False, False),  # every stride 1 or k: floor, padding unused
        (3, 2, 1, False, False),
        (3, 2, 1, False, True),
        (5, (2, 1, 3), (2, 0, 1), False, True),
        (3, 2, 1, True, False),
    ],
)
def test_spdownsample(
    kernel_size: Any,
    stride: Any,
    padding: Any,
    minkowski: bool,
    ranged: bool,
    device: torch.device,
) -> None:
    """The floor branch has no bound; the other one reads the range as that of its output."""
    k, s = triple(kernel_size), triple(stride)
    floor = minkowski or all(s[i] in (1, k[i]) for i in range(3))
    layer = Layer.of(k, s, padding, minkowski=floor)
    room = (clouds.BATCH, 5, 4, 3)
    want = oracles.output_sites(clouds.batch_gap(), layer)
    if ranged:
        layer = Layer.of(k, s, padding, infer_range=False)
        every = oracles.output_sites(clouds.batch_gap(), layer)
        want = [c for c in every if all(c[1 + i] < room[1 + i] for i in range(3))]
        assert len(want) < len(every)
    got = F.spdownsample(
        torch.from_numpy(clouds.batch_gap()).to(device),
        stride,
        kernel_size,
        padding,
        spatial_range=room if ranged else None,
        downsample_mode="minkowski" if minkowski else "spconv",
    )
    assert_rows(got, oracles.as_rows(want))


@pytest.mark.parametrize("room", [None, (clouds.BATCH, 14, 15, 9)])
@pytest.mark.parametrize(("kernel_size", "padding"), [(2, 0), (3, 1), (4, (1, 0, 2))])
def test_spupsample_generative(
    kernel_size: int, padding: Any, room: Any, device: torch.device
) -> None:
    """Sites outside the output range are dropped, not moved to its border."""
    layer = Layer.of(kernel_size, 2, padding, transposed=True, generative=True)
    every = oracles.output_sites(clouds.batch_gap(), layer)
    want = [c for c in every if room is None or all(c[1 + i] < room[1 + i] for i in range(3))]
    coords = torch.from_numpy(clouds.batch_gap()).to(device)
    got = F.spupsample_generative(coords, 2, kernel_size, padding, spatial_range=room)
    assert_rows(got, oracles.as_rows(want))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("implicit_gemm", "ImplicitGEMMConvolutionFuntion"),
        ("gather_scatter", "GatherScatterConvolutionFuntion"),
        ("fetch_on_demand", "FetchOnDemandConvolutionFuntion"),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_autograd_functions_run_on_a_built_map(
    module: str, name: str, transposed: bool, device: torch.device
) -> None:
    """v2.1's classes under their own spelling; transposed swaps the two sides of the map."""
    place = f"torchsparse.nn.functional.conv.func.{module}"
    function = getattr(importlib.import_module(place), name)
    coords = torch.from_numpy(clouds.odd()).to(device)
    kmap = F.build_kernel_map(coords, len(coords), kernel_size=3, stride=2, padding=1)
    want = oracles.relate(clouds.odd(), Layer.of(3, 2, 1))
    if transposed:
        back = np.full((len(coords), 27), -1)
        for n, m, t in want.pairs:
            back[n, t] = m
        fine = clouds.odd().astype(np.int64)
        want = oracles.Relation(fine, back, None, len(want.coords))
    feats = torch.randn(want.num_inputs, 3, dtype=torch.float64, device=device)
    kernel = weight(device, 27)
    config = F.conv_config.get_default_conv_config()
    out = function.apply(feats, kernel, kmap, config, transposed)
    expected = oracles.convolve(feats.cpu().numpy(), kernel.cpu().numpy(), want)
    assert_close(out, expected, torch.float64)


# nn.Conv3d.


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=str)
def test_module_applies_its_padding_rule(
    kernel_size: Any, stride: Any, dilation: int, device: torch.device
) -> None:
    k, s, d = triple(kernel_size), triple(stride), triple(dilation)
    module = spnn.Conv3d(3, 2, kernel_size, stride, (0, 2, 1), dilation, bias=True).to(device)
    padding = oracles.module_padding(k, s, (0, 2, 1), d)
    assert (module.kernel_size, module.stride, module.dilation) == (k, s, d)
    assert module.padding == padding
    x = sparse(device, "batch_gap", dtype=torch.float32)
    y = module(x)
    want = oracles.relate(clouds.batch_gap(), Layer.of(k, s, padding, d))
    assert_rows(y.coords, want.coords)
    assert module.bias is not None
    arrays = [t.detach().cpu().numpy() for t in (x.feats, module.kernel, module.bias)]
    out = oracles.convolve(arrays[0], arrays[1], want, arrays[2])
    assert_close(y.feats, out, torch.float32)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_module_takes_three_ints_in_any_sequence(kind: Any) -> None:
    module = spnn.Conv3d(3, 2, kind([3, 1, 2]), kind([1, 2, 1]), kind([0, 1, 0]), kind([1, 1, 2]))
    assert module.kernel_size == (3, 1, 2) and module.stride == (1, 2, 1)
    assert module.padding == (1, 1, 0) and module.dilation == (1, 1, 2)
    assert module.kernel_volume == 6 and module.kernel.shape == (6, 3, 2)
    assert all(type(v) is int for v in (*module.kernel_size, *module.stride, *module.padding))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "shape"),
    [(1, 1, (3, 2)), (1, 2, (1, 3, 2)), (3, 1, (27, 3, 2)), ((3, 1, 2), 1, (6, 3, 2))],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_module_parameters(
    kernel_size: Any, stride: int, shape: tuple[int, ...], transposed: bool
) -> None:
    """Shapes, names, and the bound 1/sqrt(C K) of the uniform start: kernel first, then bias."""
    torch.manual_seed(7)
    module = spnn.Conv3d(3, 2, kernel_size, stride, bias=True, transposed=transposed)
    assert list(module.state_dict()) == ["kernel", "bias"]
    assert module.bias is not None
    assert module.kernel.shape == shape and module.bias.shape == (2,)
    assert (module.in_channels, module.out_channels) == (3, 2)
    assert (module.transposed, module.generative) == (transposed, False)
    volume = int(np.prod(triple(kernel_size)))
    bound = 1 / np.sqrt((2 if transposed else 3) * volume)
    torch.manual_seed(7)
    kernel = torch.empty(shape).uniform_(-bound, bound)
    bias = torch.empty(2).uniform_(-bound, bound)
    torch.testing.assert_close(module.kernel.detach(), kernel)
    torch.testing.assert_close(module.bias.detach(), bias)
    assert spnn.Conv3d(3, 2, kernel_size, stride).bias is None


@pytest.mark.filterwarnings("ignore:.*form of versions before:DeprecationWarning")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2)])
def test_module_loads_both_layouts_of_a_single_tap(stride: int, shape: tuple[int, ...]) -> None:
    module = spnn.Conv3d(3, 2, 1, stride)
    values = torch.arange(6.0).reshape(shape)
    module.load_state_dict({"kernel": values})
    assert module.kernel.flatten().tolist() == values.flatten().tolist()
    assert module.kernel.ndim == (2 if stride == 1 else 3)


def test_module_refuses_a_state_of_another_size() -> None:
    with pytest.raises(RuntimeError, match="kernel"):
        spnn.Conv3d(3, 2, 3).load_state_dict({"kernel": torch.zeros(8, 3, 2)})


def test_module_config_reaches_the_layer(device: torch.device) -> None:
    """The only key that changes results: downsample_mode."""
    x = sparse(device, dtype=torch.float32)
    module = spnn.Conv3d(3, 2, 3, 2, 0, config={"downsample_mode": "minkowski"}).to(device)
    assert module._config == {"downsample_mode": "minkowski"}
    want = oracles.output_sites(clouds.odd(), Layer.of(3, 2, minkowski=True))
    assert_rows(module(x).coords, oracles.as_rows(want))


@pytest.mark.parametrize(
    ("own", "shared", "mode"),
    [
        ("spconv", "minkowski", "minkowski"),
        (None, "spconv", "minkowski"),
        (None, None, "minkowski"),
    ],
)
def test_configuration_precedence(
    own: str | None, shared: str | None, mode: str, device: torch.device
) -> None:
    """Own config over the global one over the setters, key by key."""
    F.set_downsample_mode(mode)
    F.conv_config.set_global_conv_config(
        {"ifsort": True, "unknown key": 1, **({"downsample_mode": shared} if shared else {})}
    )
    config = {"downsample_mode": own} if own else {"ifsort": False}
    winner = own or shared or mode
    layer = Layer.of(3, 2, minkowski=winner == "minkowski")
    y = F.conv3d(sparse(device), weight(device, 27), 3, None, 2, config=config)
    assert_rows(y.coords, oracles.as_rows(oracles.output_sites(clouds.odd(), layer)))


@pytest.mark.parametrize("make", ["slice", "transpose", "expand"])
def test_weight_may_be_any_view(make: str, device: torch.device) -> None:
    full = weight(device, 27, 4, 6)
    views = {
        "slice": full[:, :3, ::2],
        "transpose": full.transpose(1, 2)[:, :3],
        "expand": full[:1, :3].expand(27, 3, 6),
    }
    view = views[make]
    x = sparse(device, "block")
    y = F.conv3d(x, view, 3)
    want = F.conv3d(x, view.clone(memory_format=torch.contiguous_format), 3)
    assert_close(y.feats, want.feats, torch.float64)
    assert y.feats.shape[1] == view.shape[2]


def test_inputs_may_be_strided_views(device: torch.device) -> None:
    x = sparse(device, channels=3)
    want = F.conv3d(x, weight(device, 27), 3)
    feats = x.feats.repeat_interleave(2, 1)[:, ::2]
    coords = x.coords.repeat_interleave(2, 0)[::2]
    assert not feats.is_contiguous() and not coords.is_contiguous()
    y = F.conv3d(SparseTensor(feats, coords), weight(device, 27), 3)
    assert y.coords is coords
    assert_close(y.feats, want.feats, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", [(3, 1), (3, 2), (2, 2)], ids=str)
def test_weights_may_be_any_view(
    layer: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """As they come from dense layers, or lie in larger ones."""
    torch.manual_seed(0)
    kernel, stride = layer
    volume, c_in, c_out = kernel**3, 4, 8
    grid = torch.cartesian_prod(*[torch.arange(4)] * 3)
    coords = torch.nn.functional.pad(grid, (1, 0)).int().to(device)
    feats = torch.randn(len(coords), c_in, device=device).to(dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    views = (
        random(c_out, c_in, volume).permute(2, 1, 0),
        random(volume, c_out, c_in).transpose(1, 2),
        random(volume, 2 * c_in, 2 * c_out)[:, ::2, ::2],
        random(volume, c_in, c_out + 1)[:, :, 1:],
        random(volume * c_in * c_out + 1)[1:].view(volume, c_in, c_out),
        random(volume, c_in, 1).expand(-1, -1, c_out),
        random(1, c_in, c_out).expand(volume, -1, -1),
    )
    for view in views:
        plain = view.clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            got, want = (
                F.conv3d(SparseTensor(feats, coords), weight, kernel, stride=stride).feats
                for weight in (view, plain)
            )
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_nan_reaches_its_neighbours_only(device: torch.device) -> None:
    x = sparse(device, "odd")
    x.feats[5] = float("nan")
    want = oracles.relate(clouds.odd(), Layer.of(3))
    touched = (want.table == 5).any(1)
    y = F.conv3d(x, weight(device, 27), 3)
    assert touched.any() and not touched.all()
    np.testing.assert_array_equal(y.feats.isnan().any(1).cpu().numpy(), touched)


def test_pointwise_needs_no_map(device: torch.device) -> None:
    """Any padding and dilation, negative and repeated rows: feats @ kernel + bias."""
    coords = torch.tensor([[0, -1, 2, 3], [0, -1, 2, 3]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.randn(2, 3, device=device), coords, 4, (1, 9, 9, 9))
    for transposed, generative in ((False, False), (True, False), (True, True)):
        layer = spnn.Conv3d(
            3, 2, 1, 1, 2, 3, bias=True, transposed=transposed, generative=generative
        ).to(device)
        y = layer(x)
        assert y.coords is coords and y._caches is x._caches
        assert (y.stride, y.spatial_range) == ((4, 4, 4), (1, 9, 9, 9))
        assert not y._caches.kmaps
        assert layer.bias is not None
        want = x.feats.double() @ layer.kernel.double() + layer.bias.double()
        assert_close(y.feats, want, torch.float32)


def test_a_fifth_range_entry_is_ignored_and_dropped(device: torch.device) -> None:
    room = (clouds.BATCH, *clouds.ROOM)
    x = sparse(device, "batch_gap", spatial_range=(*room, 99))
    assert F.conv3d(x, weight(device, 1), 1).spatial_range == (*room, 99)
    assert F.conv3d(x, weight(device, 27), 3).spatial_range == room
    assert F.conv3d(x, weight(device, 8), 2, None, 2).spatial_range == (clouds.BATCH, 6, 7, 7)
