"""Padded passes against ordinary ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.scans import Dense, Several, again, flat, network, scan
from torchsparse import _graphs
from torchsparse import nn as spnn
from torchsparse._capacity import PAD, Growth, Room, growing, rounded
from torchsparse._ops import dispatch


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # inf - inf, in rows of padding
@pytest.mark.parametrize(("kind", "sure"), [(Several, True), (Dense, True), (Dense, False)])
def test_padding_changes_nothing(kind: type[nn.Module], sure: bool, device: torch.device) -> None:
    """Rows behind the real ones, full of NaN, leave no trace: bit for bit if tiles agree."""
    model, x = network(kind, device), scan(70, 1, device, ranged=kind is Dense)
    n = x.coords.shape[0]
    rows = rounded(int(1.5 * n))
    coords = torch.full((rows, 4), PAD, dtype=torch.int32, device=device)
    feats = torch.full((rows, 4), float("nan"), device=device)
    coords[:n], feats[:n] = x.coords, x.feats
    count = torch.tensor([n], device=device)
    with dispatch.forced("_triton"):
        with growing(Growth()) as seen:
            want = model(again(x))
        counts = [level.sites for level in seen.levels]
        rooms = [Room(None if sure else rounded(c), not sure) for c in counts]
        got, growth, report = _graphs.padded(model, x, coords, feats, count, rooms)
    *levels, complaints = report.tolist()
    assert levels[0::4] == counts
    assert not any(levels[1::4])
    assert complaints == 0
    assert len({rows, *growth.given}) == 1 + len(growth.given)
    real = dict(zip(growth.given, counts)) | {rows: n}
    for a, b in zip(flat(got), flat(want), strict=True):
        a_real = a[: real.get(a.shape[0], a.shape[0])]
        if device.type == "cuda":  # the number of rows decides about tiles
            torch.testing.assert_close(a_real, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a_real, b)
        if a.dtype == torch.int32:
            assert (a[b.shape[0] :] == PAD).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("kind", [Dense, Several])
def test_padding_leaves_no_trace_in_gradients(
    kind: type[nn.Module], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch statistics and all gradients count real rows alone, whatever is in the others."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    model, x = network(kind, device).train(), scan(60, 1, device, 6, ranged=True)
    usual = copy.deepcopy(model)
    n = x.coords.shape[0]
    rows = rounded(2 * n)
    coords = torch.full((rows, 4), PAD, dtype=torch.int32, device=device)
    feats = torch.zeros(rows, 4, device=device)
    coords[:n], feats[:n] = x.coords, x.feats
    feats.requires_grad_()
    x.feats.requires_grad_()
    count = torch.tensor([n], device=device)
    torch.use_deterministic_algorithms(True)  # so that unwritten memory is NaN
    try:
        with dispatch.forced("_triton"):
            with growing(Growth()) as seen:
                want = [t for t in flat(usual(x)) if t.requires_grad]
            rooms = [Room(rounded(level.sites), True) for level in seen.levels]
            got, growth, _ = _graphs.padded(model, x, coords, feats, count, rooms)
            got = [t for t in flat(got) if t.requires_grad]
            real = dict(zip(growth.given, [level.sites for level in seen.levels])) | {rows: n}
            grads = [torch.randn(t.shape, device=device) for t in want]
            padded = [torch.zeros_like(t) for t in got]
            for a, b, g, p in zip(got, want, grads, padded, strict=True):
                some = real.get(a.shape[0], a.shape[0])
                torch.testing.assert_close(a[:some], b, rtol=1e-4, atol=1e-5)
                assert a.isfinite().all()
                p[: g.shape[0]] = g
            inputs = ([feats, *model.parameters()], [x.feats, *usual.parameters()])
            found, expected = (
                torch.autograd.grad(outputs, wanted, given, allow_unused=True)
                for outputs, wanted, given in zip((got, want), inputs, (padded, grads))
            )
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found[0][n:].any()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a[: b.shape[0]], b, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.buffers(), usual.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_without_running_statistics(training: bool, device: torch.device) -> None:
    """The batch's are taken in evaluation, too: of real rows alone."""
    norm = spnn.BatchNorm(4, track_running_stats=False).to(device).train(training)
    x = scan(50, 1, device)
    n = x.coords.shape[0]
    coords = torch.full((128, 4), PAD, dtype=torch.int32, device=device)
    feats = torch.zeros(128, 4, device=device)
    coords[:n], feats[:n] = x.coords, x.feats
    with dispatch.forced("_triton"):
        got, *_ = _graphs.padded(norm, x, coords, feats, torch.tensor([n], device=device), [])
    want = nn.functional.batch_norm(x.feats, None, None, training=True)
    torch.testing.assert_close(got.feats[:n], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_level_that_overflows_says_so(device: torch.device) -> None:
    """What has no room is left out, reported, and never read from beyond the end."""
    model, x = network(Dense, device), scan(300, 2, device, ranged=True)
    count = torch.tensor([x.coords.shape[0]], device=device)
    with dispatch.forced("_triton"):
        with growing(Growth()) as seen:
            model(again(x))
        rooms = [Room(128, True)] * len(seen.levels)
        _, growth, report = _graphs.padded(model, x, x.coords, x.feats, count, rooms)
    assert seen.levels[0].sites > 128
    assert growth.given == [128]
    assert report[0] == seen.levels[0].sites


def test_other_levels_than_planned(device: torch.device) -> None:
    model, x = network(Dense, device), scan(50, 3, device, ranged=True)
    count = torch.tensor([x.coords.shape[0]], device=device)
    with torch.no_grad(), dispatch.forced("_triton"), pytest.raises(RuntimeError, match="levels"):
        _graphs.padded(model, x, x.coords, x.feats, count, [])
