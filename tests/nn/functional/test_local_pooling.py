"""Pools over windows, and the ways back, against a search in Python and dense pools of PyTorch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchsparse
from tests import clouds, oracles
from tests.cases import assert_close, assert_rows, raises_on_data, sparse
from tests.oracles import Layer, Relation
from torchsparse import SparseTensor
from torchsparse._reference import pool as reference
from torchsparse.nn import functional as F

POOLS = {"max": F.max_pool3d, "mean": F.avg_pool3d, "sum": F.sum_pool3d}
LAYERS = [
    Layer.of(2, 2),
    Layer.of(3, 1),
    Layer.of(3, 2, 1),
    Layer.of(3, 2, 0, 2),
    Layer.of((3, 1, 2), (1, 2, 1)),
    Layer.of(4, 3, (0, 2, 1)),
    Layer.of(2, 1, 0, 3),
    Layer.of(1, 2),
    Layer.of(1, 1),
    Layer.of(2, 2, minkowski=True),
    Layer.of(3, 2, minkowski=True),
]
CLOUDS = [name for name in clouds.CLOUDS if name != "negative"]


def search(how: str, feats: np.ndarray, relation: Relation) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features, and for the maximum the row of each (lowest tap first)."""
    out = np.zeros((len(relation.coords), feats.shape[1]))
    rows = np.full(out.shape, -1)
    for m, taps in enumerate(relation.table):
        met = [int(n) for n in taps if n >= 0]
        for c in range(feats.shape[1] if met else 0):
            values = [float(feats[n, c]) for n in met]
            if how == "max":
                best = next((v for v in values if v != v), None)
                best = max(values) if best is None else best
                first = next(i for i, v in enumerate(values) if v == best or v != v)
                out[m, c], rows[m, c] = best, met[first]
            else:
                out[m, c] = sum(values) / (len(values) if how == "mean" else 1)
    return out, rows


def pooled(how: str, layer: Layer, x: SparseTensor, **kwargs):
    torchsparse.tensor.set_allow_negative_coordinates(layer.allow_negative)
    config = {"downsample_mode": "minkowski" if layer.minkowski else "spconv"}
    return POOLS[how](
        x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, config=config, **kwargs
    )


def relation_of(x: SparseTensor, layer: Layer) -> Relation:
    return oracles.relate(x.coords.cpu().numpy(), layer, x.spatial_range)


# ------------------------------------------------------------------ numbers
@pytest.mark.parametrize("ranged", [False, True], ids=["", "ranged"])
@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_pools_equal_the_search(layer, cloud, ranged, device):
    extent = (clouds.BATCH, *clouds.ROOM) if ranged else None
    x = sparse(device, cloud, spatial_range=extent)
    relation = relation_of(x, layer)
    feats = x.feats.cpu().numpy()
    for how in POOLS:
        got = pooled(how, layer, x)
        want, rows = search(how, feats, relation)
        assert_rows(got.coords, relation.coords)
        assert got.spatial_range == relation.spatial_range
        assert got.stride == oracles.output_stride((1, 1, 1), layer)
        assert_close(got.feats, want, torch.float64)
        if how == "max":
            again, indices = pooled(how, layer, x, return_indices=True)
            assert torch.equal(again.feats, got.feats)
            assert indices.dtype == torch.int32
            np.testing.assert_array_equal(indices.cpu().numpy(), rows)


@pytest.mark.parametrize("layer", [Layer.of(3, 2, 1), Layer.of(2, 2), Layer.of(3, 1)], ids=str)
def test_negative_coordinates(layer, device):
    layer = Layer.of(layer.kernel_size, layer.stride, layer.padding, allow_negative=True)
    x = sparse(device, "negative")
    relation = relation_of(x, layer)
    for how in POOLS:
        got = pooled(how, layer, x)
        assert_rows(got.coords, relation.coords)
        assert_close(got.feats, search(how, x.feats.cpu().numpy(), relation)[0], torch.float64)


@pytest.mark.parametrize(
    ("k", "s", "p", "d"), [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 3, 1, 2)]
)
def test_maximum_equals_the_dense_pool(k, s, p, d):
    """Empty cells hold -inf; values are negative, so a 0 that slips in would win."""
    device = torch.device("cpu")
    x = sparse(device, "batch_gap", spatial_range=(clouds.BATCH, *clouds.ROOM))
    x.feats.sub_(10)
    got = F.max_pool3d(x, k, s, p, d)
    box = torch.full((clouds.BATCH, 3, *clouds.ROOM), -torch.inf, dtype=torch.float64)
    b, i, j, h = x.coords.long().unbind(1)
    box[b, :, i, j, h] = x.feats
    box = torch.nn.functional.pad(box, [p] * 6, value=-torch.inf)
    dense = torch.nn.functional.max_pool3d(box, k, s, 0, d)
    b, i, j, h = got.coords.long().unbind(1)
    assert torch.equal(got.feats, dense[b, :, i, j, h])
    if s > 1:  # and no window with a site was left out
        assert len(got.coords) == int(torch.isfinite(dense[:, 0]).sum())


