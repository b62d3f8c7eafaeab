"""What layers cost the host: the time until a call returns, kernels not waited for.

    python benchmarks/host.py                  # without a GPU: nothing is launched at all
    python benchmarks/host.py --device cuda

Without a GPU the launches end where Triton's launcher would begin, so that only Python and
PyTorch's allocator are timed; sizes that a device would count are made up. Nothing is computed and
nothing checked: that is what the tests are for.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.timing import synchronize
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._ops.dispatch import forced
from torchsparse.backbones import SparseResUNet42

CHANNELS = 32
Rows = dict[str, Callable[[], Any]]


class _Everything(dict[Any, Any]):
    """A table in which every kernel is the same one, which does nothing."""

    def get(self, key: Any, default: Any = None) -> Any:
        from torchsparse._triton.launch import Resolved

        return Resolved(lambda *_: None, 0, False, False, None, (), None)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Kernels are chosen for CPU tensors and not run; a level has two thirds of its input's
    sites."""
    from torchsparse._triton import launch
    from torchsparse._triton.coords import create

    fill = create._fill

    def counted(*args: Any) -> Any:
        filled = fill(*args)
        filled.info.copy_(torch.tensor([args[1].shape[0] * 2 // 3, 0, 0, 1000]))
        return filled

    with (
        forced("_triton"),
        mock.patch.multiple(
            launch, _resolved=_Everything(), _stream=lambda _: 0, watched=lambda: False,
            INTERPRETED=False,
        ),
        mock.patch.object(create, "_fill", counted),
    ):  # fmt: skip
        yield


def microseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median over calls, each begun on an idle device."""
    for _ in range(5):
        call()
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        kept = call()  # not freed inside the clock
        found.append(1e6 * (time.perf_counter() - start))
        del kept
    synchronize(device)
    return statistics.median(found)


def cloud(device: torch.device, channels: int) -> SparseTensor:
    """A cube; a small one where PyTorch's own operations really compute."""
    side = 4 if device.type == "cpu" else 16
    grid = torch.cartesian_prod(*[torch.arange(side)] * 3)
    coords = nn.functional.pad(grid, (1, 0)).int().to(device)
    return SparseTensor(torch.randn(len(coords), channels, device=device), coords)


def layers(device: torch.device) -> Rows:
    """Single layers on kept maps, in evaluation and in training."""
    x = cloud(device, CHANNELS)
    conv = spnn.Conv3d(CHANNELS, CHANNELS, 3).to(device)
    norm, relu, plain = spnn.BatchNorm(CHANNELS).to(device), spnn.ReLU(), nn.ReLU()
    block, feats = nn.Sequential(conv, norm, relu), x.feats
    other = nn.BatchNorm1d(CHANNELS).to(device).eval()
    learning = cloud(device, CHANNELS)

    def no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
        block.eval()
        return torch.no_grad()(call)

    def train() -> Any:
        return block.train()(learning).feats

    grad = torch.ones_like(feats)
    return {
        "conv": no_grad(lambda: conv(x).feats),
        "conv + norm + relu": no_grad(lambda: block.eval()(x).feats),
        "norm, alone": no_grad(lambda: norm.eval()(x).feats),
        "norm, PyTorch's": no_grad(lambda: other(feats)),
        "relu, alone": no_grad(lambda: relu(x).feats),
        "relu, PyTorch's": no_grad(lambda: plain(feats)),
        "conv + norm + relu, training": train,
        "conv + norm + relu, and backward": lambda: train().backward(grad),
    }


def networks(device: torch.device) -> Rows:
    """A MinkUNet from coordinates to features, maps and all."""
    network = SparseResUNet42(width_multiplier=0.25).to(device)
    x = cloud(device, 4)

    def forward(training: bool) -> Any:
        with torch.set_grad_enabled(training):
            y = network.train(training)(SparseTensor(x.feats, x.coords))
            return y[-1].feats

    return {
        "MinkUNet, new maps": lambda: forward(False),
        "MinkUNet, training, new maps": lambda: forward(True),
        "MinkUNet, and backward": lambda: forward(True).sum().backward(),
    }


def main(argv: list[str] | None = None) -> int:
    """Print a line for each; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(argv)
    device: torch.device = options.device
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(without_kernels())
            torch.set_num_threads(1)
        gc.collect()
        for make, repeats in ((layers, options.repeats), (networks, options.repeats // 5 + 1)):
            for name, call in make(device).items():
                print(f"{name:<32}{microseconds(call, device, repeats):>10.1f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
