"""A world to look at: a street on uneven ground, as labelled solids drawn from a seed.

The street runs along x and the sensor stands near x = 0; distances across the street are counted
from its axis.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchsparse.datasets.objects import (
    LABEL,
    Random,
    Solid,
    building,
    bush,
    car,
    fence,
    hedge,
    pedestrian,
    pole,
    reflectivity,
    tree,
)

Array = NDArray[np.float64]
Span = tuple[float, float]
Thing = list[Solid]  # its main part first


@dataclass(frozen=True, eq=False)
class Ground:
    """A street and the land beside it, as heights and labels over the plane.

    height = slope · (x, y) + Σ amplitude · sin(waves · (x, y) + phase) + bank beyond the sidewalk;
    whatever is not road lies ``curb`` higher.
    """

    road: float  # half width, metres
    sidewalk: float  # width, metres
    crossing: Span | None  # position on x and half width of a side street
    curb: float  # metres
    bank: Span  # metres per metre, right and left of the street
    slope: Array  # [2] metres per metre
    waves: Array  # [W, 2] radians per metre
    phases: Array  # [W] radians
    amplitudes: Array  # [W] metres
    reflectivity: Array  # [3] of road, sidewalk, terrain
    roughness: Array  # [3] standard deviation along z, metres

    def outside(self, x: Array, y: Array) -> Array:
        """Distance to the nearest roadway, metres; negative on it."""
        away = np.abs(y) - self.road
        if self.crossing is not None:
            away = np.minimum(away, np.abs(x - self.crossing[0]) - self.crossing[1])
        return away

    def height(self, x: Array, y: Array) -> Array:
        """Height without the curb, metres."""
        z = self.slope[0] * x + self.slope[1] * y
        for wave, phase, amplitude in zip(self.waves, self.phases, self.amplitudes, strict=True):
            z = z + amplitude * np.sin(wave[0] * x + wave[1] * y + phase)
        beyond = np.clip(np.abs(y) - self.road - self.sidewalk, 0.0, 25.0)
        return z + np.where(y < 0, self.bank[0], self.bank[1]) * beyond

    def label(self, outside: Array) -> NDArray[np.int64]:
        """Road, sidewalk or terrain, by the distance to the roadway."""
        return np.where(
            outside < 0,
            LABEL["road"],
            np.where(outside < self.sidewalk, LABEL["sidewalk"], LABEL["terrain"]),
        )

    def foot(self, x: float, y: float) -> tuple[float, float, float]:
        """Where an object stands at (x, y)."""
        at = np.array([x]), np.array([y])
        raised = self.curb if self.outside(*at)[0] >= 0 else 0.0
        return x, y, float(self.height(*at)[0]) + raised


@dataclass(frozen=True, eq=False)
class Scene:
    """Labelled solids, the ground below them, and where a sensor may stand."""

    solids: tuple[Solid, ...]
    ground: Ground | None
    stands: Array  # [S, 4] x, y, height of the floor there (metres) and heading (radians)


class Style(NamedTuple):
    """A kind of neighbourhood: ranges in metres unless said."""

    road: Span  # half width
    sidewalk: Span
    setback: Span  # from the sidewalk to the houses
    frontage: Span  # length of a house
    gap: Span  # between houses
    storeys: tuple[int, int]  # lowest, highest + 1
    parked: Span  # from car to car along the curb
    trees: Span  # from tree to tree
    bushes: int  # per side of the street
    people: tuple[int, int]


STYLES = (
    Style(
        (5.5, 10), (4.0, 7.0), (0.5, 7.0), (9, 24), (0, 6), (3, 7), (9, 24), (12, 28), 16, (8, 22)
    ),
    Style(
        (5.0, 7.0), (2.0, 4.0), (5.5, 11), (8, 15), (3, 10), (1, 4), (9, 26), (9, 20), 60, (4, 14)
    ),
    Style(
        (5.0, 9.5), (1.5, 4.0), (9, 20), (12, 35), (6, 24), (1, 6), (12, 40), (8, 18), 90, (3, 12)
    ),
)


def street(seed: int) -> Scene:
    """A street, 140 m long, with everything of ``STREET_CLASSES`` along it.

    Args:
        seed: Chooses everything: the same seed gives the same street.
    """
    rng = np.random.default_rng([seed, 0x57])
    style = STYLES[rng.integers(len(STYLES))]
    ground = _ground(rng, style)
    things: list[Thing] = []
    for side in (-1, 1):
        things += _houses(rng, style, ground, side)
        things += _property_line(rng, style, ground, side)
        things += _sidewalk(rng, style, ground, side)
        things += _garden(rng, style, ground, side)
        things += _traffic(rng, style, ground, side)
    lane = rng.uniform(0.15, 0.35) * ground.road
    x, y, z = ground.foot(0.0, -lane)
    solids = [solid for thing in things if _clear_of(thing[0], x, y) for solid in thing]
    return Scene(tuple(solids), ground, np.array([[x, y, z, rng.normal(0, 0.05)]]))


def _clear_of(solid: Solid, x: float, y: float) -> bool:
    """Whether a solid leaves room for the car that carries the sensor at (x, y)."""
    dx, dy = solid.center[0] - x, solid.center[1] - y
    c, s = np.cos(solid.yaw), np.sin(solid.yaw)
    gap_x = abs(c * dx + s * dy) - solid.half[0]
    gap_y = abs(c * dy - s * dx) - solid.half[1]
    return bool(gap_x > 2.8 or gap_y > 1.6)


def _ground(rng: Random, style: Style) -> Ground:
    lengths = np.array([70.0, 35.0, 18.0, 7.0])
    angles = rng.uniform(0, 2 * np.pi, len(lengths))
    waves = 2 * np.pi / lengths * np.stack([np.cos(angles), np.sin(angles)])
    side_street = (rng.choice([-1, 1]) * rng.uniform(14, 45), rng.uniform(2.8, 5.0))
    return Ground(
        road=rng.uniform(*style.road),
        sidewalk=rng.uniform(*style.sidewalk),
        crossing=side_street if rng.random() < 0.6 else None,
        curb=rng.uniform(0.02, 0.18),
        bank=(rng.uniform(-0.05, 0.12), rng.uniform(-0.05, 0.12)),
        slope=rng.normal(0, 0.012, 2),
        waves=waves.T,
        phases=rng.uniform(0, 2 * np.pi, len(lengths)),
        amplitudes=np.array([0.20, 0.08, 0.03, 0.012]) * rng.uniform(0.2, 1.5, len(lengths)),
        reflectivity=np.array([reflectivity(rng, m) for m in ("asphalt", "concrete", "grass")]),
        roughness=np.array([0.004, 0.006, rng.uniform(0.02, 0.07)]),
    )


def _along(
    rng: Random, spacing: Span, ground: Ground, margin: float, reach: float = 75.0
) -> list[float]:
    """Positions on x, ``spacing`` apart, that leave the side street free."""
    gaps = rng.uniform(*spacing, int(2 * reach / spacing[0]) + 1)
    x = -reach + np.cumsum(gaps) - gaps[0] * rng.random()
    x = x[x < reach]
    if ground.crossing is not None:
        x = x[np.abs(x - ground.crossing[0]) > ground.crossing[1] + margin]
    return x.tolist()


def _houses(rng: Random, style: Style, ground: Ground, side: int) -> list[Thing]:
    things, x = [], -75.0 + rng.uniform(0, 10)
    while x < 75:
        length, depth = rng.uniform(*style.frontage), rng.uniform(8, 14)
        middle, x = x + length / 2, x + length + rng.uniform(*style.gap)
        away = ground.road + ground.sidewalk + rng.uniform(*style.setback) + depth / 2
        blocked = ground.crossing is not None and (
            abs(middle - ground.crossing[0]) < ground.crossing[1] + ground.sidewalk + length / 2
        )
        if not blocked:
            foot = ground.foot(middle, side * away)
            storeys = int(rng.integers(*style.storeys))
            things.append(building(rng, foot, rng.normal(0, 0.02), length, depth, storeys))
    return things


def _property_line(rng: Random, style: Style, ground: Ground, side: int) -> list[Thing]:
    """Fences, walls and hedges in stretches along the back of the sidewalk, and railings."""
    things, length = [], 3.0
    if style.setback[1] < 3:  # houses at the sidewalk: railings at the curb instead
        line, share = ground.road + 0.25, 0.12
    else:
        line, share = ground.road + ground.sidewalk + rng.uniform(0.5, 2.5), 0.55
    kind, height, fill = "none", 1.0, 1.0
    for k, x in enumerate(np.arange(-60.0, 60.0, length)):
        if k % 4 == 0:
            kind = rng.choice(["fence", "hedge", "none"], p=[0.6 * share, 0.4 * share, 1 - share])
            height = rng.uniform(0.8, 1.9)
            fill = float(rng.choice([rng.uniform(0.2, 0.5), rng.uniform(0.6, 0.95), 1.0]))
        if ground.crossing is not None and abs(x - ground.crossing[0]) < ground.crossing[1] + 4:
            continue
        foot = ground.foot(float(x), side * line)
        if kind == "fence":
            things.append(fence(rng, foot, 0.0, length, height, fill))
        elif kind == "hedge":
            things.append(hedge(rng, foot, rng.normal(0, 0.02), length, height))
    return things


def _sidewalk(rng: Random, style: Style, ground: Ground, side: int) -> list[Thing]:
    """Poles and trees near the curb, people on the sidewalk and a few on the road."""
    things = []
    for x in _along(rng, (8, 24), ground, 1.0):
        foot = ground.foot(x, side * (ground.road + rng.uniform(0.3, 0.7)))
        things.append(pole(rng, foot, rng.normal(0, 0.2) + (np.pi if side > 0 else 0.0)))
    for x in _along(rng, style.trees, ground, 2.0):
        things.append(tree(rng, ground.foot(x, side * (ground.road + rng.uniform(0.5, 1.1)))))
    for _ in range(int(rng.integers(*style.people)) // 2 + 1):
        away = rng.uniform(0.2, ground.sidewalk) if rng.random() < 0.9 else rng.uniform(-1.5, 0)
        foot = ground.foot(rng.uniform(-35, 35), side * (ground.road + away))
        things.append(pedestrian(rng, foot, rng.uniform(0, 2 * np.pi)))
    return things


def _garden(rng: Random, style: Style, ground: Ground, side: int) -> list[Thing]:
    """Bushes and trees between the sidewalk and the houses, and behind gaps."""
    things = []
    inner = ground.road + ground.sidewalk + 0.8
    outer = inner + max(style.setback[1], 2.0)
    for _ in range(style.bushes):
        things.append(
            bush(rng, ground.foot(rng.uniform(-60, 60), side * rng.uniform(inner, outer + 5)))
        )
    for _ in range(style.bushes // 4):
        x, away = rng.uniform(-60, 60), rng.uniform(inner + 1, outer + 12)
        things.append(tree(rng, ground.foot(x, side * away)))
    for x in _along(rng, (2, 8), ground, 2.0):  # a thicket behind the gardens closes the view
        away = outer + rng.uniform(8, 25)
        things.append((bush if rng.random() < 0.6 else tree)(rng, ground.foot(x, side * away)))
    return things


def _traffic(rng: Random, style: Style, ground: Ground, side: int) -> list[Thing]:
    """Cars parked at the curb, some driving, some in driveways."""
    things = []
    facing = 0.0 if side < 0 else np.pi
    for x in _along(rng, style.parked, ground, 4.0):
        foot = ground.foot(x, side * (ground.road - rng.uniform(1.0, 1.3)))
        if abs(x) > 4:  # the sensor's own car needs a place
            things.append(car(rng, foot, facing + rng.normal(0, 0.03)))
    for x in _along(rng, (15, 60), ground, 6.0):
        if abs(x) > 8:
            foot = ground.foot(x, side * rng.uniform(0.2, 0.35) * ground.road)
            things.append(car(rng, foot, facing + rng.normal(0, 0.02)))
    if style.setback[0] >= 4:
        for x in _along(rng, (14, 40), ground, 6.0):
            away = ground.road + ground.sidewalk + rng.uniform(2.6, 4.0)
            things.append(car(rng, ground.foot(x, side * away), np.pi / 2 + rng.normal(0, 0.1)))
    return things
