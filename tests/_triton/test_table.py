"""Kernels that search by key, against their twins in PyTorch and a dictionary."""

import pytest
import torch

from tests._triton.test_points import on_gpu, randint
from torchsparse._reference import table as reference
from torchsparse._triton import table

INT64 = torch.iinfo(torch.int64)
EXTREMES = [0, -1, 1, INT64.min, INT64.max, INT64.min + 1, INT64.max - 1]


def keys_like(low, high, n, device, seed=0):
    """Random keys with the extreme ones among them, some twice."""
    extremes = torch.tensor([*EXTREMES, *EXTREMES[::2]], device=device)
    return torch.cat([randint(low, high, (n,), device, seed=seed), extremes])


# ------------------------------------------------------------------ keys
@pytest.mark.parametrize("rows", [0, 1, 301])
@pytest.mark.parametrize("taps", [None, 0, 1, 27])
def test_hashes(taps, rows, device):
    coords = randint(-(2**31), 2**31, (rows, 4), device, torch.int32)
    offsets = None if taps is None else randint(-2, 3, (taps, 3), device, torch.int32)
    assert torch.equal(table.hash_rows(coords, offsets), reference.hash_rows(coords, offsets))


def test_hashes_of_columns_apart(device):
    coords = randint(-9, 9, (4, 50), device, torch.int32).t()
    assert torch.equal(table.hash_rows(coords, None), reference.hash_rows(coords, None))


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (50, 27, 4)])
@pytest.mark.parametrize("width", [3, 2**16, 2**18, 2**31])
def test_site_keys(width, shape, device):
    sites = randint(-width, width, shape, device)
    assert torch.equal(table.site_keys(sites), reference.site_keys(sites))


# ------------------------------------------------------------------ one search
@pytest.mark.parametrize("rows", [0, 1, 2, 300])
def test_find(rows, device):
    references = keys_like(-200, 200, 300, device)[:rows]
    queries = keys_like(-250, 250, 401, device, seed=1).view(2, -1)
    got = table.find_rows(references, queries)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.find_rows(references, queries))
    assert table.find_rows(references, queries[:0]).shape == (0, queries.shape[1])


def test_find_extremes_and_the_lowest_of_equal_rows(device):
    references = torch.tensor([*EXTREMES, *EXTREMES], device=device)
    found = table.find_rows(references, torch.tensor([*EXTREMES, 2, -2], device=device))
    assert found.tolist() == [*range(len(EXTREMES)), -1, -1]


def test_find_among_equal_keys(device):
    """Every row of several programs wants one slot."""
    references = torch.full((500,), 5, device=device)
    assert table.find_rows(references, references[:3]).tolist() == [0, 0, 0]


# ------------------------------------------------------------------ a lasting table
def new_table(capacity, device):
    return (
        torch.zeros(capacity, dtype=torch.int64, device=device),
        torch.zeros(capacity, dtype=torch.int32, device=device),
    )


def test_insertions_and_searches_agree_with_a_dictionary(device):
    keys, vals = new_table(400, device)
    queries = keys_like(-90, 90, 401, device, seed=9)
    assert not table.lookup(keys, vals, queries).any()
    want: dict[int, int] = {}
    for seed in range(3):
        new = keys_like(-60, 60, 50, device, seed=seed)
        assert not table.insert_(keys, vals, new)
        want |= {k: j + 1 for j, k in reversed(list(enumerate(new.tolist())))}
        got = table.lookup(keys, vals, queries)
        assert got.tolist() == [want.get(q, 0) for q in queries.tolist()]


def test_a_table_full_to_the_last_slot(device):
    """Regression 8: searching a full table must end."""
    keys, vals = new_table(100, device)
    assert not table.insert_(keys, vals, torch.arange(100, device=device))
    queries = torch.arange(-5, 105, device=device)
    want = [q + 1 if 0 <= q < 100 else 0 for q in queries.tolist()]
    assert table.lookup(keys, vals, queries).tolist() == want
    assert table.insert_(keys, vals, torch.arange(50, 101, device=device))
    assert table.lookup(keys, vals, queries).shape == queries.shape


def test_tables_of_nothing(device):
    keys, vals = new_table(0, device)
    assert table.lookup(keys, vals, torch.arange(3, device=device)).tolist() == [0, 0, 0]
    keys, vals = new_table(3, device)
    assert not table.insert_(keys, vals, keys[:0])
    assert table.lookup(keys, vals, keys[:0]).shape == (0,)


# ------------------------------------------------------------------ on a GPU
@on_gpu
@pytest.mark.parametrize("rows", [100_000, 1_000_000])
def test_large_searches(rows, device):
    """Half of the references occur twice; the same rows ten times."""
    references = randint(-rows, rows, (rows,), device)
    queries = randint(-2 * rows, 2 * rows, (rows,), device, seed=1)
    want = reference.find_rows(references, queries)
    for _ in range(10):
        assert torch.equal(table.find_rows(references, queries), want)
    keys, vals = new_table(rows, device)
    assert not table.insert_(keys, vals, references)
    assert torch.equal(table.lookup(keys, vals, queries), want + 1)
