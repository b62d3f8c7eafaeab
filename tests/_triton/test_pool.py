"""Pooling kernels against their twins in PyTorch, and below the public modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import torchsparse.nn as spnn
from tests import clouds
from tests._triton.kit import random_table
from tests._triton.test_points import on_gpu, randint, randn
from tests._triton.test_reduce import special
from torchsparse import SparseTensor
from torchsparse._capacity import PAD, mark_rows
from torchsparse._ops import pool as ops
from torchsparse._ops.dispatch import forced
from torchsparse._reference import pool as reference
from torchsparse._triton import pool

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# Sums of at most 27 numbers around 1 in float32, in another order; then rounded to 11 and 8 bits.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
# (K, N, M): a window of one tap, taps that do not fill a turn, nothing at either end.
SIZES = [(27, 60, 70), (8, 50, 20), (1, 9, 9), (5, 1, 3), (3, 0, 4), (3, 4, 0)]
CHANNELS = [0, 1, 5, 32, 130]


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.is_contiguous()
    tolerance = TOLERANCE[want.dtype]
    atol = 40 * 2**-23 if want.dtype == torch.float32 else tolerance  # where terms cancel
    torch.testing.assert_close(got, want, rtol=tolerance, atol=atol, equal_nan=True)


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, also zeros; PyTorch's `gather` on a CPU has NaN of its own."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.is_floating_point():
        assert torch.equal(got.isnan(), want.isnan())
        got, want = (t.detach().where(~t.isnan(), 0) for t in (got, want))
    number = torch.int32 if got.element_size() == 4 else torch.int16
    assert torch.equal(got.view(number), want.view(number))


def transposed(table: Tensor, inputs: int) -> Tensor:
    """result[k, table[k, m]] = m"""
    back = torch.full((table.shape[0], inputs + 1), -1, dtype=torch.int32, device=table.device)
    outputs = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    back.scatter_(1, torch.where(table < 0, inputs, table).long(), outputs.expand_as(table))
    return back[:, :inputs]  # the strides are not those of a contiguous table


def drawn(size: tuple[int, int, int], device: torch.device) -> Tensor:
    taps, inputs, outputs = size
    return random_table(device, taps, inputs, outputs)


# ------------------------------------------------------------------ twins
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_and_means(size, channels, device):
    table = drawn(size, device)
    feats = randn(size[1], channels, dtype=torch.float32, device=device)
    shares = randn(size[1], dtype=torch.float32, device=device, seed=1).abs()
    for args in ((None, False), (None, True), (shares, False)):
        close(pool.pool_sum(feats, table, *args), reference.pool_sum(feats, table, *args))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_in_each_type_are_rounded_once(dtype, device):
    table = drawn((27, 60, 70), device)
    feats = randn(60, 12, dtype=dtype, device=device)
    for mean in (False, True):
        got = pool.pool_sum(feats, table, None, mean)
        close(got, reference.pool_sum(feats, table, None, mean))
        close(got, reference.pool_sum(feats.double(), table, None, mean).to(dtype))


def test_the_mean_of_equal_numbers_is_that_number(device):
    """And the shares are 1 / 1, 1 / 2, ..., correctly rounded."""
    table = torch.full((27, 27), -1, dtype=torch.int32, device=device)
    for m in range(27):
        table[: m + 1, m] = torch.arange(m + 1)
    feats = torch.full((27, 3), 3.0, device=device)
    assert (pool.pool_sum(feats, table, mean=True) == 3).all()
    shares = pool.pool_shares(table, torch.float32)
    same(shares, 1 / torch.arange(1, 28, device=device, dtype=torch.float32))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shares(size, device):
    table = drawn(size, device)
    for strided in (table, table.t().contiguous().t()):
        got = pool.pool_shares(strided, torch.float32)
        same(got, reference.pool_shares(table, torch.float32))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maxima_and_their_rows(size, channels, device):
    table = drawn(size, device)
    feats = special(size[1], channels, torch.float32, device)
    out, rows = pool.pool_max(feats, table)
    want, want_rows = reference.pool_max(feats, table)
    same(out, want)
    same(rows, want_rows)
    same(pool.pool_top(feats, table), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maxima_of_special_numbers_in_each_type(dtype, device):
    """Ties, zeros of either sign, infinities and NaN: the value of the lowest tap, unchanged."""
    table = random_table(device, 8, 300, 200)
    feats = special(300, 7, dtype, device)
    assert feats.isnan().any() and feats.isinf().any()
    for got, want in zip(pool.pool_max(feats, table), reference.pool_max(feats, table)):
        same(got, want)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "want", "row"),
    [
        ([-3, -1, -1], -1, 1),
        ([-INF, -INF, -INF], -INF, 0),
        ([-INF, NAN, INF], NAN, 1),
        ([NAN, INF, NAN], NAN, 0),
        ([-0.0, 0.0, 0.0], -0.0, 0),
        ([], 0, -1),
    ],
)
def test_maxima_by_hand(values, want, row, device):
    """The last of five taps is absent, and so is the first."""
    feats = torch.tensor(values, dtype=torch.float32, device=device)[:, None]
    taps = [-1, *range(len(values)), -1]
    table = torch.tensor(taps, dtype=torch.int32, device=device)[:, None]
    out, rows = pool.pool_max(feats, table)
    np.testing.assert_equal(out.item(), float(want))
    assert bool(out.signbit()) == (str(want)[0] == "-")
    assert rows.tolist() == [[row]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_go_back_to_their_rows(size, dtype, device):
    """A sum of few numbers: every order gives the same, for these are integers."""
    table = drawn(size, device)
    feats = special(size[1], 9, dtype, device)
    rows = reference.pool_max(feats, table)[1]
    values = randint(-9, 10, (size[2], 9), device).to(dtype)
    back = transposed(table, size[1])
    same(pool.unpool_max(values, rows, back), reference.unpool_max(values, rows, back))
    same(pool.pick_rows(feats, rows), reference.pick_rows(feats, rows))


def test_a_wrong_index_reads_nothing(device):
    feats = torch.ones((2, 1), device=device)
    rows = torch.tensor([[2], [-7], [1], [2**31 - 1]], dtype=torch.int32, device=device)
    assert pool.pick_rows(feats, rows)[:, 0].tolist() == [0, 0, 1, 0]


def test_tables_and_features_of_any_strides(device):
    table = drawn((8, 50, 20), device)
    wide = randn(50, 12, dtype=torch.float16, device=device)
    feats, across = wide[:, 1:8], table.t().contiguous().t()
    assert across.stride() == (1, 8)
    want, rows = reference.pool_max(feats, table)
    same(pool.pool_max(feats, across)[0], want)
    same(pool.pool_sum(feats, across), pool.pool_sum(feats.contiguous(), table))
    back = transposed(table, 50)
    one = torch.ones(1, 1, dtype=torch.float16, device=device).expand(20, 7)
    same(pool.unpool_max(one, rows, back), reference.unpool_max(one, rows, back))


@pytest.mark.parametrize("real", [0, 1, 33, 70])
def test_padding(real, device):
    """Rows behind the limit read nothing, and their indices can be used."""
    table = drawn((27, 60, 70), device)
    feats = randn(60, 5, dtype=torch.float32, device=device)
    limit = torch.tensor([real], device=device)
    out, rows = pool.pool_max(feats, table, limit)
    want, want_rows = reference.pool_max(feats, table)
    same(out[:real], want[:real])
    same(rows[:real], want_rows[:real])
    assert (rows[real:] == -1).all()
    same(pool.pool_top(feats, table, limit)[:real], want[:real])
    total = pool.pool_sum(feats, table, None, True, limit)
    same(total[:real], pool.pool_sum(feats, table, None, True)[:real])
    back = transposed(table, 60)
    limit.clamp_(max=60)
    got = pool.unpool_max(want, want_rows, back, limit)[:real]
    same(got, pool.unpool_max(want, want_rows, back)[:real])


def test_float64_is_left_to_pytorch(device, monkeypatch):
    monkeypatch.setattr(pool, "launch", None)
    table, feats = drawn((8, 50, 20), device), randn(50, 3, dtype=torch.float64, device=device)
    with forced("_triton"):
        out, rows = ops.pool_max(feats, table)
        ops.pool_sum(feats, table, ops.pool_shares(transposed(table, 50), torch.float64))
        ops.unpool_max(out, rows, transposed(table, 50))
        assert torch.equal(ops.pick_rows(feats, rows), out)


# ------------------------------------------------------------------ below the modules
def run(layers: list[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Outputs of a way down, there and up again, and the gradient of the input."""
    down, here, up = layers
    coords = torch.from_numpy(clouds.scatter("small", 25, (5, 4, 5))).to(device)
    feats = randn(len(coords), 6, dtype=dtype, device=device).requires_grad_()
    x = SparseTensor(feats, coords, spatial_range=(clouds.BATCH, 5, 4, 5))
    y, *rows = found if isinstance(found := down(x), tuple) else (found,)
    z = up(here(y), *rows)
    push = randn(*z.feats.shape, dtype=dtype, device=device, seed=3)
    (grad,) = torch.autograd.grad(z.feats, feats, push)
    return [y.feats, *rows, z.feats, grad]


