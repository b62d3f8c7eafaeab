"""Modules of pools: the functions, with the padding rule of convolutions."""

import copy

import pytest
import torch

import torchsparse.nn as spnn
from tests.cases import sparse
from torchsparse.nn import functional as F

PAIRS = [
    (spnn.MaxPool3d, F.max_pool3d),
    (spnn.AvgPool3d, F.avg_pool3d),
    (spnn.SumPool3d, F.sum_pool3d),
]


@pytest.mark.parametrize(("module", "function"), PAIRS)
@pytest.mark.parametrize("args", [(2,), (3, 1), (3, 2, 1), (3, 2, 0, 2), ((2, 1, 3), (1, 2, 1))])
def test_modules_are_the_functions(module, function, args, device):
    x = sparse(device, "odd")
    layer = module(*args)
    got = layer(x)
    want = function(x, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    assert torch.equal(got.feats, want.feats) and torch.equal(got.coords, want.coords)
    assert not list(layer.parameters())


def test_the_stride_is_the_kernel_size_unless_it_is_given(device):
    x = sparse(device, "odd")
    assert spnn.MaxPool3d((2, 3, 1))(x).stride == (2, 3, 1)
    assert spnn.AvgPool3d(3, 1)(x).coords is x.coords


def test_sites_are_those_of_the_convolution_module(device):
    """Also where an axis of stride 1 is centred whatever was passed."""
    x = sparse(device, "odd", dtype=torch.float32)
    args = ((3, 3, 2), (1, 2, 1))
    conv = spnn.Conv3d(3, 3, *args).to(device)
    pool = spnn.MaxPool3d(*args)
    assert pool.padding == conv.padding == (1, 0, 0)
    assert pool(x).coords is conv(x).coords


def test_there_and_back(device):
    x = sparse(device, "batch_gap", spatial_range=(3, 16, 16, 16))
    y, indices = spnn.MaxPool3d(2, return_indices=True)(x)
    back = spnn.MaxUnpool3d(2)(y, indices)
    assert torch.equal(back.feats, F.max_unpool3d(y, indices, 2).feats)
    kept = back.feats != 0
    assert torch.equal(back.feats[kept], x.feats[kept])
    assert int(kept.sum()) == y.feats.numel()
    for mode in ("mean", "sum"):
        got = spnn.Unpool3d(3, 2, 1, mode=mode)(spnn.SumPool3d(3, 2, 1)(x))
        want = F.unpool3d(F.sum_pool3d(x, 3, 2, 1), 3, 2, 1, mode=mode)
        assert torch.equal(got.feats, want.feats)


def test_onto_the_sites_of_another_tensor(device):
    x = sparse(device, "odd")
    there = spnn.AvgPool3d(2)(x)
    for module in (spnn.MaxPool3d(2), spnn.SumPool3d(2)):
        assert module(x, there).coords is there.coords


def test_a_config_chooses_the_sites(device):
    x = sparse(device, "odd")
    config = {"downsample_mode": "minkowski"}
    got = spnn.MaxPool3d(3, 2, config=config)(x)
    want = torch.unique(torch.cat([x.coords[:, :1], x.coords[:, 1:] // 2], 1), dim=0)
    assert torch.equal(got.coords, want)


def test_modules_describe_themselves_and_can_be_copied():
    pool = spnn.MaxPool3d(3, (1, 2, 2), 1, 2, return_indices=True)
    assert repr(pool) == (
        "MaxPool3d(kernel_size=(3, 3, 3), stride=(1, 2, 2), padding=(2, 1, 1), "
        "dilation=(2, 2, 2), return_indices=True)"
    )
    assert repr(spnn.Unpool2d(2)) == "Unpool2d(kernel_size=(2, 2), stride=(2, 2), mode='mean')"
    assert repr(copy.deepcopy(pool)) == repr(pool)


def test_modules_say_what_they_expected():
    with pytest.raises(ValueError, match=r"`kernel_size` must be at least 1 on every axis, got 0"):
        spnn.MaxPool3d(0)
    with pytest.raises(ValueError, match=r"`mode` must be one of 'mean', 'sum', got 'max'"):
        spnn.Unpool3d(2, mode="max")
