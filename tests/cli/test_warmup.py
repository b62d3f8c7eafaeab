"""`torchsparse warmup` on an untrained network and two small scans."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from torchsparse import SparseTensor, inference
from torchsparse.cli.app import app
from torchsparse.datasets import Sensor, scan, street
from torchsparse.segmentation import Recipe, Segmenter, save_checkpoint

COARSE = Sensor("coarse", tuple(np.linspace(-25, 3, 8).tolist()), 90, (1.7, 2.0))
TIMES = r"(\d+) voxels: first result \d+\.\d\d ms, second \d+\.\d\d ms"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warmup")
    recipe = Recipe(voxel_size=0.5, stem=4, encoder=(4, 4), decoder=(4, 4))
    save_checkpoint(Segmenter.new(recipe), folder / "checkpoint.pt")
    for name in ("scans", "empty", "bad"):
        (folder / name).mkdir()
    for seed, name in enumerate(("a.bin", "b.bin")):
        seen = scan(street(seed), COARSE, seed)
        table = np.column_stack([seen.points, seen.intensity]).astype("<f4")
        table.tofile(folder / "scans" / name)
    (folder / "bad" / "broken.bin").write_bytes(b"123")
    return folder


def run(folder: Path, *options: str, scans: str = "scans", device: str = "cpu") -> Result:
    arguments = ["warmup", str(folder / "checkpoint.pt"), str(folder / scans)]
    return CliRunner().invoke(app, [*arguments, f"--device={device}", *options])


@pytest.mark.parametrize("options", [(), ("--fp16",), ("--graph",)], ids=str)
def test_on_a_cpu_nothing_is_compiled(folder: Path, options: tuple[str, ...]) -> None:
    result = run(folder, *options)
    assert result.exit_code == 0, result.output
    said, times = result.stdout.splitlines()
    assert said.startswith("on a CPU there is nothing to compile")
    assert ("graph" in said) == ("--graph" in options)
    found = re.fullmatch(TIMES, times)
    assert found is not None and int(found[1]) > 100


def test_the_network_meets_the_scans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode, under autocast if asked, as many as asked; then one of them twice."""
    met: list[tuple[SparseTensor, ...]] = []
    modes: list[bool] = []

    def noted(model: torch.nn.Module, *scans: SparseTensor, graph: object = None) -> int:
        met.append(scans)
        assert not model.training and not torch.is_grad_enabled()
        assert (graph is not None) == (len(met) == 2)
        modes.append(torch.is_autocast_enabled("cpu"))
        return 0

    monkeypatch.setattr(inference, "warmup", noted)
    assert run(folder).exit_code == 0
    assert run(folder, "--samples=1", "--fp16", "--graph").exit_code == 0
    assert [len(scans) for scans in met] == [2, 1] and modes == [False, True]
    assert torch.equal(met[0][0].coords, met[1][0].coords)


def test_what_is_missing_is_named_in_one_line(folder: Path) -> None:
    result = run(folder, scans="empty")
    assert result.exit_code == 1 and "no point clouds" in result.stderr
    result = run(folder, device="nowhere")
    assert result.exit_code == 1 and "nowhere" in result.stderr
    assert result.stderr.count("\n") == 1
    result = run(folder, scans="bad")
    assert result.exit_code == 2 and "could be used" in result.stderr
