"""Rows as a set, against NumPy."""

import numpy as np
import pytest
import torch

from tests import clouds
from torchsparse._ops.sets import unique_rows


@pytest.mark.parametrize("cloud", ["empty", "single", "odd", "negative", "block"])
def test_unique_rows_are_those_of_numpy(cloud):
    rows = clouds.CLOUDS[cloud]()
    rows = np.concatenate([rows, rows[::3], rows[1:7]])
    sites, place = unique_rows(torch.from_numpy(rows))
    want, inverse = np.unique(rows, axis=0, return_inverse=True)
    assert sites.dtype == torch.int32
    np.testing.assert_array_equal(sites.numpy(), want)
    np.testing.assert_array_equal(place.numpy(), inverse.reshape(-1))


def test_a_box_that_is_too_large():
    rows = torch.tensor([[0, -(2**30), 0], [0, 2**30, 2**31 - 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"fewer than 2\^62 cells"):
        unique_rows(rows)
