"""Kernels that bring points together by voxel, against their twins in PyTorch: bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests._triton.test_points import on_gpu, randint, randn
from torchsparse._flags import Complaint
from torchsparse._ops import voxels as ops
from torchsparse._reference import voxels as reference
from torchsparse._triton import voxels
from torchsparse._triton.launch import compile_ahead
from torchsparse.utils import voxelize_points
from torchsparse.utils.quantize import sparse_quantize

SIZES = (0.1, 0.25, 3.0, 0.7)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compare(
    points: Tensor,
    voxel_size: tuple[float, ...],
    batch: Tensor | None = None,
) -> ops.VoxelGroups:
    """The kernels' groups, once they are those of the reference."""
    found = voxels.group_points(points, voxel_size, batch)
    assert found is not None
    want = reference.group_points(points, voxel_size, batch)
    for name, ours, theirs in zip(want._fields, found, want):
        assert ours.dtype == theirs.dtype and ours.is_contiguous(), name
        assert torch.equal(ours, theirs), name
    return want


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 700, 2100])
def test_groups(n: int, axes: int, batched: bool, device: torch.device) -> None:
    """Within one block of points, at its edges and over several; many points to a voxel, few."""
    points = randn(n, axes, dtype=torch.float32, device=device) * 0.4
    batch = randint(-1, 3, (n,), device) if batched else None
    groups = compare(points, SIZES[:axes], batch)
    assert n < 700 or 3 < len(groups.coords)
    assert n < 700 or (groups.coords < 0).any()


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2048, 2049])
def test_edges_of_blocks(n: int, device: torch.device) -> None:
    """A voxel of its own for each point, all in one, a change at the edge."""
    number = torch.arange(n, device=device)[:, None]
    assert len(compare(number.flip(0), (1.0,)).coords) == n
    assert len(compare(number * 0 - 5, (1.0,)).coords) == 1
    assert len(compare(number // 1024, (1.0,)).coords) == math.ceil(n / 1024)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    points = (randn(300, 3, dtype=torch.float32, device=device) * 20).abs().to(dtype)
    compare(points, (3.0, 0.3, 7.0))
    if not dtype.is_floating_point:
        compare(points, (2.0, 2.5, 3.0), points[:, 1])


def test_the_border_of_a_cell_is_that_of_float64(device: torch.device) -> None:
    """k * 0.1 in float64, its neighbours, and in float32; products with 10 round otherwise."""
    steps = torch.arange(-300, 300, dtype=torch.float64, device=device)
    border = steps * 0.1
    up, down = (torch.nextafter(border, torch.full_like(border, end)) for end in (99, -99))
    compare(torch.stack([border, up, down], 1), (0.1, 0.1, 0.1))
    compare(border.float()[:, None], (0.1,))
    compare(steps[:, None] / 3, (1 / 3,))


def test_integers_beyond_float64(device: torch.device) -> None:
    """2^53 + 1 is rounded before the division."""
    points = torch.tensor([[2**53 + 1], [2**53], [-(2**60) - 3], [2**62 - 1]], device=device)
    compare(points, (2.0**32,))


def test_columns_apart(device: torch.device) -> None:
    wide = randn(400, 9, dtype=torch.float32, device=device)
    batch = randint(0, 3, (400, 5), device, torch.int32)[:, 2]
    compare(wide[:, 1:7:2], (0.5, 0.5, 0.5), batch)
    compare(wide.t()[:3].t()[::2], (0.5, 1.0, 0.5))
    compare(wide[:1, :3].expand(50, 3), (0.5, 0.5, 0.5))
    compare(wide.view(-1)[1:1201].view(-1, 3), (0.5, 0.5, 0.5))  # not aligned


def test_corners_of_int32(device: torch.device) -> None:
    """One axis fills the range; two of them give a box below 2^62 cells."""
    ends = torch.tensor([[2**31 - 1, 0], [-(2**31), 2**29], [5, 7], [2**31 - 1, 0]], device=device)
    compare(ends, (1.0, 1.0))
    compare(ends.double(), (1.0, 1.0))
    compare(ends[:, :1].double() + 0.5, (1.0,))


# ------------------------------------------------------------------ what the reference does
def left_over(device: torch.device) -> dict[str, tuple[Tensor, tuple[float, ...], Tensor | None]]:
    far = torch.tensor([[-(2**31)] * 3, [2**31 - 1] * 3, [0, 1, 2], [0, 1, 2]], device=device)
    five = randint(0, 3, (60, 5), device)
    return {
        "no points": (torch.zeros((0, 3), device=device), (1.0, 1.0, 1.0), None),
        "no points, a batch": (five[:0, :3], (1.0, 1.0, 1.0), five[:0, 0]),
        "five axes": (five, (1.0,) * 5, None),
        "booleans": (five[:, :3] > 1, (1.0, 0.5, 0.5), None),
        "a huge box": (far, (1.0, 1.0, 1.0), None),
        "a huge box with samples": (far[:, :1], (1.0,), far[:, 0]),
        "2^62 cells": (torch.tensor([[0, 0], [2**31 - 1, 2**31 - 1]], device=device), (1.0,) * 2,
                       None),
    }  # fmt: skip


@pytest.mark.parametrize("name", left_over(torch.device("cpu")))
def test_the_rest_is_left_to_the_reference(name: str, kernels, device: torch.device) -> None:
    points, sizes, batch = left_over(device)[name]
    assert voxels.group_points(points, sizes, batch) is None
    got = ops.group_points(points, sizes, batch)
    want = reference.group_points(points, sizes, batch)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31) - 1, 1e300, -1e300], ids=str
)
@pytest.mark.parametrize("place", [0, 1500])
def test_cells_outside_int32(value: float, place: int, kernels, device: torch.device) -> None:
    points = randn(1600, 2, dtype=torch.float64, device=device)
    points[place, 1] = value
    with pytest.raises(ValueError, match="finite and fit into 32-bit integers") as want:
        reference.group_points(points, (0.5, 1.0), None)
    with pytest.raises(ValueError, match="finite and fit into 32-bit integers") as got:
        ops.group_points(points, (0.5, 1.0))
    assert str(got.value) == str(want.value)