def test_sum_equals_a_convolution_by_ones(device):
    x = sparse(device, "odd")
    ones = torch.eye(3, dtype=torch.float64, device=device).expand(27, 3, 3)
    assert_close(F.sum_pool3d(x, 3, 2, 1).feats, F.conv3d(x, ones, 3, None, 2, 1).feats, x.F.dtype)


@pytest.mark.parametrize("how", POOLS)
def test_a_window_without_sites_gives_zero(how, device):
    x = sparse(device, "odd")
    x.feats.sub_(10)
    far = torch.tensor([[0, 90, 90, 90], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    got = POOLS[how](x, 2, coordinates=far)
    assert got.coords is far
    assert got.feats[0].tolist() == [0, 0, 0]
    assert bool((got.feats[1] < 0).all())
    if how == "max":
        indices = F.max_pool3d(x, 2, coordinates=far, return_indices=True)[1]
        assert indices[0].tolist() == [-1, -1, -1]
    nothing = SparseTensor(x.feats[:0].requires_grad_(), x.coords[:0])
    got = POOLS[how](nothing, 2, coordinates=far)
    assert got.feats.tolist() == [[0.0] * 3] * 2
    got.feats.sum().backward()
    assert nothing.feats.grad is not None


def line(values, device) -> SparseTensor:
    """One channel on x = 0, 1, 2, ..."""
    feats = torch.tensor(values, dtype=torch.float64, device=device)[:, None]
    coords = torch.zeros((len(values), 4), dtype=torch.int32, device=device)
    coords[:, 1] = torch.arange(len(values))
    return SparseTensor(feats.requires_grad_(), coords)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "want", "row"),
    [
        ([1, 2, 2], 2, 1),
        ([0, 0, 0], 0, 0),
        ([-3, -1, -2], -1, 1),
        ([1, NAN, NAN], NAN, 1),
        ([NAN, INF, 1], NAN, 0),
        ([-INF, -INF, -INF], -INF, 0),
        ([-INF, NAN, INF], NAN, 1),
    ],
)
def test_the_lowest_tap_among_equal_maxima_has_the_gradient(values, want, row, device):
    x = line(values, device)
    got, indices = F.max_pool3d(x, (3, 1, 1), return_indices=True)
    np.testing.assert_equal(got.feats.tolist(), [[want]])
    assert indices.tolist() == [[row]]
    got.feats.backward(torch.full_like(got.feats, 7))
    assert x.feats.grad is not None
    assert x.feats.grad[:, 0].tolist() == [7.0 * (i == row) for i in range(3)]


def test_equal_maxima_in_even_kernels_follow_the_order_of_the_taps(device):
    """z is the fastest axis of an even volume, whatever the order of the rows."""
    coords = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.int32)
    x = SparseTensor(torch.ones((3, 1), device=device), coords.to(device))
    assert F.max_pool3d(x, 2, return_indices=True)[1].tolist() == [[2]]


def test_nan_reaches_its_windows_alone(device):
    x = line([1, NAN, 3, 4, 5, 6], device)
    for pool in POOLS.values():
        assert pool(x, (2, 1, 1)).feats.isnan()[:, 0].tolist() == [True, False, False]


# ------------------------------------------------------------------ sites and maps
def test_maps_are_those_of_convolutions(device):
    """One strided and one submanifold map serve convolutions and pools."""
    x = sparse(device, "odd")
    y = F.conv3d(x, torch.ones((27, 3, 3), dtype=x.F.dtype, device=device), 3, None, 2, 1)
    maps = dict(x._caches.kmaps)
    for pool in POOLS.values():
        got = pool(x, 3, 2, 1)
        assert got.coords is y.coords
        assert got._caches is x._caches
    for own in ("paths", "ahead"):  # of convolutions alone
        maps.pop(own, None), x._caches.kmaps.pop(own, None)
    assert {key: value[0].kmap for key, value in x._caches.kmaps.items()} == {
        key: value[0].kmap for key, value in maps.items()
    }
    assert F.max_pool3d(y, 3, 1).coords is y.coords