@pytest.mark.parametrize(
    ("args", "dtype"), [((2,), FLOATS[0]), ((3, 2, 1), FLOATS[1]), ((3, 1), FLOATS[2])], ids=str
)
@pytest.mark.parametrize("how", ["max", "mean", "sum"])
def test_modules_down_and_up(how, args, dtype, device):
    layers: dict[str, list[torch.nn.Module]] = {
        "max": [
            spnn.MaxPool3d(*args, return_indices=True),
            spnn.MaxPool3d(3, 1),
            spnn.MaxUnpool3d(*args),
        ],
        "mean": [spnn.AvgPool3d(*args), spnn.AvgPool3d(3, 1), spnn.Unpool3d(*args)],
        "sum": [spnn.SumPool3d(*args), spnn.SumPool3d(3, 1), spnn.Unpool3d(*args, mode="sum")],
    }
    want = run(layers[how], dtype, device)
    with forced("_triton"):
        got = run(layers[how], dtype, device)
    # The way up of a maximum adds what meets.
    exact = 2 if how == "max" else 0
    for k, (one, other) in enumerate(zip(got, want)):
        if k < exact:
            same(one, other)
        else:
            size = float(other.detach().abs().max())
            close(one.detach() / size, other.detach() / size)


def test_evaluation_writes_no_rows(device, monkeypatch):
    """Unless somebody asks for them."""
    monkeypatch.setattr(pool, "pool_max", None)
    coords = torch.from_numpy(clouds.scatter("small", 19, (5, 4, 5))).to(device)
    feats = randn(19, 3, dtype=torch.float32, device=device)
    want = spnn.MaxPool3d(2)(SparseTensor(feats, coords)).feats
    with forced("_triton"):
        got = spnn.MaxPool3d(2)(SparseTensor(feats, coords)).feats
        same(got, want)
        with torch.no_grad():
            feats.requires_grad_()
            same(spnn.MaxPool3d(2)(SparseTensor(feats, coords)).feats, want)


