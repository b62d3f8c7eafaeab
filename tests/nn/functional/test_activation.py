import pytest
import torch

from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

DENSE = torch.nn.functional
PAIRS = [(F.relu, DENSE.relu), (F.silu, DENSE.silu), (F.leaky_relu, DENSE.leaky_relu)]


def tensor(device):
    coords = torch.from_numpy(clouds.odd()).to(device)
    return SparseTensor(torch.randn((len(coords), 4), device=device), coords, 2, (1, 20, 20, 20))


@pytest.mark.parametrize("inplace", [None, True, False])
@pytest.mark.parametrize(("fn", "dense"), PAIRS)
def test_acts_on_features_in_place_by_default(fn, dense, inplace, device):
    x = tensor(device)
    before = x.feats.clone()
    slope = {"negative_slope": 0.1} if fn is F.leaky_relu else {}
    got = fn(x) if inplace is None else fn(x, inplace=inplace)
    torch.testing.assert_close(got.feats, dense(before, **slope))
    if inplace is False:
        assert torch.equal(x.feats, before)
    else:
        assert got.feats.data_ptr() == x.feats.data_ptr()
    assert got.coords is x.coords
    assert (got.stride, got.spatial_range) == (x.stride, x.spatial_range)
    assert got._caches is x._caches


def test_slope(device):
    x = tensor(device)
    got = F.leaky_relu(x, 0.3, False)
    torch.testing.assert_close(got.feats, DENSE.leaky_relu(x.feats, 0.3))
