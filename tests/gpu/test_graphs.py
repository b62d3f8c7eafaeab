"""Networks as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import timing
from tests.scans import Dense, Several, again, assert_agree, flat, network, scan
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResUNet42
from torchsparse.inference import Graphed, graphed


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


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("kind", [SparseResUNet42, Several])
def test_frozen_weights_give_the_same_bits(
    kind: type[nn.Module], tf32: bool, fp16: bool, gpu: torch.device
) -> None:
    """Two buckets, which share what was made from the weights."""
    torchsparse.backends.allow_tf32 = tf32
    model = network(kind, gpu)
    usual, frozen = graphed(model), graphed(model, frozen=True)
    kept: list[int] = []
    for seed, rows in enumerate((300, 1500, 310, 1480, 300, 1500)):
        x = scan(rows, seed, gpu)
        with torch.autocast("cuda", torch.float16, enabled=fp16):
            got, want = (list(flat(net(again(x)))) for net in (frozen, usual))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert frozen._store is not None
        kept.append(len(frozen._store))
    # The second bucket finds what the first made; its larger maps may here and there want more.
    assert kept[0] > 0 and kept == sorted(kept) and kept[-1] < 2 * kept[0]
    assert (frozen.captures, frozen.replays) == (usual.captures, usual.replays)
    assert frozen.replays > 0


def launched(net: Graphed) -> Counter[str]:
    """The kernels, copies and fills of a replay, by name."""
    (bucket,) = net._buckets.values()
    return Counter({span.name: round(span.calls) for span in timing.spans(bucket.graph.replay)})


@pytest.mark.parametrize("fp16", [False, True])
def test_replays_of_frozen_weights_do_less(
    fp16: bool, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight is turned or cast, and all else is done."""
    from torchsparse._triton.conv import product

    turns: list[bool] = []  # of all: whether they became part of a graph
    turn = product._Turn.of

    def of(self: Any, weight: Tensor) -> Tensor:
        turns.append(torch.cuda.is_current_stream_capturing())
        return turn(self, weight)

    monkeypatch.setattr(product._Turn, "of", of)
    model = network(SparseResUNet42, gpu)
    convolutions = [m for m in model.modules() if isinstance(m, spnn.Conv3d)]
    x = scan(300, 1, gpu)
    captured: list[int] = []
    found: list[Counter[str]] = []
    for frozen in (False, True):
        turns.clear()
        net = graphed(model, frozen=frozen)
        with torch.autocast("cuda", torch.float16, enabled=fp16):
            net(again(x))
            net(again(x))
        assert net.captures == net.replays == 1
        captured.append(sum(turns))
        found.append(launched(net))
    usual, less = found
    assert usual.total() > len(convolutions)
    assert not less - usual, "nothing else, and nothing more often"
    spared = usual - less
    if fp16:
        assert captured == [0, 0]
        assert spared.total() >= len(convolutions)  # some weights are padded, too
    else:
        assert captured[0] > 0 and captured[1] == 0
        assert spared == Counter({"turn_kernel": captured[0]})


def test_frozen_graphs_notice_what_pytorch_counts(gpu: torch.device) -> None:
    """Written, loaded or moved weights: captured anew, from what they are."""
    torchsparse.backends.allow_tf32 = True
    model = network(SparseResUNet42, gpu)
    net = graphed(model, frozen=True)
    x = scan(300, 1, gpu)

    def write() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)

    def load() -> None:
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})

    def move() -> None:
        for p in model.parameters():
            p.data = p.data * 2

    for captures, change in enumerate((None, write, load, move), 1):
        if change is not None:
            change()
        usual = graphed(model)
        assert_agree(net(again(x)), usual(again(x)))  # as usual, then captured
        for _ in range(2):
            got, want = (list(flat(each(again(x)))) for each in (net, usual))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert net._store is not None and len(net._store) > 0
        assert net.captures == captures
        assert net.replays == 2 * captures


def test_weights_that_a_frozen_layer_computes(gpu: torch.device) -> None:
    """They are part of the graph, and made in every replay."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = spnn.Conv3d(4, 64, 3)
            self.kernel = nn.Parameter(torch.randn(27, 64, 64) / 40)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: SparseTensor) -> SparseTensor:
            return spnn.functional.conv3d(self.stem(x), self.kernel * self.scale, 3)

    torchsparse.backends.allow_tf32 = True
    model = network(Scaled, gpu)
    net = graphed(model, frozen=True)
    x = scan(300, 1, gpu)
    for factor in (1.0, 2.0, -1.0):
        with torch.no_grad():
            model.scale.fill_(factor)  # pyright: ignore[reportCallIssue, reportArgumentType]
        usual = graphed(model)
        usual(again(x))
        net(again(x))
        assert torch.equal(net(again(x)).feats, usual(again(x)).feats)
    assert net.captures == 1
    assert net._store is not None and len(net._store) <= 1, "of the stem at most"


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
