"""Bird's-eye views against a dictionary of sums in float64, row by row."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import clouds
from torchsparse import SparseTensor, backends
from torchsparse.nn.functional.bev import to_bev_convolution, to_dense_bev_convolution
from torchsparse.nn.modules.bev import (
    ToBEVConvolution,
    ToBEVHeightCompression,
    ToBEVReduction,
    ToDenseBEVConvolution,
)
from torchsparse.tensor import TensorCacheMode, set_tensor_cache_mode

IN, OUT = 5, 4
ROOM = clouds.ROOM
DIMS = [0, 1, 2]
BOXED = ["empty", "single", "origin", "odd", "batch_gap", "plane", "block"]  # within ROOM
each_dim = pytest.mark.parametrize("dim", DIMS)
each_cloud = pytest.mark.parametrize("name", BOXED)


def cloud(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> SparseTensor:
    coords = clouds.CLOUDS[name]()
    feats = clouds.rng(name).normal(size=(len(coords), IN))
    x = torch.from_numpy(feats).to(device, dtype).requires_grad_()
    return SparseTensor(x, torch.from_numpy(coords).to(device), 2, (3, *ROOM))


def ready(module: Any, device: torch.device, dtype: torch.dtype = torch.float64) -> Any:
    """On a device, with a bias that is not 0."""
    module = module.to(device, dtype)
    if getattr(module, "bias", None) is not None:
        torch.nn.init.normal_(module.bias)
    return module


def plus(offset: tuple[int, ...], x: SparseTensor) -> SparseTensor:
    """The same tensor at other coordinates."""
    moved = x.coords.clone()
    moved[:, 1:] += torch.tensor(offset, dtype=torch.int32, device=moved.device)
    return SparseTensor(x.feats, moved, x.stride)


def numbers(x: Any) -> Any:
    return x.detach().double().cpu().numpy()


# ------------------------------------------------------------------ the oracle
def products(feats: Any, kernel: Any, bias: Any, heights: Any) -> list[Any]:
    """What each row contributes, one row at a time."""
    added = 0 if bias is None else numbers(bias)[0]
    return [f @ kernel[h] + added for f, h in zip(feats, heights)]


def summed(keys: list[tuple[int, ...]], rows: list[Any]) -> tuple[Any, Any, Any]:
    """Sorted distinct keys, the sum of the rows of each, and how many there were."""
    found: dict[tuple[int, ...], list[Any]] = {}
    for key, row in zip(keys, rows):
        found.setdefault(key, []).append(row)
    sites = sorted(found)
    return sites, [sum(found[key]) for key in sites], [len(found[key]) for key in sites]


def flat(coords: Any, dim: int, step: tuple[int, ...] = (1, 1, 1)) -> list[tuple[int, ...]]:
    keys = []
    for b, *xyz in coords.tolist():
        keys.append((b, *(0 if i == dim else c // step[i] for i, c in enumerate(xyz))))
    return keys


def check_sites(out: SparseTensor, sites: Any, values: Any) -> None:
    assert out.coords.dtype == torch.int32
    assert [tuple(row) for row in out.coords.tolist()] == sites
    if sites:
        want = np.stack(values)
        np.testing.assert_allclose(numbers(out.feats), want, rtol=1e-11, atol=1e-12)


def check_gradients(run: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Every derivative against central differences, along two random directions per leaf.

    The maps are linear in each leaf, so that differences are exact up to rounding.
    """
    out = run()
    g = torch.from_numpy(np.random.default_rng(1).normal(size=out.shape)).to(out)
    grads = torch.autograd.grad((out * g).sum(), leaves)
    for seed, (leaf, grad) in itertools.product(range(2), list(zip(leaves, grads))):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        step = torch.from_numpy(np.random.default_rng(seed).normal(size=leaf.shape)).to(leaf)
        with torch.no_grad():
            leaf += step
            above = (run() * g).sum()
            leaf -= 2 * step
            below = (run() * g).sum()
            leaf += step
        torch.testing.assert_close((grad * step).sum(), (above - below) / 2)


