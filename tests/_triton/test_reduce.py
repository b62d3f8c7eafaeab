"""Kernels for groups of rows, against their twins in PyTorch."""

import pytest
import torch

from tests._triton.test_points import FLOATS, close, on_gpu, randint, randn
from torchsparse._reference import reduce as reference
from torchsparse._triton import reduce, sums

# Group numbers by name: [N] and the number of groups.
INDICES = {
    "empty": lambda: (randint(0, 1, (0,), "cpu"), 3),
    "one row": lambda: (randint(0, 1, (1,), "cpu"), 1),
    "no group": lambda: (randint(-1, 2, (9,), "cpu"), 0),
    "mixed": lambda: (randint(-2, 52, (301,), "cpu", torch.int32), 50),
    "31 groups": lambda: (randint(-1, 33, (1300,), "cpu", torch.int32), 31),
    "many groups": lambda: (randint(0, 700, (300,), "cpu"), 700),
    # Longer than what is summed side by side, by one program, in one chunk.
    "uneven": lambda: (randint(0, 400, (1000,), "cpu").sub_(350).clamp_(min=0).sub_(1), 60),
    "long": lambda: (randint(0, 1000, (2100,), "cpu").clamp_(max=4).sort().values, 6),
    "one long group": lambda: (torch.full((1500,), 2), 4),
}


@pytest.fixture(params=INDICES)
def groups(request, device):
    index, num = INDICES[request.param]()
    return index.to(device), num


def test_group_rows(groups):
    for got, want in zip(reduce.group_rows(*groups), reference.group_rows(*groups)):
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


@pytest.mark.parametrize("num", [2**15 - 1, 2**15, 2**17])
def test_group_numbers_of_any_width(num, device):
    index = torch.tensor([num, num - 1, 0, 2**40, -1, num - 2, 0], device=device)
    for got, want in zip(reduce.group_rows(index, num), reference.group_rows(index, num)):
        assert torch.equal(got, want)


def test_count(groups):
    assert torch.equal(reduce.count(*groups), reference.count(*groups))


@pytest.mark.parametrize("num", [1, 256, 257])
def test_count_with_and_without_bins(num, device):
    index = randint(-5, num + 5, (3000,), device, torch.int32)
    assert torch.equal(reduce.count(index, num), reference.count(index, num))


@pytest.mark.parametrize("num", [40, 4000])
@pytest.mark.parametrize("excess", [-5000, -1, 0, 5])
def test_count_notes_numbers_behind_the_end(excess, num, device):
    index = torch.zeros(700, dtype=torch.int32, device=device)
    index[600] = num + excess
    word = torch.zeros((), dtype=torch.int64, device=device)
    reduce.count(index, num, word, 4)
    assert word.item() == (4 if excess >= 0 else 0)


@pytest.mark.parametrize("channels", [1, 5, 70])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums(groups, weighted, channels, device):
    index, num = groups
    grouped = reduce.group_rows(index, num)
    feats = randn(len(index), channels, dtype=torch.float32, device=device)
    weights = randn(len(index), dtype=torch.float32, device=device, seed=1) if weighted else None
    got = reduce.segment_sum(feats, grouped, weights)
    want = reference.segment_sum(feats.double(), grouped, weights)
    # Sums of up to 2000 numbers around 1.
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["mixed", "uneven"])
def test_averages_in_each_type(name, dtype, device):
    index, num = INDICES[name]()
    index = index.to(device)
    feats = randn(len(index), 6, dtype=dtype, device=device)
    grouped = reduce.group_rows(index, num)
    counts = randint(0, 5, (num,), device, torch.int32)
    got = reduce.segment_sum(feats, grouped, None, counts, dtype)
    close(got, reference.segment_sum(feats, grouped, None, counts, dtype))
    assert (got[counts == 0] == 0).all()


def test_a_mean_of_equal_numbers_is_that_number(device):
    """The plain division of float32 is not correctly rounded on a GPU."""
    values = randn(60, 4, dtype=torch.float32, device=device)
    feats = values.repeat_interleave(3, 0)
    index = torch.arange(60, device=device).repeat_interleave(3)
    counts = torch.full((60,), 3, device=device)
    got = reduce.segment_sum(feats, reduce.group_rows(index, 60), None, counts)
    assert torch.equal(got, (values + values + values) / torch.tensor(3.0, device=device))


