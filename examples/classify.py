"""Tell boxes, balls and rods apart: a sparse network from its parts, trained from scratch.

    python examples/classify.py --steps 60

It shows the whole way by hand: points -> voxels -> batch -> layers -> pooling -> loss.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.utils.collate import sparse_collate
from torchsparse.utils.quantize import sparse_quantize

SHAPES = ("box", "ball", "rod")


def surface(shape: str, rng: np.random.Generator, count: int = 600) -> NDArray[np.float64]:
    """Points [count, 3] on a solid of random size and turn, metres, from 0 upward."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    if shape == "ball":
        points = direction * rng.uniform(0.6, 1.0)
    elif shape == "box":
        points = direction / np.abs(direction).max(1, keepdims=True) * rng.uniform(0.4, 0.8, 3)
    else:
        flat = direction[:, :2] / np.linalg.norm(direction[:, :2], axis=1, keepdims=True)
        height = rng.uniform(-1, 1, (count, 1))
        points = np.hstack([flat * rng.uniform(0.15, 0.25), height])
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    points = points @ turn + rng.normal(scale=0.01, size=(count, 3))
    return points - points.min(0)


def voxels(points: NDArray[np.float64], size: float = 0.1) -> SparseTensor:
    """Occupied voxels [N, 3] of one sample, with the feature 1."""
    coords = sparse_quantize(points, size)
    return SparseTensor(torch.ones(len(coords), 1), torch.from_numpy(coords))


def draw(rng: np.random.Generator, samples: int) -> tuple[SparseTensor, Tensor]:
    """A batch: coordinates [N, 4] with the sample in front, and labels [samples]."""
    labels = rng.integers(len(SHAPES), size=samples)
    clouds = [voxels(surface(SHAPES[label], rng)) for label in labels]
    return sparse_collate(clouds), torch.from_numpy(labels)


class Classifier(nn.Module):
    """Three levels, each at half the resolution of the one before, then one row per sample."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out, kernel, stride in ((1, 16, 3, 1), (16, 32, 2, 2), (32, 64, 2, 2)):
            layers += [spnn.Conv3d(c_in, c_out, kernel, stride), spnn.BatchNorm(c_out)]
            layers += [spnn.ReLU(True), spnn.Conv3d(c_out, c_out, 3), spnn.BatchNorm(c_out)]
            layers += [spnn.ReLU(True)]
        self.body = nn.Sequential(*layers)
        self.pool = spnn.GlobalAvgPool()
        self.head = nn.Linear(64, classes)

    def forward(self, x: SparseTensor) -> Tensor:
        """[N, 1] features of B samples -> [B, classes]."""
        return self.head(self.pool(self.body(x)))


def main(argv: list[str] | None = None) -> float:
    """Run the example; returns the accuracy on fresh samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=12)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    network = Classifier(len(SHAPES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(options.steps):
        x, labels = draw(rng, options.batch)
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}  voxels {len(x.coords)}")

    network.eval()
    with torch.inference_mode():
        x, labels = draw(np.random.default_rng(1), 60)
        accuracy = (network(x).argmax(1) == labels).double().mean().item()
    print(f"accuracy on 60 fresh samples: {accuracy:.0%} (chance: {1 / len(SHAPES):.0%})")
    return accuracy


if __name__ == "__main__":
    main()
