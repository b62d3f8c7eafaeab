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
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import torchsparse
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._autograd import points
from torchsparse._cache import TensorCache
from torchsparse._ops import coords as coords_ops
from torchsparse._settings import override
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.backbones.modules.blocks import (
    SparseConvBlock,
    SparseConvTransposeBlock,
    SparseResBlock,
)
from torchsparse.models import MinkUNet, SparseEncoder
from torchsparse.nn import functional as F
from torchsparse.nn.functional.conv import traced

SIZES = (40, 70, 110)
# What PyTorch says of itself: behind another program, and on import of its default backend.
GRAD = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
JIT = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"


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
    device: torch.device | str = "cpu",
) -> SparseTensor:
    """About ``rows`` random voxels in two samples."""
    generator = torch.Generator().manual_seed(rows)
    columns = [torch.randint(0, e, (rows,), generator=generator) for e in (2, 9, 8, 7)]
    coords = torch.stack(columns, 1).unique(dim=0).to(dtype)
    feats = torch.randn(coords.shape[0], channels, generator=generator)
    return SparseTensor(feats.to(device), coords.to(device), 1, spatial_range)


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


def assert_alike(found: Any, expected: Any, rtol: float = 2e-4) -> None:
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


def test_training_a_network_is_one_graph(device: torch.device) -> None:
    torch.manual_seed(0)
    model = MinkUNet(4, 3, stem=4, encoder=(5,), decoder=(4,), depth=1)
    check(model.to(device), [scan(rows, device=device) for rows in SIZES])


@pytest.mark.filterwarnings(JIT)
def test_inductor_computes_the_same(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseConvBlock(4, 4, 3),
        SparseConvBlock(4, 6, 2, 2),
        spnn.Conv3d(6, 4, 2, 2, transposed=True, bias=True),
    )
    check(model.to(device), [scan(rows, device=device) for rows in SIZES], "inductor")


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
    "transposed without a stride": lambda: spnn.Conv3d(4, 3, 3, transposed=True),
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
def test_layers_are_one_graph(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    check(LAYERS[name]().to(device), [scan(rows, device=device) for rows in (40, 90)])


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
        model.train(training)
        expected.train(training)
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


def test_inference_mode() -> None:
    model = SparseConvBlock(4, 4, 3, 2).eval()
    program = compiled(model)
    with torch.inference_mode():
        for rows in SIZES:
            assert_alike([program(scan(rows)).feats], [model(scan(rows)).feats])
    assert (graphs(), breaks()) == (1, 0)


def test_mixed_dtypes_follow_the_rules_of_the_function() -> None:
    model = spnn.Conv3d(4, 4, 3, 2).to(torch.bfloat16)
    x = scan(50)
    y = compiled(model)(x)
    assert y.feats.dtype is torch.bfloat16
    assert torch.equal(y.feats, model(x).feats)


def doubled(module: Any, args: Any, out: Any) -> Any:
    return out * 2.0


def test_hooks_on_modules_are_called() -> None:
    model = nn.Sequential(spnn.Conv3d(4, 4, 3), spnn.ReLU())
    model[0].register_forward_hook(doubled)
    check(model, [scan(40), scan(90)])


def test_optimisation_reaches_the_same_weights() -> None:
    torch.manual_seed(0)
    model = SparseConvBlock(4, 3, 3)
    expected, program = copy.deepcopy(model), compiled(model)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, expected)]
    for rows in SIZES:
        run(program, scan(rows))
        run(expected, scan(rows))
        for step in steps:
            step.step()
    assert_alike(model.parameters(), expected.parameters())


