"""From points to labelled voxels, and a dataset of simulated scans.

Networks that learn on simulated streets are to work on scans of other sensors, whose origin may
lie on the roof or on the road and whose intensities follow another scale. The features therefore
count heights from the ground found in the scan itself, and intensity can be dropped in training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchsparse.datasets.lidar import HDL64, Scan, Sensor, scan
from torchsparse.datasets.scenes import Scene, street

FEATURES = ("dx", "dy", "dz", "height", "clearance", "intensity")
"""What the columns of ``Voxels.feats`` mean; lengths in metres.

dx, dy, dz: mean position of the points in units of a voxel, from its centre, in -0.5..0.5;
height: above the ground level of the whole scan, clipped to -5..15;
clearance: above the lowest surface within some 3 m, clipped to 0..10;
intensity: mean of the points in 0..1, 0 where unknown.
"""

_CELL = 2.0  # metres: side of the columns in which the lowest surface is sought
_BIAS = 1 << 20  # makes voxel indices positive; 2^20 voxels of 1 mm are a kilometre


@dataclass(frozen=True, eq=False)
class Voxels:
    """A cloud in voxels. Points (0.01, 0, 0), (0.02, 0, 0), (0.06, 0, 0) at 5 cm give
    coords = [[0, 0, 0], [1, 0, 0]] and inverse = [0, 0, 1].
    """

    coords: NDArray[np.int32]  # [N, 3] = floor(points / voxel_size) - corner, unique, from 0
    feats: NDArray[np.float32]  # [N, 6], see FEATURES
    labels: (
        NDArray[np.int64] | None
    )  # [N] the most frequent label of the points, ties to the lower
    inverse: NDArray[np.int64]  # [P] voxel of each point
    corner: NDArray[np.int64]  # [3] smallest index of a voxel


def voxelize(
    points: NDArray[np.floating],
    intensity: NDArray[np.floating] | None = None,
    labels: NDArray[np.integer] | None = None,
    voxel_size: float = 0.05,
) -> Voxels:
    """Gather points in cubes and describe each cube.

    Args:
        points: [P, 3], metres, z up.
        intensity: [P] in 0..1, or None.
        labels: [P], 0 or more, or None.
        voxel_size: Side of a cube, metres.

    Returns:
        Voxels in ascending order of (x, y, z).

    Raises:
        ValueError: Points of another shape, none at all, non-finite, or further than 2^20 voxels
            from the origin; intensity or labels of another length.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"`points` must have shape [P, 3] with P > 0, got {list(points.shape)}")
    for name, column in (("intensity", intensity), ("labels", labels)):
        if column is not None and column.shape != points.shape[:1]:
            raise ValueError(f"`{name}` must have shape [{len(points)}], got {list(column.shape)}")
    scaled = points / voxel_size
    if not np.abs(scaled).max() < _BIAS:  # also true of nan
        raise ValueError(f"`points` must be finite and within {_BIAS * voxel_size:.0f} m of 0")

    index = np.floor(scaled).astype(np.int64)
    corner = index.min(0)
    keys = (index + _BIAS) @ np.array([1 << 42, 1 << 21, 1])
    _, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    feats = np.empty((len(first), len(FEATURES)), np.float32)
    heights = np.stack(_heights(points), axis=1)
    light = np.zeros(len(points)) if intensity is None else intensity
    columns = np.concatenate([scaled - index - 0.5, heights, light[:, None]], axis=1)
    for k in range(len(FEATURES)):
        feats[:, k] = np.bincount(inverse, columns[:, k]) / counts
    majority = None if labels is None else _majority(inverse, labels, len(first))
    return Voxels((index[first] - corner).astype(np.int32), feats, majority, inverse, corner)


def ground_level(points: NDArray[np.floating]) -> float:
    """Height of the ground around the origin of a scan, metres.

    The lower quartile of the low surfaces of the 300 nearest columns, 2 m wide each.

    Args:
        points: [P, 3], metres, z up.
    """
    _, lowest, _, centers = _low_surface(np.asarray(points, dtype=np.float64))
    return _level(lowest, centers)


