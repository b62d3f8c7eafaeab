import torch

import torchsparse.nn as spnn
from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn import functional as F


def test_module_is_the_function(device):
    coords = torch.from_numpy(clouds.odd()).to(device)
    x = SparseTensor(torch.randn((len(coords), 3), device=device), coords)
    module = spnn.SparseCrop(coords_min=(2, 3, 1), coords_max=(8, 9, 10))
    got, want = module(x), F.spcrop(x, (2, 3, 1), (8, 9, 10))
    assert 0 < len(got.coords) < len(coords)
    assert torch.equal(got.coords, want.coords)
    assert torch.equal(got.feats, want.feats)
    assert len(spnn.SparseCrop()(x).coords) == len(coords)
    assert "coords_min=(2, 3, 1)" in repr(module)
