"""Train a network on simulated streets for a few steps, and label a scan it has not seen.

    python examples/segment.py --steps 100 --streets 8

The few steps of the default show that everything works, not what the network can learn; for
that, `torchsparse demo` trains for minutes.
"""

from __future__ import annotations

import argparse
import time

import torch

from torchsparse.datasets import HDL32, Scan, scan, street
from torchsparse.segmentation import Recipe, Segmenter, evaluate, fit


def simulate(seeds: range) -> list[Scan]:
    """One labelled turn of a 32-beam LiDAR per seed: points, intensity and labels."""
    return [scan(street(seed), HDL32, seed) for seed in seeds]


def main(argv: list[str] | None = None) -> float:
    """Run the example; returns the mean IoU on the unseen street."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--streets", type=int, default=2, help="to train on")
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    # Seed 0 is kept for the evaluation.
    unseen, *seen = simulate(range(options.streets + 1))
    print(f"{len(seen)} streets to train on, {len(unseen.points)} points to label")

    # A small U-Net on voxels of 20 cm.
    segmenter = Segmenter.new(Recipe(voxel_size=0.2))
    x, row_of_point = segmenter.prepare(unseen.points, unseen.intensity)
    print(f"input: {x}; {len(row_of_point)} points share {len(x.coords)} voxels")

    start = time.perf_counter()
    losses = fit(segmenter, seen, steps=options.steps, batch=1)
    seconds = time.perf_counter() - start
    print(f"{options.steps} steps in {seconds:.1f} s, loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    labels = segmenter.predict(unseen.points, unseen.intensity)
    for number, name in enumerate(segmenter.recipe.classes):
        share = float((labels == number).mean())
        if share >= 0.005:
            print(f"  {name:<12} {share:4.0%} of the points")

    result = evaluate(segmenter, [unseen])
    print(f"mIoU {result.miou:.2f} (majority class {result.majority_miou:.2f})")
    return result.miou


if __name__ == "__main__":
    main()
