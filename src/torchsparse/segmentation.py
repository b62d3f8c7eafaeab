"""Points in, labels out: train a network on labelled scans, judge it, and use it.

    scans = [scan(street(seed)) for seed in range(40)]
    segmenter = Segmenter.new(Recipe())
    fit(segmenter, scans)
    labels = segmenter.predict(points, intensity)

A scan is anything with ``points`` [P, 3] in metres, ``intensity`` [P] in 0..1 and ``labels`` [P].
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from torchsparse.datasets.lidar import Scan
from torchsparse.datasets.objects import STREET_CLASSES
from torchsparse.datasets.voxelized import FEATURES, Voxels, augment, voxelize
from torchsparse.models.minkunet import MinkUNet
from torchsparse.tensor import SparseTensor
from torchsparse.utils.collate import sparse_collate

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Recipe",
    "Segmenter",
    "evaluate",
    "fit",
    "load_checkpoint",
    "lovasz_softmax",
    "save_checkpoint",
]

_FORMAT = "torchsparse.segmentation/1"
_SCALE = np.array([1.0, 1.0, 1.0, 0.2, 0.2, 2.0], np.float32)  # of FEATURES, to about -1..1
_MORE = ("step", "near", "far", "above", "filled", "one")
"""What the network gets to see besides: lengths in metres.

step: 1 - exp(-clearance / 0.3), on which a curb is large;
near, far: exp(-d / 4) and d / 50 up to 2, with d the distance from the origin on the ground;
above: how much higher the column of this voxel reaches, / 4, up to 2;
filled: length of the column that is filled, / 2, up to 2;
one: tells a voxel from a void.
"""
_HEIGHT, _CLEARANCE = FEATURES.index("height"), FEATURES.index("clearance")


class CheckpointError(ValueError):
    """A file that is no checkpoint of this module; the message is one line with its path."""


@dataclass(frozen=True)
class Recipe:
    """All that it takes to build a network and to feed it; plain numbers and strings."""

    classes: tuple[str, ...] = tuple(row.name for row in STREET_CLASSES)
    features: tuple[str, ...] = (*FEATURES, *_MORE)
    intensity: bool = False  # look at it? Scanners scale it differently, so shape travels better
    voxel_size: float = 0.2  # metres
    stem: int = 16
    encoder: tuple[int, ...] = (24, 32, 64, 96)
    decoder: tuple[int, ...] = (64, 48, 32, 24)
    depth: int = 1
    trained_on: str = "simulated streets"

    def build(self) -> MinkUNet:
        """A network with fresh weights from torch's global generator."""
        return MinkUNet(
            len(self.features),
            len(self.classes),
            stem=self.stem,
            encoder=self.encoder,
            decoder=self.decoder,
            depth=self.depth,
        )


@dataclass(eq=False)
class Segmenter:
    """A network, what it takes to feed it, and how far its training has come."""

    recipe: Recipe
    network: MinkUNet
    steps: int = 0  # done
    planned: int = 0  # steps < planned: the training was stopped early

    @classmethod
    def new(cls, recipe: Recipe, seed: int = 0) -> Segmenter:
        """An untrained network; equal seeds give equal weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(recipe, recipe.build())

    def prepare(
        self, points: NDArray[np.floating], intensity: NDArray[np.floating] | None = None
    ) -> tuple[SparseTensor, Tensor]:
        """Points as the network wants them.

        Args:
            points: [P, 3], metres, z up.
            intensity: [P] in 0..1, or None; not looked at unless ``recipe.intensity``.

        Returns:
            A batch of one, features [N, 12] float32 and coordinates [N, 4] int32, and the row of
            each point in it, [P] int64.

        Raises:
            ValueError: No points, non-finite ones, or columns of another shape.
        """
        seen = intensity if self.recipe.intensity else None
        voxels = voxelize(points, seen, voxel_size=self.recipe.voxel_size)
        return sparse_collate([_sample(voxels, self.recipe.voxel_size)]), torch.from_numpy(
            voxels.inverse
        )

    def predict(
        self, points: NDArray[np.floating], intensity: NDArray[np.floating] | None = None
    ) -> NDArray[np.int64]:
        """The class of each point.

        Args:
            points: [P, 3], metres, z up. The origin may lie anywhere near the scanner.
            intensity: [P] in 0..1, or None; not looked at unless ``recipe.intensity``.

        Returns:
            [P] rows of ``recipe.classes``.

        Raises:
            ValueError: As :meth:`prepare`.
        """
        x, inverse = self.prepare(points, intensity)
        self.network.eval()
        with torch.inference_mode():
            return self.network(x).argmax(1)[inverse].numpy()


def fit(
    segmenter: Segmenter,
    scans: Sequence[Scan],
    *,
    steps: int = 600,
    batch: int = 1,
    rate: float = 5e-3,
    drop_intensity: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train a network in place: AdamW, one-cycle rate, cross-entropy and Lovász loss.

    Each step turns, mirrors and scales its scans anew and takes half a turn of the sensor from
    them. Rare classes weigh more, by the inverse cubic root of their frequency.
    ``segmenter.steps`` counts along, so that whoever interrupts a training can save what there is.

    Args:
        segmenter: What to train.
        scans: Labelled by rows of ``recipe.classes``.
        steps: Weight updates.
        batch: Scans per step.
        rate: Highest learning rate.
        drop_intensity: Chance that a scan shows no intensity, if the recipe looks at it at all.
        seed: Chooses order and augmentation: equal arguments give equal weights.
        progress: Show a bar on stderr.

    Returns:
        The loss of each step.

    Raises:
        ValueError: No scans.
    """
    if not scans:
        raise ValueError("fit needs at least one labelled scan, got none")
    network = segmenter.network.train()
    counts = torch.ones(len(segmenter.recipe.classes))
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(steps, 2), pct_start=0.1
    )
    segmenter.steps, segmenter.planned = 0, steps
    order, losses = _order(len(scans), seed), []

    def prepare(step: int) -> tuple[SparseTensor, Tensor]:
        picked = [scans[next(order)] for _ in range(min(batch, len(scans)))]
        rng = np.random.default_rng([seed, step, 0xF1])
        return _training_batch(picked, segmenter.recipe, drop_intensity, rng)

    # Batches are made in this thread: one that works ahead takes a core from PyTorch's own, whose
    # barriers then wait for each other (0.9 s a step in place of 0.3 s on 2 cores).
    with tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar:
        for step in range(steps):
            x, labels = prepare(step)
            scores = network(x)
            counts += torch.bincount(labels, minlength=len(counts))
            weight = counts ** (-1 / 3)
            loss = torch.nn.functional.cross_entropy(scores, labels, weight)
            loss = loss + lovasz_softmax(scores.softmax(1), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            segmenter.steps = step + 1
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-10:]):.2f}", refresh=False)
            bar.update()
    return losses


