"""Norm modules: parameters, buffers and behaviour of their PyTorch namesakes."""

import numpy as np
import pytest
import torch

import torchsparse.nn as spnn
from tests import clouds
from torchsparse import SparseTensor


def tensor(device, cloud=clouds.batch_gap, channels=6, dtype=torch.float32):
    coords = torch.from_numpy(cloud()).to(device)
    feats = np.random.default_rng(3).normal(1.0, 2.0, (len(coords), channels))
    return SparseTensor(torch.from_numpy(feats).to(device, dtype), coords)


@pytest.mark.parametrize(
    ("module", "dense"),
    [
        (spnn.BatchNorm(6), torch.nn.BatchNorm1d(6)),
        (spnn.GroupNorm(2, 6), torch.nn.GroupNorm(2, 6)),
        (spnn.InstanceNorm(6), torch.nn.InstanceNorm1d(6)),
        (
            spnn.InstanceNorm(6, affine=True, track_running_stats=True),
            torch.nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
        ),
    ],
    ids=lambda m: type(m).__name__,
)
def test_state_dicts_are_exchangeable(module, dense):
    assert isinstance(module, type(dense))
    module.load_state_dict(dense.state_dict())
    dense.load_state_dict(module.state_dict())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_the_dense_module(training, momentum, device):
    x = tensor(device)
    sparse = spnn.BatchNorm(6, momentum=momentum).to(device).train(training)
    dense = torch.nn.BatchNorm1d(6, momentum=momentum).to(device).train(training)
    first = sparse(x).feats, dense(x.feats)
    torch.testing.assert_close(*first)
    got, want = sparse(x), dense(x.feats)
    torch.testing.assert_close(got.feats, want)
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value)
    assert got._caches is x._caches


def test_batch_norm_without_rows_leaves_statistics_alone(device):
    module = spnn.BatchNorm(6).to(device)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert module(tensor(device, clouds.empty)).feats.shape == (0, 6)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_batch_norm_follows_pytorch_in_half_precision(device):
    x = tensor(device, dtype=torch.float16)
    assert spnn.BatchNorm(6).to(device)(x).feats.dtype == torch.float16


def test_group_norm_per_sample(device):
    """The rows of other samples do not matter."""
    x = tensor(device)
    module = spnn.GroupNorm(3, 6).to(device)
    both = module(x).feats
    for b in (0, 2):
        rows = x.coords[:, 0] == b
        alone = module(SparseTensor(x.feats[rows], x.coords[rows])).feats
        torch.testing.assert_close(both[rows], alone)


def test_instance_norm_tracks_statistics_as_pytorch(device):
    """Samples of equal length, so that the dense module can see them as [B, C, L]."""
    rows = np.repeat(np.arange(3), 20)
    coords = np.zeros((60, 4), np.int32)
    coords[:, 0] = rows
    feats = np.random.default_rng(4).normal(2, 3, (60, 5)).astype(np.float32)
    x = SparseTensor(torch.from_numpy(feats).to(device), torch.from_numpy(coords).to(device))
    dense_x = x.feats.view(3, 20, 5).transpose(1, 2)
    sparse = spnn.InstanceNorm(5, affine=True, track_running_stats=True).to(device)
    dense = torch.nn.InstanceNorm1d(5, affine=True, track_running_stats=True).to(device)
    for module in (sparse, dense):
        torch.nn.init.constant_(module.weight, 1.5)
        torch.nn.init.constant_(module.bias, -0.5)
    for training in (True, True, False):
        sparse.train(training)
        dense.train(training)
        want = dense(dense_x).transpose(1, 2).reshape(60, 5)
        torch.testing.assert_close(sparse(x).feats, want, rtol=1e-5, atol=1e-5)
        for name, value in dense.state_dict().items():
            torch.testing.assert_close(sparse.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_instance_norm_statistics_skip_empty_samples(device):
    """Sample 1 has no rows: it must not pull the running mean towards 0."""
    x = tensor(device)
    module = spnn.InstanceNorm(6, track_running_stats=True, momentum=1.0).to(device)
    module(x)
    means = [x.feats[x.coords[:, 0] == b].mean(0) for b in (0, 2)]
    assert module.running_mean is not None
    torch.testing.assert_close(module.running_mean, (means[0] + means[1]) / 2)


def test_instance_norm_of_one_row_is_its_bias(device):
    module = spnn.InstanceNorm(6, affine=True, track_running_stats=True).to(device)
    got = module(tensor(device, clouds.single))
    torch.testing.assert_close(got.feats, torch.zeros_like(got.feats))
    assert module.running_var is not None
    assert module.running_var.isfinite().all()
