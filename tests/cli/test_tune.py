"""`torchsparse tune` and `torchsparse bench` on an untrained network and two small scans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from torchsparse import _search, _tuned
from torchsparse.cli.app import app
from torchsparse.datasets import Sensor, scan, street
from torchsparse.segmentation import Recipe, Segmenter, save_checkpoint

COARSE = Sensor("coarse", tuple(np.linspace(-25, 3, 8).tolist()), 90, (1.7, 2.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    recipe = Recipe(voxel_size=0.5, stem=4, encoder=(4, 4), decoder=(4, 4))
    save_checkpoint(Segmenter.new(recipe), folder / "checkpoint.pt")
    (folder / "scans" / "more").mkdir(parents=True)
    (folder / "empty").mkdir()
    for seed, name in enumerate(("a.bin", "more/b.bin")):
        seen = scan(street(seed), COARSE, seed)
        table = np.column_stack([seen.points, seen.intensity]).astype("<f4")
        table.tofile(folder / "scans" / name)
    np.save(folder / "scans" / "a.labels.npy", np.zeros(3, np.int64))  # not points
    (folder / "scans" / "broken.bin").write_bytes(b"123")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(_search, "PER_CALL", {"cpu": 0.0})
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path / "tuned"))
    _tuned.forget()
    yield
    _tuned.forget()


def run(command: str, folder: Path, *options: str, scans: str = "scans") -> Result:
    arguments = [command, str(folder / "checkpoint.pt"), str(folder / scans), "--device=cpu"]
    return CliRunner().invoke(app, [*arguments, *options])


def test_tune_writes_what_bench_times(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "street.json"
    result = run("tune", folder, f"--out={out}", "--seconds=5", "--samples=2", "--backward")
    assert result.exit_code == 0, result.output
    layers = json.loads(out.read_text())["layers"]
    assert f"wrote the configurations of {len(layers)} layers to {out}" in result.stdout
    assert "kernel" in result.stdout and len(layers) > 5
    broken = [line for line in result.stderr.splitlines() if "broken.bin" in line]
    assert len(broken) == 1 and list((tmp_path / "tuned").iterdir())

    result = run("bench", folder, f"--tuned={out}", "--seconds=0.01", "--backward")
    assert result.exit_code == 0, result.output
    head, one, two, last = result.stdout.splitlines()
    assert head.split() == ["voxels", "default", "ms", "tuned", "ms", "gain"]
    for line in (one, two):
        voxels, before, after, gain = line.split()
        assert int(voxels) > 100
        assert float(gain[:-1]) == pytest.approx(float(before) / float(after), abs=0.02)
    assert re.fullmatch(r"geometric mean of 2: \d+\.\d\dx", last)


def test_bench_times_no_more_scans_than_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "street.json"
    assert run("tune", folder, f"--out={out}", "--seconds=0", "--samples=1").exit_code == 0
    result = run("bench", folder, f"--tuned={out}", "--seconds=0", "--samples=1")
    assert result.stdout.splitlines()[-1].startswith("geometric mean of 1:")


@pytest.mark.parametrize("command", ["tune", "bench"])
def test_what_is_missing_is_named_in_one_line(command: str, folder: Path, tmp_path: Path) -> None:
    result = run(command, folder, scans="empty")
    assert result.exit_code == 1 and "no point clouds" in result.stderr
    assert result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, [command, str(tmp_path / "none.pt"), str(folder / "scans")])
    assert result.exit_code == 1 and "no such checkpoint" in result.stderr
    result = run(command, folder, "--device=nowhere")
    assert result.exit_code == 1 and "nowhere" in result.stderr


def test_bench_needs_the_file_of_this_network(folder: Path, tmp_path: Path) -> None:
    result = run("bench", folder, f"--tuned={tmp_path / 'none.json'}")
    assert result.exit_code == 1 and "torchsparse tune" in result.stderr
    (tmp_path / "other.json").write_text("{}")
    result = run("bench", folder, f"--tuned={tmp_path / 'other.json'}")
    assert result.exit_code == 1 and "other.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_scans_that_cannot_be_read_are_not_enough(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.bin").write_bytes(b"123")
    out = tmp_path / "out.json"
    result = CliRunner().invoke(
        app,
        ["tune", str(folder / "checkpoint.pt"), str(tmp_path / "bad"), f"--out={out}"],
    )
    assert result.exit_code == 2 and "could be used" in result.stderr and not out.exists()


def test_a_place_that_cannot_be_written_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("tune", folder, f"--out={tmp_path / 'file' / 'x.json'}")
    assert result.exit_code == 2 and "cannot be written" in result.stderr
    assert "wrote" not in result.stdout and "tuning" not in result.stderr
