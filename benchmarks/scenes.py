"""Voxelised synthetic scenes as `.npz` files that any library can read.

    python benchmarks/scenes.py --out runs/scenes

Each file holds coords int32 [N, 4], columns (b, x, y, z), and feats float32 [N, 4]: the mean
position of the points within their voxel (x, y, z, in -0.5..0.5) and their mean intensity.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchsparse.datasets import HDL32, HDL64, INDOOR, Sensor, room, scan, street, voxelize

FOLDER = Path("runs/scenes")


class SceneSpec(NamedTuple):
    """What to simulate."""

    sensor: Sensor
    voxel_size: float  # metres
    seeds: tuple[int, ...]  # one sample each
    indoors: bool = False


SPECS = {
    "tiny": SceneSpec(HDL32, 0.8, (0,)),  # for tests
    "street": SceneSpec(HDL64, 0.1, (0,)),  # as in driving data sets
    "street-fine": SceneSpec(HDL64, 0.05, (0,)),
    "batch": SceneSpec(HDL32, 0.1, (0, 1, 2, 3)),
    "room": SceneSpec(INDOOR, 0.05, (0,), indoors=True),
}


class Scene(NamedTuple):
    """One batch."""

    coords: NDArray[np.int32]  # [N, 4] (b, x, y, z)
    feats: NDArray[np.float32]  # [N, 4]


def simulate(spec: SceneSpec) -> Scene:
    """Cast the rays and voxelise."""
    coords, feats = [], []
    for sample, seed in enumerate(spec.seeds):
        cloud = scan((room if spec.indoors else street)(seed), spec.sensor, seed)
        voxels = voxelize(cloud.points, cloud.intensity, voxel_size=spec.voxel_size)
        coords.append(np.pad(voxels.coords, ((0, 0), (1, 0)), constant_values=sample))
        feats.append(voxels.feats[:, [0, 1, 2, 5]])  # dx, dy, dz, intensity
    return Scene(np.concatenate(coords), np.concatenate(feats))


def load(name: str, folder: Path = FOLDER) -> Scene:
    """A scene by name, simulated once and then read from its file; or any such file by its path.

    Raises:
        KeyError: Unknown name.
        FileNotFoundError: No such file.
    """
    path = Path(name) if name.endswith(".npz") else folder / f"{name}.npz"
    if not path.exists() and not name.endswith(".npz"):
        scene = simulate(SPECS[name])
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, coords=scene.coords, feats=scene.feats)
    with np.load(path) as file:
        return Scene(file["coords"].astype(np.int32), file["feats"].astype(np.float32))


def crop(scene: Scene, side: int = 16) -> Scene:
    """The cube of ``side`` voxels that holds most, moved to 0, as a batch of one."""
    cells = scene.coords // np.array([1, side, side, side])
    found, rows, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    keep = rows.reshape(-1) == counts.argmax()
    corner = found[counts.argmax()] * np.array([1, side, side, side])
    return Scene((scene.coords[keep] - corner).astype(np.int32), scene.feats[keep])


def variant(scene: Scene, seed: int, share: float = 0.99) -> Scene:
    """``share`` of the rows, shuffled: another scan of the same place."""
    count = len(scene.coords)
    rows = np.random.default_rng(seed).permutation(count)[: int(share * count)]
    return Scene(scene.coords[rows], scene.feats[rows])


def together(*parts: Scene) -> Scene:
    """One batch of several, sample after sample."""
    coords, first = [], 0
    for part in parts:
        coords.append(part.coords + np.array([first, 0, 0, 0], np.int32))
        first = int(coords[-1][:, 0].max()) + 1
    return Scene(np.concatenate(coords), np.concatenate([part.feats for part in parts]))


def main(argv: list[str] | None = None) -> None:
    """Write the named scenes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SPECS)}; all by default")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    for name in options.names or SPECS:
        scene = load(name, options.out)
        extent = np.ptp(scene.coords, axis=0) + 1
        print(f"{options.out / name}.npz: {len(scene.coords)} voxels, extent {extent.tolist()}")


if __name__ == "__main__":
    main()
