"""What layers cost the host: the time until a call returns, kernels not waited for.

    python benchmarks/host.py                  # without a GPU: nothing is launched at all
    python benchmarks/host.py --device cuda

Without a GPU the launches end where Triton's launcher would begin, so that only Python and
PyTorch's allocator are timed; sizes that a device would count are made up. Nothing is computed and
nothing checked: that is what the tests are for.
"""

from __future__ import annotations

import argparse
import copy
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
    sites, and layers are launched as on large maps, whose taps are not shared out."""
    from torchsparse._triton import launch
    from torchsparse._triton.conv import product
    from torchsparse._triton.coords import create

    fill, tile = create._fill, product.gemm_tile

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
        mock.patch.object(
            product, "gemm_tile", lambda *args, **kw: tile(*args, **kw)._replace(splits=1)
        ),
        mock.patch.object(product, "_forms", {}),  # choices made before
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
    side = 4 if device.type == "cpu" else 32  # two at the fourth level below
    grid = torch.cartesian_prod(*[torch.arange(side)] * 3)
    coords = nn.functional.pad(grid, (1, 0)).int().to(device)
    return SparseTensor(torch.randn(len(coords), channels, device=device), coords)


def layers(device: torch.device) -> Rows:
    """Single layers on kept maps, in evaluation and in training."""
    x = cloud(device, CHANNELS)
    conv = spnn.Conv3d(CHANNELS, CHANNELS, 3)
    norm, relu = spnn.BatchNorm(CHANNELS), spnn.ReLU()
    block = nn.Sequential(conv, norm, relu).to(device).eval()
    plain_norm, plain_relu = nn.BatchNorm1d(CHANNELS).to(device).eval(), nn.ReLU()
    learner, learning = copy.deepcopy(block).train(), cloud(device, CHANNELS)
    leaf = cloud(device, CHANNELS)
    leaf.feats.requires_grad_()
    feats = x.feats
    grad = torch.ones_like(feats)

    def backward() -> None:
        """As a layer in the middle of a network: its input wants a gradient, too."""
        learner.zero_grad(set_to_none=True)
        leaf.feats.grad = None
        learner(leaf).feats.backward(grad)

    return {
        "conv": lambda: conv(x).feats,
        "conv + norm + relu": lambda: block(x).feats,
        "norm, alone": lambda: norm(x).feats,
        "norm, PyTorch's": lambda: plain_norm(feats),
        "relu, alone": lambda: relu(x).feats,
        "relu, PyTorch's": lambda: plain_relu(feats),
        "conv + norm + relu, training": lambda: learner(learning).feats,
        "conv + norm + relu, and backward": backward,
    }


def bare(device: torch.device) -> Rows:
    """What any library pays on this host, whatever it computes."""
    from torchsparse._triton.launch import Step
    from torchsparse._triton.maps import clear_kernel

    words = torch.zeros(4096, dtype=torch.int32, device=device)
    feats = torch.zeros(4096, CHANNELS, device=device)
    out = torch.empty_like(feats)
    step = Step(clear_kernel, BLOCK=2048)

    def start() -> None:
        step((1, 1), (words, words), (0, 0))

    return {
        "a kernel": start,
        "20 kernels": lambda: [start() for _ in range(20)],
        "an allocation": lambda: feats.new_empty(4096, CHANNELS),
        "torch.add into a given tensor": lambda: torch.add(feats, feats, out=out),
        "1000 turns of a loop of Python": lambda: sum(i for i in range(1000)),
    }


def networks(device: torch.device) -> Rows:
    """A MinkUNet from coordinates to features, maps and all."""
    network = SparseResUNet42(width_multiplier=0.25).to(device).eval()
    learner = copy.deepcopy(network).train()
    x = cloud(device, 4)

    def forward(net: nn.Module) -> Any:
        return net(SparseTensor(x.feats, x.coords))[-1].feats

    def backward() -> None:
        learner.zero_grad(set_to_none=True)
        forward(learner).sum().backward()

    return {
        "MinkUNet, new maps": lambda: forward(network),
        "MinkUNet, training, new maps": lambda: forward(learner),
        "MinkUNet, and backward": backward,
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
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        gc.collect()
        few = options.repeats // 5 + 1
        for make, repeats in ((bare, options.repeats), (layers, options.repeats), (networks, few)):
            for name, call in make(device).items():
                learns = "training" in name or "backward" in name
                stack.enter_context(torch.set_grad_enabled(learns))
                print(f"{name:<32}{microseconds(call, device, repeats):>10.1f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
