import numpy as np
import pytest
import torch

from tests.cases import raises_on_data
from torchsparse.nn import functional as F


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_and_skips_negatives(dtype, device):
    index = np.random.default_rng(0).integers(-3, 20, 400)
    got = F.spcount(torch.from_numpy(index).to(device, dtype), 23)
    assert got.dtype == torch.int32
    want = [(index == voxel).sum() for voxel in range(23)]
    assert got.tolist() == want


def test_empty(device):
    none = torch.zeros(0, dtype=torch.int32, device=device)
    assert F.spcount(none, 3).tolist() == [0, 0, 0]
    assert F.spcount(none, 0).shape == (0,)


def test_accepts_a_tensor_as_number(device):
    index = torch.tensor([1, 1], device=device)
    assert F.spcount(index, torch.tensor(2)).tolist() == [0, 2]


def test_an_index_behind_the_last_voxel_is_an_error(device):
    detail = "5 rows" if device.type == "cpu" else "noticed"
    with raises_on_data(ValueError, rf"smaller than the number of rows.*\({detail}"):
        F.spcount(torch.tensor([0, 5], device=device), 5)


def test_says_what_it_expected():
    with pytest.raises(TypeError, match=r"`coords` must hold integers, got torch.float32"):
        F.spcount(torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"1 axes, got shape \[2, 2\]"):
        F.spcount(torch.zeros((2, 2), dtype=torch.int32), 2)
