import pytest
import torch

from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn.utils import fapply


class Named(SparseTensor):
    def __init__(self, name, feats, coords):
        super().__init__(feats, coords, 2, (1, 20, 20, 20))
        self.name = name


def test_shares_everything_but_the_features(device):
    coords = torch.from_numpy(clouds.odd()).to(device)
    x = Named("x", torch.randn((len(coords), 4), device=device), coords)
    got = fapply(x, torch.sum, 1, keepdim=True)
    torch.testing.assert_close(got.feats, x.feats.sum(1, keepdim=True))
    assert type(got) is SparseTensor
    assert got.coords is x.coords
    assert got._caches is x._caches
    assert (got.stride, got.spatial_range) == ((2, 2, 2), (1, 20, 20, 20))


def test_rows_must_stay(device):
    coords = torch.from_numpy(clouds.odd()).to(device)
    x = SparseTensor(torch.randn((len(coords), 4), device=device), coords)
    with pytest.raises(ValueError, match=r"keep the number of rows, got \[61, 4\] -> \[60, 4\]"):
        fapply(x, lambda feats: feats[1:])
    with pytest.raises(ValueError, match=r"\[61, 4\] -> \[\]"):
        fapply(x, torch.sum)
