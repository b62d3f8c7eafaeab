"""Where rays meet solids: boxes, cylinders, ellipsoids and height fields.

All rays of a call share one origin. The solids stand in their own frame, centred at 0 with z up;
``to_local`` takes rays there. A solid answers with one :class:`Crossing`, so that callers can
treat a surface (stop at ``enter``) and a porous volume (stop before ``leave``) alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Crossing:
    """Where each ray is inside a solid: ``enter <= t < leave`` in units of the direction.

    A ray along +x from x = -3 through the unit sphere: enter = 2, leave = 4, cosine = 1.
    A miss has enter = leave = inf and cosine = 0; an origin inside the solid has enter = 0.
    """

    enter: Array  # [R] float64
    leave: Array  # [R] float64
    cosine: Array  # [R] float64 in 0..1, between the ray and the surface normal where it enters


def to_local(origin: Array, directions: Array, center: Array, yaw: float) -> tuple[Array, Array]:
    """Move rays into the frame of a solid at ``center`` that is turned by ``yaw`` about z.

    Args:
        origin: [3], metres.
        directions: [R, 3].
        center: [3], metres.
        yaw: Radians, counter-clockwise seen from above.

    Returns:
        The origin [3] and the directions [R, 3] in the frame of the solid.
    """
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])  # rows times this: by -yaw
    return (origin - center) @ turn, directions @ turn


def halfspaces(origin: Array, directions: Array, normals: Array, offsets: Array) -> Crossing:
    """Meet the convex body ``{p : normals @ p <= offsets}`` (Cyrus and Beck 1978).

    Args:
        origin: [3].
        directions: [R, 3], unit length.
        normals: [H, 3], unit length, outwards.
        offsets: [H], distance of each face from 0.
    """
    rays = len(directions)
    enter, leave = np.zeros(rays), np.full(rays, np.inf)
    cosine = np.ones(rays)
    for normal, gap in zip(normals, offsets - normals @ origin, strict=True):
        slope = directions @ normal
        with np.errstate(divide="ignore", invalid="ignore"):
            t = gap / slope
        inwards = slope < 0
        first = inwards & (t > enter)
        enter[first] = t[first]
        cosine[first] = -slope[first]
        np.minimum(leave, t, out=leave, where=slope > 0)
        if gap < 0:  # the origin is outside this face: rays that do not approach it miss
            leave[~inwards] = -np.inf
    return _crossing(enter, leave, cosine)


def box(
    origin: Array, directions: Array, half: Array, taper: tuple[float, float] = (0.0, 0.0)
) -> Crossing:
    """Meet a box of half extents ``half`` [3] whose top is narrower by ``taper`` on x and y.

    The bottom face spans ``±half``, the top ``±(half - taper)``: ``taper = half[:2]`` is a
    pyramid, one zero and one full taper a gabled roof. Rays as in :func:`halfspaces`.
    """
    a, b, c = half
    lean_x, lean_y = taper[0] / (2 * c), taper[1] / (2 * c)  # inward metres per metre of height
    normals = np.array(
        [
            [1, 0, lean_x],
            [-1, 0, lean_x],
            [0, 1, lean_y],
            [0, -1, lean_y],
            [0, 0, 1],
            [0, 0, -1],
        ],
        dtype=np.float64,
    )
    offsets = np.array(
        [a - taper[0] / 2, a - taper[0] / 2, b - taper[1] / 2, b - taper[1] / 2, c, c]
    )
    lengths = np.linalg.norm(normals, axis=1)
    return halfspaces(origin, directions, normals / lengths[:, None], offsets / lengths)


def cylinder(origin: Array, directions: Array, half: Array) -> Crossing:
    """Meet an upright cylinder: radii ``half[:2]`` (an ellipse), height ``±half[2]``.

    Rays as in :func:`halfspaces`.
    """
    caps = halfspaces(
        origin, directions, np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]), np.full(2, half[2])
    )
    side = _quadric(origin, directions, np.array([half[0], half[1], np.inf]))
    enter, leave = np.maximum(caps.enter, side.enter), np.minimum(caps.leave, side.leave)
    return _crossing(enter, leave, np.where(side.enter >= caps.enter, side.cosine, caps.cosine))


def ellipsoid(origin: Array, directions: Array, half: Array) -> Crossing:
    """Meet an ellipsoid with semi-axes ``half`` [3]. Rays as in :func:`halfspaces`."""
    return _quadric(origin, directions, half)


def height_field(
    origin: Array,
    directions: Array,
    height: Callable[[Array, Array], Array],
    reach: float,
    samples: int = 20,
    highest: float = np.inf,
) -> Array:
    """First distance at which rays from above pass below ``z = height(x, y)``.

    Samples the ray at distances that grow geometrically, then narrows the first bracket by the
    secant rule: a ground that is smooth at the scale of the distance is met within millimetres.

    Args:
        origin: [3], above the surface, metres.
        directions: [R, 3], unit length.
        height: Surface height, metres, at arrays x and y.
        reach: Largest distance, metres.
        samples: Distances tried per ray.
        highest: No surface above this height, metres: rays that start above and rise are skipped.

    Returns:
        [R] float64 distances, inf = miss.
    """
    hit = np.full(len(directions), np.inf)
    alive = np.flatnonzero((directions[:, 2] < 0) | (origin[2] < highest))

    def clearance(rays: Array, t: Array) -> Array:
        p = origin + t[:, None] * rays
        return p[:, 2] - height(p[:, 0], p[:, 1])

    near, gap = np.zeros(len(alive)), np.full(len(alive), clearance(np.zeros((1, 3)), np.zeros(1)))
    for t in np.geomspace(0.03 * reach, reach, samples):
        rays = directions[alive]
        far = np.full(len(alive), t)
        beyond = clearance(rays, far)
        below = beyond <= 0
        lo, hi, above, under = near[below], far[below], gap[below], beyond[below]
        for _ in range(3):
            middle = lo + (hi - lo) * above / (above - under)
            value = clearance(rays[below], middle)
            over = value > 0
            lo, above = np.where(over, middle, lo), np.where(over, value, above)
            hi, under = np.where(over, hi, middle), np.where(over, under, value)
        hit[alive[below]] = lo + (hi - lo) * above / np.maximum(above - under, 1e-12)
        alive, near, gap = alive[~below], far[~below], beyond[~below]
        rising = (directions[alive, 2] >= 0) & (origin[2] + t * directions[alive, 2] > highest)
        alive, near, gap = alive[~rising], near[~rising], gap[~rising]
    return hit


def _quadric(origin: Array, directions: Array, half: Array) -> Crossing:
    """|p / half| = 1, solved as a t² + 2 b t + c = 0; an infinite semi-axis drops out."""
    o, d = origin / half, directions / half
    a, b, c = (d * d).sum(1), d @ o, o @ o - 1
    a = np.maximum(a, 1e-30)  # a ray along the axis of a cylinder
    root = b * b - a * c
    meets = root >= 0
    root = np.sqrt(np.where(meets, root, 0.0))
    enter = np.where(meets, np.maximum((-b - root) / a, 0.0), np.inf)
    leave = np.where(meets, (-b + root) / a, -np.inf)
    gradient = (o + np.where(meets, enter, 0.0)[:, None] * d) / half
    length = np.maximum(np.linalg.norm(gradient, axis=1), 1e-30)
    cosine = np.abs((gradient * directions).sum(1)) / length
    return _crossing(enter, leave, cosine)


def _crossing(enter: Array, leave: Array, cosine: Array) -> Crossing:
    missed = (leave <= enter) | (leave <= 0)
    return Crossing(
        np.where(missed, np.inf, enter),
        np.where(missed, np.inf, leave),
        np.where(missed, 0.0, np.minimum(cosine, 1.0)),
    )
