"""What stands in a scene: labelled solids, and the cars, trees, houses ... made of them.

Every maker takes a random generator, the foot of the object and its yaw, and returns a list of
solids in world coordinates (metres, z up). Reflectivities are drawn per object from broad, widely
overlapping distributions: as in real scans, shape tells a class, not brightness.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Random = np.random.Generator
Point = tuple[float, float, float]


class SemanticClass(NamedTuple):
    """A row of the class table; its position is the label."""

    name: str
    color: tuple[int, int, int]  # red, green, blue in 0..255
    ground: bool = False  # something to drive or walk on


STREET_CLASSES = (
    SemanticClass("road", (128, 64, 128), ground=True),
    SemanticClass("sidewalk", (244, 35, 232), ground=True),
    SemanticClass("terrain", (152, 251, 152), ground=True),
    SemanticClass("building", (230, 150, 60)),
    SemanticClass("fence", (190, 153, 110)),
    SemanticClass("vegetation", (35, 142, 35)),
    SemanticClass("trunk", (139, 69, 19)),
    SemanticClass("pole", (255, 240, 60)),
    SemanticClass("car", (60, 110, 255)),
    SemanticClass("pedestrian", (220, 20, 60)),
)
"""What there is on a street."""
ROOM_CLASSES = (
    SemanticClass("floor", (200, 180, 200), ground=True),
    SemanticClass("wall", (174, 199, 232)),
    SemanticClass("ceiling", (120, 130, 140)),
    SemanticClass("furniture", (255, 127, 14)),
)
"""What there is in a room."""
CLASSES = STREET_CLASSES + ROOM_CLASSES
"""All classes: the label of a point is the position of its class."""
LABEL = {row.name: label for label, row in enumerate(CLASSES)}

# Median reflectivity and spread (standard deviation of its logarithm), per material.
_MATERIALS = {
    "asphalt": (0.24, 0.25),
    "concrete": (0.30, 0.30),
    "grass": (0.28, 0.30),
    "masonry": (0.30, 0.45),
    "wood": (0.27, 0.45),
    "leaf": (0.27, 0.35),
    "metal": (0.32, 0.65),
    "paint": (0.26, 0.80),
    "sign": (0.60, 0.35),
    "cloth": (0.26, 0.55),
}


class Bays(NamedTuple):
    """Windows of a facade, repeated along the wall and upwards: metres, and shares of a bay."""

    width: float
    storey: float
    share: float  # of the width and of the storey
    recess: float


@dataclass(frozen=True)
class Solid:
    """One primitive: its shape, where it stands, and how it answers a ray.

    A ray that meets it stops with probability ``fill``; in a porous solid it travels on for an
    exponentially distributed length of mean 1 / ``density`` and stops if it is still inside.
    """

    shape: str  # "box", "cylinder" or "ellipsoid"
    center: Point
    half: Point  # half extents in the frame of the solid
    label: int
    reflectivity: float
    yaw: float = 0.0
    taper: tuple[float, float] = (0.0, 0.0)  # of boxes, see shapes.box
    fill: float = 1.0
    density: float = np.inf  # per metre
    roughness: float = 0.0  # standard deviation along the ray, metres
    bays: Bays | None = None


def reflectivity(rng: Random, material: str) -> float:
    """Draw the share of light that a surface of ``material`` sends back, 0.02..1."""
    median, spread = _MATERIALS[material]
    return float(np.clip(median * np.exp(spread * rng.standard_normal()), 0.02, 1.0))


def _at(foot: Point, yaw: float, dx: float, dy: float, dz: float) -> Point:
    """The world position of an offset in the frame of an object."""
    c, s = np.cos(yaw), np.sin(yaw)
    return (foot[0] + c * dx - s * dy, foot[1] + s * dx + c * dy, foot[2] + dz)


def car(rng: Random, foot: Point, yaw: float) -> list[Solid]:
    """A passenger car, or, one time in six, a van: body, cabin with glass, four wheels."""
    van = rng.random() < 1 / 6
    length = rng.uniform(4.8, 6.5) if van else rng.uniform(3.6, 4.9)
    width = rng.uniform(1.9, 2.2) if van else rng.uniform(1.62, 1.92)
    height = rng.uniform(2.0, 2.7) if van else rng.uniform(1.38, 1.75)
    belt = height * rng.uniform(0.50, 0.60)
    cabin = length * (rng.uniform(0.80, 0.92) if van else rng.uniform(0.52, 0.72))
    shift = -(length - cabin) / 2 * rng.uniform(0.3, 0.9)
    paint, label = reflectivity(rng, "paint"), LABEL["car"]
    sill = rng.uniform(0.18, 0.30)
    body = (length / 2, width / 2, (belt - sill) / 2)
    top = (cabin / 2, width / 2 - 0.04, (height - belt) / 2)
    lean = (cabin * 0.10, 0.10) if van else (cabin * 0.22, 0.20)
    solids = [
        Solid(
            "box", _at(foot, yaw, 0, 0, (belt + sill) / 2), body, label, paint, yaw, (0.12, 0.06)
        ),
        Solid(
            "box",
            _at(foot, yaw, shift, 0, (belt + height) / 2),
            top,
            label,
            paint,
            yaw,
            lean,
            fill=0.9 if van else 0.6,
        ),
    ]
    for dx in (-0.31 * length, 0.31 * length):
        for dy in (-width / 2 + 0.11, width / 2 - 0.11):
            wheel = _at(foot, yaw, dx, dy, 0.31)
            solids.append(Solid("box", wheel, (0.27, 0.1, 0.31), label, 0.08, yaw, (0.1, 0.0)))
    return solids


def pedestrian(rng: Random, foot: Point, yaw: float) -> list[Solid]:
    """A standing or walking person: two legs, torso, two arms, head; 1.1 to 1.95 m tall."""
    s = rng.uniform(1.1, 1.95) / 1.75
    coat, trousers = reflectivity(rng, "cloth"), reflectivity(rng, "cloth")
    label, step, girth = LABEL["pedestrian"], rng.uniform(0, 0.2) * s, rng.uniform(0.85, 1.3) * s
    parts = [
        ("ellipsoid", (0, 0, 1.15), (0.15 * girth, 0.23 * girth, 0.40 * s), coat),
        ("ellipsoid", (0.02, 0, 1.63), (0.10 * s, 0.09 * s, 0.12 * s), coat),
    ]
    for side in (-1, 1):
        parts.append(
            ("cylinder", (side * step, side * 0.1, 0.43), (0.08, 0.07, 0.43 * s), trousers)
        )
        parts.append(
            ("cylinder", (-side * step, side * 0.25 * girth / s, 1.1), (0.05, 0.05, 0.3 * s), coat)
        )
    return [
        Solid(shape, _at(foot, yaw, x * s, y * s, z * s), half, label, tone, yaw, roughness=0.01)
        for shape, (x, y, z), half, tone in parts
    ]


def tree(rng: Random, foot: Point) -> list[Solid]:
    """A trunk under a porous crown of clumps; one time in four a conifer, green from the foot."""
    conifer = rng.random() < 0.25
    radius = rng.uniform(0.06, 0.24)
    stem = rng.uniform(0.3, 1.0) if conifer else rng.uniform(1.2, 3.2)
    rise = rng.uniform(3.0, 7.0) if conifer else rng.uniform(2.5, 6.0)
    spread = rng.uniform(0.9, 1.8) if conifer else rng.uniform(1.3, 3.4)
    top = stem + 0.5 * rise
    bark, leaf, lean = reflectivity(rng, "wood"), reflectivity(rng, "leaf"), rng.normal(0, 0.1, 2)
    solids = [
        Solid(
            "cylinder",
            _at(foot, 0, 0, 0, top / 2),
            (radius, radius, top / 2),
            LABEL["trunk"],
            bark,
            roughness=0.01,
        ),
        Solid(
            "box",
            _at(foot, 0, 0, 0, 0.2),
            (1.5 * radius, 1.5 * radius, 0.25),
            LABEL["trunk"],
            bark,
            float(rng.uniform(0, 3)),
            (0.8 * radius, 0.8 * radius),
        ),
    ]
    clumps = int(rng.integers(6, 14))
    for k in range(clumps):
        up = (k + rng.random()) / clumps
        reach = spread * ((1 - up) if conifer else np.sqrt(rng.random()) * 0.75)
        angle = rng.uniform(0, 2 * np.pi)
        size = rng.uniform(0.25, 0.5) * spread * (1.2 - 0.6 * up)
        dx, dy = reach * np.cos(angle) + lean[0] * rise, reach * np.sin(angle) + lean[1] * rise
        solids.append(
            Solid(
                "ellipsoid",
                _at(foot, 0, dx, dy, stem + up * rise + 0.3 * size),
                (size, size * rng.uniform(0.8, 1.2), size * rng.uniform(0.5, 0.9)),
                LABEL["vegetation"],
                leaf,
                density=rng.uniform(0.4, 1.6),
            )
        )
    return solids


def bush(rng: Random, foot: Point) -> list[Solid]:
    """Three to seven porous clumps on the ground, knee high to twice a man's height."""
    leaf, height = reflectivity(rng, "leaf"), rng.uniform(0.35, 1.0) * rng.choice([1.0, 1.7, 3.0])
    solids = []
    for _ in range(int(rng.integers(3, 8))):
        dx, dy = rng.normal(0, 0.55 * height, 2)
        a, b, c = height * rng.uniform(0.25, 0.6, 3)
        foot_of = _at(foot, 0, dx, dy, rng.uniform(0.2, 1.0) * height)
        solids.append(
            Solid(
                "ellipsoid",
                foot_of,
                (a, b, c),
                LABEL["vegetation"],
                leaf,
                density=rng.uniform(0.5, 2.5),
            )
        )
    return solids


