"""Pair lists, against NumPy's nonzero."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import clouds
from tests._triton.kit import random_table, rows_of, search
from torchsparse._geometry import Geometry
from torchsparse._triton.conv.pairs import Pairs, list_pairs
from torchsparse._triton.conv.plan import make_pairs

SIZES = [(27, 0, 0), (27, 5, 0), (1, 1, 1), (8, 30, 17), (27, 90, 77), (33, 9, 40), (125, 33, 33)]


def lists(pairs: Pairs) -> list[list[tuple[int, int]]]:
    """(input, output) of each list."""
    ends = [0, *(int(e) for e in rows_of(pairs.ends)[:, -1])] if pairs.ends.numel() else []
    both = list(zip(pairs.inputs.tolist(), pairs.outputs.tolist()))
    return [both[a:b] for a, b in pairwise(ends)]


def expected(table: Tensor) -> list[list[tuple[int, int]]]:
    found = []
    for row in rows_of(table):
        outputs = np.flatnonzero(row >= 0)
        found.append([(int(row[m]), int(m)) for m in outputs])
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lists_hold_the_pairs_by_tap_then_row(
    size: tuple[int, int, int], device: torch.device
) -> None:
    table = random_table(device, *size)
    pairs = list_pairs(table.t().contiguous().t(), False, table.numel())
    assert (pairs.volume, pairs.lists, pairs.swap) == (size[0], size[0], False)
    if table.shape[1] == 0:
        assert pairs.inputs.numel() == 0
        return
    assert lists(pairs) == expected(table)
    # Also in between: where each block of 32 rows ends within a tap.
    count = np.cumsum(rows_of(table).reshape(-1) >= 0)
    blocks = pairs.ends.shape[1]
    for k in range(size[0]):
        for block in range(blocks):
            last = min((block + 1) * 32, table.shape[1])
            assert int(pairs.ends[k, block]) == count[k * table.shape[1] + last - 1]


def test_the_example_of_the_record(device: torch.device) -> None:
    table = torch.tensor([[-1, 0, -1], [0, 1, 2], [1, -1, -1]], dtype=torch.int32, device=device)
    pairs = list_pairs(table, False, 9)
    assert pairs.inputs.tolist()[:5] == [0, 0, 1, 2, 1]
    assert pairs.outputs.tolist()[:5] == [1, 0, 1, 2, 0]
    assert pairs.ends.tolist() == [[1], [4], [5]]


@pytest.mark.parametrize("cloud", ["single", "odd", "block"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 3, 3), (3, 1, 5)], ids=str)
def test_half_the_lists_of_a_symmetric_map_hold_all_pairs(
    size: tuple[int, int, int], cloud: str, device: torch.device
) -> None:
    geometry = Geometry.submanifold(size, (1, 1, 1))
    coords = clouds.CLOUDS[cloud]()
    table = torch.from_numpy(search(coords, coords, geometry).astype(np.int32)).to(device)
    pairs = make_pairs(table, geometry)
    half = geometry.volume // 2 + 1
    assert pairs.lists == half and pairs.inputs.shape[0] <= half * len(coords)
    whole = expected(table)
    assert lists(pairs) == whole[:half]
    for k in range(half, geometry.volume):
        swapped = [(o, i) for i, o in lists(pairs)[geometry.volume - 1 - k]]
        assert sorted(swapped) == sorted(whole[k])


@pytest.mark.parametrize("size", [(2, 2, 2), (3, 3, 3)], ids=str)
def test_other_maps_list_every_tap(size: tuple[int, int, int], device: torch.device) -> None:
    geometry = Geometry.strided(size, (2, 2, 2), (0, 0, 0), (1, 1, 1), "spconv")
    table = random_table(device, geometry.volume, 20, 11)
    pairs = make_pairs(table, geometry)
    assert pairs.lists == geometry.volume and lists(pairs) == expected(table)
