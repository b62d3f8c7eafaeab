"""What kernels over rows [N, C] share: tiles, views as plain words, searches.

Rows are read C at a time by tiles of ROWS x COLS elements. A row of C elements is UNITS times
UNIT of them, where UNIT is a power of two known to the compiler: it then sees that every row
starts at a multiple of UNIT and reads up to 16 bytes at once, without a kernel for each C.
"""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._triton.launch import cdiv, next_power

__all__ = [
    "WIDE",
    "Tile",
    "accumulator",
    "divide",
    "lower_bound",
    "note",
    "row_tile",
    "words",
]

WIDE = 16  # bytes that one thread can load at once


class Tile(NamedTuple):
    """How rows of ``units * unit`` elements are cut:  rows x cols elements per program."""

    rows: int
    cols: int
    unit: int
    units: int

    def grid(self, n: int) -> tuple[int, int]:
        """Programs for ``n`` rows."""
        return cdiv(n, self.rows), cdiv(self.units * self.unit, self.cols)

    @property
    def constants(self) -> dict[str, int]:
        return {"UNIT": self.unit, "ROWS": self.rows, "COLS": self.cols}


def row_tile(width: int, itemsize: int, elements: int = 2048, cols: int = 128) -> Tile:
    """A tile of about ``elements`` for rows of ``width`` elements, at most ``cols`` wide.

    Elements of 8 bytes count twice: they take two registers.
    """
    unit = min(width & -width, max(WIDE // itemsize, 1)) if width else 1
    cols = min(next_power(width), cols)
    return Tile(max(elements * 4 // max(itemsize, 4) // cols, 1), cols, unit, width // unit)


def words(rows: Tensor, *others: Tensor) -> tuple[list[Tensor], int, int]:
    """The same memory as integers of 4 bytes if rows consist of such, else of 2; how many of them
    a row has; their size.

    Copying needs no floating-point type: four kernels become one, and 16-bit features move in
    pairs. All arguments are contiguous with one dtype, the first is [N, C]; shapes get lost.
    """
    every, itemsize = (rows, *others), rows.element_size()
    size = rows.shape[1] * itemsize
    whole = size % 4 == 0 and all(
        r.data_ptr() % 4 == 0 and r.storage_offset() * itemsize % 4 == 0 for r in every
    )
    dtype, unit = (torch.int32, 4) if whole else (torch.int16, 2)
    if unit != itemsize:  # a column of one row may have any stride
        every = [r.as_strided((r.numel(),), (1,)) for r in every]
    return [r.view(dtype) for r in every], size // unit, unit


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """The type in which sums over ``dtype`` are made, for torch and for Triton."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    return torch.float32, tl.float32


@triton.jit
def lower_bound(sorted_keys, n, value, steps):
    """How many of the first ``n`` sorted keys are smaller than each value; n < 2^steps."""
    low = tl.zeros_like(value).to(tl.int64)
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        smaller = open & (tl.load(sorted_keys + middle, mask=open, other=0) < value)
        high = tl.where(smaller, high, middle)
        low = tl.where(smaller, middle + 1, low)
    return low


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: a point on the border of a cell must not change its side, and the
    mean of equal numbers is that number. The plain division of float32 is off by up to 2 ulp."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def note(word, bit, bad):
    """Or ``bit`` into the word of what was noticed in the data, if ``bad`` holds."""
    if bad:
        tl.atomic_or(word, tl.full([], bit, tl.int64), sem="relaxed")
