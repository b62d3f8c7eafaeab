"""Captured training passes, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.scans import Dense, again, assert_agree, network, scan
from torchsparse import nn as spnn
from torchsparse.training import graphed


def test_what_runs_as_usual(device: torch.device) -> None:
    """Evaluation, no gradients, a single row, too many rows; on a CPU everything."""
    model = network(Dense, device)
    net = graphed(model, max_points=50)
    for rows in (40, 300):
        x = scan(rows, 1, device, ranged=True)
        with torch.no_grad():
            assert_agree(net(again(x)), model(again(x)))
    model.train()
    x = scan(300, 1, device, ranged=True)
    net(x)["grid"].sum().backward()
    assert all(p.grad is not None for p in model.body.parameters())  # pyright: ignore
    single = nn.Sequential(spnn.Conv3d(4, 4, 3)).to(device)
    graphed(single)(scan(1, 1, device)).feats.sum().backward()
    assert net.captures == net.replays == 0


def test_bad_arguments(device: torch.device) -> None:
    model = network(Dense, device)
    with pytest.raises(ValueError, match="max_points"):
        graphed(model, max_points=0)
    with pytest.raises(ValueError, match="keep"):
        graphed(model, keep=0)
    with pytest.raises(TypeError, match="SparseTensor"):
        graphed(model)(torch.zeros(3, 4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the model.*BatchNorm1d"):
        graphed(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1.*InstanceNorm1d"):
        graphed(nn.Sequential(spnn.Conv3d(4, 4, 3), nn.InstanceNorm1d(4)))