# ------------------------------------------------------------------ ToBEVReduction
@each_dim
@each_cloud
def test_reduction_averages_each_column(name, dim, device):
    x = cloud(name, device)
    out = ToBEVReduction(dim)(x)
    sites, sums, counts = summed(flat(x.coords, dim), list(numbers(x.feats)))
    check_sites(out, sites, [s / n for s, n in zip(sums, counts)])
    assert out.stride == x.stride
    assert out.spatial_range == tuple(1 if i == dim + 1 else r for i, r in enumerate((3, *ROOM)))
    assert out._caches is not x._caches and not out._caches.kmaps
    check_gradients(lambda: ToBEVReduction(dim)(x).feats, x.feats)


def test_reduction_of_negative_coordinates_and_no_range(device):
    x = cloud("negative", device)
    x.spatial_range = None
    out = ToBEVReduction(2)(x)
    sites, sums, counts = summed(flat(x.coords, 2), list(numbers(x.feats)))
    check_sites(out, sites, [s / n for s, n in zip(sums, counts)])
    assert out.spatial_range is None


# ------------------------------------------------------------------ ToBEVConvolution
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 3, (2, 3, 1)], ids=str)
@each_dim
@each_cloud
def test_convolution_sums_by_height(name, dim, stride, bias, device):
    x = cloud(name, device)
    step = stride if isinstance(stride, tuple) else (stride,) * 3
    module = ready(ToBEVConvolution(IN, OUT, ROOM[dim], stride, dim, bias), device)
    out = module(x)
    heights = x.coords[:, 1 + dim].tolist()
    rows = products(numbers(x.feats), numbers(module.kernel), module.bias, heights)
    sites, sums, _ = summed(flat(x.coords, dim, step), rows)
    check_sites(out, sites, sums)
    assert out.feats.shape == (len(sites), OUT)
    assert out.stride == tuple(2 * s for s in step)
    axes = [1 if i == dim else (r - 1) // s + 1 for i, (r, s) in enumerate(zip(ROOM, step))]
    assert out.spatial_range == (3, *axes)
    assert out._caches is not x._caches and not out._caches.kmaps
    leaves = (x.feats, *module.parameters())
    check_gradients(lambda: module(x).feats, *leaves)


@each_dim
def test_convolution_divides_negative_coordinates_downwards(dim, device):
    """Only the heights have to be inside."""
    x = cloud("negative", device)
    x.spatial_range = None
    x.coords[:, 1 + dim] += 6
    module = ready(ToBEVConvolution(IN, OUT, ROOM[dim], 2, dim), device)
    heights = x.coords[:, 1 + dim].tolist()
    rows = products(numbers(x.feats), numbers(module.kernel), None, heights)
    sites, sums, _ = summed(flat(x.coords, dim, (2, 2, 2)), rows)
    assert min(min(site[1:]) for site in sites) < 0
    check_sites(module(x), sites, sums)


@each_dim
def test_a_result_can_be_convolved_again(dim, device):
    """The lattice, range and cache of the result are those of a tensor."""
    x = cloud("odd", device)
    out = ready(ToBEVConvolution(IN, OUT, ROOM[dim], 2, dim), device)(x)
    dense = out.dense()
    assert dense.shape == (*out.spatial_range, OUT)
    twice = ToBEVReduction((dim + 1) % 3)(out)
    assert twice.spatial_range[2 + dim if dim < 2 else 1] == 1


# ------------------------------------------------------------------ ToDenseBEVConvolution
def image(keys: Any, sums: Any, shape: tuple[int, ...]) -> Any:
    """(b, channel, a, a') from sums at (b, a, a')."""
    want = np.zeros(shape)
    for (b, a, c), value in zip(keys, sums):
        want[b, :, a, c] = value
    return want


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [(0, 0, 0), (-3, 4, 11)], ids=str)
@each_dim
@each_cloud
def test_dense_convolution_is_an_image(name, dim, offset, bias, device):
    x = plus(offset, cloud(name, device))
    module = ready(ToDenseBEVConvolution(IN, OUT, ROOM, offset, dim, bias), device)
    out = module(x)
    u = x.coords.cpu() - torch.tensor([0, *offset])
    rows = products(numbers(x.feats), numbers(module.kernel), module.bias, u[:, 1 + dim].tolist())
    keys = [(b, *(c for i, c in enumerate(xyz) if i != dim)) for b, *xyz in u.tolist()]
    sites, sums, _ = summed(keys, rows)
    a, b = (r for i, r in enumerate(ROOM) if i != dim)
    batch = int(u[:, 0].max()) + 1 if len(u) else 0
    assert out.shape == (batch, OUT, a, b) and out.is_contiguous()
    np.testing.assert_allclose(
        numbers(out), image(sites, sums, tuple(out.shape)), rtol=1e-11, atol=1e-12
    )
    check_gradients(lambda: module(x), x.feats, *module.parameters())