def test_padded_levels(device):
    """NaN behind the real rows reaches nobody."""
    real, rows = 37, 128
    coords = torch.full((rows, 4), PAD, dtype=torch.int32, device=device)
    coords[:real] = torch.from_numpy(clouds.scatter("small", real, (6, 5, 6)))
    feats = torch.full((rows, 6), NAN, device=device)
    feats[:real] = randn(real, 6, dtype=torch.float32, device=device)
    layers = [spnn.MaxPool3d(3, 1), spnn.AvgPool3d(3, 1), spnn.SumPool3d(3, 1)]
    want = [layer(SparseTensor(feats[:real], coords[:real].clone())).feats for layer in layers]
    mark_rows(coords, torch.tensor([real], device=device))
    with forced("_triton"):
        for layer, other in zip(layers, want):
            close(layer(SparseTensor(feats, coords)).feats[:real], other)


# ------------------------------------------------------------------ on a GPU
@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [3, 48, 64, 96, 256])
def test_large_maps(channels, dtype, device):
    """100 003 rows; the same bits three times."""
    n, m = 100_003, 60_001
    table = torch.stack([torch.randperm(n)[:m] for _ in range(27)]).int()
    table[torch.rand(table.shape) < 0.6] = -1
    table = table.to(device)
    back, feats = transposed(table, n), randn(n, channels, dtype=dtype, device=device)
    out, rows = pool.pool_max(feats, table)
    for got, want in zip((out, rows), reference.pool_max(feats, table)):
        same(got, want)
    for mean in (False, True):
        got = pool.pool_sum(feats, table, None, mean)
        close(got / 8, reference.pool_sum(feats, table, None, mean) / 8)
        same(pool.pool_sum(feats, table, None, mean), got)
    close(pool.unpool_max(out, rows, back), reference.unpool_max(out, rows, back))
    same(pool.pick_rows(feats, rows), reference.pick_rows(feats, rows))
