"""``torchsparse bench``: the time of a network before and after `torchsparse tune`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated

import typer

import torchsparse
from torchsparse.cli.tune import Backward, Checkpoint, Device, Folder, Fp16, inputs, prepare
from torchsparse.utils.tune import compare

__all__ = ["bench"]


def bench(
    checkpoint: Checkpoint,
    folder: Folder,
    tuned: Annotated[Path, typer.Option(help="What `torchsparse tune` wrote.")] = Path(
        "runs/tune.json"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Time so many scans at most.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each scan, about.")] = 1.0,
    backward: Backward = False,
    fp16: Fp16 = False,
    device: Device = None,
) -> None:
    """Time a network on scans, with default settings and with what was tuned.

    Kernel maps are built in every call, as for new scans. Prints a line per scan and the geometric
    mean of the gains.
    """
    segmenter, files = prepare(checkpoint, folder, device)
    if not tuned.is_file():
        typer.echo(f"torchsparse: {tuned}: no such file; `torchsparse tune` writes it", err=True)
        raise typer.Exit(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            configs = torchsparse.tune(  # no samples: it reads the file
                segmenter.network,
                [],
                save_dir=str(tuned.parent),
                tune_tag=tuned.name,
                verbose=False,
            )
    except UserWarning as error:
        typer.echo(f"torchsparse: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{'voxels':>9}{'default ms':>12}{'tuned ms':>12}{'gain':>7}")
    ratios = []
    for x in inputs(segmenter, files):
        found = compare(
            segmenter.network, x, configs, enable_fp16=fp16, backward=backward,
            seconds=seconds / 2,
        )  # fmt: skip
        ratios.append(found.ratio)
        before, after = 1e3 * found.before.median, 1e3 * found.after.median
        typer.echo(f"{len(x.coords):>9}{before:>12.3f}{after:>12.3f}{found.ratio:>6.2f}x")
        if len(ratios) == samples:
            break
    if not ratios:
        typer.echo(f"torchsparse: no scan in {folder} could be used", err=True)
        raise typer.Exit(2)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    typer.echo(f"geometric mean of {len(ratios)}: {mean:.2f}x")
