"""Voxels: grouping, features, labels, and a reproducible dataset."""

import numpy as np
import pytest

from torchsparse.datasets import (
    FEATURES,
    HDL32,
    INDOOR,
    Scan,
    Voxelized,
    augment,
    ground_level,
    room,
    split,
    voxelize,
)

COARSE = HDL32.__class__("coarse", (-20.0, -10.0, -5.0, 0.0), 200, (1.7, 1.9))


def _cloud(count=500, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-3, 3, (count, 3)), rng.random(count), rng.integers(0, 5, count)


def test_the_example_in_the_docstring():
    points = np.array([[0.01, 0, 0], [0.02, 0, 0], [0.06, 0, 0]])
    voxels = voxelize(points, np.array([0.2, 0.4, 1.0]), np.array([7, 7, 1]), voxel_size=0.05)
    np.testing.assert_array_equal(voxels.coords, [[0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(voxels.inverse, [0, 0, 1])
    np.testing.assert_array_equal(voxels.labels, [7, 1])
    np.testing.assert_allclose(voxels.feats[:, 5], [0.3, 1.0])
    np.testing.assert_allclose(voxels.feats[:, 0], [0.015 / 0.05 - 0.5, 0.2 - 0.5], atol=1e-6)


@pytest.mark.parametrize("size", [0.05, 0.5, 10.0])
def test_grouping_matches_a_dict(size):
    points, intensity, labels = _cloud()
    voxels = voxelize(points, intensity, labels, size)
    cells = {}
    for row, point in enumerate(points):
        cells.setdefault(tuple(np.floor(point / size).astype(int)), []).append(row)
    assert len(voxels.coords) == len(cells) and voxels.labels is not None
    for row, (cell, rows) in enumerate(sorted(cells.items())):
        np.testing.assert_array_equal(voxels.coords[row] + voxels.corner, cell)
        assert (voxels.inverse[rows] == row).all()
        assert voxels.labels[row] == np.bincount(labels[rows]).argmax()
        assert voxels.feats[row, 5] == pytest.approx(intensity[rows].mean(), rel=1e-5)
    assert voxels.coords.dtype == np.int32 and voxels.feats.dtype == np.float32
    assert voxels.coords.min() == 0 and voxels.feats.shape[1] == len(FEATURES)


def test_a_single_point():
    voxels = voxelize(np.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(voxels.coords, [[0, 0, 0]])
    assert voxels.labels is None and voxels.feats[0, 5] == 0


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.empty((0, 3)), r"\[P, 3\] with P > 0, got \[0, 3\]"),
        (np.zeros((4, 2)), r"got \[4, 2\]"),
        (np.full((2, 3), np.nan), "finite"),
        (np.full((2, 3), 1e6), "within"),
    ],
)
def test_impossible_points_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        voxelize(points)


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"`labels` must have shape \[3\], got \[2\]"):
        voxelize(np.zeros((3, 3)), labels=np.zeros(2, int))


def test_features_do_not_depend_on_the_origin_of_heights():
    """A scan whose origin is on the roof and one whose origin is on the road look alike."""
    points, intensity, _ = _cloud()
    step = np.array([0, 0, 40 * 0.05])
    a, b = voxelize(points, intensity), voxelize(points + step, intensity)
    np.testing.assert_allclose(a.feats[:, 3:], b.feats[:, 3:], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_ground_level_finds_the_road(look, seed):
    seen = look(seed)
    near = (seen.labels < 3) & (np.linalg.norm(seen.points, axis=1) < 12)
    assert ground_level(seen.points) == pytest.approx(np.median(seen.points[near, 2]), abs=0.35)


def test_ground_level_ignores_what_lies_below(look):
    """Mirrored echoes below the road, one in two hundred, do not pull the ground down."""
    points = look(0).points
    below = points.copy()
    below[::200, 2] -= 2.0
    assert ground_level(below) == pytest.approx(ground_level(points), abs=0.05)


def test_split_deals_every_seed_once():
    train, held_out = split(10, 0.3, seed=1)
    assert len(held_out) == 3 and sorted(train + held_out) == list(range(10))
    assert split(10, 0.3, seed=1) == (train, held_out)
    assert split(10, 0.3, seed=2) != (train, held_out)
    assert split(0) == ([], [])


def test_augment_turns_about_z_and_scales():
    points, intensity, _ = _cloud()
    turned, light = augment(points, intensity, np.random.default_rng(3), drop_intensity=0.0)
    scale = np.linalg.norm(turned, axis=1) / np.linalg.norm(points, axis=1)
    assert scale.std() < 1e-5 and 0.95 <= scale.mean() <= 1.05
    np.testing.assert_allclose(turned[:, 2], points[:, 2] * scale.mean(), rtol=1e-4)
    assert 0 <= light.min() and light.max() <= 1
    order = np.argsort(intensity)
    assert (np.diff(light[order]) >= 0).all()
    assert not augment(points, intensity, np.random.default_rng(0), drop_intensity=1.0)[1].any()


def test_dataset_is_deterministic_by_seed_and_epoch():
    first, again = (Voxelized([3, 4], augmented=True, sensors=[COARSE]) for _ in range(2))
    assert len(first) == 2
    np.testing.assert_array_equal(first[1].feats, again[1].feats)
    np.testing.assert_array_equal(first[1].coords, again[1].coords)
    again.set_epoch(1)
    assert not np.array_equal(first[1].coords, again[1].coords)
    again.set_epoch(0)
    np.testing.assert_array_equal(first[1].coords, again[1].coords)
    assert not np.array_equal(first[0].coords, first[1].coords)


def test_dataset_without_memory_gives_the_same():
    kept, cast = (Voxelized([3], sensors=[COARSE], keep=keep) for keep in (True, False))
    np.testing.assert_array_equal(kept[0].feats, cast[0].feats)
    assert kept.scan(0) is kept.scan(0) and cast.scan(0) is not cast.scan(0)


def test_dataset_deals_sensors_by_seed():
    dataset = Voxelized([2, 3], sensors=[COARSE, HDL32])
    assert isinstance(dataset.scan(0), Scan)
    assert dataset.scan(0).ring.max() < 4 < dataset.scan(1).ring.max()


def test_dataset_ends_where_its_seeds_end():
    dataset = Voxelized([3], sensors=[COARSE])
    assert len(list(dataset)) == 1
    with pytest.raises(IndexError, match="out of range for 1 scenes"):
        dataset[1]


def test_rooms_can_be_learned_too():
    item = Voxelized([0], sensors=[INDOOR], world=room)[0]
    assert item.labels is not None and set(np.unique(item.labels)) == {10, 11, 12, 13}
    floor = item.labels == 10
    assert np.abs(np.median(item.feats[floor, 3])) < 0.15