def test_a_sample_outside_int32(kernels, device: torch.device) -> None:
    points = torch.zeros((3, 1), device=device)
    batch = torch.tensor([0, 2**31, 1], device=device)
    with pytest.raises(ValueError, match=r"from \[0.0, 0.0\] to \[2147483648.0, 0.0\]"):
        ops.group_points(points, (1.0,), batch)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_earlier_complaints_come_first(value: float, monkeypatch, device: torch.device) -> None:
    """And are told once. A word of the device stands for the GPU's."""
    word = torch.tensor(Complaint.INDEX.bit, device=device)
    monkeypatch.setattr(voxels, "flag_word", lambda where: word)
    points = torch.full((5, 3), value, device=device)
    with pytest.raises(ValueError, match="every index must be smaller"):
        voxels.group_points(points, (1.0, 1.0, 1.0), None)
    assert word.item() == 0
    again = voxels.group_points(points, (1.0, 1.0, 1.0), None)
    assert (again is None) == math.isnan(value)


@pytest.mark.parametrize("batched", [False, True])
def test_compiling_ahead_gets_true_voxels(batched: bool, kernels, device: torch.device) -> None:
    """Nothing is launched then, and PyTorch reads rows by what comes out."""
    points = randn(1500, 3, dtype=torch.float32, device=device)
    batch = randint(0, 3, (1500,), device) if batched else None
    want = reference.group_points(points, (0.3, 0.3, 0.3), batch)
    got = []
    call = lambda: got.append(ops.group_points(points, (0.3, 0.3, 0.3), batch))  # noqa: E731
    assert compile_ahead([call]) == 4  # all: one of them twice
    assert all(map(torch.equal, got[0], want))


# ------------------------------------------------------------------ votes
def votes_agree(labels: Tensor, groups: ops.VoxelGroups, *ignored: int) -> None:
    for one in ignored:
        got = voxels.majority(labels, one, groups)
        want = reference.majority(labels, one, groups)
        assert got.dtype == want.dtype == torch.int64 and torch.equal(got, want), one


