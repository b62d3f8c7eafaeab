"""Complete sparsely seen shapes: generate finer voxels, predict which are there, prune the rest.

    python examples/complete.py --steps 80

Of a hollow box or ball, every fourth voxel or so is seen; the network draws the whole surface.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchsparse import SparseTensor, backends, operators
from torchsparse import nn as spnn
from torchsparse.utils.collate import sparse_collate


def shape(rng: np.random.Generator) -> tuple[SparseTensor, SparseTensor]:
    """What is seen and what is there, voxels [N, 3] of one hollow solid, with the feature 1."""
    axes = np.stack(np.meshgrid(*[np.arange(32)] * 3), -1).reshape(-1, 3)
    offset = axes - rng.uniform(12, 20, 3)
    if rng.random() < 0.5:
        distance = np.linalg.norm(offset, axis=1) - rng.uniform(6, 11)
    else:
        distance = (np.abs(offset) - rng.uniform(5, 10, 3)).max(1)
    shell = np.abs(distance) < 1.0
    seen = shell & (rng.random(len(axes)) < 0.25)
    return voxels(axes[seen]), voxels(axes[shell])


def voxels(coords: NDArray[np.int64]) -> SparseTensor:
    return SparseTensor(torch.ones(len(coords), 1), torch.from_numpy(coords.astype(np.int32)))


def draw(rng: np.random.Generator, samples: int) -> tuple[SparseTensor, SparseTensor]:
    """Two batches, coordinates [N, 4] with the sample in front: seen, and there."""
    seen, there = zip(*(shape(rng) for _ in range(samples)))
    return sparse_collate(seen), sparse_collate(there)


def block(c_in: int, c_out: int, kernel_size: int, stride: int = 1, **kind: bool) -> nn.Module:
    """To another level, and one step around there."""
    convs = spnn.Conv3d(c_in, c_out, kernel_size, stride, **kind), spnn.Conv3d(c_out, c_out, 3)
    layers = [(conv, spnn.BatchNorm(c_out), spnn.ReLU(True)) for conv in convs]
    return nn.Sequential(*layers[0], *layers[1])


class Completion(nn.Module):
    """Down to 8 x 8 x 8 voxels and up again, pruned at each level."""

    def __init__(self) -> None:
        super().__init__()
        create = {"transposed": True, "generative": True}
        pairs = [(8, 16), (16, 32)]  # channels of neighbouring levels
        self.stem = block(1, 8, 3)
        self.downs = nn.ModuleList(block(a, b, 2, 2) for a, b in pairs)
        self.ups = nn.ModuleList(block(b, a, 2, 2, **create) for a, b in reversed(pairs))
        self.heads = nn.ModuleList(spnn.Conv3d(a, 1, 1, bias=True) for a, _ in reversed(pairs))

    def forward(
        self, x: SparseTensor, there: SparseTensor | None = None
    ) -> tuple[SparseTensor, Tensor]:
        """Completed voxels, and the loss of all levels where the truth is given."""
        truth = [] if there is None else [there]
        skips = [self.stem(x)]  # the encoder's levels
        for down in self.downs:
            skips.append(down(skips[-1]))
            truth += [spnn.MaxPool3d(2)(level) for level in truth[-1:]]
        y, loss = skips.pop(), x.feats.new_zeros(())
        for up, head in zip(self.ups, self.heads):
            # What the encoder knows of a site is added, where it knows the site.
            y = operators.add(up(y), skips.pop(), sites="first")
            logits = head(y).feats[:, 0]
            keep = logits > 0
            if truth:
                occupied = operators.align(y, truth[len(skips)], sites="first")[1].feats[:, 0]
                loss = loss + nn.functional.binary_cross_entropy_with_logits(logits, occupied)
                keep |= occupied > 0  # so that finer levels learn about every surface
            y = operators.prune(y, keep)
        return y, loss


def iou(a: SparseTensor, b: SparseTensor) -> float:
    """Common sites, of all sites."""
    return len(operators.intersection(a, b)[0].coords) / len(operators.align(a, b)[0].coords)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Run the example; returns the IoU with the truth of the completed and of the seen voxels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    backends.infer_spatial_range = False  # strided layers keep every border voxel
    network = Completion()
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(options.steps):
        x, there = draw(rng, 4)
        _, loss = network(x, there)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}  seen {len(x.coords)}")

    network.eval()
    with torch.inference_mode():
        x, there = draw(np.random.default_rng(1), 16)
        y, _ = network(x)
    print(f"IoU with the truth: {iou(y, there):.2f} completed, {iou(x, there):.2f} seen")
    return iou(y, there), iou(x, there)


if __name__ == "__main__":
    main()
