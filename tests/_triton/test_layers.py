"""Whole convolutions on kernels: outputs and gradients of every kind, dataflow and mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import clouds, oracles
from tests._triton.kit import HALVES
from tests.cases import assert_close, assert_rows, convolve
from tests.oracles import Layer
from torchsparse import SparseTensor, backends
from torchsparse._kernel_map import KernelMap, KernelMapKey
from torchsparse._ops.dispatch import forced
from torchsparse._recipe import Dataflow
from torchsparse._triton import launch as launching
from torchsparse._triton.conv import plan as conv_plan
from torchsparse._triton.conv import product
from torchsparse.nn import functional as F

pytestmark = pytest.mark.usefixtures("kernels")
CHANNELS = (9, 12)

LAYERS = [
    Layer.of(3),
    Layer.of(2),  # even: not symmetric, starts at the site
    Layer.of((3, 1, 2), 1, 0, 2),
    Layer.of((5, 3, 3)),  # 45 taps: two words
    Layer.of(2, 2),
    Layer.of(3, 2, 1),
    Layer.of(3, (1, 2, 3), (0, 2, 1), minkowski=True),
    Layer.of(2, 2, transposed=True, generative=True),
    Layer.of(3, 2, 1, transposed=True, generative=True, allow_negative=True),
]  # fmt: skip


def arrays(
    coords: clouds.Coords, layer: Layer, channels: tuple[int, int] = CHANNELS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, kernel and bias."""
    rng = clouds.rng(str(layer))
    c_in, c_out = channels
    kernel = rng.standard_normal((layer.volume, c_in, c_out)) / np.sqrt(4 * c_in)
    return rng.standard_normal((len(coords), c_in)), kernel, rng.standard_normal(c_out)


