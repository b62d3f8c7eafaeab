"""Ray hits against closed forms and against marching along the ray."""

import numpy as np
import pytest

from torchsparse.datasets import shapes

HALF = np.array([1.0, 0.7, 0.4])
STEP = 2e-3


def _rays(origin, count=300, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.uniform(-1.3, 1.3, (count, 3))
    directions = targets - origin
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _in_box(p, taper):
    shrink = (p[..., 2] + HALF[2]) / (2 * HALF[2])
    return (
        (np.abs(p[..., 0]) <= HALF[0] - taper[0] * shrink)
        & (np.abs(p[..., 1]) <= HALF[1] - taper[1] * shrink)
        & (np.abs(p[..., 2]) <= HALF[2])
    )


def _in_cylinder(p):
    return (((p[..., :2] / HALF[:2]) ** 2).sum(-1) <= 1) & (np.abs(p[..., 2]) <= HALF[2])


BODIES = {
    "box": (lambda o, d: shapes.box(o, d, HALF), lambda p: _in_box(p, (0, 0))),
    "frustum": (lambda o, d: shapes.box(o, d, HALF, (0.5, 0.2)), lambda p: _in_box(p, (0.5, 0.2))),
    "roof": (lambda o, d: shapes.box(o, d, HALF, (0, 0.7)), lambda p: _in_box(p, (0, 0.7))),
    "cylinder": (lambda o, d: shapes.cylinder(o, d, HALF), _in_cylinder),
    "ellipsoid": (
        lambda o, d: shapes.ellipsoid(o, d, HALF),
        lambda p: ((p / HALF) ** 2).sum(-1) <= 1,
    ),
}


@pytest.mark.parametrize("origin", [(-3.0, 0.5, 0.2), (0.3, 0.2, 4.0), (0.1, 0.0, -0.1)], ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_crossings_match_marching(body, origin):
    """Enter and leave lie within a step of the first and last sample inside the body."""
    meet, inside = BODIES[body]
    origin = np.array(origin)
    directions = _rays(origin)
    t = np.arange(0, 7, STEP)
    samples = inside(origin + t[:, None] * directions[:, None, :])  # [R, T]
    crossing = meet(origin, directions)
    hit = samples.any(1)
    assert hit.sum() > 30
    assert np.isfinite(crossing.enter[hit]).all()
    np.testing.assert_allclose(crossing.enter[hit], t[samples.argmax(1)][hit], atol=1.01 * STEP)
    last = t[len(t) - 1 - samples[:, ::-1].argmax(1)]
    np.testing.assert_allclose(crossing.leave[hit], last[hit], atol=1.01 * STEP)
    grazing = ~hit & np.isfinite(crossing.enter)
    assert (crossing.leave[grazing] - crossing.enter[grazing] < STEP).all()


def test_sphere_in_closed_form():
    """A ray that passes the centre at distance b enters 3 - √(1 - b²) on, at cosine √(1 - b²)."""
    for b in (0.0, 0.3, 0.9):
        crossing = shapes.ellipsoid(np.array([-3.0, b, 0.0]), np.array([[1.0, 0, 0]]), np.ones(3))
        root = np.sqrt(1 - b * b)
        np.testing.assert_allclose(crossing.enter, 3 - root)
        np.testing.assert_allclose(crossing.leave, 3 + root)
        np.testing.assert_allclose(crossing.cosine, root, atol=1e-12)


def test_cosine_of_a_box_face_is_that_of_the_ray():
    angle = np.deg2rad(35)
    ray = np.array([[np.cos(angle), np.sin(angle), 0.0]])
    crossing = shapes.box(np.array([-2.0, -0.7, 0.0]), ray, np.ones(3))
    np.testing.assert_allclose(crossing.cosine, np.cos(angle))


def test_a_miss_is_infinite_and_dark():
    behind = shapes.box(np.array([1.5, 0, 0]), np.array([[1.0, 0, 0], [0, 1.0, 0]]), np.ones(3))
    assert np.isinf(behind.enter).all() and np.isinf(behind.leave).all()
    assert (behind.cosine == 0).all()


@pytest.mark.parametrize("body", BODIES)
def test_no_rays_give_no_crossings(body):
    crossing = BODIES[body][0](np.array([-3.0, 0, 0]), np.empty((0, 3)))
    assert crossing.enter.shape == crossing.leave.shape == crossing.cosine.shape == (0,)


def test_to_local_undoes_the_pose():
    """The corner of a turned box, seen in its own frame, is the corner of the plain one."""
    yaw, center = 0.7, np.array([4.0, -2.0, 1.0])
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    corner = np.array([1.0, 2.0, 3.0])
    origin, directions = shapes.to_local(
        turn @ corner + center, (turn @ corner)[None], center, yaw
    )
    np.testing.assert_allclose(origin, corner, atol=1e-12)
    np.testing.assert_allclose(directions, corner[None], atol=1e-12)


def test_height_field_meets_a_slope_in_closed_form():
    """z = 0.1 x below a ray from height 2 along (x, z) = (cos a, -sin a)."""
    a = np.deg2rad(np.array([5.0, 15.0, 40.0, 80.0]))
    rays = np.stack([np.cos(a), np.zeros(4), -np.sin(a)], axis=1)
    found = shapes.height_field(np.array([0.0, 0, 2.0]), rays, lambda x, y: 0.1 * x, 100.0)
    np.testing.assert_allclose(found, 2 / (np.sin(a) + 0.1 * np.cos(a)), rtol=1e-6)


def test_height_field_meets_waves_within_millimetres():
    rng = np.random.default_rng(1)
    rays = rng.normal(size=(500, 3)) * [1, 1, 0.15]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)

    def height(x, y):
        return 0.2 * np.sin(0.1 * x) + 0.1 * np.sin(0.2 * y)

    found = shapes.height_field(np.array([0.0, 0, 1.8]), rays, height, 90.0, highest=5.0)
    hit = np.isfinite(found)
    p = np.array([0.0, 0, 1.8]) + found[hit, None] * rays[hit]
    assert hit.sum() > 150
    assert np.abs(p[:, 2] - height(p[:, 0], p[:, 1])).max() < 2e-3
    assert not hit[rays[:, 2] > 0.1].any()
