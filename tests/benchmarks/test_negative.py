"""The price of negative coordinates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import negative, oracle
from torchsparse import tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_three_ways_for_each_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--scene", "tiny", "--scenes", str(folder), "--rounds", "1", "--seconds", "0"]
    assert negative.main([*few, "--device", DEVICE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * len(negative.LAYERS) + 1
    for name in negative.LAYERS:
        assert sum(line.startswith(name) for line in lines) == 3
    assert lines[-1].endswith("times as long; 1.05 is allowed")
    assert not tensor.get_allow_negative_coordinates()


@pytest.mark.parametrize("layer", negative.LAYERS)
def test_other_maps_are_noticed(layer: str) -> None:
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 3, 3], [0, 3, 3, 5]], dtype=torch.int32)
    found = negative.ways(coords)
    assert (found[2].coords[:, 1:] < 0).all()
    assert negative.check(negative.LAYERS[layer], found) > 0
    wrong = found[2].coords.clone()
    wrong[2, 3] += 1 if layer.startswith("sub") else 20
    with pytest.raises(oracle.WrongResult, match="allowed, negative"):
        negative.check(negative.LAYERS[layer], [*found[:2], found[2]._replace(coords=wrong)])
