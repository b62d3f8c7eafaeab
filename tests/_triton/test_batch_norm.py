"""Kernels of batch normalisation against their twins, both against float64 and PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._triton.test_points import TOLERANCE, close, on_gpu, randn
from torchsparse._reference import batch_norm as _reference
from torchsparse._triton import batch_norm as _batch_norm

# Their annotations leave open what a test knows: which results are there.
reference: Any = _reference
batch_norm: Any = _batch_norm

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# Rows and channels: the least, odd ones, several shares and blocks, a width of three blocks.
SHAPES = [(2, 1), (3, 5), (65, 8), (300, 12), (70, 96), (50, 130)]
SLOPES = [None, 0.0, 0.1]


def problem(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Features far from 0, parameters in float32."""
    feats, residual, grad = (randn(*shape, dtype=dtype, device=device, seed=s) for s in range(3))
    weight, bias = (randn(shape[1], dtype=torch.float32, device=device, seed=s) for s in (3, 4))
    return {
        "feats": feats * 2 + 5, "residual": residual, "grad": grad, "weight": weight, "bias": bias
    }  # fmt: skip


def moments_of(feats: Tensor) -> Tensor:
    return reference.batch_moments_(feats.float(), 1e-5, None, None, None, 0.1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape, dtype, device):
    feats = problem(shape, dtype, device)["feats"]
    want = reference.batch_moments_(feats.double(), 1e-5, None, None, None, 0.1)
    for twin in (batch_norm, reference):
        got = twin.batch_moments_(feats, 1e-5, None, None, None, 0.1)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_moments_do_not_cancel(device):
    """The mean is 4000 standard deviations away; E[x^2] - E[x]^2 would be noise."""
    feats = 4096 + randn(1000, 20, dtype=torch.float32, device=device)
    want = reference.batch_moments_(feats.double(), 1e-5, None, None, None, 0.1)
    for twin in (batch_norm, reference):
        got = twin.batch_moments_(feats, 1e-5, None, None, None, 0.1)
        # Rows are rounded to 2^-12 deviations.
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("far", [1e2, 1e4, 1e7])
def test_distances_may_begin_at_a_row_far_away(far, device):
    """Which is one of the 64 rows of its share, so that the spread there is nearly as large."""
    feats = randn(1000, 20, dtype=torch.float32, device=device)
    feats[0], feats[64] = far, -far
    want = reference.batch_moments_(feats.double(), 1e-5, None, None, None, 0.1)
    got = batch_norm.batch_moments_(feats, 1e-5, None, None, None, 0.1)
    # The roundings of a sum of 64, up to 2^-20, count 64 times where all but one row cancel.
    torch.testing.assert_close(got[1].double(), want[1], rtol=64 * 2**-20, atol=0)
    spread = 1 / want[1]
    assert bool(((got[0].double() - want[0]).abs() < 1e-6 * spread).all())


def test_moments_of_equal_rows(device):
    """The variance is 0, up to the rounding of sums."""
    feats = torch.full((1000, 5), 0.1, device=device)
    got = batch_norm.batch_moments_(feats, 0.25, None, None, None, 0.1)
    want = torch.tensor([[0.1] * 5, [2.0] * 5], device=device)
    torch.testing.assert_close(got, want, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_row(dtype, device):
    """Its own mean, without spread; other processes may have more."""
    feats = problem((1, 5), dtype, device)["feats"]
    for twin in (batch_norm, reference):
        mean, var = torch.zeros(2, 5, device=device)
        got = twin.batch_moments_(feats, 0.25, mean, var, None, 1.0)
        assert torch.equal(mean, feats[0].float()) and torch.equal(got[0], mean)
        assert torch.equal(var, torch.zeros_like(var))
        torch.testing.assert_close(got[1], torch.full_like(var, 2.0))


@pytest.mark.parametrize("shares", [1, 3, 4])
@pytest.mark.parametrize("rows", [257, 1000])
def test_few_shares(rows, shares, device, monkeypatch):
    """Many steps each, the last one short, as in large scenes."""
    monkeypatch.setattr(batch_norm, "SHARES", shares)
    batch_norm._cut.cache_clear()
    p = problem((rows, 20), torch.float32, device)
    want = reference.batch_moments_(p["feats"].double(), 1e-5, None, None, None, 0.1)
    got = batch_norm.batch_moments_(p["feats"], 1e-5, None, None, None, 0.1)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    found = gradients(batch_norm, p, got, 3, True, 0.1)
    for one, other in zip(found, gradients(reference, p, got, 3, True, 0.1)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    batch_norm._cut.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_are_those_of_pytorch(momentum, dtype, device):
    module = torch.nn.BatchNorm1d(9, momentum=momentum).to(device)
    start = torch.zeros(9, dtype=dtype), torch.ones(9, dtype=dtype), torch.tensor(0)
    stats = [[t.clone().to(device) for t in start] for _ in range(2)]
    for step in range(3):
        feats = randn(100, 9, dtype=torch.float32, device=device, seed=step) * 3 + 1
        module(feats)
        for twin, own in zip((batch_norm, reference), stats):
            twin.batch_moments_(feats, 1e-5, *own, momentum)
    want: Any = (module.running_mean, module.running_var, module.num_batches_tracked)
    for own in stats:
        for got, value in zip(own, want):
            assert got.dtype in (dtype, torch.int64)
            torch.testing.assert_close(
                got.double(), value.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


def options(p: dict[str, Any], affine: int, added: bool) -> tuple[Any, Any, Any]:
    weight = p["weight"] if affine & 1 else None
    bias = p["bias"] if affine & 2 else None
    return weight, bias, p["residual"] if added else None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), *SHAPES], ids=str)
