"""Programs compiled by PyTorch: one graph, any size of scan, what eager execution computes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import torchsparse
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._ops import coords as coords_ops
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.backbones.modules.blocks import (
    SparseConvBlock,
    SparseConvTransposeBlock,
    SparseResBlock,
)
from torchsparse.models import MinkUNet, SparseEncoder
from torchsparse.nn import functional as F
from torchsparse.nn.functional.conv import traced

CONV = {"coords": torch.int32, "feats": torch.float32}
SIZES = (40, 70, 110)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No program of another test, and nothing counted."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def scan(
    rows: int = 60,
    channels: int = 4,
    spatial_range: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.int32,
) -> SparseTensor:
    """About ``rows`` random voxels in two samples."""
    generator = torch.Generator().manual_seed(rows)
    columns = [torch.randint(0, e, (rows,), generator=generator) for e in (2, 9, 8, 7)]
    coords = torch.stack(columns, 1).unique(dim=0).to(dtype)
    feats = torch.randn(coords.shape[0], channels, generator=generator)
    return SparseTensor(feats, coords, 1, spatial_range)


def compiled(model: Any, backend: str = "aot_eager", fullgraph: bool = True) -> Any:
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=True)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(counters["graph_break"].values())


def features(outputs: Any) -> list[Tensor]:
    """The features of one or several tensors, sparse or not."""
    several = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [y.feats if isinstance(y, SparseTensor) else y for y in several]


def run(model: Any, x: SparseTensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, and gradients of the input and of all parameters."""
    model.zero_grad()
    feats = x.feats.clone().requires_grad_()
    outputs = features(model(SparseTensor(feats, x.coords.clone(), x.stride, x.spatial_range)))
    sum((y.double() * y.detach().double().cos()).sum() for y in outputs).backward()  # pyright: ignore
    return outputs, [feats.grad, *(p.grad for p in model.parameters())]


