"""``torchsparse segment``: label the points of files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from torchsparse import viz
from torchsparse.datasets import FORMATS, read_points
from torchsparse.segmentation import CheckpointError, load_checkpoint

__all__ = ["segment"]

_ROOM = 20.0  # metres: a scan of a street reaches further


def segment(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Point clouds.")],
    checkpoint: Annotated[
        Path, typer.Option(help="A network that `torchsparse demo` trained.")
    ] = Path("runs/demo/checkpoint.pt"),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/segment"),
    format: Annotated[
        str | None,
        typer.Option(
            help="Layout of the files where their names do not tell it: kitti, nuscenes, xyzrgb, "
            "xyz, npy, npz, ply, pcd or las.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Label every point of real scans with the network of the demo.

    For each file, prints one line (points, seconds, share of each class) and writes

    \b
      NAME.labels.npy   int64 [points]: row i is the class of point i of the file;
                        the line at the start says what each number means
      NAME.png          the points in the colours of their classes

    Files that cannot be read get one line on stderr; the others are done all the same, and the
    exit code is then 2.
    """
    if format is not None and format not in FORMATS:
        raise typer.BadParameter(
            f"{format!r} is not one of {', '.join(FORMATS)}", param_hint="--format"
        )
    try:
        viz.require()
        segmenter = load_checkpoint(checkpoint)
        out.mkdir(parents=True, exist_ok=True)
    except (ImportError, CheckpointError, OSError) as error:
        typer.echo(f"torchsparse: {error}", err=True)
        raise typer.Exit(1) from None
    recipe = segmenter.recipe
    early = f", stopped after {segmenter.steps} of {segmenter.planned} steps"
    typer.echo(
        f"{checkpoint}: trained on {recipe.trained_on}"
        f"{early if segmenter.steps < segmenter.planned else ''}; labels "
        + ", ".join(f"{label} {name}" for label, name in enumerate(recipe.classes))
    )
    failed, taken = 0, set[str]()
    for path in files:
        start = time.perf_counter()
        try:
            cloud = read_points(path, format)
            labels = segmenter.predict(cloud.points, cloud.intensity)
        except (ValueError, OSError) as error:  # FormatError is a ValueError and names the file
            text = " ".join(str(error).split())
            typer.echo(text if text.startswith(str(path)) else f"{path}: {text}", err=True)
            failed += 1
            continue
        seconds = time.perf_counter() - start
        stem = _stem(path, taken)
        np.save(out / f"{stem}.labels.npy", labels)
        viz.save_prediction(out / f"{stem}.png", cloud.points, labels, title=path.name)
        shares = np.bincount(labels, minlength=len(recipe.classes)) / len(labels)
        ranked = [
            f"{recipe.classes[row]} {shares[row]:.0%}"
            for row in np.argsort(-shares, kind="stable")
            if shares[row] >= 0.005
        ]
        typer.echo(
            f"{path.name}: {len(labels)} points, {seconds:.1f} s, {', '.join(ranked)} "
            f"-> {out / stem}.png{_note(cloud.points, recipe.trained_on)}"
        )
    if failed:
        raise typer.Exit(2)


def _note(points: NDArray[np.floating], trained_on: str) -> str:
    """A warning about clouds as small as a room."""
    width, length = np.ptp(points[:, :2], axis=0)
    if max(width, length) >= _ROOM:
        return ""
    return f" (a room, {width:.0f} x {length:.0f} m? the network was trained on {trained_on})"


def _stem(path: Path, taken: set[str]) -> str:
    """The file's name without endings, made unique among ``taken``, which it joins."""
    name = path.name.lower()
    stem = base = path.name[: -len(".pcd.bin")] if name.endswith(".pcd.bin") else path.stem
    number = 2
    while stem in taken:
        stem, number = f"{base}-{number}", number + 1
    taken.add(stem)
    return stem
