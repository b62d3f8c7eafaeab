"""A rotating LiDAR: which ray meets what first, and what the sensor reports of it.

Rays form a grid of beams and azimuth steps. Each solid is tested only against the block of the
grid that its bounding box covers as seen from the sensor: 120 000 rays and 2500 solids take half a
second on one core.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchsparse.datasets import shapes
from torchsparse.datasets.objects import LABEL, Solid
from torchsparse.datasets.scenes import Ground, Scene

Array = NDArray[np.float64]
_TILT = np.deg2rad(0.5)  # standard deviation of pitch and roll: a car on its springs


@dataclass(frozen=True)
class Sensor:
    """What a scanner can see, as data.

    A surface of reflectivity 0.1 that faces the sensor at ``reach`` metres is returned half of the
    time; the chance falls with the fourth power of the distance and with grazing incidence.
    """

    name: str
    elevations: tuple[float, ...]  # degrees, ascending
    steps: int  # per turn
    height: tuple[float, float]  # above the ground, metres: drawn once per scan
    reach: float = 110.0
    max_range: float = 110.0
    min_range: float = 1.0
    range_noise: float = 0.007  # standard deviation from ray to ray, metres
    beam_bias: float = 0.015  # standard deviation from beam to beam, metres: their calibration
    dropout: float = 0.10  # share of rays lost whatever they meet
    own_car: tuple[float, float, float] | None = None  # half length, half width, roof below sensor
    cell: float = 0.0  # metres: keep one point per cell, as a fused scan does; 0 = keep all


HDL64 = Sensor(
    "hdl64",  # two blocks of 32 lasers, 1/2 and 1/3 degree apart
    tuple(np.concatenate([np.linspace(-24.33, -8.83, 32), np.linspace(-8.33, 2.0, 32)]).tolist()),
    1850,
    (1.7, 2.0),
    min_range=2.0,
)
"""64 beams in two blocks, as on the cars of KITTI."""
HDL32 = Sensor(
    "hdl32",
    tuple(np.linspace(-30.67, 10.67, 32).tolist()),
    1084,
    (1.75, 1.95),
    reach=75.0,
    own_car=(1.3, 0.75, 0.48),
)
"""32 evenly spaced beams on a car whose roof it sees."""
TOP64 = Sensor(
    "top64",  # beams denser towards the horizon, on a high mount
    tuple((2.4 - 20.0 * np.linspace(1, 0, 64) ** 1.35).tolist()),
    2400,
    (1.9, 2.2),
    reach=110.0,
    min_range=2.0,
)
"""64 beams, denser towards the horizon, on a high mount."""
INDOOR = Sensor(
    "indoor",
    tuple(np.linspace(-85.0, 85.0, 110).tolist()),
    360,
    (1.2, 1.7),
    max_range=20.0,
    min_range=0.3,
    range_noise=0.008,
    cell=0.05,
)
"""A tripod in a room, nearly all around; one point per 5 cm."""
SENSORS = {sensor.name: sensor for sensor in (HDL64, HDL32, TOP64, INDOOR)}
"""The sensors by name."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What a sensor reports, in its own frame: x forward, y left, z up, the sensor at 0."""

    points: NDArray[np.float32]  # [N, 3] metres
    intensity: NDArray[np.float32]  # [N] in 0..1
    labels: NDArray[np.int64]  # [N] rows of CLASSES
    ring: NDArray[np.int16]  # [N] beam, 0 = lowest


def scan(scene: Scene, sensor: Sensor = HDL64, seed: int = 0) -> Scan:
    """Look at a scene once from each of its stands.

    Args:
        scene: From :func:`street` or :func:`room`.
        sensor: The scanner.
        seed: Chooses its height and tilt, the noise and the lost rays.

    Returns:
        All returns, in the frame of the first stand. Equal arguments give equal arrays.
    """
    rng = np.random.default_rng([seed, len(sensor.elevations), sensor.steps])
    height, gain = rng.uniform(*sensor.height), rng.uniform(0.7, 1.3)
    poses = [_pose(stand, height, rng) for stand in scene.stands]
    turns = [_turn(scene, sensor, pose, gain, rng) for pose in poses]
    points, intensity, labels, ring = (np.concatenate(column) for column in zip(*turns))
    points = (points - poses[0].origin) @ poses[0].rotation
    if sensor.cell > 0:
        kept = _one_per_cell(points, sensor.cell, rng)
        points, intensity, labels, ring = points[kept], intensity[kept], labels[kept], ring[kept]
    return Scan(points.astype(np.float32), intensity.astype(np.float32), labels, ring)