def assert_alike(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    """Equal up to the rounding of sums in another order; gradients can cancel out altogether."""
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a.dtype == b.dtype
        atol = rtol * max(1.0, float(b.detach().abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def check(model: nn.Module, scans: list[SparseTensor], backend: str = "aot_eager") -> None:
    """One graph for all scans; results, gradients and statistics are those of eager execution."""
    expected = copy.deepcopy(model)
    program = compiled(model, backend)
    for x in scans:
        (out, grads), (want, want_grads) = run(program, x), run(expected, x)
        assert_alike(out, want)
        assert_alike(grads, want_grads)
        assert_alike(model.buffers(), expected.buffers())
    assert (graphs(), breaks()) == (1, 0)


class Apply(nn.Module):
    """A function of some layers and the input."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.layers)


class UNet(nn.Module):
    """One level down and up again, with all that the backbones have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SparseConvBlock(4, 4, 3)
        self.down = SparseConvBlock(4, 6, 2, 2)
        self.up = SparseConvTransposeBlock(6, 4, 2, 2)
        self.fuse = SparseResBlock(8, 5, 3)

    def forward(self, x: SparseTensor) -> SparseTensor:
        x = self.stem(x)
        return self.fuse(torchsparse.cat([self.up(self.down(x)), x]))


# ------------------------------------------------------------------ the networks of the library
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SparseResNet21D": lambda: SparseResNet21D(width_multiplier=0.25),
    "SparseResUNet42": lambda: SparseResUNet42(width_multiplier=0.125),
    "SparseEncoder": lambda: SparseEncoder.named("second", 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_graph(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    program = compiled(model, "eager")
    extents = (2, 32, 32, 32) if name == "SparseEncoder" else None
    with torch.no_grad():
        for rows in SIZES:
            x = scan(rows, spatial_range=extents)
            assert_alike(features(program(x)), features(model(x)))
    assert (graphs(), breaks()) == (1, 0)


def test_training_a_network_is_one_graph() -> None:
    torch.manual_seed(0)
    model = MinkUNet(4, 3, stem=4, encoder=(4, 5), decoder=(5, 4), depth=1)
    check(model, [scan(rows) for rows in SIZES])


def test_inductor_computes_the_same() -> None:
    torch.manual_seed(0)
    check(UNet(), [scan(rows) for rows in SIZES], "inductor")


# ------------------------------------------------------------------ layers
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: spnn.Conv3d(4, 3, 1, bias=True),
    "strided twice": lambda: nn.Sequential(
        spnn.Conv3d(4, 4, 3, 2, 1), spnn.Conv3d(4, 4, (1, 3, 2), (1, 2, 1), bias=True)
    ),
    "dilated": lambda: spnn.Conv3d(4, 3, 3, dilation=2),
    "even kernel": lambda: spnn.Conv3d(4, 3, 2),
    "transposed by the encoder's padding": lambda: nn.Sequential(
        spnn.Conv3d(4, 4, 3, 2, 1), spnn.Conv3d(4, 4, 3, 2, transposed=True, bias=True)
    ),
    "transposed with another kernel": lambda: nn.Sequential(
        spnn.Conv3d(4, 4, 2, 2), spnn.Conv3d(4, 4, 3, 2, 1, transposed=True)
    ),
    "generative": lambda: nn.Sequential(
        spnn.Conv3d(4, 4, 2, 2),
        spnn.Conv3d(4, 4, 2, 2, transposed=True, generative=True),
        spnn.Conv3d(4, 4, 3),
    ),
    "onto given sites": lambda: SparseResBlock(4, 5, 3, 2),
    "depthwise": lambda: spnn.Conv3d(4, 8, 3, groups=4, bias=True),
    "groups": lambda: nn.Sequential(
        spnn.Conv3d(4, 4, 3, 2, groups=2), spnn.Conv3d(4, 6, 1, groups=2)
    ),
    "minkowski": lambda: spnn.Conv3d(4, 4, 3, 2, config={"downsample_mode": "minkowski"}),
    "dataflow": lambda: spnn.Conv3d(4, 4, 3, config={"dataflow": F.Dataflow.GatherScatter}),
    "used twice": lambda: Apply(lambda x, conv: conv(conv(x)), spnn.Conv3d(4, 4, 3)),
    "beside each other": lambda: Apply(
        lambda x, a, b: a(x) + b(x), spnn.Conv3d(4, 4, 3), spnn.Conv3d(4, 4, 1)
    ),
    "arithmetic": lambda: Apply(lambda x, conv: -conv(x * 2.0 - 1) / 3, spnn.Conv3d(4, 4, 3)),
    "activations": lambda: nn.Sequential(
        spnn.SiLU(), spnn.LeakyReLU(), spnn.GELU(), spnn.Linear(4, 3), spnn.LayerNorm(3)
    ),
    "batch norms": lambda: nn.Sequential(
        spnn.Conv3d(4, 4, 3),
        spnn.BatchNorm(4, momentum=None),
        spnn.BatchNorm(4, affine=False),
        spnn.BatchNorm(4, track_running_stats=False),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_one_graph(name: str) -> None:
    torch.manual_seed(0)
    check(LAYERS[name](), [scan(40), scan(90)])


def test_ranges_may_change_from_scan_to_scan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(spnn.Conv3d(4, 4, 3, 2, 1), spnn.Conv3d(4, 4, 3, 2, 1))
    ranges = [(2, 9, 8, 7), (2, 10, 9, 9), (3, 12, 11, 10)]
    program = compiled(model)
    for rows, extents in zip(SIZES, ranges):
        x = scan(rows, spatial_range=extents)
        y, expected = program(x), model(x)
        assert y.spatial_range == expected.spatial_range
        assert y.stride == expected.stride == (4, 4, 4)
        assert torch.equal(y.coords, expected.coords)
        assert_alike([y.feats], [expected.feats])
    assert graphs() <= 2  # numbers on an object become variables when they change


def test_other_integers_become_int32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(spnn.Conv3d(4, 4, 1), spnn.Conv3d(4, 4, 3), spnn.Conv3d(4, 4, 2, 2))
    check(model, [scan(40, dtype=torch.int64), scan(90, dtype=torch.int64)])


def test_fewer_axes() -> None:
    torch.manual_seed(0)
    program = compiled(model := spnn.Conv2d(4, 4, 3, 2, 1))
    for rows in SIZES:
        coords = scan(rows).coords[:, :3].unique(dim=0)
        x = SparseTensor(torch.randn(coords.shape[0], 4), coords)
        assert_alike([program(x).feats], [model(x).feats])
    assert (graphs(), breaks()) == (1, 0)


def test_the_function_is_traced_like_the_module() -> None:
    conv = spnn.Conv3d(4, 4, 3, 2, 1, bias=True)

    def function(x: SparseTensor) -> SparseTensor:
        return F.conv3d(x, conv.kernel, 3, conv.bias, stride=2, padding=1)

    program = compiled(function)
    for rows in SIZES:
        assert_alike([program(scan(rows)).feats], [conv(scan(rows)).feats])
    assert (graphs(), breaks()) == (1, 0)


# ------------------------------------------------------------------ training
def test_evaluation_and_training_take_turns() -> None:
    torch.manual_seed(0)
    model = SparseConvBlock(4, 4, 3)
    expected, program = copy.deepcopy(model), compiled(model)
    for training in (True, False, True, False):
        model.train(training), expected.train(training)
        (out, grads), (want, want_grads) = run(program, scan(50)), run(expected, scan(50))
        assert_alike(out, want)
        assert_alike(grads, want_grads)
        assert_alike(model.buffers(), expected.buffers())
    assert (graphs(), breaks()) == (2, 0)


def test_frozen_parameters_get_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(spnn.Conv3d(4, 4, 3, bias=True), spnn.Conv3d(4, 4, 2, 2, bias=True))
    model[0].requires_grad_(False)
    check(model, [scan(40), scan(90)])
    assert model[0].kernel.grad is None and model[1].kernel.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseConvBlock(4, 4, 3), spnn.Conv3d(4, 5, 2, 2, bias=True))
    expected, program = copy.deepcopy(model), compiled(model)
    for rows in SIZES:
        with torch.autocast("cpu", dtype):
            (out, grads), (want, want_grads) = run(program, scan(rows)), run(expected, scan(rows))
        assert out[0].dtype is dtype and grads[1] is not None and grads[1].dtype is torch.float32
        assert_alike(out, want, rtol=3e-2)
        assert_alike(grads, want_grads, rtol=6e-2)
    assert (graphs(), breaks()) == (1, 0)


def test_mixed_dtypes_follow_the_rules_of_the_function() -> None:
    model = spnn.Conv3d(4, 4, 3, 2).to(torch.bfloat16)
    x = scan(50)
    y = compiled(model)(x)
    assert y.feats.dtype is torch.bfloat16
    assert torch.equal(y.feats, model(x).feats)


def test_hooks_on_modules_are_called() -> None:
    model = nn.Sequential(spnn.Conv3d(4, 4, 3), spnn.ReLU())
    model[0].register_forward_hook(lambda module, args, out: out * 2.0)
    check(model, [scan(40), scan(90)])


def test_optimisation_reaches_the_same_weights() -> None:
    torch.manual_seed(0)
    model = SparseConvBlock(4, 3, 3)
    expected, program = copy.deepcopy(model), compiled(model)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, expected)]
    for rows in SIZES:
        run(program, scan(rows)), run(expected, scan(rows))
        for step in steps:
            step.step()
    assert_alike(model.parameters(), expected.parameters())


# ------------------------------------------------------------------ few and no rows
def test_levels_without_rows() -> None:
    """The range leaves no room for sites; batch norm then keeps its statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(spnn.Conv3d(4, 4, 2, 2), spnn.BatchNorm(4), spnn.Conv3d(4, 4, 3))
    expected, program = copy.deepcopy(model), compiled(model)
    full = scan(40)
    lonely = SparseTensor(torch.randn(2, 4), torch.tensor([[0, 2, 2, 2], [0, 8, 8, 8]]).int())
    lonely.coords[:, 1:] = torch.tensor([[6, 1, 0], [6, 0, 1]])
    for x in (full, SparseTensor(torch.randn(2, 4), lonely.coords - 1)):
        with F_negative():
            (out, grads), (want, want_grads) = run(program, x), run(expected, x)
        assert_alike(out, want)
        assert_alike(grads, want_grads)
        assert_alike(model.buffers(), expected.buffers())


def F_negative() -> Any:
    return torchsparse._settings.override(allow_negative_coordinates=True)
