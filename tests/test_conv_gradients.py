"""Gradients: finite differences in float64, and what autograd is promised."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests import clouds, oracles
from tests.cases import assert_close, convolve, sparse, weight
from tests.oracles import Layer
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

F64 = torch.float64
DATAFLOWS = [F.Dataflow.ImplicitGEMM, F.Dataflow.GatherScatter, F.Dataflow.FetchOnDemand]

LAYERS = [
    Layer.of(1),
    Layer.of(3),
    Layer.of(2),
    Layer.of((3, 1, 2)),
    Layer.of(3, 1, 0, 2),
    Layer.of(1, 2),
    Layer.of(2, 2),
    Layer.of(3, 2, 1),
    Layer.of(3, (1, 2, 1), 1, 2),
    Layer.of(3, 2, minkowski=True),
]


def few(rows: int = 7) -> clouds.Coords:
    """A handful of close voxels in two samples."""
    coords = clouds.scatter("few", rows, (3, 3, 2))
    coords[rows // 2 :, 0] = 1
    return coords


def leaf(device: torch.device, *shape: int) -> torch.Tensor:
    values = clouds.rng(f"leaf{shape}").standard_normal(shape)
    return torch.from_numpy(values).to(device).requires_grad_()


@pytest.mark.parametrize("dataflow", DATAFLOWS, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_finite_differences(layer: Layer, dataflow: Any, device: torch.device) -> None:
    coords = torch.from_numpy(few()).to(device)

    def forward(*args: torch.Tensor) -> torch.Tensor:
        feats, kernel, bias = args
        config = {"dataflow": dataflow}
        return convolve(layer, SparseTensor(feats, coords), kernel, bias, config).feats

    inputs = (leaf(device, 7, 2), leaf(device, layer.volume, 2, 2), leaf(device, 2))
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("dataflow", DATAFLOWS, ids=str)
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_finite_differences_of_a_decoder(
    kernel_size: int, dataflow: Any, device: torch.device
) -> None:
    coords = torch.from_numpy(few()).to(device)
    volume, config = kernel_size**3, {"dataflow": dataflow}

    def forward(*args: torch.Tensor) -> torch.Tensor:
        feats, first, second = args
        x = SparseTensor(feats, coords)
        y = F.conv3d(x, first, kernel_size, None, 2, 0, config=config)
        return F.conv3d(y, second, kernel_size, None, 2, 0, config=config, transposed=True).feats

    inputs = (leaf(device, 7, 2), leaf(device, volume, 2, 1), leaf(device, volume, 1, 2))
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("wanted", ["feats", "kernel", "bias"])
@pytest.mark.parametrize("layer", [Layer.of(1), Layer.of(3), Layer.of(2, 2)], ids=str)
def test_each_gradient_alone(layer: Layer, wanted: str, device: torch.device) -> None:
    """A frozen operand gets no gradient and does not disturb that of the others."""
    coords = torch.from_numpy(few()).to(device)

    def gradient(*names: str) -> dict[str, torch.Tensor]:
        tensors = {
            "feats": leaf(device, 7, 2),
            "kernel": leaf(device, layer.volume, 2, 3),
            "bias": leaf(device, 3),
        }
        for name, value in tensors.items():
            value.requires_grad_(name in names)
        x = SparseTensor(tensors["feats"], coords)
        convolve(layer, x, tensors["kernel"], tensors["bias"]).feats.square().sum().backward()
        return {name: value.grad for name, value in tensors.items() if value.grad is not None}

    every, alone = gradient("feats", "kernel", "bias"), gradient(wanted)
    assert set(every) == {"feats", "kernel", "bias"} and set(alone) == {wanted}
    assert_close(alone[wanted], every[wanted], F64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(2, 2)], ids=str)
def test_training_flag_has_no_effect(layer: Layer, training: bool, device: torch.device) -> None:
    x = sparse(device)
    x.feats.requires_grad_()
    kernel = weight(device, layer.volume).requires_grad_()
    y = convolve(layer, x, kernel, training=training)
    grad = torch.ones_like(y.feats)
    y.feats.backward(grad)
    want = oracles.relate(clouds.odd(), layer)
    arrays = [t.detach().cpu().numpy() for t in (x.feats, kernel, grad)]
    to_feats, to_kernel, _ = oracles.gradients(arrays[0], arrays[1], want, arrays[2])
    assert x.feats.grad is not None and kernel.grad is not None
    assert_close(x.feats.grad, to_feats, F64)
    assert_close(kernel.grad, to_kernel, F64)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gradient_through_a_module_in_eval_mode(kernel_size: int, device: torch.device) -> None:
    module = spnn.Conv3d(3, 2, kernel_size, bias=True).to(device).double().eval()
    x = sparse(device)
    x.feats.requires_grad_()
    module(x).feats.sum().backward()
    assert x.feats.grad is not None and x.feats.grad.abs().max() > 0
    assert module.bias is not None
    assert module.kernel.grad is not None and module.bias.grad is not None
    assert_close(module.bias.grad, torch.full((2,), float(len(x.coords))), F64)


@pytest.mark.parametrize("layer", [Layer.of(1), Layer.of(3), Layer.of(3, 2, 1)], ids=str)
def test_no_rows_give_zero_gradients(layer: Layer, device: torch.device) -> None:
    x = sparse(device, "empty")
    x.feats.requires_grad_()
    kernel = weight(device, layer.volume).requires_grad_()
    bias = torch.ones(2, dtype=F64, device=device, requires_grad=True)
    y = convolve(layer, x, kernel, bias)
    assert y.feats.shape == (0, 2)
    y.feats.sum().backward()
    for tensor, shape in ((x.feats, (0, 3)), (kernel, (layer.volume, 3, 2)), (bias, (2,))):
        assert tensor.grad is not None and tensor.grad.shape == shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(2, 2)], ids=str)
def test_gradients_of_views_of_the_output(layer: Layer, device: torch.device) -> None:
    """An expanded gradient (stride 0) and a transposed one are read correctly."""
    x = sparse(device)
    kernel = weight(device, layer.volume).requires_grad_()
    convolve(layer, x, kernel).feats.sum().backward()
    ones = kernel.grad
    kernel.grad = None
    y = convolve(layer, x, kernel).feats
    y.backward(torch.ones(2, len(y), dtype=F64, device=device).t())
    assert ones is not None and kernel.grad is not None
    assert_close(kernel.grad, ones, F64)


@pytest.mark.parametrize("changed", ["feats", "kernel"])
@pytest.mark.parametrize("layer", [Layer.of(1), Layer.of(3), Layer.of(2, 2)], ids=str)
def test_a_saved_tensor_changed_before_backward_is_noticed(
    layer: Layer, changed: str, device: torch.device
) -> None:
    x = sparse(device)
    x.feats.requires_grad_()
    kernel = weight(device, layer.volume).requires_grad_()
    y = convolve(layer, x, kernel)
    with torch.no_grad():
        (x.feats if changed == "feats" else kernel).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.feats.sum().backward()


@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(2, 2)], ids=str)
def test_backward_twice_is_refused(layer: Layer, device: torch.device) -> None:
    x = sparse(device)
    x.feats.requires_grad_()
    y = convolve(layer, x, weight(device, layer.volume))
    loss = y.feats.sum()  # saves nothing itself
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(2, 2)], ids=str)
def test_features_are_freed_without_the_garbage_collector(
    layer: Layer, device: torch.device
) -> None:
    """No cycle through the autograd node keeps the features of a step alive."""
    x = sparse(device)
    kernel = weight(device, layer.volume).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        feats = x.feats * 1.0
        alive = weakref.ref(feats)
        y = convolve(layer, SparseTensor(feats, x.coords), kernel)
        out = weakref.ref(y.feats)
        del y, feats
        assert alive() is None and out() is None
    finally:
        gc.enable()


def test_backward_uses_the_settings_of_the_forward(device: torch.device) -> None:
    """Changing mode, config and autocast between forward and backward changes nothing."""
    x = sparse(device, dtype=torch.float32)
    x.feats.requires_grad_()
    kernel = weight(device, 27, dtype=torch.float32).requires_grad_()
    F.conv3d(x, kernel, 3).feats.square().sum().backward()
    want = (x.feats.grad, kernel.grad)
    x.feats.grad = kernel.grad = None
    loss = F.conv3d(x, kernel, 3).feats.square().sum()
    F.set_conv_mode(2)
    F.conv_config.set_global_conv_config({"dataflow": F.Dataflow.FetchOnDemand})
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss.backward()
    for got, expected in zip((x.feats.grad, kernel.grad), want):
        assert got is not None and expected is not None
        assert_close(got, expected, torch.float32)


def test_checkpointed_layers_give_the_same_gradient(device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    x = sparse(device)
    x.feats.requires_grad_()
    kernel = weight(device, 27, 3, 3).requires_grad_()

    def block(feats: torch.Tensor) -> torch.Tensor:
        y = F.conv3d(SparseTensor(feats, x.coords), kernel, 3)
        return F.conv3d(y, kernel, 3).feats

    block(x.feats).square().sum().backward()
    want = (x.feats.grad, kernel.grad)
    x.feats.grad = kernel.grad = None
    again = checkpoint(block, x.feats, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    again.square().sum().backward()
    for got, expected in zip((x.feats.grad, kernel.grad), want):
        assert got is not None and expected is not None
        assert_close(got, expected, F64)