def test_dense_convolution_adds_rows_of_one_voxel(device):
    """Nothing forbids equal coordinates here: their rows are summed, each with the bias."""
    coords = torch.tensor([[1, 2, 0, 1]] * 3, dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones(3, IN, device=device), coords)
    module = ToDenseBEVConvolution(IN, OUT, (3, 2, 2), bias=True).to(device)
    torch.nn.init.constant_(module.kernel, 2.0)
    assert module.bias is not None
    torch.nn.init.constant_(module.bias, 0.5)
    out = module(x)
    assert out[1, :, 2, 1].tolist() == [3 * (2 * IN + 0.5)] * OUT
    assert float(out.detach().sum()) == 3 * (2 * IN + 0.5) * OUT


# ------------------------------------------------------------------ ToBEVHeightCompression
@pytest.mark.parametrize("offset", [(0, 0, 0), (-3, 4, 11)], ids=str)
@each_dim
@each_cloud
def test_height_compression_stacks_channels(name, dim, offset, device):
    x = plus(offset, cloud(name, device))
    module = ToBEVHeightCompression(IN, ROOM, offset, dim).to(device)
    out = module(x)
    a, c = (r for i, r in enumerate(ROOM) if i != dim)
    u = x.coords.cpu() - torch.tensor([0, *offset])
    batch = int(u[:, 0].max()) + 1 if len(u) else 0
    want = np.zeros((batch, ROOM[dim] * IN, a, c))
    for (b, *xyz), feats in zip(u.tolist(), numbers(x.feats)):
        i, j = (v for axis, v in enumerate(xyz) if axis != dim)
        want[b, xyz[dim] * IN : (xyz[dim] + 1) * IN, i, j] += feats
    assert out.shape == want.shape and out.is_contiguous()
    np.testing.assert_array_equal(numbers(out), want)
    check_gradients(lambda: module(x), x.feats)


@each_dim
def test_height_compression_clamps_heights_and_sums_them(dim, device):
    low, high = [0, 1, 1, 1], [0, 1, 1, 1]
    low[1 + dim], high[1 + dim] = -5, 9
    rows = [low, [0, 0, 0, 0], high, high]
    rows[1][1:] = [1, 1, 1]
    rows[1][1 + dim] = 0
    coords = torch.tensor(rows, dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0], [2.0], [4.0], [8.0]], device=device)
    out = ToBEVHeightCompression(1, (3, 3, 3), dim=dim).to(device)(SparseTensor(feats, coords))
    assert out[0, :, 1, 1].tolist() == [3.0, 0.0, 12.0]
    assert float(out.sum()) == 15


def test_images_can_be_changed_in_place(device):
    """As by `ReLU(inplace=True)`, with gradients in any layout."""
    x = cloud("odd", device)
    out = ToBEVHeightCompression(IN, ROOM).to(device)(x)
    torch.relu_(out).permute(0, 2, 3, 1).square().sum().backward()
    torch.testing.assert_close(x.feats.grad, 2 * x.feats.detach().clamp(min=0))


# ------------------------------------------------------------------ state
def test_state_dicts_and_buffers():
    module = ToDenseBEVConvolution(3, 7, [4, 5, 6], [1, 2, 3], dim=2, bias=True)
    state = module.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {
        "kernel": [6, 3, 7],
        "bias": [1, 7],
        "shape": [3],
        "offset": [1, 4],
    }
    assert state["shape"].tolist() == [4, 5, 6] and state["offset"].tolist() == [[1, 2, 3, 0]]
    assert state["shape"].dtype == state["offset"].dtype == torch.int32
    assert module.n_kernels == 6 and not state["bias"].any()
    assert list(ToDenseBEVConvolution(3, 7, (4, 5, 6)).state_dict()) == [
        "kernel",
        "shape",
        "offset",
    ]
    compress = ToBEVHeightCompression(3, torch.tensor([4, 5, 6]), (1, 2, 3))
    assert list(compress.state_dict()) == ["shape", "offset"]
    conv = ToBEVConvolution(3, 7, 6, bias=True)
    assert {k: list(v.shape) for k, v in conv.state_dict().items()} == {
        "kernel": [6, 3, 7],
        "bias": [1, 7],
    }
    assert ToBEVConvolution(3, 7, 6).bias is None
    assert not ToBEVReduction().state_dict()


