"""Norms per sample against dense PyTorch layers on each sample alone."""

import numpy as np
import pytest
import torch

from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn import functional as F


def tensor(device, cloud=clouds.batch_gap, channels=6, dtype=torch.float64, loc=2.0):
    coords = torch.from_numpy(cloud()).to(device)
    feats = np.random.default_rng(0).normal(loc, 1.5, (len(coords), channels))
    return SparseTensor(torch.from_numpy(feats).to(device, dtype), coords)


def per_sample(x, fn):
    """``fn`` on [1, C, rows of one sample], for each sample."""
    out = torch.empty_like(x.feats)
    for b in x.coords[:, 0].unique():
        rows = x.coords[:, 0] == b
        out[rows] = fn(x.feats[rows].t()[None])[0].t()
    return out


def affine(channels, device, dtype=torch.float64):
    rng = np.random.default_rng(1)
    return tuple(torch.from_numpy(rng.normal(size=channels)).to(device, dtype) for _ in range(2))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("cloud", [clouds.single, clouds.odd, clouds.batch_gap])
def test_group_norm_equals_the_dense_layer(cloud, groups, device):
    x = tensor(device, cloud)
    weight, bias = affine(6, device)
    got = F.norm.group_norm(x, groups, weight, bias, 1e-3)
    if (cloud, groups) == (clouds.single, 6):  # one value per group: the dense layer refuses
        want = bias[None]
    else:
        dense = torch.nn.functional.group_norm
        want = per_sample(x, lambda f: dense(f, groups, weight, bias, 1e-3))
    torch.testing.assert_close(got.feats, want)
    assert got.coords is x.coords
    assert got._caches is x._caches


@pytest.mark.parametrize("cloud", [clouds.odd, clouds.batch_gap])
def test_instance_norm_is_over_rows(cloud, device):
    """Regression 36: each row was normalised over its channels."""
    x = tensor(device, cloud)
    weight, bias = affine(6, device)
    got = F.norm.instance_norm(x, weight=weight, bias=bias)
    want = per_sample(x, lambda f: torch.nn.functional.instance_norm(f, weight=weight, bias=bias))
    torch.testing.assert_close(got.feats, want)
    plain = F.norm.instance_norm(x).feats
    for b in x.coords[:, 0].unique():
        mean = plain[x.coords[:, 0] == b].mean(0)
        torch.testing.assert_close(mean, torch.zeros_like(mean))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("cloud", [clouds.single, clouds.batch_gap])
def test_gradcheck_in_feats_weight_and_bias(cloud, groups, device):
    x = tensor(device, cloud, channels=3)
    weight, bias = affine(3, device)
    leaves = [t.detach().requires_grad_() for t in (x.feats, weight, bias)]

    def run(feats, weight, bias):
        return F.norm.group_norm(SparseTensor(feats, x.coords), groups, weight, bias).feats

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda f: run(f, None, None), leaves[:1], fast_mode=True)


def test_gradient_equals_the_dense_layer(device):
    x = tensor(device)
    weight, bias = (t.requires_grad_() for t in affine(6, device))
    g = torch.randn_like(x.feats)
    grads = []
    for run in (
        lambda: F.norm.group_norm(x, 2, weight, bias).feats,
        lambda: per_sample(x, lambda f: torch.nn.functional.group_norm(f, 2, weight, bias)),
    ):
        x.feats = x.feats.detach().requires_grad_()
        grads.append(torch.autograd.grad(run(), (x.feats, weight, bias), g))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_features_keep_their_dtype_with_float32_statistics(dtype, device):
    """Regression 36: GroupNorm changed the dtype under autocast."""
    x = tensor(device, dtype=dtype, loc=100.0)
    x.feats.requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(6, device, torch.float32))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = F.norm.group_norm(x, 3, weight, bias)
    assert got.feats.dtype == dtype
    wide = SparseTensor(x.feats.detach().double(), x.coords)
    want = F.norm.group_norm(wide, 3, weight.double(), bias.double()).feats
    # half a unit in the last place of values up to 5, and float32 around a mean of 100
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(got.feats.double(), want, atol=tolerance, rtol=tolerance)
    got.feats.sum().backward()
    assert x.feats.grad is not None and x.feats.grad.dtype == dtype
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_no_rows(device):
    x = tensor(device, clouds.empty)
    assert F.norm.group_norm(x, 2).feats.shape == (0, 6)
    assert F.norm.instance_norm(x).feats.shape == (0, 6)


def test_says_what_it_expected(device):
    x = tensor(device)
    with pytest.raises(ValueError, match=r"divide the number of channels, got 4 and 6"):
        F.norm.group_norm(x, 4)
    with pytest.raises(
        ValueError, match=r"`weight` must have one entry per channel, \[6\], got \[5\]"
    ):
        F.norm.group_norm(x, 2, torch.ones(5, device=device))
    with pytest.raises(ValueError, match=r"`running_mean` and `running_var` are needed"):
        F.norm.instance_norm(x, use_input_stats=False)
