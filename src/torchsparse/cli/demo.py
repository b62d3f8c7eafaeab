"""``torchsparse demo``: from nothing to a trained network and a picture, in minutes on a CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchsparse.datasets import Scan

__all__ = ["demo", "simulate"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    streets: Annotated[int, typer.Option(min=1, help="Streets to train on.")] = 48,
    rooms: Annotated[int, typer.Option(min=0, help="Rooms to train on.")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="Streets kept for the evaluation.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 160,
    seed: Annotated[int, typer.Option(help="Same seed, same network.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few scenes and steps, to see that all works.")
    ] = False,
) -> None:
    """Train a small MinkUNet on simulated scans and look at the result.

    Casts the rays of three LiDARs through random streets, and of an indoor scanner through
    random rooms; trains; evaluates on streets that the network has not seen; and writes

      checkpoint.pt    the network, for `torchsparse segment`
      metrics.json     IoU per class, confusion matrix, losses, times
      prediction.png   truth above prediction, from above and in perspective

    Ctrl-C during the training saves the network as it is by then.
    """
    from torchsparse import viz
    from torchsparse.segmentation import Recipe, Segmenter, evaluate, fit, save_checkpoint

    try:
        viz.require()
    except ImportError as error:
        typer.echo(f"torchsparse: {error}", err=True)
        raise typer.Exit(1) from None
    if quick:
        streets, rooms, held_out, steps = min(streets, 3), min(rooms, 1), 1, min(steps, 4)
    start, checkpoint = time.perf_counter(), out / "checkpoint.pt"
    worlds = "simulated streets and rooms" if rooms else "simulated streets"
    segmenter = Segmenter.new(Recipe(trained_on=worlds), seed)
    try:
        # Seeds count upwards from the held-out streets: these stay the same whatever else changes.
        first = 1000 * seed
        unseen = simulate("street", range(first, first + held_out))
        seen = simulate("street", range(first + held_out, first + held_out + streets))
        seen += simulate("room", range(first, first + rooms))
        losses = fit(segmenter, seen, steps=steps, seed=seed, progress=True)
    except KeyboardInterrupt:
        if segmenter.steps == 0:
            typer.echo("stopped before the first training step: nothing to save", err=True)
        else:
            save_checkpoint(segmenter, checkpoint)
            typer.echo(f"stopped after {segmenter.steps} of {steps} steps: {checkpoint}", err=True)
        raise typer.Exit(130) from None
    save_checkpoint(segmenter, checkpoint)
    result = evaluate(segmenter, unseen, progress=True)
    metrics = result.as_dict() | {
        "streets": streets,
        "rooms": rooms,
        "held_out": held_out,
        "steps": steps,
        "seed": seed,
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    example = unseen[0]
    viz.save_prediction(
        out / "prediction.png",
        example.points,
        segmenter.predict(example.points, example.intensity),
        example.labels,
        title=f"A simulated street that the network has not seen (mIoU {result.miou:.2f})",
    )
    for name, value in metrics["iou"].items():
        if value is not None:
            typer.echo(f"  {name:<12} IoU {value:.2f}")
    typer.echo(f"{checkpoint}\n{out / 'metrics.json'}\n{out / 'prediction.png'}")
    typer.echo(f"mIoU {result.miou:.2f} (majority class {result.majority_miou:.2f})")


def simulate(world: str, seeds: range) -> list[Scan]:
    """Labelled scans, with a progress bar.

    Args:
        world: "street", seen by three LiDARs in turn, or "room".
        seeds: One scene each.
    """
    from tqdm import tqdm

    from torchsparse.datasets import HDL32, HDL64, INDOOR, TOP64, room, scan, street

    make, sensors = (street, (HDL64, HDL32, TOP64)) if world == "street" else (room, (INDOOR,))
    return [
        scan(make(seed), sensors[seed % len(sensors)], seed)
        for seed in tqdm(seeds, desc=f"casting {world}s", unit="scene", disable=not seeds)
    ]