def check(
    coords: clouds.Coords,
    layer: Layer,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    channels: tuple[int, int] = CHANNELS,
) -> None:
    """Sites, output and gradients against the search in Python."""
    leaves = [
        torch.from_numpy(a).to(device, dtype).requires_grad_()
        for a in arrays(coords, layer, channels)
    ]
    feats, kernel, bias = leaves
    x = SparseTensor(feats, torch.from_numpy(coords).to(device))
    y = convolve(layer, x, kernel, bias, config)
    relation = oracles.relate(coords, layer)
    assert_rows(y.coords, relation.coords)
    rounded = [leaf.detach().double().cpu().numpy() for leaf in leaves]
    assert y.feats.dtype == dtype
    assert_close(y.feats, oracles.convolve(rounded[0], rounded[1], relation, rounded[2]), dtype)
    push = clouds.rng("push").standard_normal(y.feats.shape) / 4
    grad = torch.from_numpy(push).to(device, dtype)
    got = torch.autograd.grad(y.feats, leaves, grad)
    want = oracles.gradients(rounded[0], rounded[1], relation, grad.double().cpu().numpy())
    for one, other in zip(got, want):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels of products and plans that were launched."""
    names: list[str] = []

    def spy(launch: Callable[..., None]) -> Callable[..., None]:
        def start(kernel: Any, *args: Any, **options: Any) -> None:
            if ".conv." in kernel.fn.__module__:  # maps are built by others
                names.append(kernel.fn.__name__)
            launch(kernel, *args, **options)

        return start

    for module in (product, launching):
        monkeypatch.setattr(module, "launch", spy(module.launch))
    return names


@pytest.mark.parametrize("name", ["empty", "single", "small"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_kind_of_layer(layer: Layer, name: str, device: torch.device) -> None:
    coords = clouds.scatter("small", 19, (5, 4, 5))
    check(coords if name == "small" else clouds.CLOUDS[name](), layer, device)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("dataflow", list(Dataflow)[:3], ids=lambda d: d.name)
def test_every_dataflow_and_mode(
    dataflow: Dataflow, mode: int, device: torch.device, launched: list[str]
) -> None:
    F.set_conv_mode(mode)
    coords = clouds.scatter("small", 19, (5, 4, 5))
    check(coords, Layer.of(3), device, config={"dataflow": dataflow})
    wanted = {Dataflow.FetchOnDemand: "fetch_kernel", Dataflow.GatherScatter: None}
    kernel = wanted.get(dataflow, "gemm_kernel")
    assert kernel is None or kernel in launched
    sorts = kernel == "gemm_kernel" and mode > 0
    assert ("place_kernel" in launched) is sorts


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(2, 2)], ids=str)
def test_splits_of_the_backward_pass(
    layer: Layer, literal: bool, device: torch.device, launched: list[str]
) -> None:
    """They are orders only where the library may not choose."""
    config = {"ifsort": True, "split_mask_num": 2, "split_mask_num_bwd": 3, "auto": not literal}
    check(clouds.scatter("small", 19, (5, 4, 5)), layer, device, config=config)
    assert launched.count("gemm_kernel") == 2
    assert launched.count("place_kernel") == 2 + (3 if literal else 0)


@pytest.mark.parametrize("channels", [(3, 5), (1, 1), (33, 7)], ids=str)
def test_unusual_channels(channels: tuple[int, int], device: torch.device) -> None:
    coords = clouds.scatter("small", 19, (5, 4, 5))
    check(coords, Layer.of(3), device, channels=channels)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types(dtype: torch.dtype, device: torch.device) -> None:
    coords = clouds.scatter("small", 19, (5, 4, 5))
    check(coords, Layer.of(3, 2, 1), device, dtype)


def test_float64_is_left_to_pytorch(device: torch.device, launched: list[str]) -> None:
    """On maps that kernels built."""
    check(clouds.scatter("small", 19, (5, 4, 5)), Layer.of(3), device, torch.float64)
    assert not launched


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_precisions(precision: str, device: torch.device) -> None:
    backends.float32_precision = precision
    check(clouds.scatter("small", 19, (5, 4, 5)), Layer.of(3), device)


def u_net(device: torch.device, config: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Down, across, up on the finer sites, with the gradients of all that was put in."""
    coords = clouds.scatter("net", 29, (7, 6, 7))
    rng = clouds.rng("net")

    def leaf(*shape: int) -> Tensor:
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        return torch.from_numpy(values).to(device, torch.float32).requires_grad_()

    feats = leaf(len(coords), 12)
    down, across, up, back = leaf(8, 12, 9), leaf(27, 9, 12), leaf(8, 12, 10), leaf(27, 10, 9)
    x = SparseTensor(feats, torch.from_numpy(coords).to(device))
    y = F.conv3d(x, down, 2, None, 2, config=config)
    y = F.conv3d(y, across, 3, None, 1, 1, config=config)
    z = F.conv3d(y, up, 2, None, 2, config=config, transposed=True)
    z = F.conv3d(z, back, 3, None, 1, 1, config=config, transposed=True)
    leaves = [feats, down, across, up, back]
    push = torch.from_numpy(rng.standard_normal(z.feats.shape)).to(device, torch.float32)
    return [y.feats, z.feats], list(torch.autograd.grad(z.feats, leaves, push))


@pytest.mark.parametrize("dataflow", [Dataflow.ImplicitGEMM, Dataflow.FetchOnDemand])
def test_down_across_and_up_again(dataflow: Dataflow, device: torch.device) -> None:
    """Transposed layers read the maps from their other end; against the reference."""
    config = {"dataflow": dataflow}
    outputs, gradients = u_net(device, config)
    with forced("_reference"):
        want_outputs, want_gradients = u_net(device, config)
    for got, want in zip(outputs + gradients, want_outputs + want_gradients):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)  # four layers of sums


def test_maps_of_both_twins_are_equal(device: torch.device) -> None:
    coords = torch.from_numpy(clouds.scatter("small", 19, (5, 4, 5))).to(device)
    for stride, size in ((1, 3), (2, 3), (2, 2)):
        found = F.build_kernel_map(coords, 19, kernel_size=size, stride=stride)
        with forced("_reference"):
            want = F.build_kernel_map(coords, 19, kernel_size=size, stride=stride)
        for name in ("out_in_map", "out_in_map_t", "coords", "nbmaps", "nbsizes"):
            assert torch.equal(found[name], want[name]), name


