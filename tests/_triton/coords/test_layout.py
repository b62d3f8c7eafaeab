"""Key layouts that are decided on the device, and complaints about values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests._triton.kit import NDIMS, cloud, rows_of, to
from tests.cases import raises_on_data
from torchsparse import _flags
from torchsparse._flags import Complaint
from torchsparse._reference import coords as reference
from torchsparse._triton.coords import build_index, check_sites
from torchsparse._triton.coords.layout import numbers

RANGE = (3, 20, 20, 20)


def parts(layout: torch.Tensor, ndim: int) -> dict[str, np.ndarray]:
    values = rows_of(layout)
    assert len(values) == numbers(ndim)
    names = ("origin", "stride", "lower", "upper")
    return {name: values[i * (ndim + 1) :][: ndim + 1] for i, name in enumerate(names)} | {
        "margin": values[-2], "cells": values[-1]
    }  # fmt: skip


@pytest.mark.parametrize("name", ["empty", "single", "many"])
@pytest.mark.parametrize("ndim", NDIMS)
def test_the_layout_is_that_of_the_reference(ndim: int, name: str, device: torch.device) -> None:
    coords = to(device, cloud(ndim, name))
    reach = (2, 1, 0, 4)[:ndim]
    got = parts(build_index(coords, reach).layout, ndim)
    want = reference.build_index(coords.cpu(), reach)
    np.testing.assert_array_equal(got["origin"], rows_of(want.layout.origin))
    np.testing.assert_array_equal(got["stride"], rows_of(want.layout.stride))
    np.testing.assert_array_equal(got["lower"], rows_of(want.lower))
    np.testing.assert_array_equal(got["upper"], rows_of(want.upper))
    assert got["margin"] == want.margin[0]
    assert got["cells"] == np.prod(rows_of(want.layout.extent))


def test_more_rows_than_one_program_reads(device: torch.device) -> None:
    coords = np.zeros((700, 2), np.int32)
    coords[:, 1] = np.random.default_rng(0).permutation(700) - 300
    got = parts(build_index(to(device, coords), (0,)).layout, 1)
    assert (got["lower"][1], got["upper"][1]) == (-300, 399)


def test_a_wide_kernel_widens_the_box(device: torch.device) -> None:
    index = build_index(to(device, cloud(2, "single")), (3, 30))
    assert index.margin == (30, 30) and parts(index.layout, 2)["margin"] == 30


def test_a_huge_box_gives_up_the_usual_margin(device: torch.device) -> None:
    """2^30 x 2^29 x 1 cells fit into 2^62 with the kernel's reach, not with 8 cells around."""
    far = [[0, 0, 0, 0], [0, (1 << 30) - 1, (1 << 29) - 1, 0]]
    got = parts(build_index(to(device, far), (1, 1, 0)).layout, 3)
    assert got["margin"] == 1 and 1 << 59 < got["cells"] < 1 << 62


@pytest.mark.parametrize(
    ("upper", "fits"),
    [
        ((1 << 30, (1 << 31) - 1), True),
        (((1 << 31) - 1, (1 << 31) - 2), True),  # 2^31 (2^31 - 1) cells
        (((1 << 31) - 1, (1 << 31) - 1), False),  # 2^62
    ],
    ids=str,
)
def test_two_to_the_62_cells_are_too_many(
    upper: tuple[int, int], fits: bool, device: torch.device
) -> None:
    coords = to(device, [[0, 0, 0], [0, *upper]])
    if fits:
        build_index(coords, (0, 0))
        _flags.raise_pending(device)
        return
    with raises_on_data(ValueError, "fewer than 2\\^62"):
        build_index(coords, (0, 0))
    with pytest.raises(ValueError, match="fewer than 2\\^62"):
        reference.build_index(coords.cpu(), (0, 0))


def test_far_more_cells_than_int64_counts(device: torch.device) -> None:
    """2^128 cells: the exact product wraps around, the approximate one does not."""
    low, high = -(1 << 31), (1 << 31) - 1
    with raises_on_data(ValueError, "fewer than 2\\^62"):
        build_index(to(device, [[0] + [low] * 4, [0] + [high] * 4]), (2,) * 4)


@pytest.mark.parametrize(
    ("rows", "spatial_range", "allow_negative", "complaint"),
    [
        ([], RANGE, False, None),
        ([[0, 0, 0, 0]], RANGE, False, None),
        ([[2, 19, 19, 19]], RANGE, False, None),
        ([[0, 0, 0, 20]], RANGE, False, Complaint.RANGE),
        ([[0, 0, 0, 0], [0, 20, 0, 0]], RANGE, False, Complaint.RANGE),
        ([[3, 0, 0, 0]], RANGE, False, Complaint.RANGE),
        ([[0, 100, 0, 0]], None, False, None),
        ([[0, 0, -1, 0]], None, False, Complaint.NEGATIVE),
        ([[0, 0, -1, 0]], RANGE, True, None),
        ([[-1, 0, 0, 0]], None, True, Complaint.BATCH),
        ([[0, 0, 0, 0]], (3, 1 << 40, 1 << 40, 1 << 40), False, None),
    ],
    ids=str,
)  # fmt: skip
def test_check_sites_complains_as_the_reference_does(
    rows: Sequence[Sequence[int]],
    spatial_range: tuple[int, ...] | None,
    allow_negative: bool,
    complaint: Complaint | None,
    device: torch.device,
) -> None:
    coords = to(device, np.array(rows, np.int32).reshape(-1, 4))
    index = build_index(coords, (2, 2, 2))
    check_sites(index, spatial_range, allow_negative)
    if complaint is None:
        _flags.raise_pending(device)
        return
    with pytest.raises(ValueError) as caught:
        _flags.raise_pending(device)
    assert str(caught.value).startswith(complaint.value)
    _flags.raise_pending(device)  # said once
    with pytest.raises(ValueError) as caught:
        reference.check_sites(
            reference.build_index(coords.cpu(), (2, 2, 2)), spatial_range, allow_negative
        )
    assert str(caught.value).startswith(complaint.value)


@pytest.mark.parametrize("ndim", NDIMS)
def test_every_axis_is_checked(ndim: int, device: torch.device) -> None:
    for axis in range(1, 1 + ndim):
        coords = np.zeros((1, 1 + ndim), np.int32)
        coords[0, axis] = 7
        index = build_index(to(device, coords), (0,) * ndim)
        limits = [1] + [8] * ndim
        check_sites(index, tuple(limits), False)
        _flags.raise_pending(device)
        limits[axis] = 7
        check_sites(index, tuple(limits), False)
        with pytest.raises(ValueError, match="spatial_range"):
            _flags.raise_pending(device)


def test_the_word_collects_every_complaint(device: torch.device) -> None:
    index = build_index(to(device, [[-1, -1, 5, 5]] * 2), (0, 0, 0))
    check_sites(index, (1, 5, 5, 5), False)
    word = _flags.pending_word(device)
    found = {c for c in Complaint if int(word) & c.bit}
    word.zero_()
    wanted = {Complaint.DUPLICATE, Complaint.BATCH, Complaint.NEGATIVE, Complaint.RANGE}
    assert found == wanted
