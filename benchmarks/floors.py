"""How fast a machine could be: its rates, measured, and what a convolution has to do at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.timing import fastest

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


class Work(NamedTuple):
    """One convolution: P pairs of one of N input rows and one of M output rows, K taps."""

    pairs: int
    inputs: int
    outputs: int
    taps: int
    c_in: int
    c_out: int

    @property
    def flops(self) -> float:
        """Of the forward pass. Backward costs as much for the kernel, and for the inputs."""
        return 2.0 * self.pairs * self.c_in * self.c_out

    @property
    def density(self) -> float:
        return self.pairs / max(self.taps * self.outputs, 1)

    def bytes(self, size: int) -> tuple[int, int]:
        """Moved at least, every row once, each pair's index once: forward, and kernel gradient.

        The input gradient moves as much as the forward pass.
        """
        rows = size * (self.inputs * self.c_in + self.outputs * self.c_out) + 4 * self.pairs
        weights = self.taps * self.c_in * self.c_out
        return rows + size * weights, rows + 4 * weights


class Rates(NamedTuple):
    """What the machine gives, measured in this run."""

    copy: float  # bytes read and written, per second
    matmul: dict[str, float]  # FLOP/s of a square product

    def floor_ms(self, works: Sequence[Work], dtype: str, training: bool) -> float:
        """No time below this: each pass of each layer at the slower of its two limits."""
        return 1e3 * sum(
            max(flops / self.matmul[dtype], moved / self.copy)
            for work in works
            for flops, moved in _passes(work, DTYPES[dtype].itemsize, training)
        )


def _passes(work: Work, size: int, training: bool) -> list[tuple[float, int]]:
    forward, kernel = work.bytes(size)
    moved = [forward, forward, kernel] if training else [forward]
    return [(work.flops, m) for m in moved]


def total_bytes(works: Sequence[Work], dtype: str, training: bool) -> int:
    size = DTYPES[dtype].itemsize
    return sum(moved for work in works for _, moved in _passes(work, size, training))


def total_flops(works: Sequence[Work], training: bool) -> float:
    return sum(work.flops for work in works) * (3 if training else 1)


def allow_tf32(allow: bool) -> None:
    """In the products of PyTorch itself."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def measure_rates(device: torch.device, dtypes: Sequence[str], seconds: float = 0.3) -> Rates:
    """The best of several copies and products."""
    matmul = {dtype: _matmul_rate(device, dtype, seconds) for dtype in dtypes}
    return Rates(_copy_rate(device, seconds), matmul)


def _copy_rate(device: torch.device, seconds: float) -> float:
    source = torch.ones(
        2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    best = fastest(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() / best * 1e3


def _matmul_rate(device: torch.device, dtype: str, seconds: float) -> float:
    n = 1024 if device.type == "cpu" else 4096 if dtype == "fp32" else 8192
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    allow_tf32(dtype == "tf32")
    best = fastest(lambda: torch.mm(a, a, out=out), device, seconds)
    allow_tf32(False)
    return 2 * n**3 / best * 1e3
