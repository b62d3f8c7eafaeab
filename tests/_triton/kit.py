"""What the tests of the kernels share.

The judges here know nothing of keys, tables or tiles: sites are looked up in a dictionary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsparse._geometry import Geometry

__all__ = [
    "HALVES", "cloud", "geometries", "random_table", "rows_of", "search", "taps", "to"
]  # fmt: skip

Ints = NDArray[np.int64]
NDIMS = (1, 2, 3, 4)
HALVES = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="Triton's interpreter multiplies bfloat16 operands as the integers they are",
        ),
    ),
]


def to(device: torch.device, array: NDArray[np.generic] | Sequence[Sequence[int]]) -> Tensor:
    """Coordinate rows as an int32 tensor."""
    return torch.from_numpy(np.array(array, np.int32)).to(device)


def rows_of(tensor: Tensor | None) -> Ints:
    assert tensor is not None
    return tensor.cpu().numpy().astype(np.int64)


def cloud(ndim: int, name: str, rows: int = 40, low: int = -5, high: int = 6) -> NDArray[np.int32]:
    """Distinct sites of three samples in a box, in no order; "empty" and "single" by name."""
    if name == "empty":
        return np.zeros((0, 1 + ndim), np.int32)
    if name == "single":
        return np.array([[0, *range(3, 3 + ndim)]], np.int32)
    rng = np.random.default_rng(len(name) * 100 + ndim)
    found = rng.integers(low, high, (rows, 1 + ndim))
    found[:, 0] %= 3
    return rng.permutation(np.unique(found, axis=0)).astype(np.int32)


def geometries(ndim: int) -> list[Geometry]:
    """Centred, corner-based, stretched and uneven; 2^D, 3^D / 2, uneven strides."""
    ones = (1,) * ndim
    return [
        Geometry.submanifold((3,) * ndim, ones),
        Geometry.submanifold((2,) * ndim, ones),
        Geometry.submanifold((3, 5, 1, 3)[:ndim], (2, 1, 1, 3)[:ndim]),
        Geometry.strided((2,) * ndim, (2,) * ndim, (0,) * ndim, ones, "spconv"),
        Geometry.strided((3,) * ndim, (2,) * ndim, ones, ones, "spconv"),
        Geometry.strided(
            (4, 3, 2, 3)[:ndim], (3, 2, 2, 1)[:ndim], (1, 2, 0, 1)[:ndim], (1, 3, 2, 2)[:ndim],
            "spconv",
        ),
    ]  # fmt: skip


def taps(kernel_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Taps by weight index: the first axis runs fastest for an odd volume, else the last."""
    odd = math.prod(kernel_size) % 2
    order = kernel_size if odd else kernel_size[::-1]
    weights = [math.prod(order[:place]) for place in range(len(order))]
    weights = weights if odd else weights[::-1]
    every = itertools.product(*map(range, kernel_size))
    return sorted(every, key=lambda tap: sum(t * w for t, w in zip(tap, weights)))


def search(fine: NDArray[np.generic], coarse: NDArray[np.generic], geometry: Geometry) -> Ints:
    """[K, M], the row of ``coarse * stride - offset + dilation * tap`` among ``fine``."""
    row = {tuple(site): n for n, site in enumerate(fine.tolist())}
    table = np.full((geometry.volume, len(coarse)), -1, np.int64)
    for k, tap in enumerate(taps(geometry.kernel_size)):
        for m, (batch, *site) in enumerate(coarse.tolist()):
            met = (
                c * s - o + d * t
                for c, s, o, d, t in zip(
                    site, geometry.stride, geometry.offset, geometry.dilation, tap
                )
            )
            table[k, m] = row.get((batch, *met), -1)
    return table


def random_table(
    device: torch.device, volume: int, inputs: int, outputs: int, density: float = 0.4
) -> Tensor:
    """[K, M] int32, each tap a partial matching, as in every kernel map."""
    rng = np.random.default_rng(volume * 1000 + inputs + outputs)
    table = np.full((volume, outputs), -1, np.int32)
    for row in table:
        count = min(inputs, int(density * outputs + 0.5))
        row[rng.permutation(outputs)[:count]] = rng.permutation(inputs)[:count]
    return torch.from_numpy(table).to(device)
