"""Generative layers: new sites around every input, their range, stride and own cache."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests import clouds, oracles
from tests.cases import (
    KERNEL_SIZES,
    PADDINGS,
    STRIDES,
    Case,
    assert_close,
    assert_rows,
    convolve,
    sparse,
    weight,
)
from tests.oracles import Layer
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F


def generate(*sizes: Any, **switches: bool) -> Layer:
    return Layer.of(*sizes, transposed=True, generative=True, **switches)


CASES = [
    *(
        Case(generate(k, s, p, d), "batch_gap", ranged)
        for k, s, p, d in itertools.product(KERNEL_SIZES[:4], STRIDES, PADDINGS, (1, 2))
        for ranged in (False, True)
    ),
    *(Case(generate(k, s, 1), "single") for k, s in itertools.product(KERNEL_SIZES, STRIDES)),
    *(Case(generate(k, 2), "empty", ranged=k != 3) for k in KERNEL_SIZES),
    Case(generate(5, 2, 2), "single", ranged=True),
    Case(generate((3, 1, 2), (1, 2, 2), (1, 0, 0)), "odd"),
    *(Case(generate(k, 2, 1, allow_negative=True), "negative") for k in (1, 2, 3)),
    *(Case(generate(k, 2, 1, minkowski=True), "odd") for k in (1, 2, 3)),
]


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_the_two_oracles_agree(case: Case) -> None:
    problem, layer = case.build(), case.layer
    want = oracles.relate(problem.coords, layer, problem.spatial_range)
    if layer.kind == "generative":
        sites = oracles.dense_sites(problem.coords, layer, problem.spatial_range)
        assert oracles.as_sites(want.coords) == sites
    dense = oracles.dense_convolve(
        torch.from_numpy(problem.feats),
        problem.coords,
        torch.from_numpy(problem.kernel),
        layer,
        want.coords,
    )
    assert_close(dense, oracles.convolve(problem.feats, problem.kernel, want), torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generative_matches_the_search(case: Case, device: torch.device) -> None:
    problem, layer = case.build(), case.layer
    want = oracles.relate(problem.coords, layer, problem.spatial_range)
    x = problem.tensor(device, stride=2, requires_grad=True)
    kernel, bias = problem.parameters(device, requires_grad=True)
    y = convolve(layer, x, kernel, bias)
    assert_rows(y.coords, want.coords)
    assert y.stride == oracles.output_stride((2, 2, 2), layer)
    assert y.spatial_range == want.spatial_range
    out = oracles.convolve(problem.feats, problem.kernel, want, problem.bias)
    assert_close(y.feats, out, torch.float64)
    grad = np.sin(np.arange(out.size)).reshape(out.shape)
    y.feats.backward(torch.from_numpy(grad).to(device))
    for leaf, expected in zip(
        (x.feats, kernel, bias), oracles.gradients(problem.feats, problem.kernel, want, grad)
    ):
        assert leaf.grad is not None
        assert_close(leaf.grad, expected, torch.float64)


def test_by_hand(device: torch.device) -> None:
    """Kernel 2, stride 2: child (2c + t) gets weight t; the range doubles."""
    coords = torch.tensor([[0, 1, 0, 2]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones(1, 1, device=device), coords, 2, (1, 2, 3, 4))
    kernel = torch.arange(8.0, device=device).reshape(8, 1, 1)
    y = F.conv3d(x, kernel, 2, None, 2, transposed=True, generative=True)
    children = list(itertools.product([0], [2, 3], [0, 1], [4, 5]))
    assert [tuple(row) for row in y.coords.tolist()] == children
    assert y.feats[:, 0].tolist() == list(range(8))
    assert (y.stride, y.spatial_range) == ((1, 1, 1), (1, 4, 6, 8))


@pytest.mark.parametrize(("before", "s", "after"), [(4, 2, 2), (1, 2, 1), (2, 4, 1)])
def test_stride_never_falls_below_one(
    before: int, s: int, after: int, device: torch.device
) -> None:
    x = sparse(device, "odd", stride=before)
    y = F.conv3d(x, weight(device, 8), 2, None, s, transposed=True, generative=True)
    assert y.stride == (after,) * 3
    assert y.coords[:, 1:].max() > x.coords[:, 1:].max()


def test_the_module_applies_its_padding_rule(device: torch.device) -> None:
    module = spnn.Conv3d(3, 2, 3, (1, 2, 1), 0, transposed=True, generative=True).to(device)
    assert module.generative and module.padding == (1, 0, 1)
    y = module(sparse(device, dtype=torch.float32, stride=2))
    layer = generate(3, (1, 2, 1), (1, 0, 1))
    assert_rows(y.coords, oracles.as_rows(oracles.output_sites(clouds.odd(), layer)))
    assert y.stride == (2, 1, 2)


def test_repeating_the_layer_reuses_its_map(device: torch.device) -> None:
    x = sparse(device, "odd", stride=2)
    first, second = (
        F.conv3d(x, weight(device, 8), 2, None, 2, transposed=True, generative=True)
        for _ in range(2)
    )
    assert second.coords is first.coords
    assert first._caches is not second._caches


def test_the_output_has_its_own_cache(device: torch.device) -> None:
    """cmaps copied with the new level in place, maps empty, extra attributes by reference."""
    x = sparse(device, "odd", stride=2)
    x._caches.extra = mine = ["shared"]  # pyright: ignore[reportAttributeAccessIssue]
    other = torch.from_numpy(clouds.plane()).to(device)
    x._caches.cmaps[(1, 1, 1)] = other
    convolve(Layer.of(3), x, weight(device, 27))
    y = F.conv3d(x, weight(device, 8), 2, None, 2, transposed=True, generative=True)
    assert y._caches is not x._caches
    assert set(y._caches.cmaps) == {(1, 1, 1), (2, 2, 2)}
    assert y._caches.cmaps[(1, 1, 1)][0] is y.coords
    assert y._caches.cmaps[(2, 2, 2)][0] is x.coords
    assert not y._caches.kmaps and not y._caches.hashmaps
    assert y._caches.extra is mine  # pyright: ignore[reportAttributeAccessIssue]
    kept = x._caches.cmaps[(1, 1, 1)]
    assert (kept if torch.is_tensor(kept) else kept[0]) is other
    assert x._caches.kmaps


def test_a_generated_level_can_be_convolved_further(device: torch.device) -> None:
    """Submanifold, strided and transposed layers after a generative one use its level."""
    x = sparse(device, "single", stride=2)
    y = F.conv3d(x, weight(device, 27), 3, None, 2, 1, transposed=True, generative=True)
    sites = y.coords.cpu().numpy()
    for layer in (Layer.of(3), Layer.of(2, 2)):
        z = convolve(layer, y, weight(device, layer.volume, 2, 3))
        want = oracles.relate(sites, layer)
        assert_rows(z.coords, want.coords)
        out = oracles.convolve(
            y.feats.cpu().numpy(), weight(torch.device("cpu"), layer.volume, 2, 3).numpy(), want
        )
        assert_close(z.feats, out, torch.float64)
    back = convolve(Layer.of(2, 2, transposed=True), z, weight(device, 8, 3, 1))
    assert back.coords is y.coords


@pytest.mark.parametrize("kmap_mode", ["hashmap", "hashmap_on_the_fly"])
def test_both_kmap_modes_need_no_range(kmap_mode: str, device: torch.device) -> None:
    F.set_kmap_mode(kmap_mode)
    x = sparse(device, "odd", stride=2)
    y = F.conv3d(x, weight(device, 27), 3, None, 2, 1, transposed=True, generative=True)
    want = oracles.relate(clouds.odd(), generate(3, 2, 1))
    assert_rows(y.coords, want.coords)
    assert y.spatial_range is None


def test_generative_without_transposed_is_an_error(device: torch.device) -> None:
    with pytest.raises(ValueError, match="transposed"):
        F.conv3d(sparse(device), weight(device, 8), 2, None, 2, generative=True)


def test_gradients_of_a_generative_layer(device: torch.device) -> None:
    x = sparse(device, "single")
    kernel = weight(device, 8).requires_grad_()
    feats = x.feats.requires_grad_()

    def layer(feats: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        fresh = SparseTensor(feats, x.coords)
        return F.conv3d(fresh, kernel, 2, None, 2, transposed=True, generative=True).feats

    assert torch.autograd.gradcheck(layer, (feats, kernel))
