"""Row order: sort keys, tiles and their masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests._triton.kit import random_table, rows_of, taps
from torchsparse._geometry import Geometry
from torchsparse._triton.conv.order import (
    KEY_BITS,
    TILE_ROWS,
    SortKeys,
    bit_of_taps,
    key_bits,
    make_tiles,
    row_sort_keys,
)
from torchsparse._triton.conv.pairs import list_pairs
from torchsparse._triton.coords.index import invert_taps

ONES = (1, 1, 1)
CUBE = Geometry.submanifold((3, 3, 3), ONES)
GEOMETRIES = {
    "1": Geometry.submanifold((1, 1, 1), ONES),
    "3": CUBE,
    "5": Geometry.submanifold((5, 5, 5), ONES),
    "2 down": Geometry.strided((2, 2, 2), (2, 2, 2), (0, 0, 0), ONES, "spconv"),
    "3 down": Geometry.strided((3, 3, 3), (2, 2, 2), ONES, ONES, "spconv"),
    "3 x 1 x 2": Geometry.submanifold((3, 1, 2), (2, 2, 2)),
    "4 axes": Geometry.submanifold((3, 3, 3, 3), (1,) * 4),
    "1 axis": Geometry.submanifold((33,), (1,)),
}  # fmt: skip
SIZES = [(27, 0), (27, 1), (1, 64), (8, 65), (27, 130), (31, 70), (32, 70), (33, 70), (125, 66)]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_rare_taps_are_the_high_bits(name: str) -> None:
    geometry = GEOMETRIES[name]
    bits = bit_of_taps(geometry, 0, geometry.volume)
    centre = [geometry.volume // 2] if geometry.is_symmetric else []
    assert [k for k, bit in enumerate(bits) if bit < 0] == centre
    own = [bit for bit in bits if bit >= 0]
    assert set(own) == set(range(min(len(own), KEY_BITS)))  # every bit is used
    steps = [
        sum(
            (1.6 if geometry.ndim == 3 and axis == 2 else 1.0) * abs(d * t - o)
            for axis, (t, d, o) in enumerate(zip(tap, geometry.dilation, geometry.offset))
        )
        for tap in taps(geometry.kernel_size)
    ]
    for k, bit in enumerate(bits):
        for other, lower in enumerate(bits):
            assert not (steps[k] < steps[other] and bit > lower >= 0)


def test_a_cube_has_bits_for_its_frequent_taps() -> None:
    """Ten taps, the six faces first, are told apart; the sixteen others share four bits."""
    bits = bit_of_taps(CUBE, 0, 27)
    faces = [k for k, tap in enumerate(taps((3, 3, 3))) if sum(t != 1 for t in tap) == 1]
    assert sorted(bits[k] for k in faces) == [0, 1, 2, 3, 4, 5]
    assert sorted(bits) == [-1, *range(10), *sorted([*range(10, 14)] * 4)]


def test_the_share_of_a_split_has_bits_of_its_own() -> None:
    """Nine taps of a third all have one."""
    for first in (0, 9, 18):
        bits = bit_of_taps(CUBE, first, first + 9)
        assert sorted(bits) == ([-1, *range(8)] if first == 9 else [*range(9)])


def gray_place(word: int) -> int:
    """Where a word stands in the Gray sequence n ^ (n >> 1)."""
    place = 0
    while word:
        place ^= word
        word >>= 1
    return place


def test_the_judge_of_gray_places() -> None:
    assert [gray_place(n ^ (n >> 1)) for n in range(1 << 16)] == list(range(1 << 16))


def expected_keys(table: Tensor, geometry: Geometry) -> list[int]:
    bits = bit_of_taps(geometry, 0, geometry.volume)
    keys = []
    for row in table.t().tolist():
        word = 0
        for k, i in enumerate(row):
            if i >= 0 and bits[k] >= 0:
                word |= 1 << bits[k]
        keys.append(gray_place(word))
    return keys


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_row_sort_keys(name: str, rows: int, device: torch.device) -> None:
    geometry = GEOMETRIES[name]
    table = random_table(device, geometry.volume, rows, rows)
    keys, counts = row_sort_keys(table, key_bits(geometry, device))
    assert keys.dtype == torch.int16
    want = expected_keys(table, geometry)
    assert keys.tolist() == want
    counted = [0] * len(counts)
    for key in want:
        counted[key] += key > 0
    assert counts.tolist() == counted


def test_row_sort_keys_of_a_view(device: torch.device) -> None:
    table = random_table(device, 27, 70, 70)
    view = table.t().contiguous().t()
    bits = key_bits(CUBE, device)
    assert view.stride() != table.stride()
    for got, want in zip(row_sort_keys(view, bits), row_sort_keys(table, bits)):
        assert torch.equal(got, want)


def random_keys(rows: int, device: torch.device) -> SortKeys:
    """Every eighth of them 0, as of voxels without neighbours, which are not counted."""
    keys = np.random.default_rng(rows).integers(0, 1 << KEY_BITS, rows)
    keys[::8] = 0
    counts = np.bincount(keys[keys > 0], minlength=1 << KEY_BITS)
    return SortKeys(
        torch.from_numpy(keys.astype(np.int16)).to(device),
        torch.from_numpy(counts.astype(np.int32)).to(device),
    )


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(("volume", "rows"), SIZES)
def test_tiles(volume: int, rows: int, sort: bool, device: torch.device) -> None:
    """Every row once, the table in that order, masks the taps of 64 rows."""
    table = random_table(device, volume, rows, rows, 0.1)
    keys = random_keys(rows, device) if sort else None
    found = make_tiles(table.t().contiguous().t(), None if keys is None else [keys])
    placed = table
    if keys is None:
        assert found.order is None
    else:
        assert found.order is not None
        order = found.order[0, :rows].long()
        assert sorted(order.tolist()) == list(range(rows))
        ordered = keys.keys[order].tolist()
        assert ordered == sorted(ordered, reverse=True)
        placed = table[:, order]
    assert torch.equal(found.table, placed)
    tiles = -(-rows // TILE_ROWS)
    assert found.masks.shape == (1, -(-volume // 32), tiles)
    words = rows_of(found.masks[0]) & 0xFFFFFFFF
    for tile in range(tiles):
        union = sum(int(word) << (32 * n) for n, word in enumerate(words[:, tile]))
        present = (placed[:, tile * TILE_ROWS : (tile + 1) * TILE_ROWS] >= 0).any(1)
        assert union == sum(1 << k for k in range(volume) if present[k])


def test_rows_of_many_programs_are_sorted(device: torch.device) -> None:
    keys = random_keys(3000, device)
    order = make_tiles(random_table(device, 3, 3000, 3000, 0.1), [keys]).order
    assert order is not None
    order = order[0, :3000]
    assert sorted(order.tolist()) == list(range(3000))
    ordered = keys.keys[order.long()].tolist()
    assert ordered == sorted(ordered, reverse=True)


def test_sorting_makes_tiles_pure(device: torch.device) -> None:
    """Two kinds of rows, mixed: sorted, a tile has the taps of one kind."""
    table = torch.full((27, 128), -1, dtype=torch.int32, device=device)
    table[:5, ::2] = 1
    table[20:, 1::2] = 2
    keys = row_sort_keys(table, key_bits(CUBE, device))
    mixed, pure = make_tiles(table, None).masks[0], make_tiles(table, [keys]).masks[0]
    one, other = sum(1 << k for k in range(5)), sum(1 << k for k in range(20, 27))
    assert mixed.tolist() == [[one | other] * 2]
    assert sorted(pure.tolist()[0]) == sorted([one, other])


@pytest.mark.parametrize("tap", [1 << 28, 1 << 30])
def test_taps_further_apart_than_int32(tap: int, tmp_path: Path) -> None:
    """Tables of 2^31 entries and more, of which the file holds what is written."""
    path, rows, entries = tmp_path / "sparse.bin", 64, 2 * tap + 64
    with path.open("wb") as file:
        file.truncate(4 * entries)
    flat = torch.from_file(str(path), shared=True, size=entries, dtype=torch.int32)
    table = flat.as_strided((3, rows), (tap, 1))
    table.copy_(torch.arange(3 * rows).view(3, rows))
    near = table.clone()
    bits = key_bits(Geometry.submanifold((3, 1, 1), ONES), torch.device("cpu"))
    assert torch.equal(row_sort_keys(table, bits).keys, row_sort_keys(near, bits).keys)
    assert torch.equal(make_tiles(table, None).table, near)
    far, want = (list_pairs(t, False, 3 * rows) for t in (table, near))
    assert torch.equal(far.inputs, want.inputs)
    geometry = Geometry.strided((3, 1, 1), (3, 1, 1), (0, 0, 0), ONES, "spconv")
    far, want = (invert_taps(t, 3 * rows, geometry)[0] for t in (table, near))
    assert torch.equal(far, want)
