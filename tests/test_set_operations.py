"""Tensors of different sites, against dictionaries; pruning; one vector per sample."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchsparse
from tests import clouds
from tests.cases import raises_on_data, sparse
from torchsparse import SparseTensor, operators
from torchsparse.nn import functional as F

Rows = dict[tuple[int, ...], list[float]]
BINARY = {
    operators.add: operator.add,
    operators.sub: operator.sub,
    operators.mul: operator.mul,
}
PAIRS = [
    (clouds.batch_gap, clouds.odd),
    (clouds.negative, clouds.batch_gap),
    (clouds.odd, clouds.odd),
    (clouds.single, clouds.origin),
    (clouds.single, clouds.odd),
    (clouds.empty, clouds.plane),
    (clouds.plane, clouds.empty),
    (clouds.empty, clouds.empty),
]

each_pair = pytest.mark.parametrize(
    ("first", "second"), PAIRS, ids=lambda cloud: getattr(cloud, "__name__", "")
)


def tensor(device, coords, channels=3, seed=0, **kwargs) -> SparseTensor:
    feats = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(coords), channels)))
    return SparseTensor(feats.to(device), torch.from_numpy(coords).to(device), **kwargs)


def rows(x: SparseTensor) -> Rows:
    """Features by site; every site once."""
    sites = [tuple(site) for site in x.coords.tolist()]
    assert len(set(sites)) == len(sites)
    return dict(zip(sites, x.feats.tolist()))


def sites_of(a: Rows, b: Rows, sites: str) -> list[tuple[int, ...]]:
    if sites == "first":
        return list(a)
    return sorted(set(a) | set(b) if sites == "union" else set(a) & set(b))


# ------------------------------------------------------------------ different sites
@pytest.mark.parametrize("fill", [0.0, 1.5])
@pytest.mark.parametrize("sites", ["union", "intersection", "first"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@each_pair
def test_binary_operations_equal_the_dictionaries(first, second, name, sites, fill, device):
    fn = getattr(operators, name)
    x, y = tensor(device, first()), tensor(device, second(), seed=1)
    a, b = rows(x), rows(y)
    got = fn(x, y, sites=sites, fill=fill)
    want = sites_of(a, b, sites)
    assert [tuple(site) for site in got.coords.tolist()] == want
    assert got.coords.dtype == torch.int32
    absent = [fill] * 3
    for site, feats in zip(want, got.feats.tolist()):
        pairs = zip(a.get(site, absent), b.get(site, absent))
        assert feats == [BINARY[fn](p, q) for p, q in pairs]


@pytest.mark.parametrize("sites", ["union", "intersection", "first"])
def test_align_three_tensors_of_different_widths(sites, device):
    box = (9, 10, 11)
    clouds_ = (
        clouds.scatter("many", 600, box),
        clouds.scatter("half", 500, box),
        clouds.block(),
    )
    inputs = [tensor(device, c, channels=1 + i) for i, c in enumerate(clouds_)]
    inputs[1].feats = inputs[1].feats.half()
    got = operators.align(*inputs, sites=sites, fill=-2)
    known = [rows(x) for x in inputs]
    want = {
        "union": sorted(set().union(*known)),
        "intersection": sorted(set(known[0]) & set(known[1]) & set(known[2])),
        "first": list(known[0]),
    }[sites]
    assert len(want) > 5
    for i, (x, source) in enumerate(zip(got, inputs)):
        assert x.coords is got[0].coords and x._caches is got[0]._caches
        assert x.feats.dtype == source.feats.dtype
        assert list(rows(x)) == want
        assert rows(x) == {site: known[i].get(site, [-2.0] * (1 + i)) for site in want}


def test_tensors_that_share_their_coordinates_keep_them(device):
    x = tensor(device, clouds.batch_gap(), spatial_range=(3, 13, 14, 15))
    y = F.relu(x)
    for name, want in (("add", x.F + y.F), ("sub", x.F - y.F), ("mul", x.F * y.F)):
        got = getattr(operators, name)(x, y)
        assert torch.equal(got.feats, want)
        assert got.coords is x.coords and got._caches is x._caches
        assert got.spatial_range == x.spatial_range


@each_pair
def test_intersection_keeps_the_common_rows(first, second, device):
    x, y = tensor(device, first(), 2), tensor(device, second(), 5)
    a, b = operators.intersection(x, y)
    common = set(rows(x)) & set(rows(y))
    assert a.coords is b.coords
    assert rows(a) == {site: f for site, f in rows(x).items() if site in common}
    assert rows(b) == {site: f for site, f in rows(y).items() if site in common}


def test_union_of_many_is_the_sum(device):
    inputs = [
        tensor(device, cloud(), seed=i)
        for i, cloud in enumerate((clouds.odd, clouds.block, clouds.plane, clouds.empty))
    ]
    sums: dict[tuple[int, ...], np.ndarray] = {}
    for x in inputs:
        for site, feats in rows(x).items():
            sums[site] = sums.get(site, 0) + np.array(feats)
    got = operators.union(*inputs)
    assert list(rows(got)) == sorted(sums)
    np.testing.assert_allclose(got.feats.cpu().numpy(), [sums[s] for s in sorted(sums)])
    one = operators.union(inputs[0])
    assert rows(one) == dict(sorted(rows(inputs[0]).items()))


def test_half_unions_are_summed_in_float32(device):
    """2048 + 1 + 1 is 2048 in float16, one after the other."""
    coords = torch.zeros((1, 4), dtype=torch.int32, device=device)
    inputs = [
        SparseTensor(torch.full((1, 1), value, dtype=torch.float16, device=device), coords)
        for value in (2048.0, 1.0, 1.0)
    ]
    assert operators.union(*inputs).feats.tolist() == [[2050.0]]


def test_cat_fills_what_a_tensor_lacks(device):
    x, y = tensor(device, clouds.odd(), 2), tensor(device, clouds.batch_gap(), 3)
    a, b = rows(x), rows(y)
    got = rows(torchsparse.cat([x, y], fill=-1))
    assert list(got) == sorted(set(a) | set(b))
    assert got == {s: a.get(s, [-1.0] * 2) + b.get(s, [-1.0] * 3) for s in got}


@pytest.mark.parametrize(
    ("sites", "ranges", "want"),
    [
        ("union", [(1, 20, 14, 30), (2, 13, 15, 16)], (2, 20, 15, 30)),
        ("union", [(1, 20, 14, 30), None], None),
        ("intersection", [(1, 20, 14, 30), (2, 13, 15, 16)], (1, 13, 14, 16)),
        ("intersection", [None, (2, 13, 15, 16)], (2, 13, 15, 16)),
        ("intersection", [None, None], None),
        ("first", [(1, 20, 14, 30), (2, 13, 15, 16)], (1, 20, 14, 30)),
        ("first", [None, (2, 13, 15, 16)], None),
    ],
)
def test_ranges_and_strides(sites, ranges, want, device):
    a = tensor(device, clouds.odd(), stride=4, spatial_range=ranges[0])
    b = tensor(device, clouds.plane(), stride=4, spatial_range=ranges[1])
    got = operators.add(a, b, sites=sites)
    assert (got.spatial_range, got.stride) == (want, (4, 4, 4))


@pytest.mark.parametrize("sites", ["union", "intersection"])
def test_joined_tensors_convolve_up_and_down(sites, device):
    """Their cache has the finer level, and no map of the parts."""
    x = tensor(device, clouds.batch_gap(), spatial_range=(3, 13, 14, 15))
    weight = torch.ones((8, 3, 3), dtype=torch.float64, device=device)
    parts = [F.conv3d(x, weight, 2, None, 2), F.conv3d(x, weight, 2, None, 2)]
    parts[1] = operators.prune(parts[1], parts[1].coords[:, 1] > 2)
    got = operators.add(*parts, sites=sites)
    assert not got._caches.kmaps
    assert got._caches.cmaps[(2, 2, 2)][0] is got.coords
    back = F.conv3d(got, weight, 2, None, 2, transposed=True)
    assert back.coords is x.coords
    covered = {(b, i // 2, j // 2, k // 2) for b, i, j, k in rows(x)}
    assert bool((back.feats[:, 0] != 0).any()) and set(rows(got)) <= covered


@pytest.mark.parametrize("sites", ["union", "intersection", "first"])
def test_gradcheck(sites, device):
    x, y = tensor(device, clouds.plane()[:12], 2), tensor(device, clouds.plane()[6:20], 2, seed=1)
    leaves = x.feats.requires_grad_(), y.feats.requires_grad_()
    for fn in BINARY:
        assert torch.autograd.gradcheck(
            lambda a, b, f=fn: (
                f(SparseTensor(a, x.coords), SparseTensor(b, y.coords), sites, 0.5).feats
            ),
            leaves,
        )


def test_gradcheck_of_cat_and_union(device):
    x, y = tensor(device, clouds.plane()[:12], 2), tensor(device, clouds.plane()[6:20], 2, seed=1)
    leaves = x.feats.requires_grad_(), y.feats.requires_grad_()

    def join(a, b):
        parts = SparseTensor(a, x.coords), SparseTensor(b, y.coords)
        return operators.cat(parts, fill=1).feats, operators.union(*parts).feats

    assert torch.autograd.gradcheck(join, leaves)


sites_strategy = st.lists(
    st.tuples(st.integers(0, 2), *[st.integers(-4, 4)] * 3), max_size=25, unique=True
)


@given(sites_strategy, sites_strategy)
def test_algebra(one, other):
    """a + b = b + a; (a + b) - b = a on the sites of a; |a u b| + |a n b| = |a| + |b|."""
    x, y = (
        SparseTensor(
            torch.arange(len(sites), dtype=torch.float64)[:, None] + 1,
            torch.tensor(sites, dtype=torch.int32).reshape(-1, 4),
        )
        for sites in (one, other)
    )
    total = operators.add(x, y)
    assert rows(total) == rows(operators.add(y, x)) == rows(operators.union(x, y))
    left = operators.sub(total, y)
    assert rows(operators.align(x, left, sites="first")[1]) == rows(x)
    common = operators.intersection(x, y)[0]
    assert len(total.coords) + len(common.coords) == len(one) + len(other)


def test_set_operations_say_what_they_expected(device):
    a = tensor(device, clouds.odd())
    with pytest.raises(ValueError, match=r"at least one sparse tensor is needed, got none"):
        operators.align()
    with pytest.raises(TypeError, match=r"expected a SparseTensor, got Tensor"):
        operators.union(a, a.feats)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`sites` must be one of .* got 'left'"):
        operators.add(a, a, sites="left")
    with pytest.raises(ValueError, match=r"same stride, got \(1, 1, 1\) and \(2, 2, 2\)"):
        operators.mul(a, tensor(device, clouds.odd(), stride=2))
    with pytest.raises(ValueError, match=r"same number of channels, got 3 and 4"):
        operators.sub(a, tensor(device, clouds.odd(), 4))
    with pytest.raises(ValueError, match=r"same number of columns of coords, got 4 and 3"):
        operators.align(a, SparseTensor(a.feats, a.coords[:, :3]))
    with raises_on_data(ValueError, match=r"coordinates must be unique"):
        operators.add(a, tensor(device, clouds.duplicates()))


# ------------------------------------------------------------------ pruning
@pytest.mark.parametrize("cloud", [clouds.empty, clouds.single, clouds.odd, clouds.batch_gap])
@pytest.mark.parametrize("kept", ["none", "all", "some"])
def test_prune_keeps_rows_in_their_order(cloud, kept, device):
    x = tensor(device, cloud(), stride=2, spatial_range=(3, 13, 14, 15))
    mask = {"none": x.coords[:, 1] < 0, "all": x.coords[:, 1] >= 0, "some": x.coords[:, 2] > 3}[
        kept
    ]
    got = operators.prune(x, mask)
    listed = [n for n, keep in enumerate(mask.tolist()) if keep]
    assert got.coords.tolist() == [x.coords.tolist()[n] for n in listed]
    assert got.feats.tolist() == [x.feats.tolist()[n] for n in listed]
    assert (got.stride, got.spatial_range) == (x.stride, x.spatial_range)
    assert x.coords.shape[0] == len(cloud())


def test_prune_starts_a_cache_with_the_other_levels(device):
    x = tensor(device, clouds.batch_gap(), spatial_range=(3, 13, 14, 15))
    weight = torch.ones((8, 3, 3), dtype=torch.float64, device=device)
    y = F.conv3d(x, weight, 2, None, 2)
    vars(y._caches)["note"] = "kept"
    got = operators.prune(y, y.coords[:, 1] > 2)
    assert got._caches is not y._caches
    assert got._caches.cmaps[(2, 2, 2)][0] is got.coords
    assert got._caches.cmaps[(1, 1, 1)][0] is x.coords
    assert not got._caches.kmaps and not got._caches.hashmaps
    assert vars(got._caches)["note"] == "kept"
    assert y._caches.cmaps[(2, 2, 2)][0] is y.coords
    # What comes after sees the kept sites alone.
    back = F.conv3d(got, weight, 2, None, 2, transposed=True)
    assert back.coords is x.coords
    assert ((back.feats != 0).any(1) == (x.coords[:, 1] // 2 > 2)).all()


def test_prune_gradcheck(device):
    x = tensor(device, clouds.odd()[:12], 2)
    mask = x.coords[:, 1] > 3
    assert 0 < int(mask.sum()) < 12
    assert torch.autograd.gradcheck(
        lambda f: operators.prune(SparseTensor(f, x.coords), mask).feats, x.feats.requires_grad_()
    )


def test_prune_says_what_it_expected(device):
    x = tensor(device, clouds.odd())
    with pytest.raises(TypeError, match=r"`mask` must be a bool tensor, got torch.float64"):
        operators.prune(x, x.feats[:, 0])
    with pytest.raises(TypeError, match=r"`mask` must be a bool tensor, got list"):
        operators.prune(x, [True] * 61)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`mask` must have shape \[61\].* got \[61, 1\]"):
        operators.prune(x, x.feats[:, :1] > 0)


# ------------------------------------------------------------------ one vector per sample
def vectors(device, channels=3, samples=4) -> torch.Tensor:
    values = np.random.default_rng(3).normal(size=(samples, channels))
    return torch.from_numpy(values).to(device)


@pytest.mark.parametrize("cloud", [clouds.empty, clouds.single, clouds.batch_gap])
def test_broadcast_equals_the_loop(cloud, device):
    x, v = tensor(device, cloud()), vectors(device)
    want = [v[b].tolist() for b in x.coords[:, 0].tolist()]
    for fn, combine in (
        (operators.broadcast, lambda row, vector: vector),
        (operators.broadcast_add, lambda row, vector: [p + q for p, q in zip(row, vector)]),
        (operators.broadcast_mul, lambda row, vector: [p * q for p, q in zip(row, vector)]),
        (operators.broadcast_cat, lambda row, vector: row + vector),
    ):
        got = fn(x, v)
        assert got.feats.tolist() == [combine(*rows) for rows in zip(x.feats.tolist(), want)]
        assert got.coords is x.coords and got._caches is x._caches
    assert operators.broadcast_cat(x, vectors(device, 5)).feats.shape == (len(x.coords), 8)


def test_broadcast_gradcheck(device):
    x, v = tensor(device, clouds.batch_gap()[:20], 2), vectors(device, 2)
    for fn in (operators.broadcast_add, operators.broadcast_mul, operators.broadcast_cat):
        assert torch.autograd.gradcheck(
            lambda f, g, fn=fn: fn(SparseTensor(f, x.coords), g).feats,
            (x.feats.requires_grad_(), v.requires_grad_()),
        )


def test_squeeze_and_excite(device):
    """Means of the samples, broadcast back, sum to what the rows sum to."""
    x = sparse(device, "batch_gap")
    mean = operators.broadcast(x, F.global_avg_pool(x))
    torch.testing.assert_close(F.global_sum_pool(mean), F.global_sum_pool(x))
    none = operators.broadcast(
        SparseTensor(x.feats[:0], x.coords[:0]), torch.ones((0, 2), device=device)
    )
    assert none.feats.shape == (0, 2)


def test_broadcast_says_what_it_expected(device):
    x = tensor(device, clouds.batch_gap())
    with pytest.raises(ValueError, match=r"one entry per channel, \[B, 3\], got \[4, 2\]"):
        operators.broadcast_add(x, vectors(device, 2))
    with pytest.raises(TypeError, match=r"`vectors` must be floating, got torch.int64"):
        operators.broadcast(x, torch.ones((4, 3), dtype=torch.int64, device=device))
    with raises_on_data(ValueError, match=r"smaller than `batch_size`"):
        operators.broadcast(x, vectors(device, samples=2))


@pytest.mark.parametrize("place", [2**31, -(2**31) - 1, 2**33])
@pytest.mark.parametrize(
    "join",
    [
        operators.union,
        operators.generative_add,
        operators.add,
        operators.sub,
        operators.mul,
        operators.intersection,
        lambda a, b: operators.cat([a, b], fill=0.0),
    ],
)
def test_coordinates_beyond_int32(join, place: int, device: torch.device) -> None:
    far = torch.tensor([[0, place, 0, 0], [0, 1, 0, 0]], device=device)
    near = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], device=device)
    a, b = (SparseTensor(torch.ones(2, 1, device=device), c) for c in (far, near))
    with raises_on_data(ValueError, "must fit into int32"):
        join(a, b)
    assert operators.union(b, b).coords.dtype == torch.int32


def test_no_channels(device: torch.device) -> None:
    x = sparse(device, "odd", channels=0)
    keep = torch.arange(len(x.coords), device=device) % 2 == 0
    assert operators.prune(x, keep).feats.shape == (int(keep.sum()), 0)
    assert operators.broadcast(x, x.feats.new_zeros(9, 0)).feats.shape == x.feats.shape
    assert operators.cat([x, x], fill=0.0).feats.shape == x.feats.shape


def test_a_plain_tensor_is_refused() -> None:
    x: Any = sparse(torch.device("cpu"), "odd")
    plain: Any = torch.ones(3, 4)
    for call in (
        lambda: operators.cat([x, plain]),
        lambda: operators.broadcast(plain, plain),
        lambda: F.spcrop(plain),
        lambda: F.relu(plain),
        lambda: F.global_avg_pool(plain),
        lambda: F.interpolate_points(plain, plain),
    ):
        with pytest.raises(TypeError, match="SparseTensor, got Tensor"):
            call()