def hedge(rng: Random, foot: Point, yaw: float, length: float, height: float) -> list[Solid]:
    """A trimmed, nearly opaque hedge along its local x axis."""
    half = (length / 2, rng.uniform(0.25, 0.5), height / 2)
    return [
        Solid(
            "box",
            _at(foot, yaw, 0, 0, height / 2 - 0.1),
            half,
            LABEL["vegetation"],
            reflectivity(rng, "leaf"),
            yaw,
            (0.1, 0.2),
            density=rng.uniform(5, 12),
            roughness=0.04,
        )
    ]


def fence(
    rng: Random, foot: Point, yaw: float, length: float, height: float, fill: float
) -> list[Solid]:
    """A thin panel that stops a share ``fill`` of the rays, with a post at its start."""
    material = "metal" if fill < 0.5 else "wood" if fill < 1 else "masonry"
    tone, label = reflectivity(rng, material), LABEL["fence"]
    thickness = 0.1 if fill == 1 else 0.02
    return [
        Solid(
            "box",
            _at(foot, yaw, 0, 0, height / 2 - 0.05),
            (length / 2, thickness, height / 2),
            label,
            tone,
            yaw,
            fill=fill,
        ),
        Solid(
            "cylinder",
            _at(foot, yaw, -length / 2, 0, height / 2),
            (0.04, 0.04, height / 2 + 0.05),
            label,
            tone,
        ),
    ]


