"""``torchsparse demo``: from nothing to a trained network and a picture, in minutes on a CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from torchsparse import viz
from torchsparse.datasets import HDL32, HDL64, TOP64, Scan, scan, street
from torchsparse.segmentation import Recipe, Segmenter, evaluate, fit, save_checkpoint

__all__ = ["demo", "simulate"]

_SENSORS = (HDL64, HDL32, TOP64)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    streets: Annotated[int, typer.Option(min=1, help="Streets to train on.")] = 48,
    held_out: Annotated[int, typer.Option(min=1, help="Streets kept for the evaluation.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same network.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few scenes and steps, to see that all works.")
    ] = False,
) -> None:
    """Train a small MinkUNet on simulated scans and look at the result.

    Casts the rays of three LiDARs through random streets; trains; evaluates on streets that the
    network has not seen; and writes

    \b
      checkpoint.pt    the network, for `torchsparse segment`
      metrics.json     IoU per class, confusion matrix, losses, seconds
      prediction.png   truth above prediction, from above and in perspective

    Ctrl-C saves the network as it is by then.
    """
    try:
        viz.require()
        out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    except (ImportError, OSError) as error:
        typer.echo(f"torchsparse: {error}", err=True)
        raise typer.Exit(1) from None
    if quick:
        streets, held_out, steps = min(streets, 2), 1, min(steps, 4)
    segmenter = Segmenter.new(Recipe(), seed)
    try:
        _run(segmenter, out, streets, held_out, steps, seed)
    except KeyboardInterrupt:
        if segmenter.steps == 0:
            typer.echo("stopped before the first training step: nothing to save", err=True)
        else:
            checkpoint = out / "checkpoint.pt"
            save_checkpoint(segmenter, checkpoint)
            typer.echo(f"stopped after {segmenter.steps} of {steps} steps: {checkpoint}", err=True)
        raise typer.Exit(130) from None


def _run(
    segmenter: Segmenter,
    out: Path,
    streets: int,
    held_out: int,
    steps: int,
    seed: int,
) -> None:
    start = time.perf_counter()
    # The held-out streets come first: they stay the same however many the training has.
    first = 1_000_000 * seed
    unseen = simulate(range(first, first + held_out))
    seen = simulate(range(first + held_out, first + held_out + streets))
    losses = fit(segmenter, seen, steps=steps, seed=seed, progress=True)
    save_checkpoint(segmenter, out / "checkpoint.pt")

    result = evaluate(segmenter, unseen, progress=True)
    shown = unseen[0]
    viz.save_prediction(
        out / "prediction.png",
        shown.points,
        segmenter.predict(shown.points, shown.intensity),
        shown.labels,
        title=f"A simulated street that the network has not seen (mIoU of all: {result.miou:.2f})",
    )
    sizes = {"streets": streets, "held_out": held_out, "steps": steps}
    took = {"seed": seed, "losses": losses, "seconds": time.perf_counter() - start}
    metrics = result.as_dict() | sizes | took
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    for name, value in result.as_dict()["iou"].items():
        if value is not None:
            typer.echo(f"  {name:<12} IoU {value:.2f}")
    typer.echo(f"wrote checkpoint.pt, metrics.json and prediction.png to {out}")
    typer.echo(f"mIoU {result.miou:.2f} (majority class {result.majority_miou:.2f})")


def simulate(seeds: range) -> list[Scan]:
    """Labelled scans of streets, one scene per seed, by three LiDARs in turn; shows a bar."""
    return [
        scan(street(seed), _SENSORS[seed % len(_SENSORS)], seed)
        for seed in tqdm(seeds, desc="casting rays", unit="street")
    ]