def _order(count: int, seed: int) -> Iterator[int]:
    """Row numbers without end: one shuffled pass over all rows after the other."""
    rng = np.random.default_rng([seed, 0x0D])
    while True:
        yield from rng.permutation(count).tolist()


def _training_batch(
    scans: list[Scan], recipe: Recipe, drop_intensity: float, rng: np.random.Generator
) -> tuple[SparseTensor, Tensor]:
    samples, labels = [], []
    for scan in scans:
        drop = drop_intensity if recipe.intensity else 1.0
        points, light = augment(scan.points, scan.intensity, rng, drop)
        points[:, 2] += _unevenness(points, rng)
        # Half a turn of the sensor, as some data sets have it: twice as many scans at equal cost.
        half = points[:, 0] > 0
        half = half if half.any() else ~half
        voxels = voxelize(points[half], light[half], scan.labels[half], recipe.voxel_size)
        # The ground level of a scan is an estimate: the network must not lean on centimetres.
        voxels.feats[:, _HEIGHT] += rng.normal(0, 0.2)
        samples.append(_sample(voxels, recipe.voxel_size))
        labels.append(torch.from_numpy(voxels.labels))
    return sparse_collate(samples), torch.cat(labels)


def _unevenness(points: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    """[P] metres: waves like the camber of real roads, and noise; simulated ground is smoother."""
    angle, wave = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 1.0)  # radians, radians per metre
    along = points[:, :2] @ (wave * np.array([np.cos(angle), np.sin(angle)]))
    noise = rng.uniform(0, 0.02) * rng.standard_normal(len(points))
    return rng.uniform(0, 0.1) * np.sin(along + rng.uniform(0, 2 * np.pi)) + noise


def _sample(voxels: Voxels, voxel_size: float) -> SparseTensor:
    """Features [N, 12]: ``FEATURES``, scaled to about -1..1, and what ``_MORE`` names."""
    feats = np.ones((len(voxels.feats), len(FEATURES) + len(_MORE)), np.float32)
    feats[:, : len(FEATURES)] = voxels.feats * _SCALE
    step, near, far, above, filled, _ = feats[:, len(FEATURES) :].T
    step[:] = 1 - np.exp(voxels.feats[:, _CLEARANCE] / -0.3)
    away = np.hypot(*((voxels.coords + voxels.corner + 0.5)[:, :2] * voxel_size).T)
    near[:], far[:] = np.exp(away / -4.0), np.minimum(away / 50.0, 2.0)
    # Voxels come sorted by (x, y, z): those of a column lie together, the highest last.
    new = np.diff(voxels.coords[:, :2], axis=0, prepend=-1).any(axis=1)
    column = np.cumsum(new) - 1
    last = np.append(np.flatnonzero(new)[1:], len(voxels.coords)) - 1
    top = voxels.coords[last, 2][column]
    above[:] = np.minimum((top - voxels.coords[:, 2]) * voxel_size, 8.0) / 4
    filled[:] = np.minimum(np.bincount(column)[column] * voxel_size, 4.0) / 2
    return SparseTensor(torch.from_numpy(feats), torch.from_numpy(voxels.coords))