def test_sums_of_rows_that_occur_several_times(device):
    feats = randn(5, 3, dtype=torch.float32, device=device)
    order = randint(0, 5, (400,), device)
    starts = torch.tensor([0, 3, 3, 390, 400], device=device)
    grouped = reduce.Groups(order, starts)
    want = reference.segment_sum(feats, grouped)
    torch.testing.assert_close(reduce.segment_sum(feats, grouped), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["uneven", "long", "one long group"])
def test_sums_in_longer_chunks(name, monkeypatch, device):
    """As for a million rows: groups of medium size fit into a chunk."""
    monkeypatch.setattr(sums, "CHUNKS", 3)
    index, num = INDICES[name]()
    grouped = reduce.group_rows(index.to(device), num)
    feats = randn(len(index), 5, dtype=torch.float32, device=device)
    want = reference.segment_sum(feats.double(), grouped).float()
    torch.testing.assert_close(reduce.segment_sum(feats, grouped), want, rtol=1e-5, atol=2e-5)


def test_a_row_of_no_group_is_not_read(device):
    feats = torch.tensor([[torch.nan], [1.0], [torch.inf]], device=device)
    index = torch.tensor([-1, 0, 5], device=device)
    assert reduce.segment_sum(feats, reduce.group_rows(index, 1)).tolist() == [[1.0]]


def test_long_groups_are_summed_precisely(device):
    """20 000 times 0.1: one after the other in float32 loses 3 digits."""
    feats = torch.full((20_000, 1), 0.1, device=device)
    grouped = reduce.group_rows(torch.zeros(20_000, dtype=torch.int32, device=device), 1)
    want = torch.tensor([[20_000 * 0.1]], device=device)
    torch.testing.assert_close(reduce.segment_sum(feats, grouped), want, rtol=1e-6, atol=0)


# ------------------------------------------------------------------ maxima
def special(n, channels, dtype, device):
    """Negative numbers, both infinities, NaN of either sign, zeros of either sign, ties."""
    feats = randn(n, channels, dtype=dtype, device=device).mul_(2).round_()
    for value in (torch.nan, torch.inf, -torch.inf, -0.0, 0.0):
        feats[randint(0, max(n, 1), (n // 50,), device, seed=hash(value) % 97)] = value
    if n > 7:
        feats[7] = -feats[7].new_tensor(torch.nan)
    return feats


def check_maxima(feats, index, num, top):
    """``top`` and the rows that hold it are those found on the CPU."""
    want = reference.segment_max(feats.cpu(), index.cpu(), num)
    torch.testing.assert_close(top.cpu(), want, rtol=0, atol=0, equal_nan=True)
    got = reduce.argmax_rows(feats, index, top)
    assert torch.equal(got.cpu(), reference.argmax_rows(feats.cpu(), index.cpu(), want))


@pytest.mark.parametrize("channels", [1, 5])
def test_maxima_and_where_they_come_from(groups, channels, device):
    index, num = groups
    feats = special(len(index), channels, torch.float32, device)
    top = reduce.segment_max(feats, index, num)
    check_maxima(feats, index, num, top)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maxima_in_each_type(dtype, device):
    index = randint(-1, 9, (301,), device, torch.int32)
    feats = special(301, 7, dtype, device)
    top = reduce.segment_max(feats, index, 9)
    check_maxima(feats, index, 9, top)


def test_maxima_of_minus_infinity(device):
    feats = torch.full((3, 2), -torch.inf, device=device)
    index = torch.tensor([1, 1, -1], device=device)
    assert reduce.segment_max(feats, index, 2).tolist() == [[0.0] * 2, [-torch.inf] * 2]


# ------------------------------------------------------------------ on a GPU
@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num", [1, 5, 3000, 70_000])
def test_large_scenes(num, dtype, device):
    """100 000 rows; the same bits ten times."""
    n, channels = 100_003, 48
    feats = randn(n, channels, dtype=dtype, device=device)
    index = randint(-1, num, (n,), device, torch.int32)
    index[: n // 3] = 0  # one group is long
    grouped = reduce.group_rows(index, num)
    for got, want in zip(grouped, reference.group_rows(index, num)):
        assert torch.equal(got, want)
    assert torch.equal(reduce.count(index, num), reference.count(index.cpu(), num).to(device))
    totals, top = reduce.segment_sum(feats, grouped), reduce.segment_max(feats, index, num)
    want = reference.segment_sum(feats.double(), grouped)
    torch.testing.assert_close(totals.double(), want, rtol=1e-5, atol=2e-3)
    check_maxima(feats, index, num, top)
    for _ in range(10):
        assert torch.equal(reduce.segment_sum(feats, grouped), totals)
        assert torch.equal(reduce.segment_max(feats, index, num), top)
