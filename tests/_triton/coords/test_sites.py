"""Sites that layers create, against sets of tuples and the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests import clouds, oracles
from tests._triton.kit import NDIMS, cloud, geometries, rows_of, search, taps, to
from tests.oracles import Layer
from torchsparse import _flags
from torchsparse._geometry import Geometry
from torchsparse._reference import coords as reference
from torchsparse._triton.coords import (
    build_index,
    find_taps,
    generative_sites,
    strided_sites,
)
from torchsparse._triton.coords import (
    create as levels,
)

NONE = (None, None, None)
ONES = (1, 1, 1)
STRIDED = [
    Layer.of(2, 2),
    Layer.of(3, 2, 1),
    Layer.of(3, (1, 2, 1), 1),
    Layer.of((3, 1, 2), 3, (0, 2, 1)),
    Layer.of(4, 3, 0, 2),
    Layer.of(3, 2, 1, infer_range=False),
    Layer.of(3, 2, 1, allow_negative=True, infer_range=False),
]
NAMES = ("empty", "single", "origin", "odd", "negative")


def geometry_of(layer: Layer) -> Geometry:
    kind = "generative" if layer.generative else "strided"
    mode = "minkowski" if layer.minkowski else "spconv"
    return Geometry.strided(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, mode, kind
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", STRIDED, ids=str)
def test_strided_sites(
    layer: Layer, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded below by 0, above by the largest coordinates or not at all."""
    if device.type == "cpu":  # the interpreter takes seconds to see that a table is too small
        monkeypatch.setattr(levels, "MOST_STEPS", 32)
    coords, geometry = clouds.CLOUDS[name](), geometry_of(layer)
    lower = NONE if layer.allow_negative else (0, 0, 0)
    upper = None if layer.infer_range else NONE
    index = build_index(to(device, coords), geometry.reach)
    sites, _ = strided_sites(index, to(device, coords), geometry, lower, upper)
    np.testing.assert_array_equal(
        rows_of(sites), oracles.as_rows(oracles.output_sites(coords, layer))
    )
    twin = reference.build_index(torch.from_numpy(coords), geometry.reach)
    want, _ = reference.strided_sites(twin, torch.from_numpy(coords), geometry, lower, upper)
    assert torch.equal(sites.cpu(), want)


def test_a_created_level_has_the_bounds_of_its_sites(device: torch.device) -> None:
    """Its index serves the next layer, which infers its range from what is there, not from what
    might have been there."""
    coords = to(device, [[0, 2, 2, 2], [0, 13, 0, 0], [1, 10, 4, 4]])
    geometry = Geometry.strided((2, 1, 1), (2, 1, 1), (0, 0, 0), (2, 1, 1), "spconv")
    sites, index = strided_sites(build_index(coords, geometry.reach), coords, geometry, NONE, NONE)
    again, _ = strided_sites(index, sites, geometry, (0, 0, 0), None)
    fresh = build_index(sites, geometry.reach)
    want, _ = strided_sites(fresh, sites, geometry, (0, 0, 0), None)
    assert torch.equal(again, want)
    found = slice(2 * 4, 4 * 4)  # lower and upper bounds in a layout
    assert torch.equal(index.layout[found][4:], fresh.layout[found][4:])


def test_a_generative_layer_reaches_far(device: torch.device) -> None:
    """Created levels have room around them for the taps that created them, however far."""
    coords = to(device, [[0, 3, 3, 3], [1, 0, 9, 0]])
    geometry = Geometry.strided((3, 1, 1), (2, 1, 1), (0, 0, 0), (9, 1, 1), "spconv", "generative")
    index = build_index(coords, (0, 0, 0))
    fine, made = generative_sites(index, coords, geometry, NONE, (6, None, None))
    neighbors, _ = find_taps(made, coords, geometry)
    _flags.raise_pending(device)
    twin = reference.build_index(fine.cpu(), geometry.reach)
    want, _ = reference.find_taps(twin, coords.cpu(), geometry)
    assert torch.equal(neighbors.cpu(), want)


