from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from torchsparse.cli.app import app
from torchsparse.datasets import Sensor, scan, street
from torchsparse.segmentation import Recipe, Segmenter, load_checkpoint, save_checkpoint

COARSE = Sensor("coarse", tuple(np.linspace(-25, 3, 16).tolist()), 180, (1.7, 2.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint (untrained: nothing here looks at its skill) and a scan in several files."""
    folder = tmp_path_factory.mktemp("segment")
    recipe = Recipe(voxel_size=0.5, stem=4, encoder=(4, 4), decoder=(4, 4))
    save_checkpoint(Segmenter.new(recipe), folder / "checkpoint.pt")
    seen = scan(street(0), COARSE, 0)
    table = np.column_stack([seen.points, seen.intensity]).astype("<f4")
    table.tofile(folder / "scan.bin")
    table.tofile(folder / "scan.raw")
    np.column_stack([seen.points, seen.intensity * 255, seen.ring]).astype("<f4").round().tofile(
        folder / "sweep.pcd.bin"
    )
    np.savez(folder / "plain.npz", pc=seen.points)
    (folder / "empty.bin").touch()
    (folder / "truncated.bin").write_bytes((folder / "scan.bin").read_bytes()[:-3])
    table[7, 1] = np.nan
    table.tofile(folder / "nan.bin")
    return folder


def run(folder: Path, out: Path, *arguments: str) -> Result:
    files = [a if a.startswith("-") else str(folder / a) for a in arguments]
    fixed = ["--checkpoint", str(folder / "checkpoint.pt"), "--out", str(out)]
    return CliRunner().invoke(app, ["segment", *files, *fixed])


def test_each_file_gets_a_line_labels_and_a_picture(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "scan.bin", "sweep.pcd.bin", "plain.npz")
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert "0 road, 1 sidewalk" in head and "simulated" in head
    assert [line.split(":")[0] for line in lines] == ["scan.bin", "sweep.pcd.bin", "plain.npz"]
    points = np.load(folder / "plain.npz")["pc"]
    for stem, line in zip(("scan", "sweep", "plain"), lines):
        labels = np.load(tmp_path / f"{stem}.labels.npy")
        assert labels.shape == (len(points),) and labels.dtype == np.int64
        assert f"{len(points)} points" in line
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    expected = load_checkpoint(folder / "checkpoint.pt").predict(points)
    assert np.array_equal(np.load(tmp_path / "plain.labels.npy"), expected)


def test_a_room_comes_with_a_warning(folder: Path, tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-3, 3, (500, 3)).astype("<f4")
    points.tofile(tmp_path / "room.bin")
    result = run(folder, tmp_path, str(tmp_path / "room.bin"), "--format=xyz")
    assert "trained on simulated streets)" in result.stdout.splitlines()[-1]
    assert "trained on" not in run(folder, tmp_path, "scan.bin").stdout.splitlines()[-1]


def test_bad_files_get_one_line_and_the_others_are_done(folder: Path, tmp_path: Path) -> None:
    bad = ["missing.bin", "empty.bin", "truncated.bin", "nan.bin"]
    result = run(folder, tmp_path, bad[0], bad[1], "scan.bin", bad[2], bad[3], "plain.npz")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    reasons = ["no such file", "empty", "truncated", "1 of"]
    assert len(lines) == len(bad)
    for line, name, reason in zip(lines, bad, reasons):
        assert line.startswith(str(folder / name)) and reason in line
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["plain.labels.npy", "plain.png", "scan.labels.npy", "scan.png"]


def test_format_says_what_the_name_does_not(folder: Path, tmp_path: Path) -> None:
    silent = run(folder, tmp_path, "scan.raw")
    assert silent.exit_code == 2
    assert len(silent.stderr.splitlines()) == 1 and "--format" in silent.stderr
    assert run(folder, tmp_path, "scan.raw", "--format=kitti").exit_code == 0
    assert run(folder, tmp_path / "b", "scan.bin").exit_code == 0
    assert np.array_equal(
        np.load(tmp_path / "scan.labels.npy"), np.load(tmp_path / "b" / "scan.labels.npy")
    )


def test_an_unknown_format_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "scan.bin", "--format=velo")
    assert result.exit_code == 2
    assert "velo" in result.stderr and "kitti" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_same_name_do_not_overwrite_each_other(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path, "scan.bin", "scan.bin").exit_code == 0
    assert {path.name for path in tmp_path.glob("*.npy")} == {
        "scan.labels.npy",
        "scan-2.labels.npy",
    }


def test_without_a_checkpoint_one_line_says_how_to_get_one(folder: Path, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "none.pt")
    result = CliRunner().invoke(
        app, ["segment", str(folder / "scan.bin"), "--checkpoint", checkpoint]
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"torchsparse: {checkpoint}: no such checkpoint; `torchsparse demo` trains one"
    ]
