"""What one convolution does, decided once per call and passed down unchanged."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

__all__ = ["ConvRecipe", "Dataflow"]


class Dataflow(enum.Enum):
    """How a convolution moves its data. A choice of speed: all give the same result."""

    ImplicitGEMM = 0
    GatherScatter = 1
    FetchOnDemand = 2
    CodedCSR = 3


@dataclass(frozen=True)
class ConvRecipe:
    """The resolved choices of one call: a config says what is wanted, this what is done."""

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
