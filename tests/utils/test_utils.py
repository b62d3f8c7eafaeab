import numpy as np
import pytest
import torch

import torchsparse
from torchsparse.utils.utils import make_divisible, make_ntuple, make_tensor


@pytest.mark.parametrize(
    "given",
    [2, np.int64(2), [2, 2, 2], (2, 2, 2), np.array([2, 2, 2]), torch.tensor([2, 2, 2])],
    ids=lambda v: type(v).__name__,
)
def test_make_ntuple(given):
    got = make_ntuple(given, 3)
    assert got == (2, 2, 2)
    assert all(type(n) is int for n in got)


def test_make_ntuple_says_what_it_expected():
    with pytest.raises(ValueError, match=r"`x` must be one int or .*, got \[1, 2\]"):
        make_ntuple([1, 2], 3)


def test_make_tensor_is_new_every_time():
    """Regression 47: a cached tensor was shared by all callers."""
    make_tensor((1, 2, 3), dtype=torch.int, device="cpu").zero_()
    got = make_tensor((1, 2, 3), dtype=torch.int, device="cpu")
    assert got.tolist() == [1, 2, 3]
    assert got.dtype == torch.int32
    make_tensor(got, dtype=torch.int, device="cpu").zero_()
    assert got.tolist() == [1, 2, 3]


def test_make_divisible():
    assert [make_divisible(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


@pytest.mark.filterwarnings("ignore:.*form of versions before:DeprecationWarning")
def test_star_import():
    """Exactly the names of v2.1; those of earlier versions are reached by name."""
    names = {}
    exec("from torchsparse.utils import *", names)
    assert set(names) - {"__builtins__"} == {
        "make_ntuple",
        "make_tensor",
        "make_divisible",
        "to_dense",
    }
    assert callable(names["to_dense"])
    for name in ("sparse_quantize", "sparse_collate", "sparse_collate_fn"):
        assert callable(getattr(torchsparse.utils, name))
