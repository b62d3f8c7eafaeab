"""Streets and rooms: reproducible, complete, and standing on their ground."""

import numpy as np
import pytest

from torchsparse.datasets import ROOM_CLASSES, STREET_CLASSES, room, street
from torchsparse.datasets.objects import CLASSES, LABEL


def _ground(seed):
    ground = street(seed).ground
    assert ground is not None
    return ground


@pytest.mark.parametrize("world", [street, room], ids=["street", "room"])
def test_a_seed_gives_one_scene(world):
    first, again, other = world(5), world(5), world(6)
    assert first.solids == again.solids and first.solids != other.solids
    np.testing.assert_array_equal(first.stands, again.stands)


@pytest.mark.parametrize("seed", range(8))
def test_street_holds_every_class(seed):
    names = {CLASSES[s.label].name for s in street(seed).solids}
    assert names == {row.name for row in STREET_CLASSES if not row.ground}


def test_rooms_hold_every_class():
    for seed in range(8):
        names = {CLASSES[s.label].name for s in room(seed).solids}
        assert names == {row.name for row in ROOM_CLASSES}


@pytest.mark.parametrize("seed", range(8))
def test_nothing_stands_where_the_sensor_is(seed):
    """The main parts keep clear of a car of 5 m by 2 m around the sensor."""
    scene = street(seed)
    x, y, _, _ = scene.stands[0]
    for solid in scene.solids:
        if solid.label in (LABEL["trunk"], LABEL["building"], LABEL["fence"]):
            c, s = np.cos(solid.yaw), np.sin(solid.yaw)
            dx, dy = x - solid.center[0], y - solid.center[1]
            gap = np.abs([c * dx + s * dy, c * dy - s * dx]) - solid.half[:2]
            assert gap.max() > 1.0


@pytest.mark.parametrize("seed", range(4))
def test_trunks_stand_on_the_ground(seed):
    scene, ground = street(seed), _ground(seed)
    for solid in scene.solids:
        if solid.label == LABEL["trunk"] and solid.shape == "cylinder":
            x, y, z = solid.center
            assert z - solid.half[2] == pytest.approx(ground.foot(x, y)[2], abs=1e-9)


def test_ground_labels_follow_the_distance_to_the_roadway():
    ground = _ground(0)
    edge, walk = ground.road, ground.sidewalk
    far = np.full(3, 1000.0)  # beyond any side street
    outside = ground.outside(far, np.array([edge - 0.1, edge + 0.1, edge + walk + 0.1]))
    np.testing.assert_allclose(outside, [-0.1, 0.1, walk + 0.1])
    assert [CLASSES[k].name for k in ground.label(outside)] == ["road", "sidewalk", "terrain"]


def test_ground_is_uneven_but_passable():
    """Heights differ by centimetres to metres over 40 m, and no step is steeper than 20 %."""
    for seed in range(10):
        ground = _ground(seed)
        x = np.linspace(-40, 40, 801)
        z = ground.height(x, np.zeros_like(x))
        assert 0.02 < np.ptp(z) < 5
        assert np.abs(np.diff(z) / np.diff(x)).max() < 0.2
