"""The same networks in this library and in spconv, in one run, taking turns.

    python benchmarks/compare.py --network unet --mode infer

Both hold the same weights, and their outputs are compared before anything is timed. Without
spconv in the environment, this library is timed alone.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import scenes
from benchmarks.run import synchronize
from torchsparse import SparseTensor
from torchsparse import nn as spnn

TOLERANCE = 1e-3  # of the largest output: float32 through a dozen layers, summed in other orders


class Step(NamedTuple):
    """One layer of a network; "up" returns to the sites of the last "down" not yet undone."""

    kind: str  # "same", "down" or "up"
    c_in: int
    c_out: int
    kernel_size: int


UNET = (
    Step("same", 4, 32, 3), Step("same", 32, 32, 3), Step("down", 32, 64, 2),
    Step("same", 64, 64, 3), Step("down", 64, 128, 2), Step("same", 128, 128, 3),
    Step("up", 128, 64, 2), Step("same", 64, 64, 3), Step("up", 64, 32, 2),
    Step("same", 32, 32, 3),
)  # fmt: skip
ENCODER = (
    Step("same", 4, 16, 3), Step("same", 16, 16, 3), Step("down", 16, 32, 2),
    Step("same", 32, 32, 3), Step("down", 32, 64, 2), Step("same", 64, 64, 3),
)  # fmt: skip
NETWORKS = {"unet": UNET, "encoder": ENCODER}


class Engine(NamedTuple):
    """A network in one library: features in (for a scene it knows), features out."""

    name: str
    run: Callable[[Tensor], Tensor]  # builds all maps anew
    parameters: list[nn.Parameter]
    coords: Callable[[], Tensor]  # of the last output, [M, 4] (b, x, y, z)


def ours(steps: tuple[Step, ...], coords: Tensor) -> Engine:
    """The network in this library."""
    layers: list[nn.Module] = []
    for kind, c_in, c_out, k in steps:
        stride, up = (1 if kind == "same" else 2), kind == "up"
        layers += [spnn.Conv3d(c_in, c_out, k, stride, transposed=up), spnn.ReLU(True)]
    network = nn.Sequential(*layers).to(coords.device)
    last: list[Tensor] = []

    def run(feats: Tensor) -> Tensor:
        out = network(SparseTensor(feats, coords))
        last[:] = [out.coords]
        return out.feats

    return Engine("torchsparse", run, list(network.parameters()), lambda: last[0])


def spconv(steps: tuple[Step, ...], coords: Tensor, weights: list[nn.Parameter]) -> Engine | None:
    """The network in spconv with the given weights; None if it cannot be imported."""
    try:
        sp: Any = importlib.import_module("spconv.pytorch")
    except ImportError:
        return None
    layers: list[nn.Module] = []
    depth = 0
    for (kind, c_in, c_out, k), weight in zip(steps, weights, strict=True):
        if kind == "same":
            conv = sp.SubMConv3d(c_in, c_out, k, bias=False, indice_key=f"same{depth}")
        elif kind == "down":
            conv = sp.SparseConv3d(c_in, c_out, k, 2, bias=False, indice_key=f"down{depth}")
            depth += 1
        else:
            depth -= 1
            conv = sp.SparseInverseConv3d(c_in, c_out, k, bias=False, indice_key=f"down{depth}")
        taps = (k,) * 3
        pair = weight.shape[1:]
        order = (4, 2, 1, 0, 3) if math.prod(taps) % 2 else (4, 0, 1, 2, 3)
        with torch.no_grad():  # [C_out, kx, ky, kz, C_in]
            conv.weight.copy_(weight.detach().reshape(*taps, *pair).permute(order))
        layers += [conv, nn.ReLU()]
    network = sp.SparseSequential(*layers).to(coords.device)
    # An extent that four halvings keep whole, so that both libraries keep every border site.
    extent = [16 * (n // 16 + 1) for n in coords.amax(0)[1:].tolist()]
    samples = int(coords[:, 0].max()) + 1
    last: list[Tensor] = []

    def run(feats: Tensor) -> Tensor:
        out = network(sp.SparseConvTensor(feats, coords, extent, samples))
        last[:] = [out.indices]
        return out.features

    return Engine("spconv", run, list(network.parameters()), lambda: last[0])


def distance(a: Engine, b: Engine, feats: Tensor) -> float:
    """Largest difference of two outputs, by site, relative to the largest entry.

    Raises:
        ValueError: The sites differ.
    """
    found = []
    for engine in (a, b):
        with torch.no_grad():
            out = engine.run(feats)
        sites = engine.coords().long()
        wide = int(sites.max()) + 1
        keys = ((sites[:, 0] * wide + sites[:, 1]) * wide + sites[:, 2]) * wide + sites[:, 3]
        order = keys.argsort()
        found.append((sites[order], out[order]))
    (sites, x), (other, y) = found
    if not torch.equal(sites, other):
        raise ValueError(f"{a.name} and {b.name} end on different sites")
    return ((x - y).abs().max() / x.abs().max()).item()


def call(engine: Engine, feats: Tensor, mode: str) -> float:
    """Milliseconds of one call."""
    synchronize(feats.device)
    start = time.perf_counter()
    if mode == "infer":
        with torch.no_grad():
            engine.run(feats)
    else:
        for parameter in engine.parameters:
            parameter.grad = None
        engine.run(feats).square().mean().backward()
    synchronize(feats.device)
    return 1e3 * (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--scene", default="street", choices=scenes.SPECS)
    parser.add_argument("--scenes", type=Path, default=scenes.FOLDER, help="folder of the files")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    # spconv keeps every border site of its extent; so must this library here.
    torchsparse.backends.infer_spatial_range = False
    torchsparse.backends.allow_tf32 = False
    scene = scenes.load(options.scene, options.scenes)
    coords = torch.from_numpy(scene.coords).to(options.device)
    feats = torch.from_numpy(scene.feats).to(options.device)
    steps = NETWORKS[options.network]
    engines = [ours(steps, coords)]
    rival = None
    if options.mode == "train" and options.device.type == "cpu":
        print("spconv 2.3 does not train on a CPU: its backward asks for a CUDA stream")
    else:
        rival = spconv(steps, coords, engines[0].parameters)
    if rival is None:
        print("without spconv: timing torchsparse alone")
    else:
        error = distance(engines[0], rival, feats)
        if not error <= TOLERANCE:
            print(f"outputs differ by {error:.1e} of the largest: nothing is timed")
            return 1
        print(f"outputs agree to {error:.1e} of the largest")
        engines.append(rival)
    found: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in range(options.rounds + 1):  # the first round warms up
        for engine in engines[:: 1 if turn % 2 else -1]:
            taken = call(engine, feats, options.mode)
            if turn:
                found[engine.name].append(taken)
    for name, ms in found.items():
        print(f"{name:<12} {options.network} {options.mode}: median {statistics.median(ms):8.1f} "
              f"ms, min {min(ms):8.1f} ms of {len(ms)}, {len(coords)} voxels, "
              f"{torch.get_num_threads()} threads")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
