"""``torchsparse warmup``: compile the kernels of a network before the first scan arrives."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from torchsparse import inference
from torchsparse.cli.tune import Checkpoint, Device, Folder, Fp16, inputs, prepare
from torchsparse.tensor import SparseTensor

__all__ = ["warmup"]


def warmup(
    checkpoint: Checkpoint,
    folder: Folder,
    samples: Annotated[int, typer.Option(min=1, help="Look at so many scans at most.")] = 10,
    graph: Annotated[
        bool, typer.Option("--graph", help="Capture CUDA graphs too, and time them.")
    ] = False,
    fp16: Fp16 = False,
    device: Device = None,
) -> None:
    """Compile the kernels that a network needs on this machine for scans like those in FOLDER.

    They stay in Triton's cache (~/.triton/cache, or TRITON_CACHE_DIR), where later processes find
    them. Graphs do not stay: a process captures its own. Prints how many kernels there are, how
    long it took, and the time of two results after it, maps included. On a CPU there is nothing to
    compile.
    """
    segmenter, files = prepare(checkpoint, folder, device)
    network = segmenter.network.eval()
    where = next(network.parameters()).device
    scans = [x.to(where) for x in itertools.islice(inputs(segmenter, files), samples)]
    if not scans:
        typer.echo(f"torchsparse: no scan in {folder} could be used", err=True)
        raise typer.Exit(2)
    graphs = inference.graphed(network) if graph else None
    cast = torch.autocast(where.type, torch.float16, enabled=fp16)
    with cast, torch.no_grad():
        kernels, seconds = _timed(lambda: inference.warmup(network, *scans, graph=graphs), where)
        if where.type == "cpu":
            typer.echo("on a CPU there is nothing to compile" + graph * " and no graph to capture")
        else:
            captured = f", {graphs.captures} graphs captured" if graphs else ""
            typer.echo(f"{kernels} kernels ready after {seconds:.1f} s{captured}")
        run = graphs or network
        x = scans[0]
        first, second = (_timed(lambda: run(_again(x)), where)[1] for _ in range(2))
    typer.echo(
        f"{len(x.coords)} voxels: first result {1e3 * first:.2f} ms, second {1e3 * second:.2f} ms"
    )


def _again(x: SparseTensor) -> SparseTensor:
    """The same scan without maps, as if it were new."""
    return SparseTensor(x.feats, x.coords, x.stride, x.spatial_range)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What ``work`` returns, and its seconds until the device has finished."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
