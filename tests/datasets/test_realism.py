"""Simulated streets have the voxel statistics of real scans.

Bands from real 64-beam sweeps at 5 cm: 60 to 120 thousand voxels, 2.5 to 4 of the 27 cells around
a voxel occupied (itself included), 1.3 to 1.5 children per 2x2x2 parent, and at stride 8, where
surfaces close up, about 8 of 27.
"""

import numpy as np
import pytest

SEEDS = range(8)


def _keys(points, size):
    index = np.floor(points / size).astype(np.int64)
    index -= index.min(0) - 8  # a margin, so that no neighbour wraps around
    return index


def _pack(index):
    return np.unique(index @ np.array([1 << 42, 1 << 21, 1]))


def _neighbors(keys):
    """Mean number of occupied cells in the 3x3x3 block around a voxel."""
    found = 0
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            for dz in (-1, 0, 1):
                wanted = keys + dx * (1 << 42) + dy * (1 << 21) + dz
                at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                found += np.count_nonzero(keys[at] == wanted)
    return found / len(keys)


def _statistics(points):
    """Voxels, neighbours, children per parent, neighbours at stride 8."""
    index = _keys(points, 0.05)
    fine = _pack(index)
    children = len(fine) / len(_pack(index >> 1))
    return len(fine), _neighbors(fine), children, _neighbors(_pack(index >> 3))


def test_counting_on_a_plane():
    """A filled plane has 9 of 27 neighbours and 4 children per parent, borders aside."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1) * 0.05 + 0.025
    voxels, neighbors, children, _ = _statistics(points)
    assert voxels == 40_000
    assert neighbors == pytest.approx((3 - 2 / 200) ** 2)
    assert children == 4


@pytest.fixture(scope="module")
def statistics(look):
    return np.array([_statistics(look(seed).points) for seed in SEEDS])


def test_voxel_count(statistics):
    assert (statistics[:, 0] > 60_000).all() and (statistics[:, 0] < 120_000).all()


def test_neighbors_at_full_resolution(statistics):
    assert (statistics[:, 1] > 2.5).all() and (statistics[:, 1] < 4.0).all()


def test_children_per_parent(statistics):
    assert (statistics[:, 2] > 1.3).all() and (statistics[:, 2] < 1.5).all()


def test_neighbors_at_stride_8(statistics):
    assert (statistics[:, 3] > 6.5).all() and (statistics[:, 3] < 9.5).all()
    assert 7.5 < statistics[:, 3].mean() < 8.5


def test_scenes_differ(statistics):
    """No two streets alike: the spread over seeds is real."""
    assert len(np.unique(statistics[:, 0])) == len(SEEDS)
    assert np.ptp(statistics[:, 1]) > 0.1


def test_density_falls_with_range(look):
    """Near surfaces are closed, far ones scattered: the law that sparse kernels live with."""
    points = look(1).points
    distance = np.linalg.norm(points, axis=1)
    near = _neighbors(_pack(_keys(points[(distance > 5) & (distance < 8)], 0.05)))
    far = _neighbors(_pack(_keys(points[distance > 30], 0.05)))
    assert near > 3.5 and far < 1.6


def test_ground_lies_a_sensor_height_below(look):
    for seed in SEEDS:
        seen = look(seed)
        close = (seen.labels == 0) & (np.linalg.norm(seen.points, axis=1) < 8)
        assert -2.3 < np.median(seen.points[close, 2]) < -1.4
