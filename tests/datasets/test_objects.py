"""Objects have the size of what they are called."""

import numpy as np
import pytest

from torchsparse.datasets import CLASSES, STREET_CLASSES, objects


def _extent(solids):
    """Bounds [2, 3] of the solids of an object, from their bounding boxes at yaw 0."""
    center = np.array([s.center for s in solids])
    half = np.array([s.half for s in solids])
    return np.stack([(center - half).min(0), (center + half).max(0)])


def test_class_table_has_unique_names_and_colors():
    assert len(STREET_CLASSES) >= 8
    assert (
        len({row.name for row in CLASSES}) == len({row.color for row in CLASSES}) == len(CLASSES)
    )
    assert [row.name for row in CLASSES if row.ground] == ["road", "sidewalk", "terrain", "floor"]


@pytest.mark.parametrize("seed", range(20))
def test_sizes(seed):
    rng = np.random.default_rng(seed)
    foot = (0.0, 0.0, 0.0)
    low, high = _extent(objects.car(rng, foot, 0.0))
    assert 3.5 < high[0] - low[0] < 6.6 and 1.6 < high[1] - low[1] < 2.3
    assert -0.01 < low[2] < 0.05 and 1.3 < high[2] < 2.8
    low, high = _extent(objects.pedestrian(rng, foot, 0.0))
    assert 1.0 < high[2] < 2.05 and -0.1 < low[2] < 0.1 and (high - low)[:2].max() < 1.2
    for solids in (objects.tree(rng, foot), objects.pole(rng, foot, 0.0)):
        low, high = _extent(solids)
        assert -0.2 < low[2] <= 0.1 and 0.7 < high[2] < 14


@pytest.mark.parametrize("material", objects._MATERIALS)
def test_reflectivity_scatters_about_its_median(material):
    rng = np.random.default_rng(0)
    draws = [objects.reflectivity(rng, material) for _ in range(2000)]
    assert 0.02 <= min(draws) and max(draws) <= 1
    assert np.median(draws) == pytest.approx(objects._MATERIALS[material][0], rel=0.1)


def test_a_turned_object_keeps_its_shape():
    """The parts of a car stand at the same distances from its foot, whatever its yaw."""
    foot = (3.0, -1.0, 0.5)
    plain, turned = (objects.car(np.random.default_rng(4), foot, yaw) for yaw in (0.0, 2.0))
    for a, b in zip(plain, turned, strict=True):
        assert np.hypot(*np.subtract(a.center, foot)[:2]) == pytest.approx(
            np.hypot(*np.subtract(b.center, foot)[:2])
        )
        assert a.half == b.half and a.center[2] == b.center[2]
