"""Kernels for normalisation, against their twins in PyTorch."""

import pytest
import torch

from tests._triton.test_points import FLOATS, close, on_gpu, randint, randn
from torchsparse._reference import norm as reference
from torchsparse._triton import norm, reduce


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 700])
def test_moments(rows, dtype, device):
    """Of four samples one is empty and, among many rows, one is long; the mean is far from 0."""
    batch = randint(0, 9, (rows,), device).clamp_(max=3)
    batch[batch == 1] = 0
    feats = 100 + randn(rows, 12, dtype=dtype, device=device)
    groups = reduce.group_rows(batch, 4)
    for num_groups in (1, 4):
        got = norm.sample_moments(feats, batch, groups, num_groups)
        want = reference.sample_moments(feats.double(), batch, groups, num_groups)
        for a, b in zip(got, want):
            assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 20, 700])
def test_centred_dots(rows, dtype, device):
    """Over short samples and long ones."""
    batch = randint(0, 12, (rows,), device).clamp_(max=5)
    feats, other = (randn(rows, 7, dtype=dtype, device=device, seed=s) for s in (1, 2))
    mean = randn(40, 7, dtype=torch.promote_types(dtype, torch.float32), device=device)
    groups = reduce.group_rows(batch, 40)
    got = norm.centred_dots(feats, other, batch, groups, mean)
    want = reference.centred_dots(feats, other, batch, groups, mean.double())
    assert got.dtype == mean.dtype
    torch.testing.assert_close(got, want.to(mean.dtype), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("scale", "shift", "extra"), [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)]
)
def test_affine(scale, shift, extra, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    feats = randn(301, 10, dtype=dtype, device=device)
    batch = randint(0, 3, (301,), device, torch.int32)
    tables = [randn(3, 10, dtype=wide, device=device, seed=s) for s in range(4)]
    args = (
        feats, batch, tables[0], tables[1] if scale else None, tables[2] if shift else None,
        dtype, (feats.flip(0), tables[3]) if extra else None,
    )  # fmt: skip
    close(norm.affine(*args), reference.affine(*args))


def test_affine_of_nothing(device):
    feats, table = torch.zeros((0, 4), device=device), torch.zeros((0, 4), device=device)
    batch = torch.zeros(0, dtype=torch.int64, device=device)
    assert norm.affine(feats, batch, table, None, None, torch.float16).shape == (0, 4)


@on_gpu
def test_large_scenes(device):
    """The same bits ten times."""
    feats = 10 + randn(100_001, 48, dtype=torch.float16, device=device)
    batch = randint(0, 4, (100_001,), device).sort().values
    groups = reduce.group_rows(batch, 4)
    got = norm.sample_moments(feats, batch, groups, 8)
    want = reference.sample_moments(feats.double(), batch, groups, 8)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for _ in range(10):
        again = norm.sample_moments(feats, batch, groups, 8)
        assert all(torch.equal(a, b) for a, b in zip(got, again))
