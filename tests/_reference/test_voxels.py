"""Groups of points and votes, by the examples of the docstrings and by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchsparse._reference.voxels import VoxelGroups, group_points, majority


def test_the_example_of_the_record() -> None:
    groups = group_points(torch.tensor([[5], [2], [5]]), (1.0,), None)
    want = VoxelGroups(
        torch.tensor([[2], [5]], dtype=torch.int32),
        torch.tensor([1, 0, 2]),
        torch.tensor([0, 1, 3, 3]),
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 0]),
    )
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(groups, want))


@pytest.mark.parametrize("n", [0, 1, 500])
def test_groups_are_those_of_numpy(n: int) -> None:
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) * 5
    batch = torch.arange(n) % 3 - 1
    groups = group_points(points, (1.0, 0.5, 2.0), batch)
    cells = np.floor(points.double().numpy() / [1.0, 0.5, 2.0]).astype(np.int32)
    cells = np.concatenate([batch.numpy()[:, None].astype(np.int32), cells], 1)
    coords, index, inverse, counts = np.unique(
        cells, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    np.testing.assert_array_equal(groups.coords, coords)
    np.testing.assert_array_equal(groups.inverse, inverse.reshape(-1))
    np.testing.assert_array_equal(groups.counts(), counts)
    np.testing.assert_array_equal(groups.starts.diff()[:-1], counts)
    np.testing.assert_array_equal(groups.first, index)
    np.testing.assert_array_equal(groups.order[groups.starts[:-2]], index)
    np.testing.assert_array_equal(groups.order, np.argsort(inverse.reshape(-1), kind="stable"))


@pytest.mark.parametrize("factor", [1, 2**20, 2**29, 2**59])
@pytest.mark.parametrize("lowest", [-5, 0, 2**40, -(2**63), 2**63 - 12])
def test_votes_are_those_of_a_search(lowest: int, factor: int) -> None:
    """Keys of 32 bits, of 64, ranks; also where an ignored label looks like another in 32 bits."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randint(0, 40, (300, 1), generator=generator)
    labels = torch.randint(0, 12, (300,), generator=generator) * factor + lowest  # may wrap
    groups = group_points(points, (1.0,), None)
    third = int(labels.unique()[3])
    for ignored in (lowest, third, lowest - 1, third - 2**32, third + 2**32, -100):
        if not -(2**63) <= ignored < 2**63:
            continue
        got = majority(labels, ignored, groups)
        votes = [labels[(points[:, 0] == p) & (labels != ignored)].tolist() for p in range(40)]
        want = [min(v, key=lambda x: (-v.count(x), x)) if v else ignored for v in votes]
        assert got.dtype == torch.int64 and got.tolist() == want


def test_votes_by_hand() -> None:
    """Voxel 0: two 4s beat 9; voxel 1: a tie goes to the lower; voxel 2: nobody votes."""
    points = torch.tensor([[0], [0], [0], [1], [1], [2], [2]])
    labels = torch.tensor([4, 9, 4, 8, 5, -1, -1])
    groups = group_points(points, (1.0,), None)
    got = majority(labels, -1, groups)
    assert got.tolist() == [4, 5, -1]
