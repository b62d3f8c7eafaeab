"""A furnished room, so that networks can learn from indoor scans too."""

import numpy as np

from torchsparse.datasets.objects import LABEL, Random, Solid, reflectivity
from torchsparse.datasets.scenes import Scene


def room(seed: int) -> Scene:
    """A furnished room, 4 to 9 m a side, with several places for a scanner.

    Args:
        seed: Chooses everything: the same seed gives the same room.
    """
    rng = np.random.default_rng([seed, 0x40])
    a, b, height = rng.uniform(2.0, 4.5), rng.uniform(2.0, 4.5), rng.uniform(2.3, 3.0)
    solids = [
        Solid("box", (0, 0, -0.1), (a, b, 0.1), LABEL["floor"], reflectivity(rng, "wood")),
        Solid(
            "box",
            (0, 0, height + 0.1),
            (a, b, 0.1),
            LABEL["ceiling"],
            reflectivity(rng, "masonry"),
        ),
    ]
    wall, middle = reflectivity(rng, "masonry"), height / 2
    for sign in (-1, 1):
        solids += [
            Solid("box", (sign * (a + 0.1), 0, middle), (0.1, b, middle), LABEL["wall"], wall),
            Solid("box", (0, sign * (b + 0.1), middle), (a, 0.1, middle), LABEL["wall"], wall),
        ]
    for _ in range(int(rng.integers(2, 5))):
        solids += _table(rng, rng.uniform(-0.7, 0.7) * a, rng.uniform(-0.7, 0.7) * b)
    for _ in range(int(rng.integers(3, 8))):
        solids += _cabinet(rng, a, b)
    stands = np.stack(
        [
            rng.uniform(-0.6, 0.6, 5) * a,
            rng.uniform(-0.6, 0.6, 5) * b,
            np.zeros(5),
            rng.uniform(0, 2 * np.pi, 5),
        ],
        axis=1,
    )
    return Scene(tuple(solids), None, stands)


def _table(rng: Random, x: float, y: float) -> list[Solid]:
    """A table, or a bed without legs, and the chairs around it."""
    label, tone, yaw = LABEL["furniture"], reflectivity(rng, "wood"), rng.choice([0.0, np.pi / 2])
    a, b, height = rng.uniform(0.4, 1.0), rng.uniform(0.3, 0.5), rng.uniform(0.4, 0.78)
    turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])

    def piece(dx: float, dy: float, z: float, half: tuple[float, float, float]) -> Solid:
        at = np.array([dx, dy]) @ turn
        return Solid("box", (x + at[0], y + at[1], z), half, label, tone, float(yaw))

    if rng.random() < 0.25:
        return [piece(0, 0, height / 2, (1.0, 0.5 + b, height / 2))]
    solids = [piece(0, 0, height, (a, b, 0.02))]
    for sx in (-1, 1):
        for sy in (-1, 1):
            solids.append(
                piece(sx * (a - 0.05), sy * (b - 0.05), height / 2, (0.03, 0.03, height / 2))
            )
        if rng.random() < 0.7:
            seat = sx * (a + 0.15)
            solids.append(piece(seat, 0, 0.45, (0.21, 0.21, 0.03)))
            solids.append(piece(seat + sx * 0.2, 0, 0.7, (0.02, 0.2, 0.25)))
            solids.append(piece(seat, 0, 0.2, (0.03, 0.03, 0.2)))
    return solids


def _cabinet(rng: Random, a: float, b: float) -> list[Solid]:
    """A cabinet, shelf or sofa with its back to a wall."""
    depth, width, height = rng.uniform(0.15, 0.45), rng.uniform(0.3, 1.0), rng.uniform(0.25, 1.1)
    sign, tone = float(rng.choice([-1.0, 1.0])), reflectivity(rng, "wood")
    if rng.random() < 0.5:
        x, y, dx, dy = sign * (a - depth), rng.uniform(-0.8, 0.8) * b, depth, width
    else:
        x, y, dx, dy = rng.uniform(-0.8, 0.8) * a, sign * (b - depth), width, depth
    label = LABEL["furniture"]
    return [Solid("box", (x, y, height), (dx, dy, height), label, tone, roughness=0.005)]
