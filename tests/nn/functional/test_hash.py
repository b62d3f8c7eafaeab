"""sphash against FNV-1a written out in Python integers."""

import numpy as np
import pytest
import torch

from torchsparse.nn import functional as F


def fnv(row):
    """One 64-bit FNV-1a step per column, taken as unsigned 32 bits, as a signed number."""
    h = 14695981039346656037
    for value in row:
        h = ((h ^ (int(value) % 2**32)) * 1099511628211) % 2**64
    return h - 2**64 if h >= 2**63 else h


ROWS = np.array(
    [[0, 0, 0, 0], [1, 2, 3, 4], [0, -1, -2, -3], [1023, 2**31 - 1, -(2**31), 7]], np.int32
)


def test_equals_the_definition(device):
    """Regression 39: the same hash on every device, columns (b, x, y, z)."""
    got = F.sphash(torch.from_numpy(ROWS).to(device))
    assert got.dtype == torch.int64
    assert got.tolist() == [fnv(row) for row in ROWS]


def test_offsets_move_x_y_z_and_come_first(device):
    offsets = np.array([[0, 0, 0], [1, -1, 2], [-5, 0, 0]], np.int32)
    got = F.sphash(torch.from_numpy(ROWS).to(device), torch.from_numpy(offsets).to(device))
    assert got.shape == (3, 4)
    for k, offset in enumerate(offsets.astype(np.int64)):
        want = [fnv([row[0], *(row[1:].astype(np.int64) + offset)]) for row in ROWS]
        assert got[k].tolist() == want


def test_no_rows(device):
    none = torch.zeros((0, 4), dtype=torch.int32, device=device)
    assert F.sphash(none).shape == (0,)
    assert F.sphash(none, torch.zeros((8, 3), dtype=torch.int32, device=device)).shape == (8, 0)


def test_says_what_it_expected():
    with pytest.raises(TypeError, match=r"`coords` must be an int32 tensor, got torch.int64"):
        F.sphash(torch.zeros((2, 4), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \[N, 4\], got \[2, 3\]"):
        F.sphash(torch.zeros((2, 3), dtype=torch.int32))
    coords = torch.zeros((2, 4), dtype=torch.int32)
    with pytest.raises(TypeError, match=r"`offsets` must be an int32 tensor, got torch.float32"):
        F.sphash(coords, torch.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shape \[K, 3\], got \[3\]"):
        F.sphash(coords, torch.zeros(3, dtype=torch.int32))