def test_sites_of_another_tensor(device):
    x = sparse(device, "odd")
    there = F.avg_pool3d(x, 2, 2)
    assert torch.equal(F.avg_pool3d(x, 2, 2, coordinates=there).feats, there.feats)
    with pytest.raises(ValueError, match=r"stride \(3, 3, 3\)"):
        F.avg_pool3d(x, 3, 3, coordinates=there)


# ------------------------------------------------------------------ the ways back
@pytest.mark.parametrize("layer", [a for a in LAYERS if not a.minkowski], ids=str)
def test_unpools_equal_the_search(layer, device):
    x = sparse(device, "batch_gap", spatial_range=(clouds.BATCH, *clouds.ROOM))
    args = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    y, indices = F.max_pool3d(x, *args, return_indices=True)
    values = clouds.rng("values").standard_normal(y.feats.shape)
    y.feats = torch.from_numpy(values).to(device)
    relation = relation_of(x, layer)
    total, count, back = np.zeros(x.feats.shape), np.zeros(len(x.feats)), np.zeros(x.feats.shape)
    for n, m, _ in relation.pairs:
        total[n] += values[m]
        count[n] += 1
        back[n] += values[m] * (indices[m].cpu().numpy() == n)
    mean = total / np.maximum(count, 1)[:, None]
    for got, want in (
        (F.unpool3d(y, *args, mode="sum"), total),
        (F.unpool3d(y, *args), mean),
        (F.max_unpool3d(y, indices, *args), back),
        (F.max_unpool3d(y, indices.long(), *args), back),
    ):
        assert got.coords.data_ptr() == x.coords.data_ptr()
        assert got.stride == (1, 1, 1)
        assert_close(got.feats, want, torch.float64)


def test_unpooling_copies_the_value_of_the_one_coarse_site(device):
    x = sparse(device, "block", spatial_range=(1, 16, 16, 16))
    y = F.avg_pool3d(x, 2)
    row = {tuple(site): feats for site, feats in zip(y.coords.tolist(), y.feats.tolist())}
    got = F.unpool3d(y, 2)
    for (b, i, j, k), feats in zip(got.coords.tolist(), got.feats.tolist()):
        assert feats == row[(b, i // 2, j // 2, k // 2)]


def test_unpooling_without_a_finer_level(device):
    x = sparse(device, "odd", stride=4)
    for call in (F.unpool3d, partial(F.max_unpool3d, indices=torch.zeros((61, 3)).int())):
        with pytest.raises(ValueError, match=r"needs the coordinates at stride \(2, 2, 2\)"):
            call(x, kernel_size=2)


# ------------------------------------------------------------------ gradients
GRADIENT_LAYERS = [Layer.of(2, 2), Layer.of(3, 2, 1), Layer.of(3, 1), Layer.of(2, 1)]


@pytest.mark.parametrize("layer", GRADIENT_LAYERS, ids=str)
def test_gradcheck(layer, device):
    x = sparse(device, "batch_gap", channels=2)
    args = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    y, indices = F.max_pool3d(x, *args, return_indices=True)

    def on(level, fn):
        def run(feats):
            out = SparseTensor(feats, level.coords, level.stride)
            out._caches = x._caches
            return fn(out).feats

        return run

    fine, coarse = x.feats.requires_grad_(), y.feats.detach().requires_grad_()
    for pool in POOLS.values():
        assert torch.autograd.gradcheck(on(x, lambda t, f=pool: f(t, *args)), fine)
    for mode in ("mean", "sum"):
        back = on(y, lambda t, m=mode: F.unpool3d(t, *args, mode=m))
        assert torch.autograd.gradcheck(back, coarse)
    back = on(y, lambda t: F.max_unpool3d(t, indices, *args))
    assert torch.autograd.gradcheck(back, coarse)


def test_overlapping_windows_add_up_their_gradients(device):
    """x = 1 is the maximum of three windows, x = 3 of two."""
    x = line([1, 9, 2, 5], device)
    F.max_pool3d(x, (3, 1, 1), 1).feats.sum().backward()
    assert x.feats.grad is not None
    assert x.feats.grad[:, 0].tolist() == [0, 3, 0, 1]


# ------------------------------------------------------------------ number formats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("how", POOLS)
def test_every_dtype_is_summed_in_float32_also_under_autocast(how, dtype, device):
    layer = Layer.of(3, 2, 1)
    x = sparse(device, "block", dtype=dtype)
    feats = x.feats.requires_grad_()
    want, rows = search(how, x.feats.detach().double().cpu().numpy(), relation_of(x, layer))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = pooled(how, layer, x)
    assert got.feats.dtype == dtype
    assert_close(got.feats, want, dtype)
    got.feats.sum().backward()
    assert feats.grad is not None and feats.grad.dtype == dtype
    if how == "max":
        hits = np.zeros(feats.shape)
        np.add.at(hits, (rows, np.arange(3)[None]), 1.0)
        assert_close(feats.grad, hits, dtype)


def test_half_sums_do_not_stall(device):
    """4096 + 1 is 4096 in float16: 15 ones would be lost one after the other."""
    x = line([4096.0] + [1.0] * 16, device)
    x.feats = x.feats.detach().half()
    assert F.sum_pool3d(x, (17, 1, 1)).feats.tolist() == [[4112.0]]


# ------------------------------------------------------------------ properties
@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=40, unique=True),
    st.sampled_from(GRADIENT_LAYERS),
    st.randoms(use_true_random=False),
)
def test_rows_may_come_in_any_order(sites, layer, random):
    """Permuting the rows changes neither sites nor values; shifts pass through a maximum."""
    coords = torch.tensor([(0, *site) for site in sites], dtype=torch.int32)
    feats = torch.tensor([[random.randint(-9, 9) / 4] for _ in sites], dtype=torch.float64)
    order = torch.tensor(random.sample(range(len(sites)), len(sites)))
    for how in POOLS:
        a = pooled(how, layer, SparseTensor(feats, coords))
        b = pooled(how, layer, SparseTensor(feats[order], coords[order]))
        found = dict(zip(map(tuple, b.coords.tolist()), b.feats.tolist()))
        assert found == dict(zip(map(tuple, a.coords.tolist()), a.feats.tolist()))
    a, b = (pooled("max", layer, SparseTensor(f, coords)).feats for f in (feats, feats - 8))
    assert torch.equal(a - 8, b)


