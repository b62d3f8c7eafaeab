"""voxelize_points against a dictionary of cells."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.utils import voxelize_points
from torchsparse.utils.quantize import sparse_quantize
from torchsparse.utils.voxelize import VoxelizedPoints

F64 = torch.float64
REDUCE = {
    "mean": lambda rows: np.mean(rows, 0),
    "sum": lambda rows: np.sum(rows, 0),
    "max": lambda rows: np.max(rows, 0),
    "first": lambda rows: rows[0],
}


def example(n: int = 400, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "points": rng.normal(0, 2, (n, 3)),
        "feats": rng.normal(size=(n, 3)),
        "labels": rng.integers(-2, 4, n),
        "batch": rng.integers(0, 3, n) * 2,  # samples 1 and 3 are empty
    }


def search(
    points: Any, voxel_size: Any, feats: Any, labels: Any, batch: Any, reduce: str, ignored: int
) -> VoxelizedPoints:
    cells: dict[tuple[int, ...], list[int]] = {}
    for n, point in enumerate(np.asarray(points, np.float64) / np.asarray(voxel_size, np.float64)):
        cell = tuple(int(np.floor(c)) for c in point)
        cells.setdefault(cell if batch is None else (int(batch[n]), *cell), []).append(n)
    coords = sorted(cells)
    rows = [cells[cell] for cell in coords]
    inverse = np.zeros(len(points), np.int64)
    for m, members in enumerate(rows):
        inverse[members] = m
    votes = []
    for members in rows:
        counter = Counter(int(labels[n]) for n in members if labels[n] != ignored)
        votes.append(min(counter, key=lambda v: (-counter[v], v)) if counter else ignored)
    columns = 3 + (batch is not None)
    return VoxelizedPoints(
        np.array(coords, np.int32).reshape(-1, columns),
        np.array([REDUCE[reduce](feats[members]) for members in rows]).reshape(-1, 3),
        np.array(votes, np.int64),
        np.array([members[0] for members in rows], np.int64),
        inverse,
        np.array([len(members) for members in rows], np.int64),
    )


def compare(got: VoxelizedPoints, want: VoxelizedPoints) -> None:
    for name, ours, theirs in zip(got._fields, got, want):
        ours = ours.cpu().numpy() if isinstance(ours, torch.Tensor) else ours
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if name == "feats":  # sums of up to 30 numbers in another order
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        else:
            np.testing.assert_array_equal(ours, theirs, name)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("voxel_size", [1, 0.7, (0.5, 2, 1.5)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 401])
def test_equals_a_search(n: int, reduce: str, batched: bool, voxel_size: Any, device) -> None:
    x = example(n)
    if not batched:
        x["batch"] = None
    want = search(voxel_size=voxel_size, reduce=reduce, ignored=-1, **x)
    compare(voxelize_points(voxel_size=voxel_size, reduce=reduce, ignore_label=-1, **x), want)
    moved: dict[str, Any] = {
        k: None if v is None else torch.from_numpy(v).to(device) for k, v in x.items()
    }
    got = voxelize_points(voxel_size=voxel_size, reduce=reduce, ignore_label=-1, **moved)
    assert all(value.device == device or value.device.type == device.type for value in got)
    compare(got, want)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 30), st.just(3)), elements=st.floats(-4, 4)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(REDUCE)),
)
def test_equals_a_search_everywhere(points: Any, seed: int, reduce: str) -> None:
    rng = np.random.default_rng(seed)
    n = len(points)
    feats, labels = rng.normal(size=(n, 3)), rng.integers(0, 3, n)
    got = voxelize_points(points, 3.0, feats=feats, labels=labels, reduce=reduce, ignore_label=1)
    compare(got, search(points, 3.0, feats, labels, None, reduce, 1))


def test_a_small_example_by_hand() -> None:
    """The one in the docstring, with a tie of labels."""
    v = voxelize_points(
        np.array([[0.2], [0.9], [0.4]]),
        0.5,
        feats=np.array([[1.0], [5.0], [2.0]]),
        labels=np.array([7, 3, 6], np.uint8),
    )
    assert (v.coords.tolist(), v.index.tolist(), v.inverse.tolist()) == (
        [[0], [1]], [0, 1], [0, 1, 0],
    )  # fmt: skip
    assert (v.counts.tolist(), v.feats.tolist()) == ([2, 1], [[1.5], [5.0]])
    assert v.labels.tolist() == [6, 3] and v.labels.dtype == np.uint8


def test_only_what_was_given_comes_back(device: torch.device) -> None:
    v = voxelize_points(torch.rand(50, 3, device=device), 0.3)
    assert v.feats is None and v.labels is None
    again = sparse_quantize(torch.zeros(3, 3), return_index=True, return_inverse=True)
    assert [a.tolist() for a in again] == [[[0, 0, 0]], [0], [0, 0, 0]]


def test_coordinates_and_maps_are_those_of_sparse_quantize(device: torch.device) -> None:
    points = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)).to(device) * 9
    v = voxelize_points(points, 0.7)
    coords, index, inverse = sparse_quantize(points, 0.7, return_index=True, return_inverse=True)
    assert torch.equal(v.coords, coords)
    assert torch.equal(v.index, index) and torch.equal(v.inverse, inverse)


def test_a_network_takes_the_result(device: torch.device) -> None:
    x: dict[str, Any] = {k: torch.from_numpy(v).to(device) for k, v in example().items()}
    x["points"] -= x["points"].amin(0)
    v = voxelize_points(voxel_size=0.5, **x)
    y = spnn.Conv3d(3, 4, 3).double().to(device)(SparseTensor(v.feats, v.coords))
    assert y.feats.shape == (len(v.coords), 4) and v.coords[:, 0].unique().tolist() == [0, 2, 4]


@pytest.mark.parametrize("reduce", REDUCE)
def test_gradients(reduce: str, device: torch.device) -> None:
    x = example(30)
    points = torch.from_numpy(x["points"]).to(device)
    feats = torch.from_numpy(x["feats"]).to(device).requires_grad_()
    assert len(voxelize_points(points, 2).coords) < 25

    def compute(feats: torch.Tensor) -> torch.Tensor:
        return voxelize_points(points, 2, feats=feats, reduce=reduce).feats

    assert torch.autograd.gradcheck(compute, (feats,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_half_numbers_are_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    """3000 ones end at 2048 in float16, at 256 in bfloat16."""
    feats = torch.ones(3000, 1, dtype=dtype, device=device)
    zeros = torch.zeros(3000, 3, device=device)
    for reduce, want in (("sum", torch.tensor(3000.0).to(dtype).item()), ("mean", 1.0)):
        got = voxelize_points(zeros, feats=feats, reduce=reduce).feats
        assert got.dtype == dtype and got.item() == want


def test_many_points_in_few_voxels(device: torch.device) -> None:
    """Long segments are summed in chunks."""
    rng = np.random.default_rng(0)
    points = np.floor(rng.uniform(0, 2, (20000, 3)))
    feats, labels = rng.normal(size=(20000, 3)), rng.integers(0, 5, 20000)
    moved = [torch.from_numpy(a).to(device) for a in (points, feats, labels)]
    got = voxelize_points(moved[0], feats=moved[1], labels=moved[2])
    compare(got, search(points, 1, feats, labels, None, "mean", -100))


def test_cells_spread_over_all_of_int32(device: torch.device) -> None:
    """The box has 2^96 cells, too many for one key."""
    rng = np.random.default_rng(2)
    points = rng.choice([-(2**31), -5, 0, 3, 2**31 - 1], (200, 3)).astype(np.float64)
    x = example(200)
    want = search(points, 1, x["feats"], x["labels"], x["batch"], "mean", 0)
    moved: dict[str, Any] = {k: torch.from_numpy(v).to(device) for k, v in x.items()}
    moved["points"] = torch.from_numpy(points).to(device)
    compare(voxelize_points(ignore_label=0, **moved), want)


def test_labels_that_float64_cannot_tell_apart() -> None:
    """Their distance, read from the device as such, is too small; the votes are right."""
    labels = np.array([2**60, 2**60 + 90, 2**60 + 90, 2**60 + 1])
    v = voxelize_points(np.array([[0.0], [0], [0], [1]]), labels=labels)
    assert v.labels.tolist() == [2**60 + 90, 2**60 + 1]


def test_labels_far_from_zero() -> None:
    labels = np.array([2**60, 2**60, 2**60 - 1])
    v = voxelize_points(np.zeros((3, 3)), labels=labels)
    assert v.labels.tolist() == [2**60] and v.labels.dtype == np.int64


def test_labels_far_apart(device: torch.device) -> None:
    """Also all of int64."""
    x = example()
    for labels in (x["labels"] * 2**61, np.where(x["labels"] > 0, 2**63 - 1, -(2**63))):
        for ignored in (2**61, 2**63 - 1, -100):
            points, votes = (torch.from_numpy(a).to(device) for a in (x["points"], labels))
            got = voxelize_points(points, 0.7, feats=points, labels=votes, ignore_label=ignored)
            want = search(x["points"], 0.7, x["points"], labels, None, "mean", ignored)
            compare(got, want)


def test_the_order_of_points_does_not_matter(device: torch.device) -> None:
    x: dict[str, Any] = {k: torch.from_numpy(v).to(device) for k, v in example().items()}
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).to(device)
    straight = voxelize_points(**x)
    mixed = voxelize_points(**{k: v[order] for k, v in x.items()})
    torch.testing.assert_close(mixed.feats, straight.feats, rtol=1e-12, atol=1e-12)
    for name in ("coords", "labels", "counts"):
        assert torch.equal(getattr(mixed, name), getattr(straight, name))
    assert torch.equal(mixed.inverse, straight.inverse[order])


P = np.zeros((4, 3))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"points": np.zeros(4)}, ValueError, r"`points` must have shape \[N, 3\], got \[4\]"),
        ({"voxel_size": 0}, ValueError, "one positive number or three, got 0"),
        ({"voxel_size": (1, 1)}, ValueError, "one positive number or three"),
        ({"reduce": "median"}, ValueError, "'mean', 'sum', 'max', 'first', got 'median'"),
        ({"feats": np.zeros((4, 1), int)}, TypeError, "`feats` must be floating, got torch.int64"),
        ({"feats": np.zeros(4)}, ValueError, r"`feats` must have shape \[N, C\], got \[4\]"),
        ({"feats": np.zeros((3, 1))}, ValueError, r"shape \[4, C\], got \[3, 1\]"),
        ({"labels": np.zeros(4)}, TypeError, "`labels` must hold integers, got torch.float64"),
        ({"labels": np.zeros((4, 1), int)}, ValueError, r"shape \[4\], got \[4, 1\]"),
        ({"batch": np.zeros(3, int)}, ValueError, r"`batch` must have shape \[4\], got \[3\]"),
        ({"points": np.full((4, 3), np.nan)}, ValueError, "must be finite and fit into 32-bit"),
        ({"points": np.full((4, 3), 2.0**31)}, ValueError, "must be finite and fit into 32-bit"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_refusals(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        voxelize_points(**{"points": P, **kwargs})


def test_an_ignored_label_of_numpy(device: torch.device) -> None:
    points, labels = torch.zeros(3, 3, device=device), torch.tensor([9, 9, 4], device=device)
    got = voxelize_points(points, labels=labels, ignore_label=np.int64(9))  # pyright: ignore
    assert got.labels.tolist() == [4]
    with pytest.raises(TypeError):
        voxelize_points(points, labels=labels, ignore_label=9.0)  # pyright: ignore
