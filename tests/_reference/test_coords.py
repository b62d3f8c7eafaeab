"""Searching and site building on keys against sets and dictionaries, in one to four axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from torchsparse._geometry import Geometry, tap_list
from torchsparse._keys import unpack
from torchsparse._reference import coords
from torchsparse._reference.coords import build_index, find_taps, invert_taps, strided_sites

NDIMS = (1, 2, 3, 4)


def cloud(ndim: int, seed: int, low: int = -6, high: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.concatenate(
        [rng.integers(0, 3, (60, 1)), rng.integers(low, high, (60, ndim))], 1
    ).astype(np.int32)
    return rng.permutation(np.unique(rows, axis=0))


def geometries(ndim: int) -> list[Geometry]:
    ones = (1,) * ndim
    return [
        Geometry.submanifold((3,) * ndim, ones),
        Geometry.submanifold((2,) * ndim, ones),
        Geometry.submanifold((3, 5, 1, 3)[:ndim], (2, 1, 1, 3)[:ndim]),
        Geometry.strided((2,) * ndim, (2,) * ndim, (0,) * ndim, ones, "spconv"),
        Geometry.strided((3,) * ndim, (2,) * ndim, ones, ones, "spconv"),
        Geometry.strided(
            (4, 3, 2, 3)[:ndim], (3, 2, 2, 1)[:ndim], (1, 2, 0, 1)[:ndim], (1, 3, 2, 2)[:ndim],
            "spconv",
        ),
    ]  # fmt: skip


CASES = [(ndim, i) for ndim in NDIMS for i in range(6)]


@pytest.mark.parametrize(("ndim", "which"), CASES)
def test_find_taps_matches_a_dictionary(ndim: int, which: int) -> None:
    geometry = geometries(ndim)[which]
    fine = cloud(ndim, 1)
    coarse = fine if geometry.kind == "submanifold" else cloud(ndim, 2, -9, 12)
    index = build_index(torch.from_numpy(fine), geometry.reach)
    given = None if geometry.kind == "submanifold" else torch.from_numpy(coarse)
    found = find_taps(index, given, geometry)[0].numpy()
    assert index.rows is not None  # the sites are in no order
    rows = {tuple(row): i for i, row in enumerate(fine.tolist())}
    for k, tap in enumerate(tap_list(geometry.kernel_size)):
        for row in range(len(coarse)):
            site = [coarse[row, 0]] + [
                coarse[row, 1 + i] * geometry.stride[i]
                - geometry.offset[i]
                + geometry.dilation[i] * tap[i]
                for i in range(ndim)
            ]
            assert found[k, row] == rows.get(tuple(int(v) for v in site), -1)


@pytest.mark.parametrize(("ndim", "which"), [case for case in CASES if case[1] >= 3])
@pytest.mark.parametrize("bounded", [False, True])
def test_strided_sites_are_every_site_that_a_tap_reaches(
    ndim: int, which: int, bounded: bool
) -> None:
    geometry = geometries(ndim)[which]
    fine = cloud(ndim, 3)
    lower, upper = ((0,) * ndim, (2,) * ndim) if bounded else ((None,) * ndim, (None,) * ndim)
    found, index = strided_sites(
        build_index(torch.from_numpy(fine), geometry.reach),
        torch.from_numpy(fine),
        geometry,
        lower,
        upper,
    )
    sites = set()
    for row in fine.tolist():
        for tap in itertools.product(*map(range, geometry.kernel_size)):
            numerators = [
                row[1 + i] + geometry.offset[i] - geometry.dilation[i] * tap[i]
                for i in range(ndim)
            ]
            if any(n % s for n, s in zip(numerators, geometry.stride)):
                continue
            site = [n // s for n, s in zip(numerators, geometry.stride)]
            if not bounded or all(0 <= c <= 2 for c in site):
                sites.add((row[0], *site))
    assert found.tolist() == sorted(map(list, sites))
    assert torch.equal(unpack(index.keys, index.layout), found)


@pytest.mark.parametrize(("ndim", "which"), CASES)
def test_pieces_of_a_search_agree(ndim: int, which: int, monkeypatch) -> None:
    """Many small pieces, with lines in batches: the same table."""
    geometry = geometries(ndim)[which]
    index = build_index(torch.from_numpy(cloud(ndim, 1)), geometry.reach)
    given = torch.from_numpy(cloud(ndim, 2, -9, 12)) if geometry.kind == "strided" else None
    want = find_taps(index, given, geometry)[0]
    monkeypatch.setattr(coords, "TOGETHER", 16)
    monkeypatch.setattr(coords, "MOST_LINES", 2)
    assert torch.equal(find_taps(index, given, geometry)[0], want)
    monkeypatch.setattr(coords, "CROWDED", 0)  # a search among all keys
    assert torch.equal(find_taps(index, given, geometry)[0], want)


def test_invert_taps_exchanges_the_ends() -> None:
    table = torch.tensor([[-1, 0, 2], [1, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    geometry = Geometry.submanifold((3, 1, 1), (1, 1, 1))
    inverse, _ = invert_taps(table, 4, geometry)
    assert inverse.tolist() == [[1, -1, 2, -1], [-1, 0, -1, -1], [-1, -1, -1, -1]]


def test_a_huge_box_gives_up_the_usual_margin() -> None:
    """2^30 x 2^29 x 1 cells fit into 2^62 with the kernel's reach, not with 8 cells around."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 2**30, 2**29, 0]], dtype=torch.int32)
    geometry = Geometry.strided((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), "spconv")
    index = build_index(coords, geometry.reach)
    assert index.margin == (1, 1, 1)
    coarse, _ = strided_sites(index, coords, geometry, (0,) * 3, (None,) * 3)
    assert coarse.tolist() == [[0, 0, 0, 0], [0, 2**29, 2**28, 0]]
    assert find_taps(index, coarse, geometry)[0][0].tolist() == [0, 1]


@pytest.mark.parametrize("divisor", [1, 2, 3, 6, 8])
def test_quotients_are_rounded_down(divisor: int) -> None:
    values = torch.arange(-20, 20)
    quotient, remainder = coords._divide(values, divisor)
    assert quotient.tolist() == [value // divisor for value in range(-20, 20)]
    assert remainder.tolist() == [value % divisor for value in range(-20, 20)]