def lovasz_softmax(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The Lovász extension of 1 - IoU, averaged over the classes present (arXiv 1705.08790).

    Args:
        probabilities: [N, C] floating, rows sum to one.
        labels: [N] int64 in 0..C-1.

    Returns:
        A scalar in 0..1, differentiable; 0 for N = 0.
    """
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1]).to(probabilities.dtype)
    present = truth.sum(0) > 0
    truth = truth[:, present]
    errors, order = (truth - probabilities[:, present]).abs().sort(0, descending=True)
    hits = truth.gather(0, order)
    total = hits.sum(0)
    # Jaccard loss when the rows up to here, those of the largest errors, are counted as wrong.
    jaccard = 1 - (total - hits.cumsum(0)) / (total + (1 - hits).cumsum(0))
    steps = torch.diff(jaccard, dim=0, prepend=jaccard.new_zeros(1, jaccard.shape[1]))
    return (errors * steps).sum() / max(int(present.sum()), 1)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Counts of (truth, prediction) pairs, and what follows from them.

    For confusion = [[3, 1], [0, 4]]: iou = [3/4, 4/5], accuracy = 7/8, majority_miou = 1/4, as
    the prediction "always class 0" has IoU 4/8 for it and 0 for the other.
    """

    classes: tuple[str, ...]
    confusion: Tensor  # [C, C] int64 points, truth by prediction

    @property
    def iou(self) -> Tensor:
        """[C] float64: intersection over union; nan for a class neither present nor predicted."""
        hits = self.confusion.diagonal().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in the truth."""
        return float(self.iou[self.confusion.sum(1) > 0].mean())

    @property
    def accuracy(self) -> float:
        """Share of the points whose class is right."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def majority_accuracy(self) -> float:
        """The accuracy of always answering the most frequent class."""
        return float(self.confusion.sum(1).max() / self.confusion.sum())

    @property
    def majority_miou(self) -> float:
        """The mean IoU of always answering the most frequent class."""
        return self.majority_accuracy / max(int((self.confusion.sum(1) > 0).sum()), 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all of the above; None where a number is undefined."""
        present = self.confusion.sum(1) > 0
        return {
            "miou": self.miou,
            "majority_miou": self.majority_miou,
            "accuracy": self.accuracy,
            "majority_accuracy": self.majority_accuracy,
            "iou": {
                name: value if there else None
                for name, value, there in zip(self.classes, self.iou.tolist(), present)
            },
            "points": dict(zip(self.classes, self.confusion.sum(1).tolist())),
            "confusion": self.confusion.tolist(),
        }


def evaluate(segmenter: Segmenter, scans: Sequence[Scan], *, progress: bool = False) -> Evaluation:
    """Compare predictions with truth, point by point.

    Args:
        segmenter: Trained.
        scans: Labelled by rows of ``recipe.classes``.
        progress: Show a bar on stderr.
    """
    classes = len(segmenter.recipe.classes)
    counts = np.zeros(classes * classes, np.int64)
    for scan in tqdm(scans, desc="evaluating", unit="scan", disable=not progress):
        predicted = segmenter.predict(scan.points, scan.intensity)
        counts += np.bincount(scan.labels * classes + predicted, minlength=classes * classes)
    confusion = torch.from_numpy(counts.reshape(classes, classes))
    return Evaluation(segmenter.recipe.classes, confusion)


def save_checkpoint(segmenter: Segmenter, path: str | Path) -> None:
    """Write a network and its recipe; an older file stays whole until the new one is.

    Args:
        segmenter: What to save.
        path: File to write; its folder is made if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "recipe": asdict(segmenter.recipe),
        "steps": segmenter.steps,
        "planned": segmenter.planned,
        "state": segmenter.network.state_dict(),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> Segmenter:
    """Read what :func:`save_checkpoint` wrote, on the CPU; runs no code from the file.

    Raises:
        CheckpointError: The file is missing, damaged, or of another kind or version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; `torchsparse demo` trains one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch errors, by kind of damage
        raise CheckpointError(f"{path}: not a readable checkpoint") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of format {_FORMAT}, got {found}")
    try:
        recipe = Recipe(**content["recipe"])
        if recipe.features != Recipe().features:
            raise CheckpointError(
                f"{path}: expects the features {', '.join(recipe.features)}; "
                f"this version computes {', '.join(Recipe().features)}"
            )
        segmenter = Segmenter(recipe, recipe.build(), content["steps"], content["planned"])
        segmenter.network.load_state_dict(content["state"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the checkpoint is incomplete") from error
    return segmenter
