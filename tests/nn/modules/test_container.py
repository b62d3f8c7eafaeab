"""Sequential: which module sees the tensor, and which its features."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchsparse.nn as spnn
from tests.cases import sparse
from torchsparse import SparseTensor

F32 = torch.float32


class Mine(nn.Module):
    """A module of tensors, which nobody can tell from one of sparse tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()


@pytest.mark.parametrize("cloud", ["empty", "single", "odd"])
def test_plain_and_sparse_modules_in_one_chain(cloud: str, device: torch.device) -> None:
    x = sparse(device, cloud, dtype=F32, spatial_range=(1, 13, 14, 15), stride=2)
    conv, linear, inner = spnn.Conv3d(3, 5, 3), nn.Linear(5, 4), nn.Linear(4, 4)
    last = spnn.Conv3d(4, 4, 3)
    net = spnn.Sequential(
        conv,
        nn.LayerNorm(5),
        linear,
        nn.Sequential(nn.Sequential(inner), nn.Tanh()),
        nn.Sequential(last, spnn.ReLU()),
        spnn.OnFeats(Mine()),
        nn.Identity(),
    ).to(device)
    y = net(x)
    feats = torch.nn.functional.layer_norm(conv(x).feats, (5,))
    middle = SparseTensor(inner(linear(feats)).tanh(), x.coords, 2, x.spatial_range)
    want = spnn.ReLU()(last(middle)).feats.square()
    assert type(y) is SparseTensor and y.coords is x.coords and y._caches is x._caches
    assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)
    torch.testing.assert_close(y.feats, want)


def test_after_a_pool_tensors_are_plain(device: torch.device) -> None:
    x = sparse(device, "batch_gap", dtype=F32)
    pooled = spnn.GlobalAvgPool()(x)
    head = nn.Linear(3, 7).to(device)
    out = spnn.Sequential(spnn.GlobalAvgPool(), head, nn.BatchNorm1d(7).to(device).eval())(x)
    assert out.shape == (3, 7)
    torch.testing.assert_close(out, head(pooled) / (1 + 1e-5) ** 0.5)


def test_blocks_and_parametrised_layers(device: torch.device) -> None:
    """Classes that wrap others are judged by the layer at work."""
    x = sparse(device, dtype=F32)
    plain = parametrizations.weight_norm(nn.Linear(3, 3))
    tied = parametrizations.weight_norm(spnn.Conv3d(3, 2, 3), "kernel")
    net = spnn.Sequential(plain, tied).to(device)
    assert type(net[0]) is not nn.Linear
    want = tied(SparseTensor(plain(x.feats), x.coords)).feats
    torch.testing.assert_close(net(x).feats, want)


def test_keys_are_those_of_pytorch() -> None:
    layers: Any = OrderedDict(conv=spnn.Conv3d(3, 4, 3), act=nn.GELU(), head=nn.Linear(4, 2))
    ours, theirs = spnn.Sequential(layers), nn.Sequential(layers)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == [
        "conv.kernel", "head.weight", "head.bias",
    ]  # fmt: skip
    assert isinstance(ours[:2], spnn.Sequential) and len(ours) == 3


def test_a_chain_travels(device: torch.device) -> None:
    x = sparse(device, dtype=F32)
    net = spnn.Sequential(spnn.Conv3d(3, 4, 3), spnn.GELU(), nn.Linear(4, 2), spnn.Softplus())
    net = net.to(device)
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(x).feats, net(x).feats)


def test_modules_that_change_the_number_of_rows(device: torch.device) -> None:
    x = sparse(device, dtype=F32)
    with pytest.raises(ValueError, match=r"keep the number of rows, got \[61, 3\] -> \[183\]"):
        spnn.Sequential(nn.Flatten(0))(x)