# ------------------------------------------------------------------ tables that are let go
def _layers_on(x: SparseTensor, weights: dict[str, Tensor]) -> dict[str, SparseTensor]:
    same = F.conv3d(x, weights["same"], 3)
    return {
        "same": same,
        "overlapping": F.conv3d(same, weights["same"], 3, stride=2, padding=1),
        "apart": F.conv3d(same, weights["apart"], 2, stride=2),
    }


def _maps(x: SparseTensor) -> dict[str, KernelMap]:
    """By the name of the layer that made them."""
    found = {}
    for key, entries in x._caches.kmaps.items():
        if isinstance(key, KernelMapKey):
            geometry = key.geometry
            name = "same" if geometry.is_symmetric else "apart" if geometry.volume == 8 else ""
            found[name or "overlapping"] = entries[0].kmap
    return found


def _input(device: torch.device) -> tuple[SparseTensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    coords = torch.nn.functional.pad(torch.randint(0, 9, (40, 3), generator=rng), (1, 0)).unique(
        dim=0
    )
    feats = torch.randn(len(coords), 4, generator=rng)
    weights = {
        "same": torch.randn(27, 4, 4, generator=rng).to(device),
        "apart": torch.randn(8, 4, 4, generator=rng).to(device),
    }
    return SparseTensor(feats.to(device), coords.int().to(device)), weights


@pytest.mark.usefixtures("forgetful")
def test_tables_are_let_go_without_gradients(device: torch.device) -> None:
    """Where a plan has the same numbers and no decoder is likely to read the map backwards."""
    x, weights = _input(device)
    with torch.no_grad():
        outputs = _layers_on(x, weights)
        for y in outputs.values():
            y.feats.sum().item()
    maps = _maps(x)
    held = {name: "neighbors" in kmap.__dict__ for name, kmap in maps.items()}
    assert held == {"same": False, "overlapping": False, "apart": True}
    with torch.no_grad():
        F.conv3d(
            outputs["apart"], weights["apart"], 2, stride=2, transposed=True
        ).feats.sum().item()
    for kmap in (maps["apart"], maps["apart"].transposed):  # both ends have been read
        assert "neighbors" not in kmap.__dict__
    y, _ = _input(device)
    for z in _layers_on(y, {k: w.requires_grad_() for k, w in weights.items()}).values():
        z.feats.sum().item()
    for name, kmap in _maps(y).items():
        assert "neighbors" in kmap.__dict__
        assert torch.equal(maps[name].neighbors, kmap.neighbors)
        assert "neighbors" in maps[name].__dict__


@pytest.mark.usefixtures("forgetful")
def test_gradients_on_a_map_whose_table_was_let_go(device: torch.device) -> None:
    """Bit for bit those of a map that kept it."""
    gradients = []
    for first in (torch.no_grad, torch.enable_grad):
        x, weights = _input(device)
        leaves = [x.feats.requires_grad_(), *(w.requires_grad_() for w in weights.values())]
        with first():
            for y in _layers_on(x, weights).values():
                y.feats.sum().item()
        held = {name: "neighbors" in kmap.__dict__ for name, kmap in _maps(x).items()}
        assert held["same"] is (first is torch.enable_grad)
        total = torch.stack(
            [y.feats.square().sum() for y in _layers_on(x, weights).values()]
        ).sum()
        gradients.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_map_without_its_table_gives_it_to_a_copy(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_plan, "FEW_ROWS", 8)  # sorted rows: the plan has another order
    x, weights = _input(device)
    with torch.no_grad():
        F.conv3d(x, weights["same"], 3).feats.sum().item()
    kmap = _maps(x)["same"]
    assert "neighbors" not in kmap.__dict__
    bare = replace(kmap, _views={})
    y, _ = _input(device)
    F.conv3d(y, weights["same"].requires_grad_(), 3).feats.sum().item()
    assert torch.equal(bare.neighbors, _maps(y)["same"].__dict__["neighbors"])
    with pytest.raises(AttributeError, match="'KernelMap' object has no attribute 'neighbours'"):
        _ = kmap.neighbours
