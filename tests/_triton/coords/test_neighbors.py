"""Neighbour tables by hash search, against dictionaries and the sorted search of the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests import clouds, oracles
from tests._triton.kit import (
    NDIMS,
    cloud,
    geometries,
    random_table,
    rows_of,
    search,
    to,
)
from tests.cases import DILATIONS, KERNEL_SIZES, STRIDES, raises_on_data
from tests.oracles import Layer
from torchsparse._geometry import Geometry
from torchsparse._reference import coords as reference
from torchsparse._triton.conv.order import SortKeys, key_bits, row_sort_keys
from torchsparse._triton.coords import build_index, find_taps, invert_taps

ONES = (1, 1, 1)


def assert_same_keys(got: SortKeys | None, want: SortKeys) -> None:
    """The search and the inversion compute keys on the way; tests/_triton/conv has the judge."""
    assert got is not None
    assert torch.equal(got.keys, want.keys) and torch.equal(got.counts, want.counts)


@pytest.mark.parametrize("name", ["empty", "single", "many"])
@pytest.mark.parametrize(("ndim", "which"), [*itertools.product(NDIMS, range(6))])
def test_find_taps_matches_dictionary_and_reference(
    ndim: int, which: int, name: str, device: torch.device
) -> None:
    geometry = geometries(ndim)[which]
    fine = cloud(ndim, name, 24)
    index = build_index(to(device, fine), geometry.reach)
    twin = reference.build_index(to(torch.device("cpu"), fine), geometry.reach)
    if geometry.kind == "submanifold":
        coarse, given = fine, None
    else:
        coarse = cloud(ndim, "coarse sites", 20, -7, 9)
        given = to(device, coarse)
    found, keys = find_taps(index, given, geometry)
    assert found.dtype == torch.int32 and found.shape == (geometry.volume, len(coarse))
    np.testing.assert_array_equal(rows_of(found), search(fine, coarse, geometry))
    other, _ = reference.find_taps(twin, None if given is None else given.cpu(), geometry)
    np.testing.assert_array_equal(rows_of(found), rows_of(other))
    assert_same_keys(keys, row_sort_keys(found, key_bits(geometry, device)))


def geometry_of(layer: Layer) -> Geometry:
    if layer.kind in ("submanifold", "pointwise"):
        return Geometry.submanifold(layer.kernel_size, layer.dilation)
    return Geometry.strided(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, "spconv"
    )


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize("size", KERNEL_SIZES, ids=str)
def test_every_kernel_size(
    size: int | oracles.Triple, dilation: int, device: torch.device
) -> None:
    """Up to 125 taps: four words of them, and a table wider than one step of the search."""
    layer = Layer.of(size, 1, 0, dilation)
    coords = clouds.scatter("small", 23, (5, 4, 5))
    index = build_index(to(device, coords), layer.reach)
    found, _ = find_taps(index, None, geometry_of(layer))
    np.testing.assert_array_equal(rows_of(found).T, oracles.relate(coords, layer).table)


@pytest.mark.parametrize("stride", [s for s in STRIDES if s != 1], ids=str)
@pytest.mark.parametrize("size", KERNEL_SIZES, ids=str)
def test_every_kernel_size_strided(
    size: int | oracles.Triple, stride: int | oracles.Triple, device: torch.device
) -> None:
    layer = Layer.of(size, stride, (0, 2, 1), 1)
    coords = clouds.scatter("small", 31, (7, 6, 7))
    relation = oracles.relate(coords, layer)
    assert len(relation.coords)
    index = build_index(to(device, coords), layer.reach)
    found, _ = find_taps(index, to(device, relation.coords), geometry_of(layer))
    np.testing.assert_array_equal(rows_of(found).T, relation.table)


def test_given_coarse_sites_far_outside_the_box_meet_nothing(device: torch.device) -> None:
    """A key that carried into another column would meet a site that is not there."""
    geometry = Geometry.strided((3, 3, 3), (2, 2, 2), ONES, ONES, "spconv")
    fine = clouds.block()
    index = build_index(to(device, fine), geometry.reach)
    low, high = -(1 << 31), (1 << 31) - 1
    far = [
        [0, x, y, z] for x, y, z in itertools.product((low, -30, 2, 30, high), repeat=3)
    ]  # every corner and face, and one site in the middle
    far += [[b, 2, 2, 2] for b in (low, -1, 1, high)]
    found = rows_of(find_taps(index, to(device, far), geometry)[0])
    np.testing.assert_array_equal(found, search(fine, np.array(far), geometry))
    inside = far.index([0, 2, 2, 2])
    assert (found[:, inside] >= 0).any() and (np.delete(found, inside, 1) < 0).all()


def test_a_margin_of_neighbouring_boxes_meets_nothing(device: torch.device) -> None:
    """Sites just beyond the box, on the opposite side of which there are voxels."""
    geometry = Geometry.strided((3, 3, 3), (1, 1, 1), ONES, ONES, "spconv")
    fine = clouds.block()  # from (3, 3, 3) to (7, 6, 7)
    around = np.array([*itertools.product([0], (1, 2, 8, 9), (1, 2, 7, 8), (1, 2, 8, 9))])
    index = build_index(to(device, fine), geometry.reach)
    found = rows_of(find_taps(index, to(device, around), geometry)[0])
    np.testing.assert_array_equal(found, search(fine, around, geometry))


def test_a_reach_beyond_a_margin_that_was_given_up(device: torch.device) -> None:
    """In a box of almost 2^62 cells, a tap at z + 3 is the key of the voxel at y + 1."""
    far = to(device, [[0, 0, 0, 0], [0, 0, 1, 0], [0, (1 << 30) - 1, (1 << 29) - 1, 0]])
    index = build_index(far, (1, 1, 0))
    find_taps(index, None, Geometry.submanifold((1, 2, 1), ONES))
    with raises_on_data(ValueError, "fewer than 2\\^62"):
        find_taps(index, None, Geometry.submanifold((1, 1, 7), ONES))


def test_coarse_sites_may_be_none(device: torch.device) -> None:
    geometry = geometries(3)[4]
    index = build_index(to(device, cloud(3, "many")), geometry.reach)
    found, keys = find_taps(index, to(device, cloud(3, "empty")), geometry)
    assert found.shape == (27, 0) and keys is not None and keys.keys.shape == (0,)


@pytest.mark.parametrize("volume", [1, 3, 8, 27, 33, 125])
def test_invert_taps_exchanges_the_ends(volume: int, device: torch.device) -> None:
    geometry = Geometry.strided((volume,), (1,), (0,), (1,), "spconv")
    table = random_table(device, volume, 30, 21)
    inverse, keys = invert_taps(table, 30, geometry)
    want = np.full((volume, 30), -1)
    for k, row in enumerate(table.tolist()):
        for m, i in enumerate(row):
            if i >= 0:
                want[k, i] = m
    np.testing.assert_array_equal(rows_of(inverse), want)
    twin, _ = reference.invert_taps(table.cpu(), 30, geometry)
    assert torch.equal(inverse.cpu(), twin)
    assert_same_keys(keys, row_sort_keys(inverse, key_bits(geometry, device)))
    assert torch.equal(invert_taps(inverse, 21, geometry)[0], table)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 0), (4, 0), (0, 4), (1, 1)])
def test_invert_nothing(inputs: int, outputs: int, device: torch.device) -> None:
    geometry = geometries(3)[4]
    table = random_table(device, 27, inputs, outputs, 1.0)
    inverse, keys = invert_taps(table, inputs, geometry)
    assert inverse.shape == (27, inputs) and int((inverse >= 0).sum()) == int((table >= 0).sum())
    assert keys is not None and keys.keys.shape == (inputs,)