def test_the_arguments_are_those_of_v21():
    wanted = {
        ToBEVReduction: "dim=1",
        ToBEVConvolution: "in_channels, out_channels, n_kernels, stride=1, dim=1, bias=False",
        ToDenseBEVConvolution: (
            "in_channels, out_channels, shape, offset=(0, 0, 0), dim=1, bias=False"
        ),
        ToBEVHeightCompression: "channels, shape, offset=(0, 0, 0), dim=1",
    }
    for kind, want in wanted.items():
        found = inspect.signature(kind).parameters.values()
        assert ", ".join(str(p.replace(annotation=p.empty)) for p in found) == want


@pytest.mark.parametrize("make", [ToBEVConvolution, ToDenseBEVConvolution])
def test_kernels_start_uniform(make):
    torch.manual_seed(0)
    kernel = make(16, 32, 9 if make is ToBEVConvolution else (9, 9, 9)).kernel.detach()
    assert 0.24 < float(kernel.max()) <= 0.25 and -0.25 <= float(kernel.min()) < -0.24
    assert abs(float(kernel.std()) - 0.25 / 3**0.5) < 0.005


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_box_is_the_one_that_acts(assign, device):
    x = cloud("odd", device, torch.float32)
    source = ToBEVHeightCompression(IN, ROOM, (-1, 0, -2))
    target = ToBEVHeightCompression(IN, (2, ROOM[1], 2)).to(device)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(x), source.to(device)(x))


