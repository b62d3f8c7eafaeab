"""The same bits every time, whatever lay in the memory before, and the right numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.gpu.layers import (
    CHANNELS,
    DTYPES,
    KINDS,
    Result,
    assert_right,
    assert_same_bits,
    poison,
    run,
)

CPU = torch.device("cpu")
RUNS = 10


def repeat(gpu: torch.device, name: str, channels: tuple[int, int], dtype: str, flow: int) -> None:
    first: Result | None = None
    for turn in range(RUNS):
        before = partial(poison, gpu, 0xFF if turn % 2 else 0x7F)
        got = run(KINDS[name], channels, dtype, gpu, dataflow=flow, before=before)
        if first is None:
            first = got
            assert_right(got, run(KINDS[name], channels, dtype, CPU), dtype)
        assert_same_bits(got, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_ten_runs(name: str, channels: tuple[int, int], dtype: str, gpu: torch.device) -> None:
    repeat(gpu, name, channels, dtype, 0)


@pytest.mark.parametrize("dataflow", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_ten_runs_of_other_dataflows(name: str, dataflow: int, gpu: torch.device) -> None:
    repeat(gpu, name, (32, 64), "fp16", dataflow)


@pytest.mark.parametrize("rows", [0, 1, 2, 127, 129])
@pytest.mark.parametrize("name", KINDS)
def test_few_rows(name: str, rows: int, gpu: torch.device) -> None:
    """Less than a tile, and a row more or less than one."""
    poison(gpu, 0xFF)
    got = run(KINDS[name], (16, 8), "fp16", gpu, rows=rows)
    assert_right(got, run(KINDS[name], (16, 8), "fp16", CPU, rows=rows), "fp16")
