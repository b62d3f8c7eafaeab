"""What one convolution does, decided once per call and passed down unchanged."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ConvRecipe", "Dataflow", "Epilogue", "Norm", "sum_dtype"]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of ``dtype`` are summed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Dataflow(enum.Enum):
    """How a convolution moves its data. A choice of speed: all give the same result."""

    ImplicitGEMM = 0
    GatherScatter = 1
    FetchOnDemand = 2
    CodedCSR = 3


@dataclass(frozen=True, eq=False)
class ConvRecipe:
    """The resolved choices of one call: a config says what is wanted, this what is done.

    Equal choices are one object where `nn.functional.conv` makes them, so that layouts can be
    remembered by it.
    """

    dataflow: Dataflow
    sort: bool  # order output rows by their neighbour mask
    splits: int  # parts of the mask that are sorted apart
    splits_bwd: int
    literal: bool  # take sort and splits as orders, not as "you choose"
    kmap_mode: str
    downsample_mode: str
    dtype: torch.dtype  # of the result
    compute: torch.dtype  # of the operands; sums are float32, or float64 for float64
    precision: str  # of float32 products on a GPU: "ieee", "tf32", "tf32x3"


class Norm(NamedTuple):
    """A normalisation by known statistics: (y - mean) / sqrt(var + eps) * weight + bias."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
    weight: Tensor | None  # [C]; both or neither
    bias: Tensor | None
    eps: float


class Epilogue(NamedTuple):
    """What happens to a row of products before it is rounded and stored, in this order."""

    norm: Norm | None = None
    residual: Tensor | None = None  # [M, C], added
    slope: float | None = None  # negative values are multiplied by it: 0 is ReLU
