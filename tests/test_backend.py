"""GPUHashTable against a dict."""

import itertools

import numpy as np
import pytest
import torch

import torchsparse
from tests import clouds
from tests.cases import raises_on_data
from torchsparse.backend import GPUHashTable


def table(capacity, device):
    keys = torch.zeros(capacity, dtype=torch.int64, device=device)
    vals = torch.zeros(capacity, dtype=torch.int32, device=device)
    return GPUHashTable(keys, vals), keys, vals


EXTREMES = [0, -1, 2**63 - 1, -(2**63), 1]


@pytest.mark.parametrize("capacity", [40, 41, 64, 300])
def test_values_are_rows_from_one(capacity, device):
    """Regressions 8 and 41: a full table probed forever, and key 0 was an empty slot."""
    keys = torch.tensor(EXTREMES + list(range(100, 170, 2)), device=device)  # 40 keys
    t, *_ = table(capacity, device)
    t.insert_vals(keys)
    queries = torch.cat([keys.flip(0), torch.tensor([99, 101, 7], device=device)])
    got = t.lookup_vals(queries)
    assert got.dtype == torch.int32
    assert got.shape == (128,)
    assert got.tolist() == [*range(40, 0, -1), *([0] * 88)]


def test_before_the_first_insertion_nothing_is_found(device):
    t, *_ = table(16, device)
    assert not t.lookup_vals(torch.tensor(EXTREMES, device=device)).any()
    lazy = GPUHashTable(16)
    assert not lazy.lookup_vals(torch.tensor(EXTREMES, device=device)).any()


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129])
def test_answers_are_padded_to_128(length, device):
    t, *_ = table(4, device)
    keys = torch.arange(length, device=device)
    assert len(t.lookup_vals(keys)) == -(-length // 128) * 128


def test_repeated_keys_and_later_insertions(device):
    """Within a call the lowest row counts; a later call overwrites and leaves the rest."""
    t, *_ = table(3, device)
    t.insert_vals(torch.tensor([5, 0, 5], device=device))
    assert t.lookup_vals(torch.tensor([5, 0], device=device))[:2].tolist() == [1, 2]
    t.insert_vals(torch.tensor([7, 0], device=device))
    assert t.lookup_vals(torch.tensor([5, 0, 7], device=device))[:3].tolist() == [1, 2, 1]


def test_the_state_is_in_the_tensors(device):
    t, keys, vals = table(10, device)
    t.insert_vals(torch.tensor([3, 0], device=device))
    second = GPUHashTable(keys, vals)
    assert second.lookup_vals(torch.tensor([0, 3, 4], device=device))[:3].tolist() == [2, 1, 0]


def test_a_full_table_is_an_error(device):
    """Regression 8. Five distinct keys among seven fit into 5 slots, not into 4."""
    keys = torch.tensor([1, 1, 2, 3, 4, 0, 0], device=device)
    table(5, device)[0].insert_vals(keys)
    torchsparse.backends.check_errors()
    said = r"room for every distinct key \("
    where = "capacity" if device.type == "cpu" else "noticed"
    with raises_on_data(RuntimeError, said + where):
        table(4, device)[0].insert_vals(keys)
    t, *_ = table(3, device)
    t.insert_vals(keys[:3])
    torchsparse.backends.check_errors()
    with raises_on_data(RuntimeError, said + where):
        t.insert_vals(keys[3:])


def test_capacity_alone_takes_the_device_of_the_keys(device):
    t = GPUHashTable(np.int64(8))
    t.insert_vals(torch.tensor([9, 4], device=device))
    got = t.lookup_vals(torch.tensor([4, 9, 8], device=device))
    assert got.device.type == device.type
    assert got[:3].tolist() == [2, 1, 0]


def around(coords, size, stride):
    """[n, K] rows + 1 at c * stride + t - (k - 1) // 2, by a dict over (x, y, z, b)."""
    rows = {tuple(c): j + 1 for j, c in enumerate(coords.tolist())}
    odd = size[0] * size[1] * size[2] % 2
    taps = list(itertools.product(*map(range, size[::-1] if odd else size)))
    taps = [t[::-1] if odd else t for t in taps]
    out = [
        [
            rows.get((*(c[i] * stride[i] + t[i] - (size[i] - 1) // 2 for i in range(3)), c[3]), 0)
            for t in taps
        ]
        for c in coords.tolist()
    ]
    return np.array(out, np.int32).reshape(len(coords), len(taps))


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 1, 2), (4, 1, 1)])
@pytest.mark.parametrize("cloud", [clouds.batch_gap, clouds.negative])
def test_neighbours_of_sites(cloud, size, stride, device):
    coords = cloud()[:, [1, 2, 3, 0]]
    c = torch.from_numpy(coords).to(device)
    t, *_ = table(len(coords), device)
    t.insert_coords(c)
    volume = size[0] * size[1] * size[2]
    got = t.lookup_coords(c, torch.tensor(size), torch.tensor(stride), volume)
    assert got.dtype == torch.int32
    assert got.shape == (128, volume)
    n = len(coords)
    np.testing.assert_array_equal(got[:n].cpu().numpy(), around(coords, size, stride))
    assert not got[n:].any()
    assert torch.equal(got, t.lookup_coords(c, list(size), stride, torch.tensor(volume)))


def test_extreme_sites(device):
    """Within the box of exact keys, at its border, and beyond it."""
    ends = [-(2**31), -(2**17) - 1, -(2**17), -1, 0, 2**16, 2**17 - 1, 2**17, 2**31 - 1]
    sites = [(x, y, z, b) for x in ends for y in ends[::4] for z in ends for b in (0, 1023, 1024)]
    c = torch.tensor(sites, dtype=torch.int32, device=device)
    t, *_ = table(len(c), device)
    t.insert_coords(c)
    got = t.lookup_coords(c, (1, 1, 1), (1, 1, 1), 1)[: len(c), 0]
    assert got.tolist() == list(range(1, len(c) + 1))


def test_says_what_it_expected():
    keys, vals = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"int64 and int32, got torch.int64 and torch.int64"):
        GPUHashTable(keys, keys)
    with pytest.raises(TypeError, match=r"int64 and int32, got torch.int64 and NoneType"):
        GPUHashTable(keys)
    with pytest.raises(ValueError, match=r"equal length, got \[4\] and \[3\]"):
        GPUHashTable(keys, vals[:3])
    with pytest.raises(ValueError, match=r"`capacity` must be at least 1, got 0"):
        GPUHashTable(0)
    with pytest.raises(TypeError, match=r"\(capacity\), got \(int, vals\)"):
        GPUHashTable(4, vals)
    t = GPUHashTable(keys, vals)
    with pytest.raises(TypeError, match=r"`keys` must be int64, got torch.int32"):
        t.insert_vals(vals)
    with pytest.raises(ValueError, match=r"shape \[n\], got \[2, 2\]"):
        t.lookup_vals(keys.view(2, 2))
    with pytest.raises(TypeError, match=r"`coords` must be int32, got torch.int64"):
        t.insert_coords(keys.view(1, 4))
    with pytest.raises(ValueError, match=r"\(x, y, z, b\), got \[2, 2\]"):
        t.insert_coords(vals.view(2, 2))
    with pytest.raises(ValueError, match=r"product of `kernel_size` \(3, 3, 3\), got 8"):
        t.lookup_coords(vals.view(1, 4), (3, 3, 3), (1, 1, 1), 8)
