"""The sweep of tile shapes, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import oracle, tiles, timing
from torchsparse._triton import conv
from torchsparse._triton.conv import product

# The interpreter turns arrays of one element into numbers, and wraps around silently.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGUMENTS = "--layers 1:16:16 --dtypes fp16 --seconds 0 --splits 1 2 --own 2 --top 9".split()


def run(folder: Path, *more: str) -> int:
    grid = np.stack(np.unravel_index(np.arange(0, 1000, 7), (1, 10, 10, 10)), 1).astype(np.int32)
    scene = folder / "grid.npz"
    np.savez(scene, coords=grid, feats=np.ones(grid.shape, np.float32))
    few = [*ARGUMENTS, "--scene", str(scene), "--device", DEVICE, *more]
    with mock.patch.object(tiles, "HALF", ((64, 32, 3, 4), (128, 16, 3, 8))):
        return tiles.main(few)


def test_every_candidate_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    line = capsys.readouterr().out
    assert "grid 1:16:16 fp16" in line and "of the best" in line
    assert line.count("(64, 16, 32, 3, 4, 1)") == 1
    assert line.count("(128, 16, 16, 3, 8, 2)") == 2
    assert line.count("(128, 16, 16, 3, 8, 2) own") == line.count("(64, 16, 32, 3, 4, 2) own") == 1


@pytest.mark.parametrize("change", [lambda out: out * 1.01, torch.zeros_like, lambda out: -out])
def test_a_wrong_product_is_not_timed(
    change: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = conv.gather_gemm
    monkeypatch.setattr(conv, "gather_gemm", lambda *args, **kw: change(right(*args, **kw)))
    timed: list[Any] = []
    monkeypatch.setattr(timing, "fastest", lambda *args: timed.append(args) or 1.0)
    with pytest.raises(oracle.WrongResult, match="off by"):
        run(tmp_path)
    assert not timed


def test_a_wrong_tile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the library would not choose: the others are still timed."""
    right = conv.gather_gemm

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        out = right(*args, **kwargs)
        chosen: Any = product.gemm_tile  # in the sweep a mock, which gives the one that is tried
        return out * 1.01 if args[0].shape[1] == 16 and chosen()[0] == 128 else out

    monkeypatch.setattr(conv, "gather_gemm", wrong)
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "(128, 16, 16, 3, 8, 1): WrongResult: " in said
    assert "(128, 16, 16" not in said.splitlines()[-1]
    assert "(64, 16, 32, 3, 4, 1)" in said.splitlines()[-1]


def test_weights_may_be_read_by_addresses() -> None:
    """Whatever was chosen before, and only as long as it is asked for."""
    device, chosen = torch.device("cpu"), {"a kind": "of products"}
    with mock.patch.multiple(product, has_blocks=lambda device: True, _forms=chosen):
        for addresses in (True, False):
            with tiles.reading(addresses=addresses):
                assert product.has_blocks(device) is not addresses
                assert product._forms == {}
        assert product.has_blocks(device) and product._forms is chosen
