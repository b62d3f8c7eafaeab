"""SyncBatchNorm in one process; between processes: `test_sync_norm_processes`."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import torchsparse.nn as spnn
from tests.cases import sparse
from torchsparse.models import MinkUNet

F32 = torch.float32


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "body": nn.Sequential(spnn.Conv3d(3, 4, 3), spnn.BatchNorm(4, eps=1e-3), spnn.ReLU()),
            "many": nn.ModuleList([spnn.BatchNorm(4, momentum=None), spnn.GroupNorm(2, 4)]),
            "head": nn.BatchNorm2d(5),
            "bare": spnn.BatchNorm(3, affine=False),
            "still": spnn.BatchNorm(3, track_running_stats=False),
        }
    )


def test_conversion_changes_the_classes_alone() -> None:
    net = network()
    net["still"].eval()  # pyright: ignore
    before = dict(net.state_dict(keep_vars=True))
    got = spnn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert got is net
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kinds = [type(m) for m in norms]
    ours, theirs = spnn.SyncBatchNorm, nn.SyncBatchNorm
    assert kinds == [ours, ours, theirs, ours, ours]
    assert [m.eps for m in norms] == [1e-3, *[1e-5] * 4]
    assert [m.momentum for m in norms] == [0.1, None, 0.1, 0.1, 0.1]
    assert [m.training for m in norms] == [True, True, True, True, False]
    assert [m.affine for m in norms] == [True, True, True, False, True]
    assert not isinstance(net["many"][1], nn.SyncBatchNorm)  # pyright: ignore


def test_a_norm_alone_and_a_second_conversion() -> None:
    norm = spnn.BatchNorm(4).eval()
    group = object()
    got = spnn.convert_sync_batchnorm(norm, group)
    assert type(got) is spnn.SyncBatchNorm and got.weight is norm.weight and not got.training
    assert got.process_group is group
    assert isinstance(got, nn.SyncBatchNorm) and not isinstance(got, spnn.BatchNorm)
    assert spnn.convert_sync_batchnorm(got) is got
    plain = spnn.convert_sync_batchnorm(nn.BatchNorm1d(4))
    assert type(plain) is nn.SyncBatchNorm and spnn.convert_sync_batchnorm(plain) is plain


def test_pickles_keep_class_and_state() -> None:
    norm = spnn.SyncBatchNorm(4, momentum=None)
    again = pickle.loads(pickle.dumps(norm))
    assert type(again) is spnn.SyncBatchNorm and again.momentum is None
    assert list(again.state_dict()) == list(nn.BatchNorm1d(4).state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_without_a_group_it_is_batch_norm(training: bool, device: torch.device) -> None:
    """Checkpoints go back and forth, and so do results."""
    torch.manual_seed(0)
    x = sparse(device, "batch_gap", dtype=F32)
    config = {"stem": 4, "encoder": (6,), "decoder": (5,), "depth": 1}
    plain = MinkUNet(3, 2, **config).to(device)
    synced = spnn.convert_sync_batchnorm(MinkUNet(3, 2, **config)).to(device)
    assert sum(isinstance(m, spnn.SyncBatchNorm) for m in synced.modules()) == 10
    synced.load_state_dict(plain.state_dict())
    plain.train(training)
    synced.train(training)
    torch.testing.assert_close(synced(x), plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value)


def test_no_rows_leave_statistics_alone(device: torch.device) -> None:
    norm = spnn.SyncBatchNorm(3).to(device)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert norm(sparse(device, "empty", dtype=F32)).feats.shape == (0, 3)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())
