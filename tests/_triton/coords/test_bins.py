"""The order of created sites: a bucket sort, whatever the keys' distribution and the room."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests._triton.kit import NDIMS, cloud, rows_of, search, to
from torchsparse._capacity import PAD, Growth, Room, growing, row_count
from torchsparse._flags import pending_word
from torchsparse._geometry import Geometry
from torchsparse._reference import coords as reference
from torchsparse._triton.coords import build_index, find_taps, generative_sites, strided_sites
from torchsparse._triton.coords import create as levels
from torchsparse._triton.coords.index import CoordIndex
from torchsparse._triton.zeros import Zeros

ONES = (1, 1, 1)
Coords = NDArray[np.int32]


def halves(ndim: int, kind: str = "strided") -> Geometry:
    """Two taps, steps of two."""
    two, one, none = (2,) * ndim, (1,) * ndim, (0,) * ndim
    return Geometry.strided(two, two, none, one, "spconv", kind)


def evens(ndim: int) -> Geometry:
    """One tap, steps of two: odd coordinates create nothing."""
    return Geometry.strided((1,) * ndim, (2,) * ndim, (0,) * ndim, (1,) * ndim, "spconv")


def line(last: int) -> Coords:
    """Fifty sites in a row, in no order, and one far away on every axis."""
    coords = np.zeros((51, 4), np.int32)
    coords[:50, 3] = 2 * np.random.default_rng(0).permutation(50)
    coords[50, 1:] = last
    return coords


SIZES = (60, 300, 200, 40)
CLOUDS = {
    **{f"{ndim} axes": cloud(ndim, "many", rows, -9, 9) for ndim, rows in zip(NDIMS, SIZES)},
    "empty": cloud(3, "empty"),
    "single": cloud(3, "single"),
    "negative": cloud(3, "many", 200, -900, -800),
    "outlier": line(1100),  # in one bin, but for one
    "in one bin": line(1101),  # under `evens`
    "wide keys": line(5001),
}


def create(coords: Coords, geometry: Geometry, device: torch.device) -> tuple[Tensor, CoordIndex]:
    index = build_index(to(device, coords), geometry.reach)
    none = (None,) * geometry.ndim
    make = generative_sites if geometry.kind == "generative" else strided_sites
    return make(index, to(device, coords), geometry, none, none)


def expected(coords: Coords, geometry: Geometry) -> Tensor:
    given = torch.from_numpy(coords)
    index = reference.build_index(given, geometry.reach)
    none = (None,) * geometry.ndim
    if geometry.kind == "generative":
        return reference.generative_sites(index, given, geometry, none, none)[0]
    return reference.strided_sites(index, given, geometry, none, none)[0]


def filled(
    coords: Coords, geometry: Geometry, device: torch.device, each: int = 8, most: int = 512
) -> Any:
    """A table, with room for twice so many keys per row, whose keys are not in order yet."""
    index = build_index(to(device, coords), geometry.reach)
    none = (None,) * geometry.ndim
    slots = 2 * each * max(len(coords), 1)
    generative = geometry.kind == "generative"
    return levels._fill(
        index, to(device, coords), geometry, none, none, generative, slots, most, False
    )


def entries(index: Any) -> tuple[Tensor, Tensor]:
    """The keys of a table in order, and their values."""
    used = index.keys >= 0
    keys, order = index.keys[used].sort()
    return keys, index.values[used][order]


def bins_of(keys: NDArray[np.int64], cells: int, bins: int) -> NDArray[np.int64]:
    shift = 0
    while cells - 1 >> shift >= bins:
        shift += 1
    return np.bincount(keys[keys >= 0] >> shift, minlength=bins)


def geometries_of(name: str, ndim: int) -> list[Geometry]:
    if name in ("outlier", "in one bin", "wide keys"):
        return [evens(ndim)]
    ones = (1,) * ndim
    return [
        halves(ndim),
        halves(ndim, "generative"),
        Geometry.strided((3,) * ndim, (2,) * ndim, ones, ones, "spconv"),
    ]


CASES = [
    (name, geometry)
    for name, coords in CLOUDS.items()
    for geometry in geometries_of(name, coords.shape[1] - 1)
]
IDS = [f"{name}-{geometry.kind}-{geometry.kernel_size[0]}" for name, geometry in CASES]


@pytest.mark.parametrize(("name", "geometry"), CASES, ids=IDS)
def test_sites_are_those_of_the_reference(
    name: str, geometry: Geometry, device: torch.device
) -> None:
    """In its order, each found at its row."""
    coords = CLOUDS[name]
    sites, index = create(coords, geometry, device)
    want = expected(coords, geometry)
    assert torch.equal(sites.cpu(), want)
    point = Geometry.submanifold((1,) * geometry.ndim, (1,) * geometry.ndim)
    found, _ = find_taps(index, None, point)
    assert found.tolist() == [list(range(len(want)))]
    count = int((index.keys >= 0).sum())
    assert count == len(want)
    assert sorted(index.values[index.keys >= 0].tolist()) == list(range(count))


@pytest.mark.parametrize(
    ("name", "most"), [("outlier", 50), ("in one bin", 50), ("3 axes", None), ("empty", 0)]
)
def test_keys_are_counted_where_they_are_inserted(
    name: str, most: int | None, device: torch.device
) -> None:
    coords = CLOUDS[name]
    geometry = evens(3) if most else halves(3)
    index, info, counts = filled(coords, geometry, device)
    want = bins_of(rows_of(index.keys), int(info[3]), len(counts))
    np.testing.assert_array_equal(rows_of(counts), want)
    assert int(info[0]) == want.sum()
    assert most is None or want.max() == most


@pytest.mark.parametrize("most", [1, 2, 5])
def test_keys_that_are_lost_are_not_counted(most: int, device: torch.device) -> None:
    """A full table, where the last key of a chain is not the one that it began with."""
    geometry = Geometry.strided((5, 5, 5), ONES, (2, 2, 2), ONES, "spconv")
    index, info, counts = filled(CLOUDS["3 axes"][:60], geometry, device, each=1, most=most)
    sites, lost = info.tolist()[:2]
    assert lost > 0
    want = bins_of(rows_of(index.keys), int(info[3]), len(counts))
    np.testing.assert_array_equal(rows_of(counts), want)
    assert sites == want.sum()


def test_keys_are_counted_once_however_chains_overtake_each_other() -> None:
    """The rule of `create_kernel`, with chains that proceed one step at a time in random order:
    one that left out another key than it brought counts its own and takes back the other."""
    taken_back = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        table, counts = [-1] * 8, [0] * 4
        chains = [(key, key, key % 3) for key in draw.integers(0, 4, 8).tolist()]
        while chains:
            first, key, slot = chains.pop(draw.integers(len(chains)))
            old, table[slot] = table[slot], max(table[slot], key)
            if old not in (-1, key):
                chains.append((first, min(old, key), (slot + 1) % 8))
                continue
            if old == -1 or key != first:
                counts[first] += 1
            if old == key != first:
                counts[key] -= 1
                taken_back += 1
        assert counts == [table.count(key) for key in range(4)] and max(counts) == 1
    assert taken_back > 0, "no chain was overtaken: the test shows nothing"


def padded(
    coords: Coords, geometry: Geometry, room: Room, device: torch.device
) -> tuple[Tensor, CoordIndex, Growth]:
    with growing(Growth([room], rows=-1)) as growth:
        sites, index = create(coords, geometry, device)
    return sites, index, growth


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 130])
@pytest.mark.parametrize(
    "name", ["1 axes", "3 axes", "4 axes", "empty", "single", "outlier", "in one bin"]
)
def test_padding_stands_behind(name: str, spare: int, narrow: bool, device: torch.device) -> None:
    """Of keys of either kind, in just as many rows or in more."""
    coords = CLOUDS[name]
    geometry = geometries_of(name, coords.shape[1] - 1)[0]
    want = expected(coords, geometry)
    rows = len(want) + spare
    sites, index, growth = padded(coords, geometry, Room(rows, narrow), device)
    assert sites.shape == (rows, coords.shape[1])
    assert torch.equal(sites[: len(want)].cpu(), want)
    assert (sites[len(want) :] == PAD).all()
    count = row_count(sites)
    assert count is not None and count.tolist() == [len(want)]
    assert growth.infos[0].tolist()[:2] == [len(want), 0]
    ordinary = create(coords, geometry, device)[1]
    for one, other in zip(entries(index), entries(ordinary)):
        assert torch.equal(one, other)  # the tables may differ in size
    assert torch.equal(index.layout, ordinary.layout)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("name", ["3 axes", "4 axes", "outlier"])
def test_more_keys_than_rows(name: str, narrow: bool, device: torch.device) -> None:
    """All are counted, some are there, and nothing is written behind them."""
    coords = CLOUDS[name]
    geometry = geometries_of(name, coords.shape[1] - 1)[0]
    want = expected(coords, geometry)
    rows, width = len(want) - 7, coords.shape[1]
    table = filled(coords, geometry, device)
    memory = torch.full((len(want) + 20, width), 77, dtype=torch.int32, device=device)
    write = levels._by_bins if narrow else levels._by_sorting
    write(table, memory[:rows], table.info[:1])
    assert (memory[rows:] == 77).all()
    assert int(table.info[0]) == len(want)
    found = [tuple(site) for site in memory[:rows].tolist()]
    assert found == sorted(set(found)) and set(found) <= set(map(tuple, want.tolist()))
    assert int(table.made.values.max()) == rows - 1


def test_keys_that_are_wider_than_planned(device: torch.device) -> None:
    """The pass is void; it ends, and writes padding alone."""
    coords = CLOUDS["wide keys"]
    sites, index, growth = padded(coords, evens(3), Room(60, True), device)
    assert int(growth.infos[0][3]) > 1 << 31
    assert int(growth.infos[0][0]) == 50
    assert (sites == PAD).all() and (index.values == -1).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_bins_of_many_programs(
    steps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added up in one step or in two."""
    coords = np.zeros((700, 2), np.int32)
    coords[:, 1] = np.random.default_rng(2).permutation(400_000)[:700] - 200_000
    geometry = halves(1)
    table = filled(coords, geometry, device)
    assert len(table.counts) == 8 * levels.BIN_BLOCK
    monkeypatch.setattr(levels, "SUMMED_BINS", 1 << 14 if steps == 1 else 1 << 12)
    sites = torch.empty((int(table.info[0]), 2), dtype=torch.int32, device=device)
    levels._by_bins(table, sites, None)
    assert torch.equal(sites.cpu(), expected(coords, geometry))