@pytest.mark.parametrize("name", NAMES)
def test_minkowski_cells(name: str, device: torch.device) -> None:
    """A 1 x 1 x 1 kernel: floor(c / s), also for negative coordinates."""
    coords = clouds.CLOUDS[name]()
    geometry = Geometry.strided(ONES, (2, 3, 4), (0, 0, 0), ONES, "spconv")
    cells = Geometry.strided((2, 3, 4), (2, 3, 4), (0, 0, 0), ONES, "spconv")
    index = build_index(to(device, coords), cells.reach)
    sites, _ = strided_sites(index, to(device, coords), cells, NONE, NONE)
    floored = coords // np.array([1, 2, 3, 4], np.int32)
    np.testing.assert_array_equal(rows_of(sites), np.unique(floored, axis=0).reshape(-1, 4))
    on_lattice, _ = strided_sites(index, to(device, coords), geometry, NONE, NONE)
    kept = coords[(coords[:, 1:] % [2, 3, 4] == 0).all(1)]
    kept = np.unique(kept // np.array([1, 2, 3, 4], np.int32), axis=0)
    np.testing.assert_array_equal(rows_of(on_lattice), kept.reshape(-1, 4))


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ((1, 0, 2), (3, 4, 3)),
        ((0, 0, 0), (0, 9, 9)),
        ((2, 2, 2), (1, 1, 1)),  # nothing is left
        ((None, 2, None), (3, None, None)),
        ((-100, -100, -100), (100, 1 << 40, 100)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("generative", [False, True])
def test_bounds(
    lower: tuple[int | None, ...],
    upper: tuple[int | None, ...],
    generative: bool,
    device: torch.device,
) -> None:
    layer = Layer.of(2, 2, generative=True) if generative else Layer.of(3, 2, 1)
    coords, geometry = clouds.scatter("bounded", 11, (6, 6, 6)), geometry_of(layer)
    make, other = (
        (generative_sites, reference.generative_sites)
        if generative
        else (strided_sites, reference.strided_sites)
    )
    index = build_index(to(device, coords), geometry.reach)
    sites, _ = make(index, to(device, coords), geometry, lower, upper)
    twin = reference.build_index(torch.from_numpy(coords), geometry.reach)
    want, _ = other(twin, torch.from_numpy(coords), geometry, lower, upper)
    assert torch.equal(sites.cpu(), want)
    free, _ = make(index, to(device, coords), geometry, NONE, NONE)
    kept = [
        row for row in free.tolist()
        if all((low is None or low <= c) and (high is None or c <= high)
               for c, low, high in zip(row[1:], lower, upper))
    ]  # fmt: skip
    assert sites.tolist() == kept


@pytest.mark.parametrize("name", ["empty", "single", "many"])
@pytest.mark.parametrize(("ndim", "which"), [*itertools.product(NDIMS, (3, 4, 5))])
def test_strided_sites_in_any_dimension(
    ndim: int, which: int, name: str, device: torch.device
) -> None:
    geometry, coords = geometries(ndim)[which], cloud(ndim, name, 24)
    want: set[tuple[int, ...]] = set()
    for batch, *site in coords.tolist():
        for tap in taps(geometry.kernel_size):
            shifted = [
                c + o - d * t for c, o, d, t in zip(site, geometry.offset, geometry.dilation, tap)
            ]
            if all(c % s == 0 for c, s in zip(shifted, geometry.stride)):
                want.add((batch, *(c // s for c, s in zip(shifted, geometry.stride))))
    index = build_index(to(device, coords), geometry.reach)
    none = (None,) * ndim
    sites, coarse = strided_sites(index, to(device, coords), geometry, none, none)
    assert [tuple(row) for row in sites.tolist()] == sorted(want)
    # The index that comes with them finds them: it serves the next layer.
    near = Geometry.submanifold((3, 1, 1, 1)[:ndim], (1,) * ndim)
    found, _ = find_taps(coarse, None, near)
    rows = rows_of(sites).reshape(-1, 1 + ndim)
    np.testing.assert_array_equal(rows_of(found), search(rows, rows, near))


@pytest.mark.parametrize("name", ["empty", "single", "few", "negative"])
@pytest.mark.parametrize(
    "layer",
    [
        Layer.of(2, 2, generative=True),
        Layer.of(3, 2, 1, generative=True),
        Layer.of((1, 3, 2), 1, 0, 2, generative=True),
    ],
    ids=str,
)
def test_generative_sites(layer: Layer, name: str, device: torch.device) -> None:
    coords = clouds.scatter("few", 21, (5, 6, 5))
    if name != "few":
        coords = clouds.CLOUDS[name]()[:25]
    geometry = geometry_of(layer)
    index = build_index(to(device, coords), geometry.reach)
    lower = (0, 0, 0)
    sites, fine = generative_sites(index, to(device, coords), geometry, lower, NONE)
    assert sites.dtype == torch.int32
    np.testing.assert_array_equal(
        rows_of(sites), oracles.as_rows(oracles.output_sites(coords, layer))
    )
    twin = reference.build_index(torch.from_numpy(coords), geometry.reach)
    want, _ = reference.generative_sites(twin, torch.from_numpy(coords), geometry, lower, NONE)
    assert torch.equal(sites.cpu(), want)
    found, _ = find_taps(fine, to(device, coords), geometry)
    np.testing.assert_array_equal(rows_of(found), search(rows_of(sites), coords, geometry))


def test_more_sites_than_the_first_table_holds(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scattered voxels under a wide kernel: the table is filled again with room for all."""
    coords = np.array([[0, 10 * n, 0, 0] for n in range(5)], np.int32)
    layer = Layer.of(3, 1, 1, generative=True)
    slots: list[int] = []
    fill = levels._fill

    def spy(*args):
        slots.append(args[6])
        return fill(*args)

    monkeypatch.setattr(levels, "_fill", spy)
    geometry = geometry_of(layer)
    index = build_index(to(device, coords), geometry.reach)
    sites, _ = generative_sites(index, to(device, coords), geometry, NONE, NONE)
    assert slots == [2 * 8 * 5, 2 * 27 * 5]
    assert len(sites) == 27 * 5 and len(set(map(tuple, sites.tolist()))) == 27 * 5


@pytest.mark.parametrize("generative", [False, True])
def test_sites_outside_int32(generative: bool, device: torch.device) -> None:
    coords = to(device, [[0, (1 << 31) - 2, 0, 0]])
    if generative:
        geometry = Geometry.strided((2, 2, 2), (2, 2, 2), (0, 0, 0), ONES, "spconv", "generative")
        make, other = generative_sites, reference.generative_sites
    else:
        geometry = Geometry.strided((3, 3, 3), ONES, (2, 2, 2), ONES, "spconv")
        make, other = strided_sites, reference.strided_sites
    index = build_index(coords, geometry.reach)
    with pytest.raises(ValueError, match="int32"):
        make(index, coords, geometry, NONE, NONE)
    twin = reference.build_index(coords.cpu(), geometry.reach)
    with pytest.raises(ValueError, match="int32"):
        other(twin, coords.cpu(), geometry, NONE, NONE)
    # Where a bound cuts off what does not fit, nothing is lost unawares.
    top = (100,) * 3 if generative else ((1 << 31) - 2,) * 3
    sites, _ = make(index, coords, geometry, NONE, top)
    assert len(sites) == (0 if generative else 9)
    _flags.raise_pending(device)


def test_complaints_are_raised_where_the_number_of_sites_is_waited_for(
    device: torch.device,
) -> None:
    coords = to(device, clouds.duplicates())
    geometry = geometry_of(Layer.of(2, 2))
    index = build_index(coords, geometry.reach)
    with pytest.raises(ValueError, match="must be unique rows"):
        strided_sites(index, coords, geometry, NONE, NONE)
    _flags.raise_pending(device)  # said once


def test_a_box_that_is_too_large_to_create(device: torch.device) -> None:
    """The input fits; a stride of 2^20 upwards does not."""
    coords = to(device, [[0, 0, 0, 0], [0, 2000, 2000, 2000]])
    stride = (1 << 20,) * 3
    geometry = Geometry.strided((2, 2, 2), stride, (0, 0, 0), ONES, "spconv", "generative")
    index = build_index(coords, geometry.reach)
    with pytest.raises(ValueError, match="fewer than 2\\^62"):
        generative_sites(index, coords, geometry, NONE, NONE)


def test_the_order_of_rows_changes_nothing(device: torch.device) -> None:
    coords = clouds.odd()
    geometry = geometry_of(Layer.of(3, 2, 1))
    found = []
    for rows in (coords, coords[::-1].copy()):
        index = build_index(to(device, rows), geometry.reach)
        found.append(strided_sites(index, to(device, rows), geometry, NONE, NONE)[0])
    assert torch.equal(*found)
