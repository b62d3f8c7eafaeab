"""The sensor: noise, occlusion, porosity, culling, and what its intensities give away."""

import dataclasses
import time

import numpy as np
import pytest

from torchsparse.datasets import (
    HDL32,
    HDL64,
    INDOOR,
    SENSORS,
    STREET_CLASSES,
    Scene,
    Solid,
    lidar,
    room,
    scan,
    street,
)
from torchsparse.datasets.objects import LABEL, Bays

STAND = np.zeros((1, 4))
PLAIN = dataclasses.replace(HDL64, name="plain", dropout=0.0, reach=1e6, steps=720)


def _wall(x, **changes):
    """A wall across the view at distance x, 4 m wide and 4 m high."""
    solid = Solid("box", (x + 0.1, 0.0, 1.5), (0.1, 2.0, 2.0), LABEL["building"], 0.5)
    return dataclasses.replace(solid, **changes)


def _see(*solids, seed=0, sensor=PLAIN):
    return scan(Scene(solids, None, STAND), sensor, seed)


def test_a_seed_gives_one_scan(look):
    first, again = look(0), scan(street(0), HDL64, 0)
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    other = scan(street(0), HDL64, 1)
    assert not np.array_equal(first.points[:1000], other.points[:1000])


@pytest.mark.parametrize("name", ["hdl64", "hdl32", "top64"])
def test_fields_are_in_range(look, name):
    sensor = SENSORS[name]
    seen = look(0, sensor)
    count = len(seen.points)
    assert seen.points.shape == (count, 3) and seen.points.dtype == np.float32
    assert seen.intensity.shape == (count,) and seen.intensity.dtype == np.float32
    assert seen.labels.dtype == np.int64 and seen.labels.max() < len(STREET_CLASSES)
    assert 0 <= seen.intensity.min() and seen.intensity.max() <= 1
    assert 0 <= seen.ring.min() and seen.ring.max() < len(sensor.elevations)
    distance = np.linalg.norm(seen.points, axis=1)
    assert distance.min() > sensor.min_range - 0.2 and distance.max() < sensor.max_range + 0.2


def test_rings_follow_their_elevations(look):
    """Points of a beam lie at its elevation: the sensor may be tilted, its own frame is not."""
    seen = look(2)
    distance = np.linalg.norm(seen.points, axis=1)
    far = distance > 15
    found = np.rad2deg(np.arcsin(seen.points[far, 2] / distance[far]))
    wanted = np.array(HDL64.elevations)[seen.ring[far]]
    assert np.abs(found - wanted).max() < 1.0
    assert np.median(np.abs(found - wanted)) < 0.05


def test_nothing_to_see_gives_no_points():
    assert len(_see().points) == 0


def test_a_wall_is_met_within_the_noise():
    seen = _see(_wall(10.0))
    ideal = dataclasses.replace(PLAIN, range_noise=0.0, beam_bias=0.0)
    exact = _see(_wall(10.0), sensor=ideal)
    assert len(seen.points) > 500
    assert np.abs(exact.points[:, 0] - 10.0).max() < 0.4  # the tilt of the sensor
    flat = np.column_stack([exact.points[:, 1:], np.ones(len(exact.points))])
    fit = flat @ np.linalg.lstsq(flat, exact.points[:, 0], rcond=None)[0]
    assert np.abs(exact.points[:, 0] - fit).max() < 1e-4
    flat = np.column_stack([seen.points[:, 1:], np.ones(len(seen.points))])
    fit = flat @ np.linalg.lstsq(flat, seen.points[:, 0], rcond=None)[0]
    expected = np.hypot(PLAIN.range_noise, PLAIN.beam_bias)
    assert 0.3 * expected < np.std(seen.points[:, 0] - fit) < 1.7 * expected


def test_a_wall_hides_what_is_behind():
    person = Solid("ellipsoid", (14.0, 0.0, 1.0), (0.3, 0.3, 0.9), LABEL["pedestrian"], 0.5)
    assert (_see(person).labels == LABEL["pedestrian"]).sum() > 10
    assert (_see(person, _wall(10.0)).labels == LABEL["pedestrian"]).sum() == 0
    assert (_see(_wall(10.0), person).labels == LABEL["pedestrian"]).sum() == 0


def test_a_mesh_stops_its_share_of_rays():
    solid, mesh = len(_see(_wall(10.0)).points), len(_see(_wall(10.0, fill=0.4)).points)
    assert mesh / solid == pytest.approx(0.4, abs=0.05)