def pole(rng: Random, foot: Point, yaw: float) -> list[Solid]:
    """A bollard, a traffic sign, or a lamp post with an arm towards local y."""
    label, tone, kind = LABEL["pole"], reflectivity(rng, "metal"), rng.random()
    if kind < 0.15:
        radius, top = rng.uniform(0.05, 0.1), rng.uniform(0.4, 0.6)
        half = (radius, radius, top)
        return [Solid("cylinder", _at(foot, 0, 0, 0, half[2]), half, label, tone)]
    height = rng.uniform(2.3, 3.2) if kind < 0.55 else rng.uniform(5.0, 9.0)
    radius = rng.uniform(0.03, 0.05) if kind < 0.55 else rng.uniform(0.06, 0.16)
    shaft = Solid(
        "cylinder", _at(foot, 0, 0, 0, height / 2), (radius, radius, height / 2), label, tone
    )
    if kind < 0.55:
        plate = (0.01, rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.4))
        center = _at(foot, yaw, radius + 0.02, 0, height - plate[2])
        return [shaft, Solid("box", center, plate, label, reflectivity(rng, "sign"), yaw)]
    arm = _at(foot, yaw, 0, 0.9, height - 0.1)
    box = _at(foot, yaw, 0.3, 0, 1.3)
    solids = [shaft, Solid("box", arm, (0.06, 0.9, 0.05), label, tone, yaw)]
    if kind > 0.85:  # a switch cabinet or signal head at the shaft
        solids.append(Solid("box", box, (0.15, 0.2, 0.4), label, tone, yaw))
    return solids


def building(
    rng: Random, foot: Point, yaw: float, length: float, depth: float, storeys: int
) -> list[Solid]:
    """A house: walls with recessed windows, a gabled roof on low ones, balconies and a porch."""
    storey = rng.uniform(2.7, 3.4)
    height, tone, label = storeys * storey + 0.5, reflectivity(rng, "masonry"), LABEL["building"]
    bays = Bays(rng.uniform(1.8, 3.6), storey, rng.uniform(0.35, 0.6), rng.uniform(0.05, 0.25))
    half = (length / 2, depth / 2, height / 2 + 0.5)
    solids = [
        Solid(
            "box",
            _at(foot, yaw, 0, 0, height / 2 - 0.5),
            half,
            label,
            tone,
            yaw,
            bays=bays,
            roughness=0.015,
        )
    ]
    if storeys <= 2:
        roof = (length / 2 + 0.3, depth / 2 + 0.4, rng.uniform(0.8, 2.0))
        solids.append(
            Solid(
                "box",
                _at(foot, yaw, 0, 0, height + roof[2]),
                roof,
                label,
                reflectivity(rng, "masonry"),
                yaw,
                (0.0, roof[1]),
            )
        )
    for side in (-1, 1):
        for _ in range(int(rng.integers(0, 4))):  # porches, stairs, oriels, balconies
            at = rng.uniform(-0.4, 0.4) * length
            half = (rng.uniform(0.4, 1.5), rng.uniform(0.3, 0.8), rng.uniform(0.2, 1.4))
            lift = half[2] if rng.random() < 0.6 else rng.uniform(1, max(storeys - 1, 1)) * storey
            solids.append(
                Solid("box", _at(foot, yaw, at, side * (depth / 2), lift), half, label, tone, yaw)
            )
    return solids
