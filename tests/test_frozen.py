"""What is made from weights alone: once, from what they are, and from nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.scans import Several, assert_agree, flat, network, scan
from torchsparse import SparseTensor, _frozen
from torchsparse import nn as spnn
from torchsparse._frozen import Store, cast, keeping, made
from torchsparse.nn import functional as F

HALF = torch.bfloat16


class Counted:
    """Doubles weights, and counts how often."""

    calls = 0

    def __call__(self, weight: Tensor, kind: Any) -> Tensor:
        self.calls += 1
        return weight.detach() * 2


def a_weight(*shape: int) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape or (3, 4, 6)))


def test_once_for_each_kind() -> None:
    weight, make = a_weight(), Counted()
    store = Store([weight])
    with keeping(store):
        first = made(weight, "a", make)
        assert made(weight, "a", make) is first and make.calls == 1
        assert made(weight, "b", make) is not first and make.calls == 2
        assert made(weight.detach(), "a", make) is first, "another object, the same memory"
    assert torch.equal(first, weight * 2) and len(store) == 2


def test_nothing_is_kept_without_a_store() -> None:
    weight, make = a_weight(), Counted()
    for calls in (1, 2):
        assert torch.equal(made(weight, "a", make), weight * 2)
        assert make.calls == calls
    assert cast(weight, HALF) is not cast(weight, HALF)
    assert cast(weight, weight.dtype) is weight


def test_views_are_told_by_where_they_lie() -> None:
    """Each call of a layer makes new ones."""
    weight, make = a_weight(4, 4, 4), Counted()
    store = Store([weight])
    views: list[Callable[[], Tensor]] = [
        lambda: weight[0], lambda: weight[1], lambda: weight[:, 0], lambda: weight[:, :, 0],
        lambda: weight[0].t(), lambda: weight[:2], lambda: weight[0][None],
    ]  # fmt: skip
    with keeping(store):
        kept = [made(view(), "a", make) for view in views]
        assert make.calls == len(views) == len({id(value) for value in kept})
        for view, value in zip(views, kept):
            assert made(view(), "a", make) is value
            assert torch.equal(value, view() * 2)
    assert make.calls == len(views)


def test_another_dtype() -> None:
    weight = a_weight()
    with keeping(Store([weight])):
        for dtype in (torch.float16, HALF, torch.float64):
            value = cast(weight, dtype)
            assert value.dtype == dtype and cast(weight, dtype) is value
            assert torch.equal(value, weight.to(dtype))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_a_weight_that_was_written_to(view: bool, inference: bool) -> None:
    """What it makes is made anew, and the store says that it changed."""
    weight = a_weight()
    store = Store([weight])
    with torch.inference_mode(inference), torch.no_grad(), keeping(store):
        first = cast(weight[0] if view else weight, HALF)
        before = first.clone()
        assert store.unchanged()
        weight.add_(1)
        assert not store.unchanged()
        second = cast(weight[0] if view else weight, HALF)
        assert torch.equal(second, (weight[0] if view else weight).to(HALF))
        assert torch.equal(first, before), "graphs may read it"
        assert cast(weight[0] if view else weight, HALF) is second
        assert not store.unchanged(), "also after that"


def test_weights_that_are_loaded_or_trained_are_noticed() -> None:
    def load(layer: nn.Module) -> None:
        layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})

    def train(layer: nn.Module, **options: Any) -> None:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(layer.parameters(), 0.1, **options).step()

    def write_unseen(layer: Any) -> None:
        layer.weight.data.add_(1)

    changes: list[tuple[Callable[[nn.Module], None], bool]] = [
        (load, True),
        (train, True),
        (lambda layer: train(layer, foreach=True), True),
        (write_unseen, False),  # PyTorch counts no such writes, nor those of fused optimisers
    ]
    for change, seen in changes:
        layer = nn.Linear(3, 4)
        store = Store(layer.parameters())
        with keeping(store):
            cast(layer.weight, HALF)
        change(layer)
        assert store.unchanged() is not seen


def test_a_weight_that_was_not_used_may_change() -> None:
    used, other = a_weight(), a_weight()
    store = Store([used, other])
    with keeping(store), torch.no_grad():
        cast(used, HALF)
        other.add_(1)
    assert store.unchanged()


def test_weights_of_inference_mode_are_constant() -> None:
    with torch.inference_mode():
        weight = torch.randn(3, 4)
        store = Store([weight])
        with keeping(store):
            first = cast(weight, HALF)
            weight.add_(1)
            assert cast(weight, HALF) is first and store.unchanged()


def test_only_what_comes_from_weights_is_kept() -> None:
    """A cast of what was kept is; what a layer computes, features among it, is not."""
    weight = a_weight()
    store = Store([weight, torch.empty(0)])
    with keeping(store):
        half = cast(weight, HALF)
        assert cast(half, torch.float32) is cast(half, torch.float32)
        assert cast(half[0], torch.float32) is cast(half[0], torch.float32)
        kept = len(store)
        for other in (weight * 2, a_weight(), half.float(), torch.empty(0)):
            assert cast(other, torch.float64) is not cast(other, torch.float64)
    assert len(store) == kept == 3


def test_the_address_of_a_weight_stays_its_own() -> None:
    """A weight that is gone leaves its memory to nobody while a store goes by addresses."""
    weight = torch.randn(1000, 1000)
    store, address = Store([weight]), weight.data_ptr()
    with keeping(store):
        cast(weight, HALF)
        del weight
        for _ in range(20):
            assert torch.randn(1000, 1000).data_ptr() != address


def test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is found; what is not is part of that graph."""
    weight = a_weight()
    store = Store([weight])
    with keeping(store):
        there = cast(weight, HALF)
        monkeypatch.setattr(_frozen, "_captured", lambda tensor: True)
        assert cast(weight, HALF) is there
        assert cast(weight[0], HALF) is not cast(weight[0], HALF) and len(store) == 1
        with torch.no_grad():
            weight.add_(1)
        assert cast(weight, HALF) is not cast(weight, HALF)
        assert torch.equal(cast(weight, HALF), weight.to(HALF))


