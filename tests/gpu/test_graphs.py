"""Networks as CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchsparse
from tests.scans import Dense, again, assert_agree, network, scan
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResUNet42
from torchsparse.inference import graphed


def test_overflow_is_served(gpu: torch.device) -> None:
    """A scan whose levels are larger than those seen runs as usual, and is remembered."""
    model = network(SparseResUNet42, gpu)
    net = graphed(model)
    flat_scan, sparse_scan = scan(800, 1, gpu, 8), scan(800, 2, gpu, 200)
    for x in (flat_scan, flat_scan, sparse_scan, sparse_scan, flat_scan):
        with torch.no_grad():
            want = model(again(x))
        assert_agree(net(again(x)), want)
    assert net.overflows == 1
    assert net.captures == 2


def test_graphs_follow_the_weights(gpu: torch.device) -> None:
    """Values written in place are read by the graph; moved parameters are noticed."""
    model = network(Dense, gpu)
    net = graphed(model)
    x = scan(300, 1, gpu, ranged=True)

    def check() -> None:
        with torch.no_grad():
            want = model(again(x))
        assert_agree(net(again(x)), want)

    check()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    check()
    assert net.captures == 1
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    check()
    assert net.captures == 1
    for p in model.parameters():
        p.data = p.data.clone()
    check()
    assert net.captures == 2
    torchsparse.backends.allow_tf32 = True
    check()
    assert net.captures == 3


class Headed(nn.Module):
    """A convolution and a plain layer, whose weights autocast casts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = spnn.Conv3d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, x: SparseTensor) -> Tensor:
        return self.head(self.conv(x).feats)


def test_autocast(gpu: torch.device) -> None:
    """A graph reads the weights that there are, not casts that autocast kept for a while."""
    model = network(Headed, gpu)
    net = graphed(model)
    x = scan(300, 1, gpu, ranged=True)
    for factor in (1.0, 2.0, -1.0):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        for _ in range(3):
            with torch.autocast("cuda", torch.float16), torch.no_grad():
                want = model(again(x))
            with torch.autocast("cuda", torch.float16):
                got = net(again(x))
            assert got.dtype == torch.float16
            assert_agree(got, want)
            garbage = [torch.full_like(p, torch.nan) for p in model.parameters() for _ in range(9)]
            del garbage
    assert net.captures == 1


def test_a_replaced_layer_is_noticed(gpu: torch.device) -> None:
    model = nn.Sequential(spnn.Conv3d(4, 8, 3), nn.Identity()).to(gpu).eval()
    net = graphed(model)
    x = scan(300, 1, gpu, ranged=True)
    net(again(x))
    net(again(x))
    model[1] = spnn.ReLU().eval()
    with torch.no_grad():
        want = model(again(x))
    assert_agree(net(again(x)), want)
    assert net.captures == 2


@pytest.mark.parametrize("wait", [True, False])
def test_results_where_they_lie(wait: bool, gpu: torch.device) -> None:
    """Without copies the next call overwrites them; with copies it does not."""
    model = network(SparseResUNet42, gpu)
    first, second = scan(800, 1, gpu, 8), scan(800, 2, gpu, 8)
    with torch.no_grad():
        want = [model(again(first)), model(again(second))]
    lying, copied = graphed(model, wait=wait, copy=False), graphed(model, wait=wait)
    for net in (lying, copied):
        net(again(first))
        net(again(second))
        early = net(again(first))
        assert_agree(early, want[0])
        kept = [y.feats.clone() for y in early]
        assert_agree(net(again(second)), want[1])
        same = all(torch.equal(a, b.feats) for a, b in zip(kept, early))
        assert same is (net is copied)


def test_another_stream_waits_for_the_last_call(gpu: torch.device) -> None:
    model = network(SparseResUNet42, gpu)
    net = graphed(model)
    x = scan(800, 1, gpu, 8)
    with torch.no_grad():
        want = model(again(x))
    net(again(x))
    for _ in range(4):
        here = net(again(x))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there = net(again(x))
        torch.cuda.current_stream().wait_stream(side)
        assert_agree(here, want)
        assert_agree(there, want)


def test_complaints_of_a_graph(gpu: torch.device) -> None:
    model = network(Dense, gpu)
    net = graphed(model)
    x = scan(300, 1, gpu, ranged=True)
    net(again(x))
    net(again(x))
    bad = again(x)
    bad.coords = x.coords.clone()
    bad.coords[1] = bad.coords[0]
    with pytest.raises(ValueError, match="unique rows"):
        net(bad)
    assert_agree(net(again(x)), model(again(x)))


def test_what_cannot_be_captured(gpu: torch.device) -> None:
    class Waits(nn.Module):
        def forward(self, x: SparseTensor) -> Tensor:
            return x.feats * float(x.feats.sum())

    with pytest.raises(RuntimeError, match="captured"):
        graphed(Waits().eval())(scan(100, 1, gpu))


def test_limits(gpu: torch.device) -> None:
    model = network(Dense, gpu)
    net = graphed(model, max_points=100, keep=1)
    large = scan(400, 1, gpu, ranged=True)
    with torch.no_grad():
        assert_agree(net(again(large)), model(again(large)))
    assert net.captures == 0
    net(scan(60, 2, gpu, ranged=True))
    assert net.captures == 1
    assert len(net._buckets) == 1


def test_graphs_on_another_stream(gpu: torch.device) -> None:
    model = network(SparseResUNet42, gpu)
    net = graphed(model)
    x = scan(300, 1, gpu)
    with torch.no_grad():
        want = model(again(x))
    net(again(x))
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(6):
        with torch.cuda.stream(streams[turn % 2]):
            got = net(again(x))
        torch.cuda.current_stream().wait_stream(streams[turn % 2])
        assert_agree(got, want)