def test_second_derivatives_are_refused() -> None:
    """A penalty on gradients would else lack a term, in silence."""
    x = scan(50)
    x.requires_grad_()
    loss = compiled(spnn.Conv3d(4, 4, 3), "eager")(x).feats.square().sum()
    (grad,) = torch.autograd.grad(loss, x.feats, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.square().sum().backward()


# ------------------------------------------------------------------ few and no rows
def flat(rows: int) -> SparseTensor:
    """A scan one voxel high. By the border rule, kernel 2 at stride 2 finds no site in it."""
    x = scan(rows)
    coords = torch.cat([x.coords[:, :3], torch.zeros_like(x.coords[:, :1])], 1).unique(dim=0)
    return SparseTensor(x.feats[: coords.shape[0]], coords)


def test_levels_without_rows() -> None:
    """Batch norm leaves its statistics alone; gradients are 0 where eager execution has none."""
    torch.manual_seed(0)
    model = nn.Sequential(spnn.Conv3d(4, 4, 2, 2, bias=True), spnn.BatchNorm(4), spnn.ReLU())
    expected, program = copy.deepcopy(model), compiled(model)
    for x in (scan(40), flat(50), scan(60)):
        (out, grads), (want, want_grads) = run(program, x), run(expected, x)
        assert_alike(out, want)
        assert_alike(model.buffers(), expected.buffers())
        for grad, other in zip(grads, want_grads, strict=True):
            assert grad is not None
            assert_alike([grad], [torch.zeros_like(grad) if other is None else other])
    assert expected[1].num_batches_tracked == 2
    assert (graphs(), breaks()) == (1, 0)


def test_batch_norm_of_a_single_row_is_refused() -> None:
    model = nn.Sequential(spnn.Conv3d(4, 4, 2, 2), spnn.BatchNorm(4))
    program = compiled(model)
    program(scan(40))
    corners = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]]).int()
    with pytest.raises(RuntimeError, match="more than one row"):
        program(SparseTensor(torch.randn(2, 4), corners))


