"""A depthwise 3x3x3 layer beside the time that its bytes take: checked, then timed.

    python benchmarks/depthwise.py                              # CPU, scene "street"
    python benchmarks/depthwise.py --device cuda --scene street-fine
    python benchmarks/depthwise.py --device cuda --scene my-scan.npz --tiles

The floor of a pass is its bytes (rows read once, rows written once, the [K, M] table once) over
the rate of a large copy, measured in the same run. Forward and backward make three passes. Time is
that of a CUDA graph's replay: warm, with what the 50 MB of an H100's L2 cache keep, and cold, with
the cache flushed before. ``--tiles`` tries other programs than the library's choice.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import scenes
from benchmarks.cases import tensor
from benchmarks.floors import DTYPES, measure_rates
from benchmarks.oracle import dense_kernel
from benchmarks.timing import captured, fastest, times
from torchsparse import SparseTensor
from torchsparse import nn as spnn

# Relative to the largest entry: float32 sums in another order; one rounding to 11, to 8 bits.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}
FLUSH = 256 << 20  # bytes


def check(scene: scenes.Scene, channels: int, dtype: str, device: torch.device) -> None:
    """Output and gradients on a crop against a dense float64 convolution in groups.

    Raises:
        SystemExit: They differ.
    """
    x = tensor(scenes.crop(scene), channels, device, DTYPES[dtype])
    layer = layer_of(x)
    feats, taps = (t.detach().double().cpu().requires_grad_() for t in (x.feats, layer.kernel))
    b, i, j, k = x.coords.long().cpu().unbind(1)
    extent = [int(axis.max()) + 1 for axis in (i, j, k)]
    box = torch.zeros(channels, *extent, dtype=torch.float64).index_put(
        (torch.arange(channels)[None], *(axis[:, None] for axis in (i, j, k))), feats
    )
    dense = torch.nn.functional.conv3d(
        box[None], dense_kernel(taps, (3, 3, 3)).transpose(0, 1), padding=1, groups=channels
    )
    want = dense[b, :, i, j, k]
    push = torch.randn(want.shape, generator=torch.Generator().manual_seed(0)).to(x.feats.dtype)
    forward, both = steps(layer, x, push.to(device))
    right = want, *torch.autograd.grad(want, (feats, taps), push.double())
    names = ("output", "output with gradients", "input gradient", "kernel gradient")
    found = forward(), *both()
    for name, one, other in zip(names, found, (want, *right), strict=True):
        error = ((one.detach().double().cpu() - other).abs().max() / other.abs().max()).item()
        if not error <= TOLERANCES[dtype]:
            raise SystemExit(f"{dtype}, {channels} channels: {name} is off by {error:.2e}")


def layer_of(x: SparseTensor) -> spnn.Conv3d:
    channels = x.feats.shape[1]
    layer = spnn.Conv3d(channels, channels, 3, groups=channels).to(x.feats)
    layer.kernel.data.copy_(kernel(channels, x.feats))
    return layer


def steps(
    layer: spnn.Conv3d, x: SparseTensor, push: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """What is checked and timed: the output alone, and with the gradients of input and kernel."""

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x).feats

    def both() -> tuple[Tensor, ...]:
        feats = x.feats.detach().requires_grad_()
        own = SparseTensor(feats, x.coords)
        own._caches = x._caches
        out = layer(own).feats
        return out.detach(), *torch.autograd.grad(out, (feats, layer.kernel), push)

    return forward, both


def kernel(channels: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(27, 1, channels, generator=generator) / 5).to(like)


def floors(x: SparseTensor) -> tuple[int, int]:
    """Bytes of a forward pass, and of forward and backward."""
    n = len(x.coords)
    table = 4 * 27 * n
    forward = 2 * x.feats.nbytes + table
    return forward, 3 * forward


def clock(step: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step, warm and cold."""
    if device.type == "cpu":
        found = statistics.median(times(step, device, 2.0))
        return found, found
    trash = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def after_flush() -> None:
        trash.zero_()
        step()

    flush = fastest(captured(trash.zero_), device, 1.0)
    cold = fastest(captured(after_flush), device, 1.0) - flush
    return fastest(captured(step), device, 1.0), cold


def measure(
    scene: scenes.Scene, channels: int, dtype: str, device: torch.device, rate: float
) -> None:
    """Print the lines of one layer."""
    x = tensor(scene, channels, device, DTYPES[dtype])
    timed = steps(layer_of(x), x, torch.ones_like(x.feats))
    for name, step, nbytes in zip(("forward", "fwd+bwd"), timed, floors(x), strict=True):
        floor = 1e3 * nbytes / rate
        warm, cold = clock(step, device)
        print(
            f"{dtype:<6}{channels:>5}  {name:<9}{nbytes / 1e6:>9.1f}{1e3 * floor:>10.1f}"
            f"{1e3 * warm:>10.1f}{1e3 * cold:>10.1f}{warm / floor:>8.2f}{cold / floor:>8.2f}"
        )


def try_tiles(
    scene: scenes.Scene, channels: int, dtype: str, device: torch.device, rate: float
) -> None:
    """The same with other tiles. Only for choosing those of `_triton/tiles`."""
    from torchsparse._triton.depthwise import product
    from torchsparse._triton.tiles import DepthwiseTile

    kept = product.depthwise_tile, product.depthwise_grad_tile
    programs = itertools.product((64, 128), ((16, 4), (32, 2), (32, 4), (64, 4)), (1, 3))
    for columns, (rows, warps), stages in programs:
        if columns <= channels:
            tile = DepthwiseTile(rows, columns, warps, stages)
            product.depthwise_tile = product.depthwise_grad_tile = lambda _, t=tile: t
            print(tile)
            measure(scene, channels, dtype, device, rate)
    product.depthwise_tile, product.depthwise_grad_tile = kept


def main(argv: list[str] | None = None) -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scene", default="street", help="a name, or an .npz file")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=None)
    parser.add_argument("--tiles", action="store_true", help="try other tiles (GPU)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    dtypes = options.dtypes or (["fp32"] if device.type == "cpu" else ["fp16", "fp32"])
    scene = scenes.load(options.scene)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rate = measure_rates(device, ()).copy
    print(f"{name}, {options.scene}: {len(scene.coords)} voxels, copies {rate / 1e9:.0f} GB/s")
    print(
        f"{'type':<6}{'C':>5}  {'pass':<9}{'MB':>9}{'floor us':>10}"
        f"{'warm us':>10}{'cold us':>10}{'ratio':>8}{'cold':>8}"
    )
    for dtype in dtypes:
        for channels in options.channels:
            check(scene, channels, dtype, device)
            measure(scene, channels, dtype, device, rate)
            if options.tiles:
                try_tiles(scene, channels, dtype, device, rate)


if __name__ == "__main__":
    main()
