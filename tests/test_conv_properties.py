"""What holds for every cloud and every layer, on random examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import oracles
from tests.cases import assert_close, assert_rows, convolve
from tests.oracles import Layer
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

F64 = torch.float64

SITES = st.tuples(st.integers(0, 2), *(st.integers(-4, 6),) * 3)
CLOUDS = st.lists(SITES, unique=True, min_size=0, max_size=24).map(
    lambda rows: np.array(rows, np.int32).reshape(-1, 4)
)
SEEDS = st.integers(0, 2**31)
KERNELS = st.one_of(st.integers(1, 5), st.tuples(*(st.integers(1, 3),) * 3))
SIZES = {
    "kernel_size": KERNELS,
    "stride": st.one_of(st.integers(1, 3), st.tuples(*(st.integers(1, 3),) * 3)),
    "padding": st.tuples(*(st.integers(0, 3),) * 3),
    "dilation": st.one_of(st.just(1), st.tuples(*(st.integers(1, 3),) * 3)),
}
LAYERS = st.builds(
    Layer.of,
    **SIZES,
    minkowski=st.booleans(),
    allow_negative=st.just(True),
    infer_range=st.booleans(),
)
GENERATIVE = st.builds(
    Layer.of,
    **SIZES,
    transposed=st.just(True),
    generative=st.just(True),
    allow_negative=st.just(True),
)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def tensor(coords: Any, feats: torch.Tensor, device: torch.device) -> SparseTensor:
    return SparseTensor(feats.to(device), torch.as_tensor(coords).to(device))


@given(CLOUDS, st.one_of(LAYERS, GENERATIVE), SEEDS)
def test_the_search_agrees(device: torch.device, coords: Any, layer: Layer, seed: int) -> None:
    kernel, feats = numbers(seed, layer.volume, 2, 3), numbers(seed + 1, len(coords), 2)
    y = convolve(layer, tensor(coords, feats, device), kernel.to(device))
    want = oracles.relate(coords, layer)
    assert_rows(y.coords, want.coords)
    assert_close(y.feats, oracles.convolve(feats.numpy(), kernel.numpy(), want), F64)


@given(CLOUDS, st.one_of(LAYERS, GENERATIVE), SEEDS)
def test_order_of_rows_does_not_matter(
    device: torch.device, coords: Any, layer: Layer, seed: int
) -> None:
    """Submanifold outputs are permuted along; the others are sorted and stay."""
    kernel = numbers(seed, layer.volume, 2, 3).to(device)
    feats = numbers(seed + 1, len(coords), 2)
    order = np.random.default_rng(seed).permutation(len(coords))
    straight = convolve(layer, tensor(coords, feats, device), kernel)
    shuffled = convolve(layer, tensor(coords[order], feats[order], device), kernel)
    kept = torch.from_numpy(order) if layer.kind in ("pointwise", "submanifold") else slice(None)
    assert_rows(shuffled.coords, straight.coords.cpu()[kept].numpy())
    assert_close(shuffled.feats, straight.feats.cpu()[kept], F64)


@given(CLOUDS, st.one_of(LAYERS, GENERATIVE), SEEDS)
def test_linearity(device: torch.device, coords: Any, layer: Layer, seed: int) -> None:
    """In the features and in the kernel."""
    kernels = [numbers(seed + i, layer.volume, 2, 3).to(device) for i in range(2)]
    feats = [numbers(seed + 2 + i, len(coords), 2) for i in range(2)]

    def apply(f: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return convolve(layer, tensor(coords, f, device), w).feats

    both = apply(2 * feats[0] - feats[1], kernels[0])
    assert_close(both, 2 * apply(feats[0], kernels[0]) - apply(feats[1], kernels[0]), F64)
    both = apply(feats[0], 3 * kernels[0] + kernels[1])
    assert_close(both, 3 * apply(feats[0], kernels[0]) + apply(feats[0], kernels[1]), F64)


@given(CLOUDS, st.one_of(LAYERS, GENERATIVE), SEEDS)
def test_the_input_gradient_is_the_adjoint(
    device: torch.device, coords: Any, layer: Layer, seed: int
) -> None:
    """<A x, y> = <x, A' y> for independent x and y; the same for the kernel."""
    x = numbers(seed, len(coords), 2).to(device).requires_grad_()
    kernel = numbers(seed + 1, layer.volume, 2, 3).to(device).requires_grad_()
    forward = convolve(layer, tensor(coords, x, device), kernel).feats
    y = numbers(seed + 2, *forward.shape).to(device)
    forward.backward(y)
    assert x.grad is not None and kernel.grad is not None
    product = (forward * y).sum()
    assert_close(product, (x * x.grad).sum(), F64)
    assert_close(product, (kernel * kernel.grad).sum(), F64)