@pytest.mark.parametrize(
    "module",
    [
        ToBEVReduction(2),
        ToBEVConvolution(2, 3, 4, 2, 0, True),
        ToDenseBEVConvolution(2, 3, (4, 4, 4), bias=True),
        ToBEVHeightCompression(2, (4, 4, 4), (1, 0, 0)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_describe_themselves(module):
    assert repr(module).startswith(f"{type(module).__name__}(") and "dim=" in repr(module)


# ------------------------------------------------------------------ formats
HALF = {
    torch.float16: 2e-3,  # one rounding of results around 3
    torch.bfloat16: 2e-2,
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@each_dim
def test_half_precision_is_rounded_once(dim, dtype, device):
    """Products and sums are those of the rounded operands in float32 or better."""
    x = cloud("block", device, dtype)
    for make in (
        lambda: ToBEVConvolution(IN, OUT, ROOM[dim], 2, dim, True),
        lambda: ToDenseBEVConvolution(IN, OUT, ROOM, dim=dim, bias=True),
    ):
        torch.manual_seed(1)
        half = ready(make(), device, dtype)
        exact = make().to(device, torch.float64)
        exact.load_state_dict(half.state_dict())
        y = SparseTensor(x.feats.detach().double().requires_grad_(), x.coords)
        got, want = half(x), exact(y)
        if isinstance(got, SparseTensor):
            got, want = got.feats, want.feats
        assert got.dtype == dtype
        # Nearly always the same rounding; float32 sums may fall on the other side of a tie.
        close = torch.isclose(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert bool(close.all())
        leaves = (x.feats, *half.parameters()), (y.feats, *exact.parameters())
        ones = (
            torch.autograd.grad(got.sum(), leaves[0]),
            torch.autograd.grad(want.sum(), leaves[1]),
        )
        for a, b in zip(*ones):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=HALF[dtype], atol=HALF[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_casts_the_kernels_and_nothing_else(dtype, device):
    x = cloud("odd", device, torch.float32)
    sparse = ready(ToBEVConvolution(IN, OUT, ROOM[1], bias=True), device, torch.float32)
    dense = ready(ToDenseBEVConvolution(IN, OUT, ROOM, bias=True), device, torch.float32)
    with torch.autocast(device.type, dtype=dtype):
        assert ToBEVReduction()(x).feats.dtype == torch.float32
        assert ToBEVHeightCompression(IN, ROOM).to(device)(x).dtype == torch.float32
        outs = sparse(x).feats, dense(x)
    for out, module in zip(outs, (sparse, dense)):
        assert out.dtype == dtype
        inside = []
        for enabled in (False, True):  # the state at the time of backward does not matter
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                leaves = (x.feats, *module.parameters())
                inside.append(torch.autograd.grad(out.sum(), leaves, retain_graph=True))
        for a, b in zip(*inside):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        rounded = module.kernel.detach().to(dtype).float()
        want = rounded[x.coords[:, 2].long()].sum((0, 2))  # over rows and output channels
        got = inside[0][0].sum(0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_double_is_not_cast_and_dtypes_promote(device):
    x = cloud("odd", device)
    module = ToBEVConvolution(IN, OUT, ROOM[1]).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert module(x).feats.dtype == torch.float64
    assert module(x).feats.dtype == torch.float64
    x.feats = x.feats.detach().half()
    assert module(x).feats.dtype == torch.float16
    with pytest.raises(TypeError, match="bfloat16"):
        module.to(torch.bfloat16)(x)


def test_reduction_of_halves_sums_in_float32(device):
    """4096 ones: a float16 sum would stop at 2048."""
    coords = torch.zeros(4096, 4, dtype=torch.int32, device=device)
    coords[:, 2] = torch.arange(4096, device=device)
    x = SparseTensor(torch.ones(4096, 1, dtype=torch.float16, device=device), coords)
    assert ToBEVReduction()(x).feats.tolist() == [[1.0]]
    kernel = torch.ones(4096, 1, 1, dtype=torch.float16, device=device)
    assert to_bev_convolution(x, kernel).feats.tolist() == [[4096.0]]


def test_results_do_not_depend_on_the_row_order_of_other_heights(device):
    """A permutation of the rows gives the same sites, and sums that differ by rounding alone."""
    x = cloud("batch_gap", device, torch.float32)
    order = torch.from_numpy(clouds.rng("order").permutation(x.feats.shape[0])).to(device)
    y = SparseTensor(x.feats[order], x.coords[order])
    module = ready(ToBEVConvolution(IN, OUT, ROOM[0], 2, 0, True), device, torch.float32)
    a, b = module(x), module(y)
    assert torch.equal(a.coords, b.coords)
    torch.testing.assert_close(a.feats, b.feats)
    assert torch.equal(module(x).feats, a.feats)


def test_nan_stays_in_its_cell(device):
    x = cloud("odd", device, torch.float32)
    with torch.no_grad():
        x.feats[7] = torch.nan
    module = ToDenseBEVConvolution(IN, OUT, ROOM).to(device)
    bad = module(x).isnan().any(1).nonzero().tolist()
    b, i, _, k = x.coords[7].tolist()
    assert bad == [[b, i, k]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int8], ids=str)
def test_other_integers_are_converted(dtype, device):
    """A number of heights beyond int8 is no trap."""
    x = cloud("odd", device)
    y = SparseTensor(x.feats, x.coords.to(dtype))
    module = ready(ToBEVConvolution(IN, OUT, 300, bias=True), device)
    a, b = module(x), module(y)
    assert b.coords.dtype == torch.int32
    assert torch.equal(a.coords, b.coords) and torch.equal(a.feats, b.feats)
    assert ToBEVReduction()(y).coords.dtype == torch.int32
    box = ToBEVHeightCompression(IN, (300, 300, 20)).to(device)
    assert torch.equal(box(x), box(y))


def test_subclasses_give_plain_tensors_with_new_caches(device):
    class Mine(SparseTensor):
        def __init__(self, extra: int, feats: Tensor, coords: Tensor) -> None:
            super().__init__(feats, coords)
            self.extra = extra

    x = cloud("odd", device)
    mine = Mine(3, x.feats, x.coords)
    assert type(ToBEVReduction()(mine)) is SparseTensor
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    a, b = ToBEVReduction()(mine), ToBEVConvolution(IN, OUT, 20).double().to(device)(mine)
    assert a._caches is b._caches is not mine._caches


# ------------------------------------------------------------------ errors
def raises(call: Callable[[], Any], match: str, device: torch.device) -> None:
    """A complaint about data: now on the CPU, at the latest when asked on a GPU."""
    with pytest.raises(ValueError, match=match):
        call()
        if device.type != "cpu":
            backends.check_errors()


@each_dim
@pytest.mark.parametrize("height", [-1, 4])
def test_heights_outside_are_errors(height, dim, device):
    coords = torch.ones(3, 4, dtype=torch.int32, device=device)
    coords[1, 1 + dim] = height
    x = SparseTensor(torch.ones(3, IN, device=device), coords)
    conv = ToBEVConvolution(IN, OUT, 4, dim=dim).to(device)
    raises(lambda: conv(x), "module's `shape`", device)
    dense = ToDenseBEVConvolution(IN, OUT, (4, 4, 4), dim=dim).to(device)
    raises(lambda: dense(x), "module's `shape`", device)
    ToBEVHeightCompression(IN, (4, 4, 4), dim=dim).to(device)(x)  # clamps
    for other in set(DIMS) - {dim}:
        compress = ToBEVHeightCompression(IN, (4, 4, 4), dim=other).to(device)
        raises(partial(compress, x), "module's `shape`", device)


@each_dim
def test_every_axis_of_an_image_is_checked(dim, device):
    x = cloud("odd", device, torch.float32)
    largest = x.coords[:, 1:].max(0).values.tolist()
    for axis in DIMS:
        box = list(ROOM)
        box[axis] = largest[axis]  # one too small
        module = ToDenseBEVConvolution(IN, OUT, box, dim=dim).to(device)
        raises(partial(module, x), "module's `shape`", device)


def test_negative_batches_are_errors(device):
    x = cloud("odd", device, torch.float32)
    x.coords[3, 0] = -1
    for module in (
        ToBEVReduction(),
        ToBEVConvolution(IN, OUT, 20),
        ToDenseBEVConvolution(IN, OUT, ROOM),
        ToBEVHeightCompression(IN, ROOM),
    ):
        raises(partial(module.to(device), x), "batch index", device)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ToBEVReduction(3), "dim"),
        (lambda: ToBEVReduction(-1), "dim"),
        (lambda: ToBEVConvolution(4, 4, 3, dim=3), "dim"),
        (lambda: ToBEVConvolution(4, 4, 0), "n_kernels"),
        (lambda: ToBEVConvolution(4, 4, 3, stride=0), "stride"),
        (lambda: ToBEVConvolution(4, 4, 3, stride=2.0), "stride"),
        (lambda: ToBEVConvolution(4, 4, 3, stride=(1, 2)), "stride"),
        (lambda: ToDenseBEVConvolution(4, 4, (3, 3)), "shape"),
        (lambda: ToDenseBEVConvolution(4, 4, (3, 3, 0)), "shape"),
        (lambda: ToDenseBEVConvolution(4, 4, (3, 3, 3), dim=4), "dim"),
        (lambda: ToBEVHeightCompression(4, (3, 3, 3), (0, 0)), "offset"),
        (lambda: ToBEVHeightCompression(4, (3, -3, 3)), "shape"),
    ],
)
def test_parameters_are_checked(make, match):
    with pytest.raises(ValueError, match=f"`{match}`"):
        make()


def test_arguments_are_checked(device):
    x = cloud("odd", device, torch.float32)
    with pytest.raises(ValueError, match=r"\[n_kernels, 5, C_out\].*\[20, 6, 4\]"):
        ToBEVConvolution(6, OUT, 20).to(device)(x)
    with pytest.raises(ValueError, match=r"\[N, 7\].*\[61, 5\]"):
        ToBEVHeightCompression(7, ROOM).to(device)(x)
    with pytest.raises(ValueError, match=r"`bias`.*\[4\].*\[3\]"):
        to_bev_convolution(x, torch.zeros(20, IN, OUT, device=device), torch.zeros(3).to(device))
    with pytest.raises(ValueError, match="14 weights"):
        to_dense_bev_convolution(x, torch.zeros(20, IN, OUT, device=device), ROOM)
    with pytest.raises(TypeError, match="`kernel` must be floating"):
        to_bev_convolution(x, torch.zeros(20, IN, OUT, dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match="SparseTensor"):
        ToBEVReduction()(x.feats)
    with pytest.raises(ValueError, match="same number of rows"):
        ToBEVReduction()(SparseTensor(x.feats[1:], x.coords))
    with pytest.raises(TypeError, match="features come first"):
        ToBEVReduction()(SparseTensor(x.feats, x.coords.float()))
    with pytest.raises(ValueError, match="4 entries"):
        ToBEVReduction()(SparseTensor(x.feats, x.coords, 1, (9, 9, 9)))


def test_a_graph_serves_one_backward(device):
    """Tensors are saved through autograd, which notices a second use."""
    x = cloud("odd", device)
    out = ToBEVConvolution(IN, OUT, 20).double().to(device)(x).feats.sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()
