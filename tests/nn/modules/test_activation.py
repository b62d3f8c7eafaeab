import pytest
import torch

import torchsparse.nn as spnn
from tests import clouds
from torchsparse import SparseTensor


@pytest.mark.parametrize(
    ("module", "dense"),
    [
        (spnn.ReLU, torch.nn.ReLU()),
        (spnn.LeakyReLU, torch.nn.LeakyReLU(0.01)),
        (spnn.SiLU, torch.nn.SiLU()),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_the_dense_module(module, dense, inplace, device):
    coords = torch.from_numpy(clouds.odd()).to(device)
    x = SparseTensor(torch.randn((len(coords), 3), device=device), coords)
    before = x.feats.clone()
    got = (module(inplace=True) if inplace else module())(x)
    torch.testing.assert_close(got.feats, dense(before))
    assert (got.feats.data_ptr() == x.feats.data_ptr()) is inplace
    assert torch.equal(x.feats, before) is not inplace
    assert got.coords is x.coords


def test_slope(device):
    x = SparseTensor(-torch.ones((1, 1)), torch.zeros((1, 4)).int())
    assert spnn.LeakyReLU(0.25)(x).feats.item() == -0.25
