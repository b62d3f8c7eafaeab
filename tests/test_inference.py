"""Graphed networks give what the networks give, on every device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import torchsparse
from tests.scans import Dense, Shared, again, assert_agree, flat, network, scan
from torchsparse import PointTensor, _frozen, _graphs, training
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.inference import graphed, warmup
from torchsparse.nn import functional as F
from torchsparse.utils.tensor_cache import (
    TensorCacheMode,
    clear_global_tensor_cache,
    set_tensor_cache_mode,
)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("kind", [SparseResUNet42, SparseResNet21D, Dense, Shared])
def test_graphed_is_eager(kind: type[nn.Module], wait: bool, device: torch.device) -> None:
    """Scans of changing sizes, up and down, in one bucket and in several."""
    model = network(kind, device)
    net = graphed(model, wait=wait)
    for seed, rows in enumerate((300, 310, 1500, 290, 305, 1480, 0, 300)):
        x = scan(rows, seed, device, ranged=kind is Dense)
        with torch.no_grad():
            want = model(again(x))
        got = net(x)
        assert_agree(got, want)
        kept = [t.clone() for t in flat(got)]
        net(scan(rows, seed + 50, device, ranged=kind is Dense))
        assert all(torch.equal(a, b) for a, b in zip(flat(got), kept)), "results are copies"
    if device.type == "cuda":
        assert net.captures == 2
        assert net.replays >= 8


def test_bad_arguments(device: torch.device) -> None:
    model = network(Dense, device)
    with pytest.raises(ValueError, match="max_points"):
        graphed(model, max_points=0)
    with pytest.raises(ValueError, match="keep"):
        graphed(model, keep=0)
    with pytest.raises(TypeError, match="SparseTensor"):
        graphed(model)(torch.zeros(3, 4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="eval"):
        graphed(model.train())(scan(10, 1, device, ranged=True))


@pytest.mark.parametrize("kind", [SparseResUNet42, Dense])
def test_frozen_weights_change_nothing(kind: type[nn.Module], device: torch.device) -> None:
    """Scans of two buckets, and where no graph serves, weights that change."""
    model = network(kind, device)
    net = graphed(model, frozen=True)
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        for seed, rows in enumerate((300, 1500, 310, 1480, 0)):
            x = scan(rows, seed, device, ranged=kind is Dense)
            with torch.no_grad():
                want = model(again(x))
            assert_agree(net(x), want)
    assert _frozen.current.store is None


def test_one_store_serves_until_weights_change() -> None:
    """Written to, moved, or part of another layer: the next graph has another store."""
    model = network(Dense, torch.device("cpu"))
    assert graphed(model)._kept() is None
    net = graphed(model, frozen=True)
    changes: list[Any] = [
        lambda: next(model.parameters()).add_(1),
        lambda: setattr(p := next(model.parameters()), "data", p.data.clone()),
        lambda: model.add_module("more", nn.Linear(2, 3)),
    ]
    for change in changes:
        store = net._kept()
        assert store is not None and net._kept() is store
        with _frozen.keeping(store), torch.no_grad():
            _frozen.cast(next(model.parameters()), torch.float16)
            assert net._kept() is store
            change()
        assert net._kept() is not store


def test_warmup(device: torch.device) -> None:
    """Kernels are compiled, and nothing else changes."""
    model = network(Dense, device)
    x = scan(100, 1, device, ranged=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = warmup(model, x, graph=graphed(model))
    assert (compiled > 0) == (device.type == "cuda")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torchsparse.backends.check_errors()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_warmup_for_training(enabled: bool, graph: bool, device: torch.device) -> None:
    """Forward and backward run, and leave statistics, gradients and random numbers as they are."""
    model = network(SparseResNet21D, device).train()
    x = scan(100, 1, device)
    x.feats.requires_grad_()
    first, *others = model.parameters()
    kept = first.grad = torch.ones_like(first)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps: list[Any] = []
    first.register_hook(lambda grad: steps.append(grad.shape))
    random = torch.get_rng_state()
    with torch.set_grad_enabled(enabled):
        net = training.graphed(model)
        compiled = warmup(model, x, graph=net if graph else None)
    assert net.captures == (graph and device.type == "cuda")
    assert (compiled > 0) == (device.type == "cuda") and len(steps) >= 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert first.grad is kept and bool((kept == 1).all())
    assert [p.grad for p in others] == [None] * len(others) and x.feats.grad is None
    assert torch.equal(torch.get_rng_state(), random) and not x._caches.kmaps
    torchsparse.backends.check_errors()


def test_what_a_graph_holds_is_noticed_when_it_goes() -> None:
    """Values may be written; a layer more, less or other, a new or moved parameter may not."""

    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())

    def write(net: Any) -> None:
        net[0].weight.data.mul_(2)
        net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})

    def new_bias(net: Any) -> None:
        net[0].bias = nn.Parameter(torch.zeros(4))

    def move(net: Any) -> None:
        net[0].weight.data = net[0].weight.data.clone()

    changes: list[tuple[Any, bool]] = [
        (write, True), (new_bias, False), (move, False),
        (lambda net: net.append(nn.ReLU()), False),
        (lambda net: net.pop(2), False),
        (lambda net: net.__setitem__(2, nn.Sigmoid()), False),
        (lambda net: net.double(), False),
    ]  # fmt: skip
    for change, holds in changes:
        net = fresh()
        parts = _graphs.Parts.of(net)
        assert parts.hold()
        change(net)
        assert parts.hold() is holds, change


class Named(dict[str, Any]):
    """A dictionary with more to it."""


@dataclass(frozen=True)
class Heads:
    logits: Any
    number: int = field(default=3, init=False)


def test_results_of_every_form(device: torch.device) -> None:
    """Each form is found again around other tensors; what has no form is refused."""
    x = scan(20, 1, device)
    t = torch.ones(2, device=device)
    value = [defaultdict(list, a=t), Named(b=(t, None)), Heads({"c": x}), "text", 5]
    assert [leaf.shape for leaf in _graphs.leaves(value)] == [t.shape, t.shape, x.feats.shape]
    found = _graphs.mapped(value, lambda t: t + 1, lambda y: y.feats * 2)
    assert isinstance(found[0], defaultdict) and found[0].default_factory is list
    assert found[0]["a"].tolist() == [2, 2] and value[0]["a"].tolist() == [1, 1]
    assert type(found[1]) is Named and found[1]["b"][1] is None
    assert torch.equal(found[2].logits["c"], x.feats * 2) and found[2].number == 3
    assert value[2].logits["c"] is x and found[3:] == ["text", 5]
    with pytest.raises(RuntimeError, match=r"dataclasses of these, got PointTensor"):
        _graphs.check_form([PointTensor(x.feats, x.coords.float())])
    _graphs.check_form(value)


def test_a_graph_is_of_one_kind_while_nothing_decisive_changes(device: torch.device) -> None:
    """Neither caches that come and go nor functions that set modes for their own length count."""
    net = graphed(network(SparseResUNet42, device))
    x = scan(50, 0, device)
    kind = net._kind(x)
    F.spdownsample(x.coords, 2, 2)
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    try:
        clear_global_tensor_cache()
        assert net._kind(x) == kind
    finally:
        set_tensor_cache_mode(TensorCacheMode.SEPARATE_TENSOR_CACHE)
    torchsparse.backends.fuse = False
    try:
        assert net._kind(x) != kind
    finally:
        torchsparse.backends.fuse = True
    torch.use_deterministic_algorithms(True)
    try:
        assert net._kind(x) != kind
    finally:
        torch.use_deterministic_algorithms(False)
    assert net._kind(x) == kind


def test_a_part_in_training_mode_is_refused_before_it_runs(gpu: torch.device) -> None:
    model = network(SparseResUNet42, gpu)
    part: Any = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)).train()
    before = part.running_mean.clone()
    with pytest.raises(RuntimeError, match="for evaluation"):
        graphed(model)(scan(300, 0, gpu))
    assert torch.equal(part.running_mean, before)
