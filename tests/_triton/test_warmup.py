"""What is compiled ahead is what a network then launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import nn

import torchsparse
from tests.scans import again, scan
from torchsparse import SparseTensor, _capacity, _graphs, _warmup
from torchsparse import nn as spnn
from torchsparse._triton import launch
from torchsparse._triton.conv import plan as conv_plan
from torchsparse.inference import graphed

CUDA = torch.cuda.is_available()
FLOATING = torch.float16 if CUDA else torch.bfloat16


class Net(nn.Module):
    """Down and up again, with sums, dropout and a module that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Sequential(spnn.Conv3d(4, 8, 3), spnn.BatchNorm(8), spnn.ReLU())
        self.down = nn.Sequential(spnn.Conv3d(8, 16, 3, 2, 1), spnn.BatchNorm(16), spnn.ReLU())
        self.up = nn.Sequential(
            spnn.Conv3d(16, 8, 3, 2, 1, transposed=True), spnn.BatchNorm(8), spnn.ReLU()
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, x: SparseTensor) -> dict[str, Any]:
        x = self.start(x)
        y = self.up(self.down(x)) + x
        return {"y": y, "logits": self.drop(y.feats)}


def launched(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> set[Hashable]:
    """The kernels that some work asks for; those of maps run."""
    jobs: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_noted", jobs)
        patch.setattr(launch, "_makes_maps", True)
        work()
    return set(launch.different(jobs))


def compiled(work: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> set[Hashable]:
    """Those that some work compiles ahead."""
    found: set[Hashable] = set()
    right = launch.different

    def note(jobs: Any) -> Any:
        kernels = right(jobs)
        found.update(kernels)
        return kernels

    with monkeypatch.context() as patch:
        patch.setattr(launch, "different", note)
        work()
    return found


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_all_kernels_of_a_step_are_compiled(
    training: bool, mixed: bool, device: torch.device, kernels: None, monkeypatch
) -> None:
    model = Net().to(device).train(training)
    x = scan(40, 1, device)
    x.feats.requires_grad_(training)
    cast = torch.autocast(device.type, FLOATING, enabled=mixed)

    def step() -> None:
        with torch.set_grad_enabled(training):
            with cast:
                out = model(again(x))
            loss = out["y"].feats.float().square().mean() + out["logits"].float().mean()
        if training:
            loss.backward()

    with cast:
        ahead = compiled(lambda: _warmup.compile_passes(model, [x], None), monkeypatch)
    needed = launched(step, monkeypatch)
    assert len(needed) > 10
    assert {key[0].fn.__name__ for key in needed - ahead} == set()  # pyright: ignore


@pytest.mark.parametrize("training", [False, True])
def test_what_makes_tables_again_is_compiled_where_pairs_are_listed(
    training: bool, device: torch.device, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_plan, "FEW_ROWS", 8)  # what is not sorted is its own table
    model = Net().to(device).train(training)
    x = scan(40, 1, device)
    ahead = compiled(lambda: _warmup.compile_passes(model, [x], None), monkeypatch)
    names = {key[0].fn.__name__ for key in ahead}  # pyright: ignore
    assert ("untile_kernel" in names) is training


@pytest.mark.parametrize("wait", [True, False])
def test_all_kernels_of_a_graph_are_compiled(
    wait: bool, device: torch.device, kernels: None, monkeypatch
) -> None:
    monkeypatch.setattr(_graphs, "SMALLEST", 128)
    _graphs.room_for.cache_clear()
    model = Net().to(device).eval()
    x = scan(40, 1, device)
    graph = graphed(model, wait=wait)
    ahead = compiled(lambda: _warmup.compile_passes(model, [x], graph), monkeypatch)
    rows = _graphs.room_for(len(x.coords), None)
    coords = x.coords.new_full((rows, 4), _capacity.PAD)
    coords[: len(x.coords)] = x.coords
    feats = x.feats.new_zeros(rows, 4)
    count = torch.tensor([len(x.coords)], device=device)

    def capture() -> None:
        kind = graph._kind(x)
        graph._eager(x, kind)
        rooms, wishes = graph._rooms(kind, rows), graph._wishes[kind]
        _graphs.padded(model, x, coords, feats, count, rooms, wishes)

    with torch.no_grad():
        needed = launched(capture, monkeypatch)
    _graphs.room_for.cache_clear()
    assert len(needed) > 10
    assert {key[0].fn.__name__ for key in needed - ahead} == set()  # pyright: ignore


def test_a_rehearsal_leaves_no_trace(device: torch.device, kernels: None) -> None:
    model = Net().to(device).train()
    x = scan(40, 1, device)
    x.feats.requires_grad_()
    kernel, *rest = model.parameters()
    kept = kernel.grad = torch.ones_like(kernel)
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with _warmup._left_alone(model, [x]):
        assert _warmup.compile_passes(model, [x], None) > 10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert bool((kept == 1).all()) and kernel.grad is kept
    assert [p.grad for p in rest] == [None] * len(rest) and x.feats.grad is None
    torchsparse.backends.check_errors()
