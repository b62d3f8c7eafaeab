"""Training passes as CUDA graphs against the usual ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.scans import Dense, Several, Shared, again, flat, network, scan
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResUNet42
from torchsparse.inference import warmup
from torchsparse.training import graphed

# The number of rows decides about tiles, and these about the order of float32 sums.
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def pair(kind: type[nn.Module], gpu: torch.device) -> tuple[nn.Module, nn.Module]:
    """Two equal networks in training mode."""
    model = network(kind, gpu).train()
    return model, copy.deepcopy(model)


def learned(value: Any) -> list[Tensor]:
    return [t for t in flat(value) if t.requires_grad]


def step(
    call: Callable[[SparseTensor], Any], x: SparseTensor, dtype: torch.dtype | None, seed: int
) -> tuple[list[Tensor], Tensor | None]:
    """One forward and backward pass: the outputs, and the gradient of the input."""
    x = again(x)
    x.feats = x.feats.detach().clone().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        outputs = learned(call(x))
    draw = torch.Generator(x.feats.device).manual_seed(seed)
    loss = sum(
        (t.float() * torch.randn(t.shape, generator=draw, device=t.device)).sum() for t in outputs
    )
    loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
    return outputs, x.feats.grad


def assert_same_state(model: nn.Module, other: nn.Module, **close: Any) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters()):
        # A level without rows has no gradients in the usual pass, and zeros in a graph.
        of_a, of_b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b))
        atol = close["atol"] * max(of_b.abs().max().item(), 1.0) * 10
        torch.testing.assert_close(
            of_a, of_b, rtol=close["rtol"], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers()):
        torch.testing.assert_close(a, b, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [SparseResUNet42, Dense, Several, Shared])
def test_steps_are_those_of_the_usual_passes(kind: type[nn.Module], gpu: torch.device) -> None:
    """Outputs, gradients and running statistics, for scans of changing sizes."""
    model, other = pair(kind, gpu)
    net = graphed(model)
    ranged = kind is Dense
    scans = [scan(rows, seed, gpu, ranged=ranged) for seed, rows in enumerate((900, 1000, 850))]
    for seed, x in enumerate([*scans, *scans, scan(3000, 9, gpu, ranged=ranged), *scans]):
        got, of_input = step(net, x, None, seed)
        want, of_usual = step(other, x, None, seed)
        assert len(got) == len(want)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, **CLOSE)
        # A rounding that turns a ReLU moves the gradient of its row.
        torch.testing.assert_close(of_input, of_usual, rtol=1e-2, atol=1e-2)
        assert_same_state(model, other, **CLOSE)
        # Gradients add up where nobody clears them.
        if seed % 2:
            for p in (*model.parameters(), *other.parameters()):
                p.grad = None
    assert net.replays >= 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype: torch.dtype, gpu: torch.device) -> None:
    model, other = pair(Several, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu)
    for seed in range(3):
        got, _ = step(net, x, dtype, seed)
        want, _ = step(other, x, dtype, seed)
        for a, b in zip(got, want):
            assert a.dtype == b.dtype
            # Roundings of bfloat16 (2^-8) through eight layers, in another order of sums.
            torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)
    assert_same_state(model, other, rtol=0.1, atol=0.1)
    assert net.replays == 2


def test_the_same_bits_every_time(gpu: torch.device) -> None:
    model, _ = pair(SparseResUNet42, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu)
    found = []
    state = copy.deepcopy(model.state_dict())
    for _ in range(6):
        model.load_state_dict(state)
        for p in model.parameters():
            p.grad = None
        outputs, of_input = step(net, x, torch.float16, 0)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*outputs, of_input, *grads, *(b.clone() for b in model.buffers())])
    for again_ in found[2:]:
        assert all(torch.equal(a, b) for a, b in zip(found[1], again_))  # pyright: ignore[reportArgumentType]


def test_training_goes_on(gpu: torch.device) -> None:
    """An optimiser's steps reach the graph."""
    model, other = pair(Several, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (model, other)]
    for seed in range(5):
        for call, optimizer in zip((net, other), optimizers):
            optimizer.zero_grad()
            step(call, x, None, seed)
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert (net.captures, net.replays) == (1, 4)


def test_overflow_leaves_no_trace(gpu: torch.device) -> None:
    """A scan without room runs as usual, and running statistics see it once."""
    model, other = pair(SparseResUNet42, gpu)
    net = graphed(model)
    for seed, spread in enumerate((8, 8, 200, 200, 8)):
        x = scan(800, 1 + (spread > 8), gpu, spread)
        step(net, x, None, seed)
        step(other, x, None, seed)
    assert net.overflows == 1
    assert_same_state(model, other, **CLOSE)


def test_frozen_parts_and_modes(gpu: torch.device) -> None:
    """What trains and learns may change; the graphs follow."""
    model, other = pair(Several, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu)

    def check(seed: int) -> None:
        for p in (*model.parameters(), *other.parameters()):
            p.grad = None
        step(net, x, None, seed)
        step(other, x, None, seed)
        assert_same_state(model, other, **CLOSE)

    check(0)
    check(1)
    for m in (model, other):
        m.get_submodule("stem").requires_grad_(False)
    check(2)
    check(3)
    for m in (model, other):
        m.get_submodule("mid").eval()
    check(4)
    check(5)
    assert net.captures == 3
    model.eval()
    other.eval()
    with torch.no_grad():
        for a, b in zip(flat(net(again(x))), flat(other(again(x)))):
            torch.testing.assert_close(a, b, **CLOSE)
    assert net.captures == 3


