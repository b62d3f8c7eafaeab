"""The ordered hash table: one content whatever the order of insertion, keys descend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests._triton.kit import cloud, rows_of, to
from torchsparse._triton.coords import build_index
from torchsparse._triton.coords.index import CoordIndex

MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def first_slot(key: int, slots: int) -> int:
    """Where the search for a key begins, in Python's unbounded integers."""
    mixed = (key // 4 * MULTIPLIER % (1 << 64)) // ((1 << 64) // (slots // 4))
    return mixed * 4 + key % 4


def entries(index: CoordIndex) -> dict[int, tuple[int, int]]:
    """key -> (slot, row)."""
    keys, values = rows_of(index.keys), rows_of(index.values)
    return {int(keys[s]): (int(s), int(values[s])) for s in np.flatnonzero(keys >= 0)}


@pytest.mark.parametrize("rows", [40, 300])
def test_the_content_does_not_depend_on_the_order_of_rows(rows: int, device: torch.device) -> None:
    coords = cloud(3, "many", rows)
    index = build_index(to(device, coords), (2, 2, 2))
    permutation = np.random.default_rng(1).permutation(len(coords))
    other = build_index(to(device, coords[permutation]), (2, 2, 2))
    assert torch.equal(index.keys, other.keys) and len(entries(index)) == len(coords)
    for key, (slot, row) in entries(other).items():
        assert entries(index)[key] == (slot, permutation[row])


@pytest.mark.parametrize("rows", [40, 300])
def test_keys_descend_along_every_probe_sequence(rows: int, device: torch.device) -> None:
    """A search may therefore stop at the first smaller key."""
    index = build_index(to(device, cloud(3, "many", rows)), (2, 2, 2))
    keys = rows_of(index.keys)
    moved = 0
    for key, (slot, _) in entries(index).items():
        at = first_slot(key, len(keys))
        while at != slot:
            assert keys[at] > key
            at = (at + 1) % len(keys)
            moved += 1
    assert moved > 0, "no key was displaced: the test shows nothing"


def test_a_table_has_room_for_three_times_its_keys(device: torch.device) -> None:
    for rows, slots in ((0, 16), (1, 16), (5, 16), (6, 32), (40, 128)):
        coords = np.zeros((rows, 4), np.int32)
        coords[:, 1] = np.arange(rows)
        assert len(build_index(to(device, coords), (2, 2, 2)).keys) == slots


def test_consecutive_keys_share_a_sector(device: torch.device) -> None:
    """Four sites in a row along the last axis lie in 32 bytes, where nothing displaces them."""
    coords = to(device, [[0, 0, 0, z] for z in range(8)])
    index = build_index(coords, (0, 0, 0))
    found = entries(index)
    groups: dict[int, set[int]] = {}
    for key in found:
        groups.setdefault(key // 4, set()).add(first_slot(key, len(index.keys)) // 4)
    assert all(len(sectors) == 1 for sectors in groups.values()) and len(groups) >= 2