def test_unpooling_by_sums_is_the_adjoint(device):
    x = sparse(device, "batch_gap")
    y = F.sum_pool3d(x, 3, 2, 1)
    push = torch.from_numpy(clouds.rng("push").standard_normal(y.feats.shape)).to(device)
    forward = (y.feats * push).sum()
    y.feats = push
    assert_close((x.feats * F.unpool3d(y, 3, 2, 1, mode="sum").feats).sum(), forward, x.F.dtype)


WAYS = {
    # Where listing the outputs of a tap would wait for a GPU, all of them are looked at.
    "all outputs": ("_candidates", lambda taps: torch.arange(len(taps))),
    "many blocks": ("BLOCK", 7),
}


@pytest.mark.parametrize(("name", "value"), WAYS.values(), ids=WAYS)
def test_every_way_through_the_taps_gives_the_same(name, value, monkeypatch):
    x = sparse(torch.device("cpu"), "batch_gap", spatial_range=(clouds.BATCH, *clouds.ROOM))
    x.feats.requires_grad_()

    def run():
        y, rows = F.max_pool3d(x, 3, 2, 1, return_indices=True)
        (grad,) = torch.autograd.grad(y.feats.square().sum(), x.feats)
        return y.feats, rows, grad

    want = run()
    monkeypatch.setattr(reference, name, value)
    for a, b in zip(run(), want):
        assert torch.equal(a, b)


# ------------------------------------------------------------------ errors
def test_says_what_it_expected(device):
    x = sparse(device, "odd")
    y, indices = F.max_pool3d(x, 2, return_indices=True)
    with pytest.raises(TypeError, match=r"`input` must be a SparseTensor, got Tensor"):
        F.max_pool3d(x.feats, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`kernel_size` must be at least 1"):
        F.avg_pool3d(x, 0)
    with pytest.raises(ValueError, match=r"`stride` must be one int or 3 ints"):
        F.sum_pool3d(x, 2, (1, 2))
    with pytest.raises(ValueError, match=r"`mode` must be one of 'mean', 'sum', got 'max'"):
        F.unpool3d(y, 2, mode="max")
    with pytest.raises(ValueError, match=r"`indices` must have the shape of the features"):
        F.max_unpool3d(y, indices[1:], 2)
    with pytest.raises(TypeError, match=r"`indices` must hold int32 or int64, got torch.float64"):
        F.max_unpool3d(y, y.feats, 2)
    with raises_on_data(ValueError, match=r"index must be smaller than the number of rows"):
        F.max_unpool3d(y, indices + 61, 2)
    twice = sparse(device, clouds.duplicates)
    with raises_on_data(ValueError, match=r"coordinates must be unique"):
        F.max_pool3d(twice, 2)
