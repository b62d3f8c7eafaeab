"""Levels: the index of given coordinates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests import clouds
from tests._triton.kit import NDIMS, cloud, rows_of, to
from tests.cases import raises_on_data
from torchsparse._geometry import Geometry
from torchsparse._triton.conv.order import key_bits
from torchsparse._triton.coords import build_index
from torchsparse._triton.coords.create import _backwards
from torchsparse._triton.coords.index import new_table, relation_of


@pytest.mark.parametrize("name", ["empty", "single", "many"])
@pytest.mark.parametrize("ndim", NDIMS)
def test_every_row_is_found_under_its_key(ndim: int, name: str, device: torch.device) -> None:
    coords = cloud(ndim, name)
    index = build_index(to(device, coords), (2,) * ndim)
    keys, values, layout = map(rows_of, (index.keys, index.values, index.layout))
    origin, stride = layout[: ndim + 1], layout[ndim + 1 : 2 * ndim + 2]
    used = keys >= 0
    assert sorted(values[used]) == list(range(len(coords)))
    np.testing.assert_array_equal(((coords[values[used]] - origin) * stride).sum(1), keys[used])


def test_coordinates_may_be_a_view(device: torch.device) -> None:
    coords = to(device, cloud(3, "many"))
    wide = torch.zeros((coords.shape[0], 8), dtype=torch.int32, device=device)
    wide[:, ::2] = coords
    index = build_index(wide[:, ::2], (2, 2, 2))
    assert torch.equal(index.keys, build_index(coords, (2, 2, 2)).keys)


def test_duplicates_are_complained_about(device: torch.device) -> None:
    with raises_on_data(ValueError, "must be unique rows"):
        index = build_index(to(device, clouds.duplicates()), (2, 2, 2))
        # The lowest row answers for a key, whoever came first.
        values = rows_of(index.values)[rows_of(index.keys) >= 0]
        assert sorted(values) == list(range(61))


def test_equal_rows_far_apart_are_duplicates(device: torch.device) -> None:
    """In different programs."""
    coords = np.zeros((400, 3), np.int32)
    coords[:, 1] = np.arange(400)
    coords[399] = coords[3]
    with raises_on_data(ValueError, "must be unique rows"):
        build_index(to(device, coords), (0, 0))


@pytest.mark.parametrize("make", [relation_of, key_bits, _backwards])
def test_what_graphs_read_is_never_freed(
    make: Callable[..., object], device: torch.device
) -> None:
    """However many geometries come after: a captured kernel has the address."""
    many = [Geometry.submanifold((3, 3, 3), (step, 1, 1)) for step in range(1, 1101)]
    first = make(many[0], device)
    for geometry in many:
        make(geometry, device)
    assert make(many[0], device) is first


@pytest.mark.parametrize("ndim", NDIMS)
@pytest.mark.parametrize("room", [0, 1, 17, 1000])
def test_what_is_cleared_comes_in_fours(room: int, ndim: int, device: torch.device) -> None:
    """Kernels clear four words at a time, and would leave the rest of others as they are."""
    like = torch.zeros((1, 1 + ndim), dtype=torch.int32, device=device)
    sizes = [len(part) for part in new_table(room, ndim, like)]
    assert all(size > 0 and size % 4 == 0 for size in sizes), sizes