class _Listen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("room", [None, Room(256, True)])
def test_pytorch_launches_nothing(room: Room | None, device: torch.device) -> None:
    """Two searches of a level are served with zeros that its own kernels made."""
    coords = CLOUDS["3 axes"]
    geometry, cube = halves(3), Geometry.submanifold((3, 3, 3), ONES)
    pending_word(device)  # made once per process
    listen = _Listen()
    with listen, growing(Growth([room] if room else None, rows=-1)):
        index = build_index(to(device, coords), geometry.reach)
        sites, coarse = strided_sites(index, to(device, coords), geometry, (0,) * 3, None)
        find_taps(index, sites, geometry)
        found, keys = find_taps(coarse, None, cube)
    assert not listen.heard & {"sort", "zeros", "zero_", "fill_", "full", "new_full", "new_zeros"}
    assert listen.heard & {"empty", "new_empty"}, "nothing was heard: the test shows nothing"
    real = rows_of(sites)[: int((sites[:, 0] != PAD).sum())]
    np.testing.assert_array_equal(rows_of(found)[:, : len(real)], search(real, real, cube))
    assert keys is not None
    want = np.bincount(rows_of(keys.keys), minlength=len(keys.counts))
    want[0] = 0
    np.testing.assert_array_equal(rows_of(keys.counts), want)


def test_zeros_are_given_out_once(device: torch.device) -> None:
    memory = torch.zeros(24, dtype=torch.int32, device=device)
    zeros = Zeros(memory)
    parts = [zeros.take(count) for count in (16, 16, 8, 8)]
    for value, part in enumerate(parts, 1):
        assert part.dtype == torch.int32 and not part.any()
        part += value
    assert [len(part) for part in parts] == [16, 16, 8, 8]
    assert memory.tolist() == [1] * 16 + [3] * 8


def test_a_capture_gets_no_zeros_from_outside(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replays would find them used."""
    memory = torch.zeros(24, dtype=torch.int32, device=device)
    zeros = Zeros(memory)
    monkeypatch.setattr("torchsparse._triton.zeros._captured", lambda tensor: True)
    zeros.take(8).add_(1)
    assert not memory.any()
    Zeros(memory).take(8).add_(1)
    assert memory.tolist() == [1] * 8 + [0] * 16