def test_blocks_within_blocks_and_what_raises() -> None:
    weight = a_weight()
    outer, inner = Store([weight]), Store([weight])

    def fail(weight: Tensor, kind: Any) -> Tensor:
        raise ZeroDivisionError

    with keeping(outer):
        with pytest.raises(ZeroDivisionError), keeping(inner):
            assert _frozen.current.store is inner
            made(weight, "a", fail)
        assert _frozen.current.store is outer and len(inner) == 0
        with keeping(None):
            assert cast(weight, HALF) is not cast(weight, HALF)
        assert made(weight, "a", Counted()).shape == weight.shape, "made after all"
    assert _frozen.current.store is None and len(outer) == 1


def test_a_store_is_of_one_thread() -> None:
    weight, seen = a_weight(), []
    store = Store([weight])
    with keeping(store):
        thread = threading.Thread(
            target=lambda: seen.append((_frozen.current.store, cast(weight, HALF)))
        )
        thread.start()
        thread.join()
        assert seen[0][0] is None and cast(weight, HALF) is not seen[0][1]


# ------------------------------------------------------------------ layers
@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_layers_cast_each_weight_once(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary, depthwise, grouped and pointwise ones; features leave nothing behind."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("torchsparse.backends.fuse", fuse)
    model = nn.ModuleList(
        [network(Several, cpu), nn.Sequential(spnn.Conv3d(4, 8, 3, groups=2, bias=True),
        spnn.Conv3d(8, 8, 1, groups=4, bias=True), spnn.Conv3d(8, 8, 1), spnn.ReLU())]
    ).eval()  # fmt: skip
    store = Store(model.parameters())

    def run(seed: int) -> list[Tensor]:
        with torch.autocast("cpu", HALF):
            return [t for part in model for t in flat(part(scan(60, seed, cpu)))]

    want = [run(1), run(2)]
    with keeping(store):
        got = [run(1)]
        kept = len(store)
        monkeypatch.setattr(store, "_hold", pytest.fail)
        got.append(run(2))
    # Of eight convolutions, grouped ones per group, and of four biases; where a product on a CPU
    # is not fused, it takes them from there to float32.
    assert len(store) == kept == (19 if fuse else 20)
    for pair in zip(got, want):
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@torch.no_grad()
def test_weights_that_a_layer_computes_are_not_kept() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = a_weight(27, 4, 6)

        def forward(self, x: SparseTensor) -> SparseTensor:
            return F.conv3d(x, self.kernel / self.kernel.std(), 3)

    model, cpu = Standardised(), torch.device("cpu")
    store = Store(model.parameters())
    with torch.autocast("cpu", HALF):
        want = model(scan(60, 1, cpu)).feats
        with keeping(store):
            assert_agree(model(scan(60, 1, cpu)).feats, want)
    assert len(store) == 0


def test_compiled_layers_make_what_they_need() -> None:
    """A program is traced as if there were no store, and is right with and without one."""
    layer = spnn.Conv3d(4, 6, 1, bias=True)
    x = scan(20, 1, torch.device("cpu")).feats
    store = Store(layer.parameters())

    def product(feats: Tensor) -> Tensor:
        coords = torch.zeros(len(feats), 4, dtype=torch.int32)
        return layer(SparseTensor(feats, coords)).feats

    with torch.no_grad(), torch.autocast("cpu", HALF):
        want = product(x)
        compiled = torch.compile(product, backend="eager", fullgraph=True)
        with keeping(store):
            assert torch.equal(compiled(x), want)
        assert torch.equal(compiled(x), want) and len(store) == 0