def split(count: int, held_out: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    """Deal scene seeds 0..count-1 into training and held-out scenes.

    Args:
        count: Number of scenes.
        held_out: Share of them to keep from training.
        seed: Of the shuffle.

    Returns:
        Two disjoint ascending lists that together hold every seed.
    """
    order = np.random.default_rng(seed).permutation(count)
    kept = round(count * held_out)
    return sorted(order[kept:].tolist()), sorted(order[:kept].tolist())


def augment(
    points: NDArray[np.floating],
    intensity: NDArray[np.floating],
    rng: np.random.Generator,
    drop_intensity: float = 0.3,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Turn, mirror and scale a cloud about the z axis, and change or drop its intensity.

    Args:
        points: [P, 3], metres.
        intensity: [P] in 0..1.
        rng: Chooses the change.
        drop_intensity: Chance that all intensities become 0.

    Returns:
        New points and intensity, float32.
    """
    angle, scale, mirror = rng.uniform(0, 2 * np.pi), rng.uniform(0.95, 1.05), rng.choice([-1, 1])
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    turn = np.array([[c, s, 0], [-mirror * s, mirror * c, 0], [0, 0, scale]])
    # Sensors differ in gain and in how they compress bright echoes.
    light = np.clip(rng.uniform(0.5, 1.5) * intensity ** rng.uniform(0.7, 1.4), 0.0, 1.0)
    if rng.random() < drop_intensity:
        light = np.zeros_like(light)
    return (points @ turn).astype(np.float32), light.astype(np.float32)


class Voxelized:
    """Simulated scans as voxels, one per seed: a map-style dataset for ``DataLoader``.

    Args:
        seeds: One scene each; see :func:`split`.
        voxel_size: Metres.
        sensors: Scene ``seed`` is seen by ``sensors[seed % len(sensors)]``.
        augmented: Change each cloud anew in every epoch, deterministically by (seed, epoch).
        drop_intensity: Chance that an augmented cloud has no intensity; 1.0 = never look at it.
        world: Makes the scene of a seed: :func:`street` or :func:`room`.
        keep: Remember each scan (about 3 MB) instead of casting it again.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        voxel_size: float = 0.05,
        *,
        sensors: Sequence[Sensor] = (HDL64,),
        augmented: bool = False,
        drop_intensity: float = 0.3,
        world: Callable[[int], Scene] = street,
        keep: bool = True,
    ) -> None:
        self.seeds = tuple(seeds)
        self.voxel_size = voxel_size
        self.sensors = tuple(sensors)
        self.augmented = augmented
        self.drop_intensity = drop_intensity
        self.world = world
        self.epoch = 0
        self._scans: dict[int, Scan] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Voxels]:
        return (self[index] for index in range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentations of an epoch; call before iterating."""
        self.epoch = epoch

    def scan(self, index: int) -> Scan:
        """The points behind item ``index``, before augmentation."""
        seed = self.seeds[index]
        if self._scans is not None and seed in self._scans:
            return self._scans[seed]
        seen = scan(self.world(seed), self.sensors[seed % len(self.sensors)], seed)
        if self._scans is not None:
            self._scans[seed] = seen
        return seen

    def __getitem__(self, index: int) -> Voxels:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} scenes")
        seen = self.scan(index)
        points, intensity = seen.points, seen.intensity
        if self.augmented:
            rng = np.random.default_rng([self.seeds[index], self.epoch, 0xA6])
            points, intensity = augment(points, intensity, rng, self.drop_intensity)
        return voxelize(points, intensity, seen.labels, self.voxel_size)


def _low_surface(
    points: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Per 2 m column: its key, its low surface, the column of each point, its centre."""
    column = np.floor(points[:, :2] / _CELL).astype(np.int64)
    keys, of = np.unique((column + _BIAS) @ np.array([1 << 21, 1]), return_inverse=True)
    order = np.lexsort((points[:, 2], of))
    counts = np.bincount(of)
    # The 5 % quantile, not the minimum: mirrored echoes lie below the ground.
    lowest = points[order[np.cumsum(counts) - counts + counts // 20], 2]
    columns = np.stack([keys >> 21, keys & (2 * _BIAS - 1)], axis=1) - _BIAS
    centers = _CELL * (columns.astype(np.float64) + 0.5)
    return keys, lowest, of, centers


def _level(lowest: NDArray[np.float64], centers: NDArray[np.float64]) -> float:
    nearest = np.argsort((centers**2).sum(1), kind="stable")[:300]
    return float(np.quantile(lowest[nearest], 0.25))


def _heights(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The features ``height`` and ``clearance`` of each point."""
    keys, lowest, of, centers = _low_surface(points)
    level = _level(lowest, centers)
    floor = lowest.copy()
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            wanted = keys + dx * (1 << 21) + dy
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            floor = np.minimum(floor, np.where(keys[at] == wanted, lowest[at], np.inf))
    z = points[:, 2]
    return np.clip(z - level, -5.0, 15.0), np.clip(z - floor[of], 0.0, 10.0)


def _majority(
    inverse: NDArray[np.int64], labels: NDArray[np.integer], voxels: int
) -> NDArray[np.int64]:
    classes = int(labels.max()) + 1
    votes = np.bincount(inverse * classes + labels, minlength=voxels * classes)
    return votes.reshape(voxels, classes).argmax(1)
