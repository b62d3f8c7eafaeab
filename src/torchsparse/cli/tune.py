"""``torchsparse tune``: measure how a network is best computed on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

import torchsparse
from torchsparse.datasets import FORMATS, read_points
from torchsparse.segmentation import CheckpointError, Segmenter, load_checkpoint
from torchsparse.tensor import SparseTensor

__all__ = ["inputs", "prepare", "tune"]

Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A network that `torchsparse demo` trained."),
]
Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Point clouds; subfolders are searched too.")
]
Result = Annotated[Path, typer.Option(help="Where the result is kept.")]
Backward = Annotated[bool, typer.Option("--backward", help="Count the gradients, for training.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Under float16 autocast.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")
]


def tune(
    checkpoint: Checkpoint,
    folder: Folder,
    out: Result = Path("runs/tune.json"),
    samples: Annotated[int, typer.Option(min=1, help="Look at so many scans at most.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.0, help="Search so long, about.")] = 40.0,
    backward: Backward = False,
    fp16: Fp16 = False,
    device: Device = None,
) -> None:
    """Measure how each layer of a network is best computed on this machine.

    Writes the configuration of each layer to OUT and tile shapes to the machine's own table, which
    every program profits from, and prints what was chosen and gained. `torchsparse bench` times
    the network before and after. What OUT held before is replaced.
    """
    segmenter, paths = prepare(checkpoint, folder, device)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        there = out.exists()
        with out.open("a"):
            pass
        if not there:
            out.unlink()
    except OSError as error:
        typer.echo(f"torchsparse: {out} cannot be written ({error.strerror})", err=True)
        raise typer.Exit(2) from None
    scans = inputs(segmenter, paths)
    first = next(scans, None)
    if first is None:
        typer.echo(f"torchsparse: no scan in {folder} could be used", err=True)
        raise typer.Exit(2)
    found = torchsparse.tune(
        segmenter.network,
        itertools.chain([first], scans),
        samples,
        enable_fp16=fp16,
        save_dir=str(out.parent),
        tune_tag=out.name,
        force_retune=True,
        tune_with_bwd=backward,
        seconds=seconds,
    )
    typer.echo(f"wrote the configurations of {len(found)} layers to {out}")


def prepare(checkpoint: Path, folder: Path, device: str | None) -> tuple[Segmenter, list[Path]]:
    """The network on its device, and the files of a folder; or one line and exit code 1."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    suffixes = tuple(suffix for row in FORMATS.values() for suffix in row.suffixes)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(suffixes) and not path.name.endswith(".labels.npy")
    )
    try:
        segmenter = load_checkpoint(checkpoint)
        segmenter.network.to(torch.device(device))
        if not files:
            raise CheckpointError(f"{folder}: no point clouds ({', '.join(suffixes)})")
    except (CheckpointError, RuntimeError, AssertionError) as error:  # no such device
        typer.echo(f"torchsparse: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    return segmenter, files


def inputs(segmenter: Segmenter, files: list[Path]) -> Iterator[SparseTensor]:
    """Scans as the network wants them; a file that cannot be read gets one line on stderr."""
    for path in files:
        try:
            cloud = read_points(path)
            yield segmenter.prepare(cloud.points, cloud.intensity)[0]
        except (ValueError, OSError) as error:
            text = " ".join(str(error).split())
            typer.echo(text if text.startswith(str(path)) else f"{path}: {text}", err=True)
