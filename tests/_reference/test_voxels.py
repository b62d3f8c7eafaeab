"""Groups of points and votes, by the examples of the docstrings and by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchsparse._reference.voxels import VoxelGroups, group_points, majority


def test_the_example_of_the_record() -> None:
    groups, read = group_points(torch.tensor([[5], [2], [5]]), (1.0,), None, None)
    want = VoxelGroups(
        torch.tensor([[2], [5]], dtype=torch.int32),
        torch.tensor([1, 0, 2]),
        torch.tensor([0, 1, 3, 3]),
        torch.tensor([1, 0, 1]),
    )
    assert read == []
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(groups, want))


@pytest.mark.parametrize("n", [0, 1, 500])
def test_numbers_ride_along(n: int) -> None:
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) * 5
    batch = torch.arange(n) % 3 - 1
    groups, read = group_points(points, (1.0, 0.5, 2.0), batch, torch.tensor([7, -3]))
    assert read == [7.0, -3.0]
    cells = np.floor(points.double().numpy() / [1.0, 0.5, 2.0]).astype(np.int32)
    cells = np.concatenate([batch.numpy()[:, None].astype(np.int32), cells], 1)
    coords, index, inverse, counts = np.unique(
        cells, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    np.testing.assert_array_equal(groups.coords, coords)
    np.testing.assert_array_equal(groups.inverse, inverse.reshape(-1))
    np.testing.assert_array_equal(groups.starts.diff()[:-1], counts)
    np.testing.assert_array_equal(groups.order[groups.starts[:-2]], index)
    np.testing.assert_array_equal(groups.order, np.argsort(inverse.reshape(-1), kind="stable"))


def test_votes_by_hand() -> None:
    """Voxel 0: two 4s beat 9; voxel 1: a tie goes to the lower; voxel 2: nobody votes."""
    points = torch.tensor([[0], [0], [0], [1], [1], [2], [2]])
    labels = torch.tensor([4, 9, 4, 8, 5, -1, -1])
    groups, _ = group_points(points, (1.0,), None, None)
    got = majority(labels, -1, groups, torch.tensor(-1), torch.tensor(11))
    assert got.tolist() == [4, 5, -1]