# ------------------------------------------------------------------ maps
@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every kernel map that is built."""
    found: list[int] = []
    search = coords_ops.find_taps
    monkeypatch.setattr(coords_ops, "find_taps", lambda *args: (found.append(1), search(*args))[1])
    return found


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_scan_builds_its_maps_once(
    backend: str, searches: list[int], device: torch.device
) -> None:
    """Forward, backward and a second run over the same coordinates share them."""
    model = nn.Sequential(
        spnn.Conv3d(4, 4, 3), spnn.Conv3d(4, 4, 3), spnn.Conv3d(4, 4, 2, 2),
        spnn.Conv3d(4, 4, 3), spnn.Conv3d(4, 4, 2, 2, transposed=True), spnn.Conv3d(4, 4, 3),
    )  # fmt: skip
    program = compiled(model.to(device), backend)
    for rows in SIZES:
        x = scan(rows, device=device)
        searches.clear()
        for _ in range(2):
            program(x).feats.sum().backward()
        assert len(searches) == 3


def test_coordinates_that_were_written_to_get_new_maps() -> None:
    model = spnn.Conv3d(4, 4, 3, 2, 1)
    program, x = compiled(model), scan(50)
    program(x)
    x.coords[:, 1] += 1
    y, expected = program(x), model(SparseTensor(x.feats, x.coords))
    assert torch.equal(y.coords, expected.coords)
    assert_alike([y.feats], [expected.feats])


def test_few_scans_keep_their_maps() -> None:
    program = compiled(spnn.Conv3d(4, 4, 3))
    held = [scan(rows) for rows in range(40, 40 + 3 * traced.MOST_SCANS)]
    assert len([program(x) for x in held]) > traced.MOST_SCANS
    assert len(traced._scans) == traced.MOST_SCANS
    assert all(x.coords in traced._scans for x in held[-traced.MOST_SCANS :])
    held.clear()
    gc.collect()
    assert len(traced._scans) == 0


def test_a_token_without_its_cache_is_no_loss() -> None:
    """What a backend does with tensors cannot break anything: maps follow from coordinates."""
    args = conv_arguments(requires_grad=False)
    expected = traced.conv(*args)
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    assert torch.equal(traced.conv(*copies), expected)


@pytest.mark.filterwarnings(JIT)
def test_memory_that_is_used_again_does_not_confuse_maps() -> None:
    """Coordinates that a program computes may come to lie where others were."""
    conv = spnn.Conv3d(4, 4, 3, 2, 1, bias=True)

    def function(x: SparseTensor) -> Tensor:
        y = conv(x)
        for _ in range(3):
            y = conv(SparseTensor(y.feats, y.coords * 2 + 1))
        return y.feats

    program = compiled(function, "inductor")
    for rows in SIZES:
        assert_alike([program(scan(rows))], [function(scan(rows))])


def test_settings_count_when_a_program_runs() -> None:
    """The border rule decides about sites; no program is traced again for it."""
    model = spnn.Conv3d(4, 4, 2, 2)
    program, x = compiled(model), scan(50)
    few = program(x)
    with override(infer_spatial_range=False):
        many, expected = program(x), model(scan(50))
    assert few.feats.shape[0] < many.feats.shape[0]
    assert_alike([many.feats], [expected.feats])
    assert graphs() == 1


def test_the_downsample_mode_belongs_to_the_program() -> None:
    model = spnn.Conv3d(4, 4, 3, 2)
    program, x = compiled(model), scan(50)
    program(x)
    with override(downsample_mode="minkowski"):
        y, expected = program(x), model(scan(50))
    assert torch.equal(y.coords, expected.coords)
    assert_alike([y.feats], [expected.feats])
    assert graphs() == 2


# ------------------------------------------------------------------ beside eager code
def test_an_eager_decoder_behind_a_compiled_encoder() -> None:
    """It knows the levels, and the padding of the layer that it inverts."""
    torch.manual_seed(0)
    encoder, decoder = spnn.Conv3d(4, 4, 3, 2, 1), spnn.Conv3d(4, 4, 3, 2, transposed=True)
    x = scan(60)
    expected = decoder(encoder(scan(60)))
    y = decoder(compiled(encoder)(x))
    assert y.coords is x.coords
    assert_alike([y.feats], [expected.feats])


@pytest.mark.filterwarnings(GRAD)
def test_a_compiled_decoder_behind_a_compiled_encoder() -> None:
    torch.manual_seed(0)
    encoder, decoder = spnn.Conv3d(4, 4, 3, 2, 1), spnn.Conv3d(4, 4, 3, 2, transposed=True)
    one, other = compiled(encoder), compiled(decoder)
    for rows in SIZES:
        assert_alike([other(one(scan(rows))).feats], [decoder(encoder(scan(rows))).feats])
    assert (graphs(), breaks()) == (2, 0)


def test_a_compiled_decoder_behind_an_eager_encoder_is_left_to_python() -> None:
    torch.manual_seed(0)
    encoder, decoder = spnn.Conv3d(4, 4, 3, 2, 1), spnn.Conv3d(4, 4, 3, 2, transposed=True)
    program = compiled(decoder, fullgraph=False)
    for rows in SIZES:
        assert_alike([program(encoder(scan(rows))).feats], [decoder(encoder(scan(rows))).feats])
    assert breaks() > 0


def test_features_that_were_put_off_are_computed_first() -> None:
    """In evaluation, an eager convolution waits for what may join it."""
    torch.manual_seed(0)
    stem, model = spnn.Conv3d(4, 4, 3), SparseConvBlock(4, 4, 3).eval()
    program = compiled(model, fullgraph=False)
    with torch.no_grad():
        for rows in SIZES:
            assert_alike([program(stem(scan(rows))).feats], [model(stem(scan(rows))).feats])


@pytest.mark.filterwarnings(GRAD)
def test_one_block_serves_several_levels() -> None:
    """Compiled layer by layer: a stride is part of the program, a size is not."""
    torch.manual_seed(0)
    block, down = compiled(SparseConvBlock(4, 4, 3)), compiled(spnn.Conv3d(4, 4, 2, 2))
    for rows in SIZES:
        x = scan(rows)
        for level in range(3):
            assert x.stride == (2**level,) * 3
            x = down(block(x)) if level < 2 else block(x)
    assert graphs() <= 6 and breaks() == 0


def test_pools_and_norms_over_samples_cut_the_graph() -> None:
    torch.manual_seed(0)
    layers = spnn.MaxPool3d(2, 2), spnn.GroupNorm(2, 4), spnn.Conv3d(4, 4, 3)
    model = nn.Sequential(*layers, spnn.GlobalAvgPool())
    program = compiled(model, fullgraph=False)
    with torch.no_grad():
        for rows in SIZES:
            assert_alike(features(program(scan(rows))), features(model(scan(rows))))
    assert breaks() > 0


def test_what_a_program_returns_is_pickled_without_maps() -> None:
    y = compiled(spnn.Conv3d(4, 4, 2, 2))(scan(50))
    y.detach()
    for z in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y)):
        assert torch.equal(z.feats, y.feats) and torch.equal(z.coords, y.coords)
        assert type(z._caches) is TensorCache
        assert set(z._caches.cmaps) == {(1, 1, 1), (2, 2, 2)}


# ------------------------------------------------------------------ errors
def test_errors_about_data_come_when_the_program_runs() -> None:
    program = compiled(spnn.Conv3d(4, 4, 3))
    program(scan(50))
    x = scan(60)
    x.coords[1] = x.coords[0]
    with pytest.raises(ValueError, match="unique"):
        program(x)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(26, 4, 4), torch.ones(27, 3, 4), torch.ones(27, 4)],
    ids=lambda w: w.shape,
)
def test_a_weight_that_does_not_fit_is_refused(weight: Tensor) -> None:
    program = compiled(lambda x: F.conv3d(x, weight, 3))
    with pytest.raises(Unsupported, match="ValueError"):
        program(scan(50))


# ------------------------------------------------------------------ operators
def conv_arguments(
    transposed: bool = False, groups: int = 1, requires_grad: bool = True
) -> list[Any]:
    """Arguments of `traced.conv`: a strided layer on a scan, or the way back."""
    torch.manual_seed(0)
    x = scan(30)
    sizes = (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), "spconv"
    down = traced.encode("strided", *sizes, (1, 1, 1), False, groups, None)
    layer = traced.encode("strided", *sizes, (2, 2, 2), True, groups, None)
    token = traced.begin(x.coords)
    there, coords = traced.sites(token, x.coords, [9, 9, 8, 7], down)
    rows = (coords if transposed else x.coords).shape[0]
    floats = [torch.randn(rows, 4), torch.randn(27, 4 // groups, 6), torch.randn(6)]
    floats = [t.requires_grad_(requires_grad) for t in floats]
    ends = [token, x.coords, [9, 9, 8, 7], there, coords, []]
    return [*floats, *ends, layer if transposed else down]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_operators_of_features_pass_the_checks_of_pytorch(transposed: bool, groups: int) -> None:
    feats, weight, _, *rest = conv_arguments(transposed, groups)
    torch.library.opcheck(
        traced.conv,
        (
            feats,
            weight,
            None,
            *rest,
        ),
    )
    torch.library.opcheck(traced.conv, tuple(conv_arguments(transposed, groups)))
    feats, weight = feats.detach(), weight.detach()
    grad = traced.conv(feats, weight, None, *rest)
    torch.library.opcheck(
        traced.conv_feats_grad_op,
        (
            grad,
            weight,
            *rest,
        ),
    )
    torch.library.opcheck(
        traced.conv_weight_grad_op,
        (
            feats,
            grad,
            *rest,
            torch.float32,
        ),
    )


def test_operators_of_coordinates_pass_the_checks_of_pytorch() -> None:
    x = scan(30)
    torch.library.opcheck(traced.begin, (x.coords,))
    torch.library.opcheck(traced.as_int32, (x.coords.long(),))
    layer = traced.encode(
        "strided", (3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3, "spconv", (1,) * 3, False, 1, None
    )
    torch.library.opcheck(
        traced.sites,
        (
            traced.begin(x.coords),
            x.coords,
            [],
            layer,
        ),
    )
    torch.library.opcheck(
        points._dense_op,
        (
            x.feats.requires_grad_(),
            x.coords,
            [2, 9, 8, 7],
        ),
    )
    torch.library.opcheck(
        points._from_dense_op,
        (
            torch.randn(2, 9, 8, 7, 4),
            x.coords,
            [2, 9, 8, 7],
        ),
    )


def test_every_operator_is_checked_above() -> None:
    names = {
        name.removeprefix("torchsparse::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torchsparse::")
    }
    assert names == {
        "as_int32", "begin", "conv", "conv_feats_grad", "conv_weight_grad", "from_dense", "sites",
        "to_dense",
    }  # fmt: skip


# ------------------------------------------------------------------ export
class OnTensors(nn.Module):
    """A network from tensors to tensors, as an exported program is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, feats: Tensor, coords: Tensor) -> Tensor:
        return self.network(SparseTensor(feats, coords)).feats


@pytest.mark.parametrize("strict", [False, True])
def test_a_network_is_exported(strict: bool) -> None:
    torch.manual_seed(0)
    model = OnTensors(UNet()).eval()
    x = scan(60)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"feats": {0: rows}, "coords": {0: rows}}
    program = torch.export.export(
        model, (x.feats, x.coords), dynamic_shapes=shapes, strict=strict
    ).module()
    for size in SIZES:
        x = scan(size)
        with torch.no_grad():
            assert_alike([program(x.feats, x.coords)], [model(x.feats, x.coords)])
