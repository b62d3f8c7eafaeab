"""Layers that look at each row alone, against their namesakes in PyTorch."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchsparse.nn as spnn
from tests import clouds
from tests.cases import sparse
from torchsparse import SparseTensor


@pytest.mark.parametrize(
    ("module", "dense"),
    [
        (spnn.ReLU, torch.nn.ReLU()),
        (spnn.LeakyReLU, torch.nn.LeakyReLU(0.01)),
        (spnn.SiLU, torch.nn.SiLU()),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_the_dense_module(module, dense, inplace, device):
    coords = torch.from_numpy(clouds.odd()).to(device)
    x = SparseTensor(torch.randn((len(coords), 3), device=device), coords)
    before = x.feats.clone()
    got = (module(inplace=True) if inplace else module())(x)
    torch.testing.assert_close(got.feats, dense(before))
    assert (got.feats.data_ptr() == x.feats.data_ptr()) is inplace
    assert torch.equal(x.feats, before) is not inplace
    assert got.coords is x.coords


def test_slope(device):
    x = SparseTensor(-torch.ones((1, 1)), torch.zeros((1, 4)).int())
    assert spnn.LeakyReLU(0.25)(x).feats.item() == -0.25


# name: arguments, and what the layer makes of -1 and 2 where that is a short number.
LAYERS = {
    "CELU": ((2.0,), None),
    "ELU": ((0.5,), None),
    "GELU": (("tanh",), None),
    "SELU": ((), None),
    "Hardsigmoid": ((), (1 / 3, 5 / 6)),
    "Hardswish": ((), (-1 / 3, 5 / 3)),
    "Hardtanh": ((-0.5, 1.5), (-0.5, 1.5)),
    "LogSigmoid": ((), None),
    "Mish": ((), None),
    "PReLU": ((), (-0.25, 2.0)),
    "ReLU6": ((), (0.0, 2.0)),
    "Sigmoid": ((), None),
    "Softplus": ((2.0,), None),
    "Softsign": ((), (-1 / 2, 2 / 3)),
    "Tanh": ((), None),
    "Linear": ((3, 5), None),
    "LayerNorm": ((3,), None),
    "Dropout": ((0.5,), None),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
@pytest.mark.parametrize("cloud", ["empty", "single", "odd"])
def test_a_layer_is_its_namesake_on_features(name, cloud, device):
    arguments, _ = LAYERS[name]
    dense = getattr(nn, name)(*arguments).to(device)
    module = getattr(spnn, name)(*arguments).to(device)
    assert isinstance(module, getattr(nn, name)) and repr(module) == repr(dense)
    module.load_state_dict(dense.state_dict())
    x = sparse(device, cloud, dtype=torch.float32, stride=2, spatial_range=(1, 13, 14, 15))
    before = x.feats.clone()
    torch.manual_seed(0)
    got = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got.feats, dense(before))
    assert type(got) is SparseTensor and got.coords is x.coords and got._caches is x._caches
    assert (got.stride, got.spatial_range) == (x.stride, x.spatial_range)
    assert torch.equal(x.feats, before)


@pytest.mark.parametrize("name", [name for name, row in LAYERS.items() if row[1]])
def test_values_by_hand(name, device):
    arguments, want = LAYERS[name]
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], device=device).int()
    x = SparseTensor(torch.tensor([[-1.0], [2.0]], device=device), coords)
    got = getattr(spnn, name)(*arguments).to(device)(x).feats
    torch.testing.assert_close(got[:, 0].tolist(), list(want), rtol=1e-6, atol=1e-6)


@each_layer
@pytest.mark.parametrize(
    "travel", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_layer_travels(name, travel):
    module = getattr(spnn, name)(*LAYERS[name][0]).eval()
    again = travel(module)
    x = sparse(torch.device("cpu"), dtype=torch.float32)
    assert type(again) is type(module) is getattr(spnn, name)
    assert torch.equal(again(x).feats, module(x).feats)


def test_layers_in_place(device):
    x = sparse(device, dtype=torch.float32)
    feats = x.feats
    assert spnn.ELU(inplace=True)(x).feats.data_ptr() == feats.data_ptr()
    assert feats.min() > -1


def test_dropout_rests_in_evaluation(device):
    x = sparse(device)
    layer = spnn.Dropout(0.5)
    assert (layer(x).feats == 0).any()
    assert torch.equal(layer.eval()(x).feats, x.feats)


def test_learned_parameters_get_gradients(device):
    x = sparse(device, dtype=torch.float32)
    net = nn.Sequential(spnn.Linear(3, 4), spnn.LayerNorm(4), spnn.PReLU(4)).to(device)
    net(x).feats.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
