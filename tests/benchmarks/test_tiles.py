"""The sweep of tile shapes, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks import oracle, tiles

# The interpreter turns arrays of one element into numbers, and wraps around silently.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGUMENTS = ["--layers", "1:16:16", "--dtypes", "fp16", "--seconds", "0", "--splits", "1", "2"]


def run(folder: Path) -> int:
    grid = np.stack(np.unravel_index(np.arange(0, 1000, 7), (1, 10, 10, 10)), 1).astype(np.int32)
    scene = folder / "grid.npz"
    np.savez(scene, coords=grid, feats=np.ones(grid.shape, np.float32))
    few = [*ARGUMENTS, "--scene", str(scene), "--device", DEVICE]
    with mock.patch.object(tiles, "HALF", ((64, 32, 3, 4), (128, 16, 3, 8))):
        return tiles.main(few)


def test_every_candidate_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    line = capsys.readouterr().out
    assert "grid 1:16:16 fp16" in line and "of the best" in line
    assert line.count("(64, 16, 32, 3, 4, 1)") == line.count("(128, 16, 16, 3, 8, 2)") == 1


def test_a_wrong_tile_is_not_timed(tmp_path: Path) -> None:
    with mock.patch.dict(tiles.AGREE, fp16=-1.0), pytest.raises(oracle.WrongResult):
        run(tmp_path)
