"""Whole networks in training, with batch norms that sums and activations join, and without."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import torchsparse
from tests.gpu.layers import surface
from torchsparse import SparseTensor
from torchsparse.backbones import SparseResUNet42

ROWS = 6000
# Of the norm of what is compared, after 42 layers: rounding to 24 and to 11 bits.
SHARE = {torch.float32: 1e-3, torch.float16: 6e-2}


class Step(NamedTuple):
    """What one step of training leaves behind."""

    out: Tensor
    grads: list[Tensor]
    state: dict[str, Tensor]
    peak: int  # bytes


def step(net: nn.Module, device: torch.device, dtype: torch.dtype, fuse: bool) -> Step:
    """On a copy of the network."""
    net = copy.deepcopy(net)
    coords = torch.from_numpy(surface(ROWS)).to(device)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(len(coords), 4, generator=generator).to(device)
    torchsparse.backends.fuse = fuse
    torch.cuda.reset_peak_memory_stats(device)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = net(SparseTensor(feats, coords))[-1].feats
    out.float().square().mean().mul(64).backward()
    torchsparse.backends.fuse = True
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    state = dict(net.state_dict())
    return Step(out.detach(), grads, state, torch.cuda.max_memory_allocated(device))


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return SparseResUNet42(in_channels=4, width_multiplier=0.5).to(device).train()


def off(got: Tensor, want: Tensor) -> float:
    """Distance over size."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("dtype", SHARE, ids=str)
def test_a_network_learns_the_same(dtype: torch.dtype, gpu: torch.device) -> None:
    """Output, gradients, running statistics; no more memory."""
    net = network(gpu)
    got, want = (step(net, gpu, dtype, fuse) for fuse in (True, False))
    assert got.out.dtype == want.out.dtype
    assert off(got.out, want.out) < SHARE[dtype]
    flat = [torch.cat([g.flatten() for g in one.grads]) for one in (got, want)]
    assert off(*flat) < 5 * SHARE[dtype]
    for name, value in want.state.items():
        if "running" in name:
            assert off(got.state[name], value) < SHARE[dtype], name
        else:
            assert torch.equal(got.state[name], value), name
    print(f"peak {got.peak >> 20} MiB, without joining {want.peak >> 20} MiB")
    assert got.peak < 1.05 * want.peak


@pytest.mark.parametrize("dtype", SHARE, ids=str)
def test_the_same_bits_every_time(dtype: torch.dtype, gpu: torch.device) -> None:
    net = network(gpu)
    first = step(net, gpu, dtype, True)
    for _ in range(5):
        again = step(net, gpu, dtype, True)
        assert torch.equal(again.out, first.out)
        assert all(torch.equal(a, b) for a, b in zip(again.grads, first.grads))
        assert all(torch.equal(again.state[name], value) for name, value in first.state.items())