def test_a_crown_stops_rays_exponentially():
    """Through 2 m of leaves at 0.8 per metre 1 - exp(-1.6) of the rays stop."""
    slab = _wall(10.0, center=(11.0, 0.0, 1.5), half=(1.0, 6.0, 8.0))

    def straight(seen):  # rays that cross the 2 m within 2 %
        return (np.hypot(seen.points[:, 1], seen.points[:, 2]) < 0.2 * seen.points[:, 0]).sum()

    share = straight(_see(dataclasses.replace(slab, density=0.8))) / straight(_see(slab))
    assert share == pytest.approx(1 - np.exp(-1.6), abs=0.04)


def test_windows_lie_deeper_than_the_wall():
    wall = _wall(10.0, half=(0.1, 8.0, 5.0), bays=Bays(3.0, 3.0, 0.5, 0.25))
    depth = _see(wall).points[:, 0]
    assert ((depth > 10.15).mean() > 0.1) and ((depth < 10.1).mean() > 0.3)


def test_far_and_dark_surfaces_return_less():
    sensor = dataclasses.replace(PLAIN, reach=30.0)
    share = [
        len(_see(_wall(x, reflectivity=r), sensor=sensor).points)
        / len(_see(_wall(x, reflectivity=r)).points)
        for x, r in ((10, 0.3), (40, 0.3), (40, 0.05))
    ]
    assert 0.9 < share[0] and 0.4 < share[1] < 0.9 and share[2] < 0.3


def test_culling_loses_no_hit(monkeypatch):
    """Testing every solid against every ray gives the same scan."""
    scene = street(1)
    opaque = [s for s in scene.solids if s.fill == 1 and np.isinf(s.density)]
    near = [s for s in opaque if np.hypot(*s.center[:2]) < 30][:150]
    scene = Scene(tuple(near), scene.ground, scene.stands)
    sensor = dataclasses.replace(HDL64, name="coarse", elevations=HDL64.elevations[::4], steps=360)
    culled = scan(scene, sensor, 0)

    def all_rays(solids, sensor, pose):
        rows, columns = np.arange(len(sensor.elevations)), np.arange(sensor.steps)
        return [(solid, rows, columns) for solid in solids]

    monkeypatch.setattr(lidar, "_blocks", all_rays)
    full = scan(scene, sensor, 0)
    np.testing.assert_array_equal(culled.labels, full.labels)
    np.testing.assert_array_equal(culled.points, full.points)


def test_the_sensor_sees_its_own_car(look):
    seen = look(0, HDL32)
    close = np.linalg.norm(seen.points[:, :2], axis=1) < 2.2
    assert close.sum() > 300
    assert (seen.labels[close] == LABEL["car"]).mean() > 0.95
    bare = dataclasses.replace(HDL32, own_car=None)
    assert (np.linalg.norm(look(0, bare).points[:, :2], axis=1) < 2.2).sum() < 20


def test_every_class_is_seen_in_most_scenes(look):
    """Twenty points of each class, in at least four scenes of five."""
    seen = [np.bincount(look(k).labels, minlength=len(STREET_CLASSES)) >= 20 for k in range(6)]
    share = np.mean(seen, axis=0)
    assert (share >= 0.8).all(), dict(zip([row.name for row in STREET_CLASSES], share))


def test_no_class_dominates(look):
    counts = np.bincount(np.concatenate([look(k).labels for k in range(6)]))
    assert counts.max() / counts.sum() < 0.55


def test_intensity_does_not_tell_the_class(look):
    """The best rule on intensity alone gains little over naming the largest class.

    The rule knows the histogram of each class in 50 bins, so it bounds every set of thresholds.
    """
    labels = np.concatenate([look(k).labels for k in range(6)])
    intensity = np.concatenate([look(k).intensity for k in range(6)])
    bins = np.minimum((intensity * 50).astype(int), 49)
    table = np.bincount(bins * 10 + labels, minlength=500).reshape(50, 10)
    best, largest = table.max(1).sum() / table.sum(), table.sum(0).max() / table.sum()
    assert best < largest + 0.08
    balanced = table / table.sum(0)  # every class equally frequent
    assert balanced.max(1).sum() / 10 < 0.35


def test_each_scan_is_quick():
    """Half a second on a 2020 core; ten times that leaves room for a busy machine."""
    start = time.process_time()
    scan(street(3), HDL64, 3)
    assert time.process_time() - start < 5


def test_a_room_is_seen_from_inside():
    seen = scan(room(1), INDOOR, 1)
    counts = np.bincount(seen.labels, minlength=14)
    assert (counts[:10] == 0).all() and (counts[10:] > 300).all()
    spread = np.ptp(seen.points, axis=0)
    assert (spread[:2] > 3.5).all() and 2.2 < spread[2] < 3.3