@dataclass(frozen=True, eq=False)
class _Pose:
    origin: Array  # [3] world, metres
    rotation: Array  # [3, 3]: world = sensor @ rotation.T
    heading: float  # radians


@dataclass(frozen=True, eq=False)
class _Hits:
    """The nearest surface along each ray so far; arrays that ``_meet`` overwrites."""

    distance: Array  # [R] metres, inf = none
    cosine: Array  # [R] of the incidence
    label: NDArray[np.int64]  # [R]
    reflectivity: Array  # [R]
    rough: Array  # [R] standard deviation along the ray, metres
    bumps: Array  # [R] standard deviation along z, metres


def _pose(stand: Array, height: float, rng: np.random.Generator) -> _Pose:
    pitch, roll = rng.normal(0, _TILT, 2)
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (stand[3], pitch, roll))
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    nod = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    lean = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return _Pose(stand[:3] + height * np.eye(3)[2], yaw @ nod @ lean, float(stand[3]))


def _turn(
    scene: Scene, sensor: Sensor, pose: _Pose, gain: float, rng: np.random.Generator
) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.int16]]:
    """World points [N, 3], intensity, labels and rings of one turn of the sensor."""
    beams, steps = len(sensor.elevations), sensor.steps
    directions = _directions(sensor, pose, rng).reshape(-1, 3)
    hits = _Hits(
        np.full(beams * steps, np.inf),
        *(np.zeros(beams * steps, dtype) for dtype in (float, int, float, float, float)),
    )
    if scene.ground is not None:
        _meet_ground(hits, scene.ground, directions, sensor, pose)
    solids = list(scene.solids)
    if sensor.own_car is not None:
        solids.append(_own_car(sensor.own_car, pose))
    for solid, rows, columns in _blocks(solids, sensor, pose):
        rays = (rows[:, None] * steps + columns).ravel()
        _meet(hits, solid, rays, directions[rays], pose.origin, rng)

    returned = np.flatnonzero(_returned(hits, sensor, rng))
    distance, rough = hits.distance[returned], hits.rough[returned]
    noise = rng.standard_normal((3, len(returned)))
    distance = distance + noise[0] * np.sqrt(sensor.range_noise**2 + rough**2)
    distance = distance + (sensor.beam_bias * rng.standard_normal(beams))[returned // steps]
    points = pose.origin + distance[:, None] * directions[returned]
    points[:, 2] += hits.bumps[returned] * np.abs(noise[1])
    shade = 0.35 + 0.65 * hits.cosine[returned]
    intensity = gain * hits.reflectivity[returned] * shade * np.exp(0.35 * noise[2])
    ring = (returned // steps).astype(np.int16)
    return points, np.clip(intensity, 0.0, 1.0), hits.label[returned], ring


def _directions(sensor: Sensor, pose: _Pose, rng: np.random.Generator) -> Array:
    """[beams, steps, 3] unit vectors in the world; azimuth step a is at heading + 2π a / steps."""
    beams, step = len(sensor.elevations), 2 * np.pi / sensor.steps
    up = np.deg2rad(sensor.elevations)[:, None]
    turn = np.arange(sensor.steps) * step + rng.uniform(-0.5, 0.5, (beams, 1)) * step
    rays = [
        np.cos(up) * np.cos(turn),
        np.cos(up) * np.sin(turn),
        np.broadcast_to(np.sin(up), turn.shape),
    ]
    return np.stack(rays, axis=-1) @ pose.rotation.T


def _own_car(size: tuple[float, float, float], pose: _Pose) -> Solid:
    x, y, z = (pose.origin - [0.0, 0.0, size[2] + 0.1]).tolist()
    return Solid("box", (x, y, z), (size[0], size[1], 0.1), LABEL["car"], 0.2, pose.heading)


def _blocks(
    solids: list[Solid], sensor: Sensor, pose: _Pose
) -> list[tuple[Solid, NDArray[np.int64], NDArray[np.int64]]]:
    """For each solid in view, the beams and azimuth steps that its bounding box may cover."""
    if not solids:
        return []
    center = np.array([s.center for s in solids]) - pose.origin
    half = np.array([s.half for s in solids])
    yaw = np.array([s.yaw for s in solids])
    c, s = np.cos(yaw), np.sin(yaw)
    signs = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    x, y = signs[:, :1] * half[:, 0], signs[:, 1:] * half[:, 1]  # [4, S] corners
    corners = np.hypot(center[:, 0] + c * x - s * y, center[:, 1] + s * x + c * y)
    angles = np.arctan2(center[:, 1] + s * x + c * y, center[:, 0] + c * x - s * y)
    middle = np.arctan2(center[:, 1], center[:, 0])
    swing = (angles - middle + np.pi) % (2 * np.pi) - np.pi

    # The sensor in the frame of the solid: how far is the nearest point of the footprint?
    local_x = np.abs(c * center[:, 0] + s * center[:, 1]) - half[:, 0]
    local_y = np.abs(c * center[:, 1] - s * center[:, 0]) - half[:, 1]
    near = np.maximum(np.hypot(np.maximum(local_x, 0), np.maximum(local_y, 0)), 1e-3)
    far = corners.max(0)
    low, high = center[:, 2] - half[:, 2], center[:, 2] + half[:, 2]
    margin = 4 * _TILT
    bottom = np.rad2deg(np.arctan2(low, np.where(low < 0, near, far)) - margin)
    top = np.rad2deg(np.arctan2(high, np.where(high < 0, far, near)) + margin)
    first = np.searchsorted(sensor.elevations, bottom)
    last = np.searchsorted(sensor.elevations, top, side="right")

    # Tilt moves the azimuth of a ray by about tilt * tan(elevation).
    step = 2 * np.pi / sensor.steps
    steep = np.tan(np.deg2rad(np.minimum(np.maximum(np.abs(bottom), np.abs(top)), 80.0)))
    slack = margin * np.minimum(steep, 1.0) + step
    start = np.floor((middle - pose.heading + swing.min(0) - slack) / step).astype(int)
    stop = np.ceil((middle - pose.heading + swing.max(0) + slack) / step).astype(int) + 1
    around = (np.maximum(local_x, local_y) < 0.05) | (stop - start >= sensor.steps)
    start, stop = np.where(around, 0, start), np.where(around, sensor.steps, stop)
    seen = (first < last) & (near < sensor.max_range)
    return [
        (solids[k], np.arange(first[k], last[k]), np.arange(start[k], stop[k]) % sensor.steps)
        for k in np.flatnonzero(seen)
    ]


def _meet(
    hits: _Hits,
    solid: Solid,
    rays: NDArray[np.int64],
    directions: Array,
    origin: Array,
    rng: np.random.Generator,
) -> None:
    """Overwrite the ``rays`` of ``hits`` that meet the solid before anything else."""
    o, d = shapes.to_local(origin, directions, np.array(solid.center), solid.yaw)
    half = np.array(solid.half)
    if solid.shape == "box":
        crossing = shapes.box(o, d, half, solid.taper)
    else:
        crossing = (shapes.cylinder if solid.shape == "cylinder" else shapes.ellipsoid)(o, d, half)
    here = np.flatnonzero(crossing.enter < hits.distance[rays])
    distance, cosine = crossing.enter[here], crossing.cosine[here]
    tone = np.full(len(here), solid.reflectivity)
    if solid.bays is not None:
        at = o + distance[:, None] * d[here]
        pane = _in_window(at, half, solid)
        distance = distance + np.where(pane, solid.bays.recess / np.maximum(cosine, 0.3), 0.0)
        tone[pane] *= 0.2  # glass sends most of the light elsewhere
    stops = np.ones(len(here), dtype=bool)
    if np.isfinite(solid.density):
        distance = distance + rng.exponential(1 / solid.density, len(here))
        cosine = rng.uniform(0.2, 1.0, len(here))  # leaves face anywhere
        stops = distance < crossing.leave[here]
    if solid.fill < 1:
        stops &= rng.random(len(here)) < solid.fill
    stops &= distance < hits.distance[rays[here]]
    met = rays[here[stops]]
    hits.distance[met], hits.cosine[met] = distance[stops], cosine[stops]
    hits.label[met], hits.reflectivity[met] = solid.label, tone[stops]
    hits.rough[met], hits.bumps[met] = solid.roughness, 0.0


def _in_window(at: Array, half: Array, solid: Solid) -> NDArray[np.bool_]:
    """Which points [n, 3] on the walls of a solid with bays lie in a window."""
    bays = solid.bays
    assert bays is not None
    on_end = np.abs(np.abs(at[:, 0]) - half[0]) < 1e-6
    along, up = np.where(on_end, at[:, 1], at[:, 0]), at[:, 2] + half[2] - 1.0
    across = np.abs((along / bays.width) % 1.0 - 0.5) < bays.share / 2
    return across & (np.abs((up / bays.storey) % 1.0 - 0.55) < bays.share / 2)


def _meet_ground(
    hits: _Hits, ground: Ground, directions: Array, sensor: Sensor, pose: _Pose
) -> None:
    """Meet the land, which is two smooth layers: the roadway, and all else a curb higher."""

    def upper(x: Array, y: Array) -> Array:
        return ground.height(x, y) + ground.curb

    def where(rays: Array, t: Array) -> tuple[Array, Array]:
        p = pose.origin + t[:, None] * rays
        return ground.outside(p[:, 0], p[:, 1]), p[:, 2] - ground.height(p[:, 0], p[:, 1])

    distance = shapes.height_field(
        pose.origin, directions, upper, sensor.max_range, highest=pose.origin[2] + 3.0
    )
    met = np.flatnonzero(np.isfinite(distance))
    rays, t = directions[met], distance[met]
    outside, above = where(rays, t)
    closing = np.maximum(
        (above - where(rays, t + 0.1)[1]) / 0.1, 1e-4
    )  # metres of height per metre
    lower = t + np.where(outside < 0, above / closing, 0.0)
    landing = where(rays, lower)[0]
    face = (outside < 0) & (landing >= 0)  # dives below the curb line before it reaches the road
    share = np.where(face, outside / np.where(face, outside - landing, 1.0), 1.0)
    t = t + share * (lower - t)
    label = ground.label(np.where(face, 0.0, landing))
    hits.distance[met] = t
    hits.cosine[met] = np.where(
        face, np.linalg.norm(rays[:, :2], axis=1), np.minimum(closing, 1.0)
    )
    hits.label[met] = label
    hits.reflectivity[met] = ground.reflectivity[label]  # the first three classes, in this order
    hits.bumps[met] = ground.roughness[label]


def _returned(hits: _Hits, sensor: Sensor, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which rays come back: a chance of one half at the distance where the echo is too weak."""
    t = hits.distance
    echo = hits.reflectivity * np.sqrt(hits.cosine) / 0.1
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weakness = (np.minimum(t, 1e6) / sensor.reach) ** 2 / echo
        chance = (1 - sensor.dropout) / (1 + weakness**2)
    return (t > sensor.min_range) & (t < sensor.max_range) & (rng.random(len(t)) < chance)


def _one_per_cell(points: Array, cell: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of one random point per cube of side ``cell``, ascending."""
    order = rng.permutation(len(points))
    packed = np.floor(points[order] / cell).astype(np.int64) @ [1 << 42, 1 << 21, 1]
    return np.sort(order[np.unique(packed, return_index=True)[1]])
