"""Tensors that do not lie as a kernel would like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.layers import KINDS, assert_right, assert_same_bits, run

CPU = torch.device("cpu")


def misaligned(t: Tensor) -> Tensor:
    """One element behind a 16-byte boundary."""
    room = t.new_empty(t.numel() + 1)
    return room[1:].view(t.shape).copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The last axis varies slowest."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def spread(t: Tensor) -> Tensor:
    """Every other entry of wider rows; what lies between is NaN."""
    room = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    room[..., ::2] = t
    return room[..., ::2]


def sliced(t: Tensor) -> Tensor:
    """Columns cut out of wider rows, as after `cat` and a split."""
    room = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    room[..., 2:-1] = t
    return room[..., 2:-1]


def expanded(t: Tensor) -> Tensor:
    """Stride 0: one row seen many times (the numbers change, so the judge sees the same)."""
    return t[..., :1].expand(t.shape)


SAME_NUMBERS = (misaligned, transposed, spread, sliced)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize("laid_out", [*SAME_NUMBERS, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", ["pointwise", "submanifold-3", "submanifold-even", "strided-2", "transposed-2"]
)
def test_layouts(
    name: str, laid_out: Callable[[Tensor], Tensor], dtype: str, gpu: torch.device
) -> None:
    got = run(KINDS[name], (32, 64), dtype, gpu, laid_out=laid_out)
    assert_right(got, run(KINDS[name], (32, 64), dtype, CPU, laid_out=laid_out), dtype)


@pytest.mark.parametrize("laid_out", SAME_NUMBERS, ids=lambda f: f.__name__)
def test_a_layout_is_no_other_computation(
    laid_out: Callable[[Tensor], Tensor], gpu: torch.device
) -> None:
    plain = run(KINDS["submanifold-3"], (32, 64), "fp16", gpu)
    assert_same_bits(run(KINDS["submanifold-3"], (32, 64), "fp16", gpu, laid_out=laid_out), plain)
