"""cat and generative_add."""

import numpy as np
import pytest
import torch

import torchsparse
from tests import clouds
from tests.cases import raises_on_data
from torchsparse import SparseTensor


def tensor(device, coords, channels=3, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    feats = torch.from_numpy(rng.normal(size=(len(coords), channels))).to(device)
    return SparseTensor(feats, torch.from_numpy(coords).to(device), **kwargs)


def union(a, b):
    """Sums per site in a dict, sorted by (b, x, y, z)."""
    sums = {}
    for x in (a, b):
        for site, row in zip(x.coords.tolist(), x.feats.detach().cpu().numpy()):
            sums[tuple(site)] = sums.get(tuple(site), 0) + row
    sites = sorted(sums)
    return np.array(sites).reshape(-1, 4), np.array([sums[s] for s in sites])


def test_cat_joins_channels_and_keeps_the_first_range(device):
    """Regression 32: the range was lost, and dense() failed after a skip connection."""
    coords = clouds.batch_gap()
    a = tensor(device, coords, 2, stride=2, spatial_range=(3, 13, 14, 15))
    b = SparseTensor(torch.randn((len(coords), 5), device=device).double(), a.coords, 2)
    got = torchsparse.cat([a, b])
    assert torch.equal(got.feats, torch.cat([a.feats, b.feats], 1))
    assert got.coords is a.coords
    assert got._caches is a._caches
    assert (got.stride, got.spatial_range) == ((2, 2, 2), (3, 13, 14, 15))
    assert got.dense().shape == (3, 13, 14, 15, 7)
    assert torchsparse.cat((b, a)).spatial_range is None


def test_cat_gradients(device):
    coords = clouds.odd()
    a, b = tensor(device, coords, 2), tensor(device, coords, 1)
    a.feats.requires_grad_()
    b.feats.requires_grad_()
    (torchsparse.cat([a, b, a]).feats * torch.arange(5, device=device)).sum().backward()
    assert a.feats.grad is not None and a.feats.grad[0].tolist() == [3, 5]
    assert b.feats.grad is not None and b.feats.grad[0].tolist() == [2]


def test_cat_and_plus_compare_coordinates(device):
    """Regression 34: rows of different sites were joined without a word."""
    coords = clouds.odd()
    a, same = tensor(device, coords), tensor(device, coords)
    assert torchsparse.cat([a, same]).feats.shape == (61, 6)  # equal values in another tensor
    for other in (coords[::-1].copy(), coords[1:]):
        b = tensor(device, other)
        with raises_on_data(ValueError, "same coordinates"):
            torchsparse.cat([a, b])
        with raises_on_data(ValueError, "same coordinates"):
            _ = a + b


def test_cat_of_nothing():
    with pytest.raises(ValueError, match=r"at least one sparse tensor, got none"):
        torchsparse.cat([])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (clouds.batch_gap, clouds.odd),
        (clouds.negative, clouds.batch_gap),
        (clouds.odd, clouds.odd),
        (clouds.empty, clouds.plane),
        (clouds.plane, clouds.empty),
        (clouds.empty, clouds.empty),
    ],
)
def test_generative_add_is_the_sorted_union(first, second, device):
    a, b = tensor(device, first()), tensor(device, second(), seed=1)
    got = torchsparse.generative_add(a, b)
    coords, feats = union(a, b)
    assert got.coords.dtype == torch.int32
    np.testing.assert_array_equal(got.coords.cpu().numpy(), coords)
    np.testing.assert_allclose(got.feats.cpu().numpy().reshape(feats.shape), feats)


def test_generative_add_gradcheck(device):
    a, b = tensor(device, clouds.plane()[:12]), tensor(device, clouds.plane()[6:20], seed=1)

    def run(x, y):
        return torchsparse.generative_add(
            SparseTensor(x, a.coords), SparseTensor(y, b.coords)
        ).feats

    leaves = a.feats.requires_grad_(), b.feats.requires_grad_()
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ((1, 20, 14, 30), (2, 13, 15, 16), (2, 20, 15, 30)),
        ((1, 20, 14, 30), None, None),
        (None, None, None),
    ],
)
def test_generative_add_range_and_stride(one, other, want, device):
    a = tensor(device, clouds.odd(), stride=4, spatial_range=one)
    b = tensor(device, clouds.plane(), stride=4, spatial_range=other)
    got = torchsparse.generative_add(a, b)
    assert got.spatial_range == want
    assert got.stride == (4, 4, 4)


def test_generative_add_starts_a_cache_with_the_other_levels(device):
    """Regression 33: the union came with the maps and coordinates of one of its parts."""
    a = tensor(device, clouds.odd(), stride=2)
    b = tensor(device, clouds.plane(), stride=2)
    fine_a, fine_b, coarse_b = (
        torch.from_numpy(cloud()).to(device)
        for cloud in (clouds.block, clouds.single, clouds.origin)
    )
    a._caches.cmaps.update({(1, 1, 1): (fine_a, (1, 9, 9, 9)), (2, 2, 2): (a.coords, None)})
    b._caches.cmaps.update({(1, 1, 1): (fine_b, None), (4, 4, 4): coarse_b})
    a._caches.kmaps["a map"] = b._caches.kmaps["a map"] = object()
    vars(a._caches)["note"] = "kept"
    got = torchsparse.generative_add(a, b)
    cache = got._caches
    assert cache.cmaps[(1, 1, 1)][0] is fine_a
    assert cache.cmaps[(1, 1, 1)][1] == (1, 9, 9, 9)
    assert cache.cmaps[(2, 2, 2)][0] is got.coords
    assert cache.cmaps[(4, 4, 4)][0] is coarse_b
    assert not cache.kmaps
    assert not cache.hashmaps
    assert vars(cache)["note"] == "kept"
    assert a._caches.cmaps[(2, 2, 2)][0] is a.coords
    assert (4, 4, 4) not in a._caches.cmaps


def test_generative_add_says_what_it_expected(device):
    a = tensor(device, clouds.odd())
    with pytest.raises(ValueError, match=r"same stride, got \(1, 1, 1\) and \(2, 2, 2\)"):
        torchsparse.generative_add(a, tensor(device, clouds.odd(), stride=2))
    with pytest.raises(ValueError, match=r"same number of channels, got 3 and 4"):
        torchsparse.generative_add(a, tensor(device, clouds.odd(), 4))
