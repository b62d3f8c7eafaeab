"""Paths of versions before 2.0."""

import pytest
import torch

import torchsparse.utils
from torchsparse.nn.utils import get_kernel_offsets
from torchsparse.utils import collate, helpers, quantize, tensor_cache, utils
from torchsparse.utils.kernel_region import KernelRegion

# What they say is tested in tests/test_compat.py.
pytestmark = pytest.mark.filterwarnings("ignore:torchsparse.utils:DeprecationWarning")


def test_helpers_are_the_functions_of_today():
    assert helpers.sparse_quantize is quantize.sparse_quantize
    assert helpers.sparse_collate is collate.sparse_collate
    assert helpers.sparse_collate_fn is collate.sparse_collate_fn
    assert helpers.ravel_hash_vec is quantize.ravel_hash
    assert helpers.make_tuple is utils.make_ntuple
    assert torchsparse.utils.sparse_quantize is quantize.sparse_quantize


def test_kernel_region():
    for args in ((3,), (2, 2), ((3, 1, 2), 1, (2, 1, 1))):
        assert torch.equal(KernelRegion(*args).get_kernel_offset(), get_kernel_offsets(*args))


def test_cache_names_are_in_both_places():
    for name in tensor_cache.__all__:
        assert getattr(torchsparse.tensor, name) is getattr(tensor_cache, name)
