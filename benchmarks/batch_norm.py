"""BatchNorm, residual sum and ReLU in training beside PyTorch's: checked, then timed.

    python benchmarks/batch_norm.py --device cuda
    python benchmarks/batch_norm.py --device cuda --dtypes fp16 bf16 fp32 --rows 190000

Forward and backward on features [N, C] with parameters in float32. ``kernels`` is the sum of the
durations of all kernels, ``calls`` their number; the floor is the bytes of the passes over the
rate of a large copy: one pass for the statistics, one forward, two backward. ``host`` is the time
that the host needs to ask for a step, on few rows. On a CPU PyTorch serves both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.floors import DTYPES, measure_rates
from benchmarks.timing import kernels, times
from torchsparse import SparseTensor
from torchsparse import nn as spnn

# Relative to the largest entry: float32 sums in another order; one rounding to 11, to 8 bits.
TOLERANCES = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 3e-2}
# The levels of MinkUNet on two SemanticKITTI scans.
LEVELS = [(189_000, 32), (189_000, 96), (102_000, 32), (102_000, 96), (47_000, 64), (47_000, 128),
          (19_000, 128), (19_000, 256), (6_500, 256)]  # fmt: skip
FEW = 512
Step = Callable[[], tuple[Tensor, ...]]


class Case:
    """One layer, with leaves for its gradients."""

    def __init__(self, rows: int, channels: int, dtype: str, added: bool, device: torch.device):
        generator = torch.Generator().manual_seed(rows + channels)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.feats, self.residual, self.push = (
            draw(rows, channels).to(DTYPES[dtype]) for _ in range(3)
        )
        self.feats += 1
        self.feats.requires_grad_()
        self.residual.requires_grad_(added)
        self.added = added
        self.coords = torch.zeros((rows, 4), dtype=torch.int32, device=device)
        self.sparse, self.dense = spnn.BatchNorm(channels), nn.BatchNorm1d(channels)
        for norm in (self.sparse, self.dense):
            generator.manual_seed(1)
            norm.to(device)
            with torch.no_grad():
                norm.weight.copy_(1 + draw(channels) / 4)
                norm.bias.copy_(draw(channels))
        self.relu = spnn.ReLU(True)
        # Where the activation bends, a rounding decides what the gradient is: none goes there.
        self.push[self._exact()[1].abs() < 5e-2] = 0

    def _grads(self, out: Tensor, norm: nn.BatchNorm1d) -> tuple[Tensor, ...]:
        leaves = [self.feats, norm.weight, norm.bias] + [self.residual] * self.added
        return out.detach(), *torch.autograd.grad(out, leaves, self.push)

    def ours(self) -> tuple[Tensor, ...]:
        y = self.sparse(SparseTensor(self.feats, self.coords))
        if self.added:
            y = y + SparseTensor(self.residual, self.coords)
        return self._grads(self.relu(y).feats, self.sparse)

    def theirs(self) -> tuple[Tensor, ...]:
        y = self.dense(self.feats)
        if self.added:
            y = y + self.residual
        return self._grads(torch.relu_(y), self.dense)

    def _exact(self) -> tuple[list[Tensor], Tensor]:
        """Leaves in float64, and what is rectified."""
        given = self.feats, self.dense.weight, self.dense.bias, self.residual
        leaves = [t.detach().double().requires_grad_() for t in given]
        y = nn.functional.batch_norm(leaves[0], None, None, *leaves[1:3], training=True)
        return (leaves, y + leaves[3]) if self.added else (leaves[:3], y)

    def exact(self) -> tuple[Tensor, ...]:
        """In float64, by PyTorch."""
        leaves, y = self._exact()
        out = torch.relu(y)
        return out.detach(), *torch.autograd.grad(out, leaves, self.push.double())

    @property
    def nbytes(self) -> int:
        """Of all passes: what each reads and writes, in features."""
        passes = (1, 3, 3, 5) if self.added else (1, 2, 2, 3)
        return sum(passes) * self.feats.nbytes


def check(case: Case, dtype: str) -> None:
    """Results, gradients and running statistics.

    Raises:
        SystemExit: They differ.
    """
    right = case.exact()
    names = ("output", "input", "weight", "bias", "sum")[: len(right)]
    for name, one, other in zip(names, case.ours(), right, strict=True):
        error = float((one.double() - other).abs().max() / other.abs().max())
        if not error <= TOLERANCES[dtype]:
            raise SystemExit(f"{dtype} {list(case.feats.shape)}: {name} is off by {error:.2e}")
    case.theirs()
    for name, value in case.dense.state_dict().items():
        torch.testing.assert_close(case.sparse.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def host(step: Step, device: torch.device) -> float:
    """Microseconds until a step has been asked for."""
    found: list[float] = []
    for _ in range(200):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        found.append(1e6 * (time.perf_counter() - start))
    return sorted(found)[len(found) // 2]


def clock(step: Step, device: torch.device) -> tuple[float, float]:
    """Microseconds and launches of a step."""
    if device.type == "cuda":
        row = kernels(step, 20)
        return 1e3 * row["kernel_ms"], row["launches"]
    return 1e3 * min(times(step, device, 0.5)), 0.0


def main(argv: list[str] | None = None) -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description="BatchNorm in training beside PyTorch's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=["fp16"])
    parser.add_argument("--rows", type=int, help="instead of those of each level")
    options: Any = parser.parse_args(argv)
    device = torch.device(options.device)
    rate = measure_rates(device, ()).copy
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}: copies {rate / 1e9:.0f} GB/s; ours / PyTorch's")
    print(
        f"{'type':<6}{'N':>8}{'C':>5} {'sum':<5}{'floor us':>9}{'kernels us':>18}{'calls':>10}"
        f"{'host us':>15}{'of floor':>10}"
    )
    for dtype in options.dtypes:
        for rows, channels in LEVELS:
            rows = options.rows or rows
            for added in (False, True):
                case = Case(rows, channels, dtype, added, device)
                check(case, dtype)
                (mine, calls), (other, more) = (
                    clock(step, device) for step in (case.ours, case.theirs)
                )
                few = Case(FEW, channels, dtype, added, device)
                asked = [host(step, device) for step in (few.ours, few.theirs)]
                floor = 1e6 * case.nbytes / rate
                print(
                    f"{dtype:<6}{rows:>8}{channels:>5} {'yes' if added else 'no':<5}{floor:>9.1f}"
                    f"{mine:>9.1f} /{other:>7.1f}{calls:>5.0f} /{more:>3.0f}"
                    f"{asked[0]:>8.0f} /{asked[1]:>5.0f}{floor / mine:>10.0%}"
                )


if __name__ == "__main__":
    main()
