"""sphashquery against a dict."""

import numpy as np
import pytest
import torch

from torchsparse.nn import functional as F


def search(queries, references):
    rows = {}
    for row, key in enumerate(references.tolist()):
        rows.setdefault(key, row)
    return np.vectorize(lambda key: rows.get(key, -1), otypes=[np.int32])(queries)


@pytest.mark.parametrize("size", [1, 7, 500])
def test_equals_a_dict_and_finds_the_lowest_row(size, device):
    """Regression 39: crashed on the CPU. Keys repeat, and extreme ones occur."""
    rng = np.random.default_rng(size)
    extremes = np.array([0, -1, 1, 2**63 - 1, -(2**63)])
    references = np.concatenate([rng.integers(-50, 50, size), extremes, extremes[::-1]])
    queries = np.concatenate([rng.integers(-80, 80, 300), extremes]).reshape(5, -1)
    got = F.sphashquery(
        torch.from_numpy(queries).to(device), torch.from_numpy(references).to(device)
    )
    assert got.dtype == torch.int32
    np.testing.assert_array_equal(got.cpu().numpy(), search(queries, references))


def test_key_zero_is_a_key_like_any_other(device):
    """Regression 41: 0 marked an empty slot."""
    key = torch.tensor([0, 5], device=device)
    assert F.sphashquery(key, key[:1]).tolist() == [0, -1]
    assert F.sphashquery(key, key[1:]).tolist() == [-1, 0]


def test_nothing_to_ask_or_to_find(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    some = torch.tensor([[3, 0]], device=device)
    assert F.sphashquery(some, none).tolist() == [[-1, -1]]
    assert F.sphashquery(none, some[0]).shape == (0,)


def test_non_contiguous_queries(device):
    queries = torch.arange(6, device=device).view(2, 3).t()
    assert F.sphashquery(queries, torch.tensor([4, 1], device=device)).tolist() == [
        [-1, -1],
        [1, 0],
        [-1, -1],
    ]


def test_says_what_it_expected():
    keys = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"`queries` must be an int64 tensor.*got torch.int32"):
        F.sphashquery(keys.int(), keys)
    with pytest.raises(
        TypeError, match=r"`references` must be an int64 tensor.*got torch.float32"
    ):
        F.sphashquery(keys, keys.float())