def test_an_input_without_gradient_and_dropout(gpu: torch.device) -> None:
    model = nn.Sequential(spnn.Conv3d(4, 8, 3), spnn.Dropout(0.5), spnn.Conv3d(8, 4, 3)).to(gpu)
    net = graphed(model)
    x = scan(900, 1, gpu)
    seen = []
    for _ in range(4):
        model.zero_grad()
        y = net(again(x)).feats
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        seen.append(y.detach())
    assert not torch.equal(seen[2], seen[3])  # another mask each time


def test_a_backward_pass_that_comes_too_late(gpu: torch.device) -> None:
    model, _ = pair(Dense, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu, ranged=True)
    net(again(x))
    first = net(again(x))["grid"].sum()
    second = net(again(x))["grid"].sum()
    with pytest.raises(RuntimeError, match="before its next call"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        second.backward()


def test_what_cannot_be_captured(gpu: torch.device) -> None:
    with pytest.raises(ValueError, match="rows of padding"):
        graphed(nn.Sequential(spnn.Conv3d(4, 8, 3), nn.BatchNorm1d(8)).to(gpu))

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = spnn.Conv3d(4, 4, 3)

        def forward(self, x: SparseTensor) -> SparseTensor:
            y = self.conv(x)
            return y * float(y.feats.detach().sum())

    net = graphed(Waits().to(gpu))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        net(scan(300, 1, gpu))


class Grid(nn.Module):
    """Ends in a norm of a dense map, in a scalar, and in the same tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(spnn.Conv3d(4, 8, 3), spnn.BatchNorm(8), spnn.ReLU())
        self.head = nn.BatchNorm3d(8)

    def forward(self, x: SparseTensor) -> list[Any]:
        y = self.body(x)
        grid = self.head(y.dense().movedim(-1, 1))
        pooled = spnn.functional.global_avg_pool(y, batch_size=2)
        return [grid, grid.square().mean(), pooled, pooled, x.feats, y]


@pytest.mark.parametrize("copied", [True, False])
def test_outputs_of_a_fixed_size(copied: bool, gpu: torch.device) -> None:
    model, other = pair(Grid, gpu)
    net = graphed(model, copy=copied)
    for seed, rows in enumerate((900, 900, 800, 900)):
        x = scan(rows, seed, gpu, ranged=True)
        got, of_input = step(net, x, None, seed)
        want, of_usual = step(other, x, None, seed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(of_input, of_usual, rtol=1e-2, atol=1e-2)
        assert_same_state(model, other, **CLOSE)
    assert net.replays == 3
    for bucket in net._buckets.values():
        assert not any(t.requires_grad for t in bucket.more.outputs)


def test_momentum_may_follow_a_schedule(gpu: torch.device) -> None:
    model, other = pair(Dense, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu, ranged=True)
    for seed, momentum in enumerate((0.1, 0.1, 0.5, 0.5)):
        for m in (*model.modules(), *other.modules()):
            if isinstance(m, spnn.BatchNorm):
                m.momentum = momentum
        step(net, x, None, seed)
        step(other, x, None, seed)
        assert_same_state(model, other, **CLOSE)
    assert (net.captures, net.replays) == (2, 2)


def test_data_of_buffers_and_parameters_may_move(gpu: torch.device) -> None:
    """What takes their place gets what a step writes, and what lay there is left alone."""
    model, other = pair(Dense, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu, ranged=True)
    for seed in range(2):
        step(net, x, None, seed)
        step(other, x, None, seed)
    old = [b.data for b in model.buffers()]
    values = [b.clone() for b in old]
    for m in (model, other):
        for b in m.buffers():
            b.data = torch.full_like(b, 3)
    step(net, x, None, 2)
    step(other, x, None, 2)
    assert_same_state(model, other, **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(old, values))
    for m in (model, other):
        m.cpu().to(gpu)
    torch.cuda.empty_cache()
    step(net, x, None, 3)
    step(other, x, None, 3)
    torch.cuda.synchronize(gpu)
    assert_same_state(model, other, **CLOSE)
    assert net.captures == 3


def test_a_buffer_that_is_replaced(gpu: torch.device) -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv = spnn.Conv3d(4, 4, 3)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: SparseTensor) -> SparseTensor:
            self.seen = self.seen + 1
            return self.conv(x)

    model = Counts().to(gpu)
    with pytest.raises(RuntimeError, match="`seen` must be changed in place"):
        graphed(model)(scan(300, 1, gpu))
    assert model.seen.tolist() == [1] * 4  # by the usual pass


def test_warming_up_leaves_no_trace(gpu: torch.device) -> None:
    """Although the graph is captured with the very buffers of the model."""
    model, other = pair(Dense, gpu)
    net = graphed(model)
    x = scan(900, 1, gpu, ranged=True)
    x.feats.requires_grad_()
    before = torch.cuda.get_rng_state(gpu)
    warmup(model, x, graph=net)
    assert torch.equal(torch.cuda.get_rng_state(gpu), before)
    assert_same_state(model, other, rtol=0, atol=0)
    step(net, x, None, 1)
    step(other, x, None, 1)
    assert_same_state(model, other, **CLOSE)
    assert (net.captures, net.replays) == (1, 1)