def test_normalise(shape, dtype, device):
    p = problem(shape, dtype, device)
    moments = moments_of(p["feats"] if shape[0] else torch.ones((2, 4), device=device))
    for slope in SLOPES:
        for affine, added in ((3, False), (3, True), (0, True), (1, False), (2, False)):
            args = p["feats"], moments, *options(p, affine, added), slope
            got = batch_norm.normalise(*args)
            assert got.dtype == dtype
            close(got, reference.normalise(*args))


def gradients(twin: Any, p: dict[str, Any], moments: Tensor, affine: int, added: bool, slope: Any):
    """All five, from both passes."""
    weight, bias, residual = options(p, affine, added)
    signs = None
    if added and slope is not None:
        signs = reference.normalise(p["feats"], moments, weight, bias, residual, slope)
    args = p["grad"], p["feats"], moments, weight, bias, signs, slope
    means, *own = twin.grad_sums(*args)
    return means, *own, *twin.grad_rows(*args, means, added)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, device):
    p = problem(shape, dtype, device)
    moments = moments_of(p["feats"])
    for slope in SLOPES:
        for affine, added in ((3, False), (3, True), (0, True), (1, False), (2, False)):
            got = gradients(batch_norm, p, moments, affine, added, slope)
            want = gradients(reference, p, moments, affine, added, slope)
            for one, other in zip(got, want):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.dtype == other.dtype
                    scale = float(other.abs().max().clamp(min=1))
                    tolerance = TOLERANCE[other.dtype] * scale
                    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_only_what_is_wanted(device):
    p = problem((70, 12), torch.float32, device)
    args = p["grad"], p["feats"], moments_of(p["feats"]), p["weight"], p["bias"], None, 0.0
    means, _, _ = batch_norm.grad_sums(*args)
    feats, nothing = batch_norm.grad_rows(*args, means, False)
    assert nothing is None
    nothing, residual = batch_norm.grad_rows(*args, None, True)
    assert nothing is None
    both = batch_norm.grad_rows(*args, means, True)
    assert torch.equal(both[0], feats) and torch.equal(both[1], residual)


def test_infinity_and_nan_pass_as_in_pytorch(device):
    feats = torch.tensor([[-torch.inf, torch.nan, torch.inf, -1.0]], device=device)
    moments = torch.tensor([[0.0] * 4, [1.0] * 4], device=device)
    got = batch_norm.normalise(feats, moments, None, None, None, 0.0)
    assert torch.equal(got.nan_to_num(7), torch.relu(feats).nan_to_num(7))


def test_rows_apart_in_memory(device):
    """Features and gradients need not be contiguous."""
    p = problem((60, 6), torch.float32, device)
    moments = moments_of(p["feats"])
    apart = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in p.items()}
    got, want = (gradients(batch_norm, q, moments, 3, True, 0.0) for q in (apart, p))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("begin", "wide"), [(0, 40), (8, 40), (3, 40), (8, 37)])
def test_gradients_of_a_part_of_the_channels(begin, wide, dtype, device):
    """As `torch.cat` gives them: parts of wider rows, aligned or not."""
    p = problem((60, 24), dtype, device)
    moments = moments_of(p["feats"])
    whole = torch.full((60, wide), torch.nan, dtype=dtype, device=device)
    whole[:, begin : begin + 24] = p["grad"]
    part = {**p, "grad": whole[:, begin : begin + 24]}
    got, want = (gradients(batch_norm, q, moments, 3, True, 0.0) for q in (part, p))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("real", [0, 1, 37, 60])
def test_rows_of_padding_are_not_read(real, device):
    """Whatever they hold: results are those of the real rows, and zeros."""
    p = problem((60, 12), torch.float16, device)
    limit = torch.tensor([real], device=device)
    moments = moments_of(p["feats"])
    poisoned, cut = {}, {}
    for name, value in p.items():
        rows = value.dim() == 2
        cut[name] = value[:real] if rows else value
        poisoned[name] = value.clone()
        if rows:
            poisoned[name][real:] = torch.nan
    args = [(q["feats"], moments, q["weight"], q["bias"], q["residual"], 0.0)
            for q in (poisoned, cut)]  # fmt: skip
    outs = batch_norm.normalise(*args[0], limit), batch_norm.normalise(*args[1])
    found = []
    for q, out, own in zip((poisoned, cut), outs, (limit, None)):
        given = q["grad"], q["feats"], moments, q["weight"], q["bias"], out, 0.0
        means, *rest = batch_norm.grad_sums(*given, own)
        found.append((*rest, *batch_norm.grad_rows(*given, means, True, own)))
    for got, want in zip((outs[0], *found[0]), (outs[1], *found[1])):
        if got.dim() == 2:
            assert not got[real:].any()
            got = got[:real]
        # Rows are the same bit for bit; sums over them may be shared out in another way.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if got.dim() == 1 else 0)


@on_gpu
@pytest.mark.parametrize("channels", [32, 96, 256])
def test_large_scenes(channels, device):
    """The same bits ten times, and the right ones."""
    p = problem((200_001, channels), torch.float16, device)

    def run() -> tuple[Tensor, ...]:
        stats = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        moments = batch_norm.batch_moments_(p["feats"], 1e-5, *stats, count, None)
        return moments, *stats, count, *gradients(batch_norm, p, moments, 3, True, 0.0)

    first = run()
    want = reference.batch_moments_(p["feats"].double(), 1e-5, None, None, None, None)
    torch.testing.assert_close(first[0].double(), want, rtol=1e-5, atol=1e-5)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))
