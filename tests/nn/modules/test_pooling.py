import torch

import torchsparse.nn as spnn
from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn import functional as F


def test_modules_are_the_functions(device):
    coords = torch.from_numpy(clouds.batch_gap()).to(device)
    x = SparseTensor(torch.randn((len(coords), 3), device=device), coords)
    assert torch.equal(spnn.GlobalAvgPool()(x), F.global_avg_pool(x))
    assert torch.equal(spnn.GlobalMaxPool()(x), F.global_max_pool(x))
    assert torch.equal(spnn.GlobalSumPool()(x), F.global_sum_pool(x))
    assert spnn.GlobalAvgPool()(x, batch_size=5).shape == (5, 3)
    assert not list(spnn.GlobalMaxPool().parameters())