@pytest.mark.parametrize("n", [0, 1, 127, 129, 1500])
def test_votes(n: int, device: torch.device) -> None:
    """Voxels of many points and of few, ties, voxels where nobody votes."""
    cells = randint(0, 1 + n // 4, (n, 1), device) * randint(0, 2, (n, 1), device, seed=2)
    groups = reference.group_points(cells, (1.0,), None)
    votes_agree(randint(-3, 4, (n,), device, seed=1), groups, -1, 2, -100, 2**40, -(2**63))


@pytest.mark.parametrize("size", [voxels.SHORT - 1, voxels.SHORT, voxels.SHORT + 1])
def test_voxels_around_the_longest_short_one(size: int, device: torch.device) -> None:
    cells = torch.arange(40 * size, device=device)[:, None] // size
    groups = reference.group_points(cells.flip(0), (1.0,), None)
    votes_agree(randint(0, 5, (40 * size,), device), groups, 0, 4, -100)


def test_labels_of_all_sizes(device: torch.device) -> None:
    """Equal in their low 32 bits, at both ends of int64, each its own, with gaps in memory."""
    groups = reference.group_points(randint(0, 9, (400, 1), device), (1.0,), None)
    few = randint(-2, 2, (400,), device, seed=1)
    for factor in (2**32, 2**61, -(2**31)):
        votes_agree(few * factor, groups, factor, 0, -2 * factor)
    ends = torch.tensor([-(2**63), 2**63 - 1, -1, 0], device=device)[few + 2]
    votes_agree(ends, groups, 2**63 - 1, -(2**63), 0)
    each = torch.randperm(400, generator=torch.Generator().manual_seed(0)).to(device)
    votes_agree(each, groups, 399)
    votes_agree(torch.stack([few, each], 1)[:, 0], groups, 1)


def test_all_vote_in_one_voxel(device: torch.device) -> None:
    groups = reference.group_points(torch.zeros((700, 1), device=device), (1.0,), None)
    number = torch.arange(700, device=device)
    for labels in (number, number * 0 + 5, number % 2, number // 350):
        votes_agree(labels, groups, 5, 0, -1)


# ------------------------------------------------------------------ the functions on top
def test_quantize_and_voxelize(kernels, device: torch.device) -> None:
    points = randn(500, 3, dtype=torch.float32, device=device)
    feats = randn(500, 4, dtype=torch.float32, device=device, seed=1)
    labels = randint(-1, 4, (500,), device, torch.int32)
    batch = randint(0, 2, (500,), device, torch.uint8)
    coords, index, inverse = sparse_quantize(points, 0.4, return_index=True, return_inverse=True)
    assert torch.equal(coords[inverse], (points.double() / 0.4).floor().int())
    assert torch.equal(inverse[index], torch.arange(len(coords), device=device))
    found = voxelize_points(points, 0.4, feats=feats, labels=labels, batch=batch, reduce="first")
    assert torch.equal(found.feats, feats[found.index])
    assert torch.equal(found.coords[found.inverse][:, 0], batch.int())
    assert found.counts.sum() == 500 and found.labels.dtype == torch.int32


@on_gpu
def test_many_points_and_the_same_bits_again(device: torch.device) -> None:
    points = randn(300_000, 3, dtype=torch.float32, device=device) * 20
    batch = randint(0, 4, (300_000,), device)
    first = compare(points, (0.05, 0.1, 0.2), batch)
    for _ in range(3):
        found = voxels.group_points(points, (0.05, 0.1, 0.2), batch)
        assert found is not None and all(map(torch.equal, found, first))
    for cell in (0.05, 4.0, 1000.0):  # few points to a voxel, many, nearly all
        groups = compare(points, (cell, cell, cell), batch)
        labels = randint(-5, 40, (300_000,), device, seed=3)
        votes_agree(labels, groups, -1)
        want = voxels.majority(labels, -1, groups)
        assert all(torch.equal(voxels.majority(labels, -1, groups), want) for _ in range(3))
