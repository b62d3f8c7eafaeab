"""The price of negative coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import negative, oracle
from torchsparse import tensor
from torchsparse.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_three_ways_for_each_map(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--scene", "tiny", "--scenes", str(folder), "--rounds", "1", "--seconds", "0"]
    monkeypatch.setattr(negative, "LIMIT", 1e3)
    assert negative.main([*few, "--device", DEVICE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * len(negative.LAYERS) + 1
    for name in negative.LAYERS:
        assert sum(line.startswith(name) for line in lines) == 3
    assert lines[-1].endswith("times as long; 1000.0 is allowed")
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


@pytest.mark.parametrize(("slower", "code"), [(1.04, 0), (1.06, 1)])
def test_a_price_beyond_the_limit_fails(
    slower: float, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = [(10.0, 20.0), (10.0 * slower, 20.0 * slower), (10.0, 20.0)]
    monkeypatch.setattr(negative, "measure", lambda *_: spent)
    assert negative.main(["--scene", "tiny", "--scenes", str(folder)]) == code


@pytest.mark.filterwarnings("ignore:.* was replaced")
@pytest.mark.parametrize("layer", negative.LAYERS)
def test_a_map_that_is_wrong_in_all_ways_is_noticed(
    layer: str, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = negative.ways(torch.from_numpy(small.coords).int())
    assert negative.check(negative.LAYERS[layer], found) > 0

    class Map(dict[str, Any]):
        def __init__(self, maps: dict[str, Any], geometry: Any) -> None:
            super().__init__(maps)
            self.geometry = geometry

    def lost(maps: dict[str, Any]) -> None:
        maps["out_in_map"][:, 0] = -1

    def swapped(maps: dict[str, Any]) -> None:
        maps["out_in_map"] = maps["out_in_map"].flip(1)

    def fewer(maps: dict[str, Any]) -> None:
        maps["coords"] = maps["coords"][: len(maps["coords"]) // 2]

    def twice(maps: dict[str, Any]) -> None:
        maps["coords"][1] = maps["coords"][0]

    right = F.build_kernel_map
    for change in (lost, swapped, fewer, twice):

        def wrong(*args: Any, change: Any = change, **kwargs: Any) -> dict[str, Any]:
            kmap = right(*args, **kwargs)
            maps = {name: kmap[name].clone() for name in ("out_in_map", "coords")}
            change(maps)
            return Map(maps, kmap.geometry)

        monkeypatch.setattr(F, "build_kernel_map", wrong)
        with pytest.raises(oracle.WrongResult, match=r"search|reaches"):
            negative.check(negative.LAYERS[layer], found)