@given(CLOUDS, LAYERS, SEEDS)
def test_a_decoder_is_the_adjoint_of_its_encoder(
    device: torch.device, coords: Any, layer: Layer, seed: int
) -> None:
    """<down(x; W), y> = <x, up(y; W')>: one map, read in both directions."""
    assume(layer.stride != (1, 1, 1))
    kernel = numbers(seed, layer.volume, 2, 3).to(device)
    x = tensor(coords, numbers(seed + 1, len(coords), 2), device)
    down = convolve(layer, x, kernel)
    y = numbers(seed + 2, *down.feats.shape).to(device)
    coarse = SparseTensor(y, down.coords, down.stride, down.spatial_range)
    coarse._caches = down._caches
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    decoder = Layer.of(*sizes, transposed=True, minkowski=layer.minkowski, allow_negative=True)
    up = convolve(decoder, coarse, kernel.transpose(1, 2))
    assert up.coords is x.coords
    assert_close((down.feats * y).sum(), (x.feats * up.feats).sum(), F64)


@given(CLOUDS, LAYERS, st.tuples(*(st.integers(-50, 50),) * 3), SEEDS)
def test_translation_by_whole_strides(
    device: torch.device, coords: Any, layer: Layer, steps: tuple[int, int, int], seed: int
) -> None:
    """Moving the input by n s moves the output by n (without v2.1's far border or with it)."""
    kernel = numbers(seed, layer.volume, 2, 3).to(device)
    feats = numbers(seed + 1, len(coords), 2)
    moved = coords + np.array([0, *np.multiply(steps, layer.stride)], np.int32)
    here = convolve(layer, tensor(coords, feats, device), kernel)
    there = convolve(layer, tensor(moved, feats, device), kernel)
    assert_rows(there.coords, here.coords.cpu().numpy() + np.array([0, *steps]))
    assert_close(there.feats, here.feats, F64)


@given(CLOUDS, st.one_of(LAYERS, GENERATIVE), SEEDS)
def test_samples_are_independent(
    device: torch.device, coords: Any, layer: Layer, seed: int
) -> None:
    """A sample alone gives its rows of the batch, once the inferred border is off."""
    assume(layer.kind != "strided" or not layer.infer_range)
    kernel = numbers(seed, layer.volume, 2, 3).to(device)
    feats = numbers(seed + 1, len(coords), 2)
    batch = convolve(layer, tensor(coords, feats, device), kernel)
    for b in range(3):
        mine = coords[:, 0] == b
        alone = convolve(layer, tensor(coords[mine], feats[mine], device), kernel)
        rows = batch.coords[:, 0] == b
        assert_rows(alone.coords, batch.coords[rows].cpu().numpy())
        assert_close(alone.feats, batch.feats[rows], F64)


@given(CLOUDS, LAYERS, SEEDS, st.sampled_from([0, 1, 2]), st.sampled_from([0, 1, 2]))
def test_speed_switches_change_nothing(
    device: torch.device, coords: Any, layer: Layer, seed: int, mode: int, dataflow: int
) -> None:
    kernel, feats = numbers(seed, layer.volume, 2, 3), numbers(seed + 1, len(coords), 2)
    F.set_conv_mode(0)
    want = convolve(layer, tensor(coords, feats, device), kernel.to(device))
    F.set_conv_mode(mode)
    config = {"dataflow": F.Dataflow(dataflow), "kmap_mode": "hashmap"}
    got = convolve(layer, tensor(coords, feats, device), kernel.to(device), config=config)
    assert_rows(got.coords, want.coords.cpu().numpy())
    assert_close(got.feats, want.feats, F64)


def test_the_same_bits_on_two_threads() -> None:
    """On a CPU with several threads, a step gives the same bits in every run."""
    torch.manual_seed(0)
    sites = torch.cartesian_prod(*[torch.arange(18)] * 3)
    sites = sites[torch.rand(len(sites)) < 0.5]
    coords = torch.nn.functional.pad(sites, (1, 0)).int()
    feats = torch.randn(len(coords), 64)
    net = torch.nn.Sequential(
        spnn.Conv3d(64, 64, 3), spnn.BatchNorm(64), spnn.ReLU(), spnn.Conv3d(64, 32, 2, stride=2)
    )

    def step() -> list[torch.Tensor]:
        x = SparseTensor(feats.clone().requires_grad_(), coords)
        net.zero_grad()
        out = net(x).feats
        out.square().sum().backward()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        return [out.detach(), x.feats.grad, *grads]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = step()
        for _ in range(5):
            assert all(map(torch.equal, first, step()))
    finally:
        torch.set_num_threads(before)
