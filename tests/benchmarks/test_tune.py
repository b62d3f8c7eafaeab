"""The benchmark of the tuner, on a layer and a tiny scan."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from torchsparse import _tuned
from torchsparse import nn as spnn
from torchsparse.nn import functional as F


def test_every_way_is_timed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "NETWORKS", {"subm-3-4-32": "tiny"})
    monkeypatch.setattr(tune, "ALLOWED", 100.0)
    folder = os.environ[_tuned.VARIABLE]
    options = ["--tuned-on=1", "--judged-on=2", "--search=0.2", "--each=0.01"]
    assert tune.main([*options, f"--scenes={tmp_path / 'scenes'}", f"--out={tmp_path}"]) == 0
    with (tmp_path / "tune-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["seed"]) for row in rows] == [
        (mode, seed) for seed in ("100", "101") for mode in ("infer", "train")
    ]
    for row in rows:
        others = [float(row[f"{name}_ms"]) for name in ("default", "mode1", "mode2")]
        assert float(row["of_best"]) == pytest.approx(
            float(row["tuned_ms"]) / min(others), rel=1e-3
        )
        assert float(row["gain"]) == pytest.approx(others[0] / float(row["tuned_ms"]), rel=1e-3)
    assert "geometric mean of the gains" in capsys.readouterr().out
    assert os.environ[_tuned.VARIABLE] == folder


def test_a_file_is_tuned_in_its_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One scan at least; runs are summed up together."""
    monkeypatch.setattr(tune, "ALLOWED", 100.0)
    name = f"subm-3-4-32@{folder / 'tiny.npz'}"
    options = [name, "--tuned-on=1", "--seconds=0.01", "--each=0.01", f"--out={tmp_path}"]
    assert tune.main(options) == 0
    assert "2 scans left out" in capsys.readouterr().out
    path = tmp_path / "tune-cpu.csv"
    assert len(path.read_text().splitlines()) == 1 + 2
    assert tune.main(["--summary", str(path), str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in said] == [
        "wall, subm-3-4-32 tiny fp32 infer", "wall, subm-3-4-32 tiny fp32 train", "wall, all 4",
    ]  # fmt: skip
    monkeypatch.setattr(tune, "ALLOWED", 0.0)
    assert tune.main(["--summary", str(path)]) == 1
    with pytest.raises(SystemExit):
        tune.main(["nothing"])


def test_a_way_holds_and_ends() -> None:
    device = torch.device("cpu")
    network = torch.nn.Sequential(spnn.Conv3d(4, 4, 3))
    _tuned.record({"name/d1": (1,), "name/d3": (2,)}, device, write=False)
    try:
        for name, mode, config, known in (
            ("default", 0, None, 0), ("mode 2", 2, None, 0), ("tuned", 0, {"ifsort": True}, 1),
        ):  # fmt: skip
            with tune.way(name, network, {"0": {"ifsort": True}}, device):
                assert F.get_conv_mode().value == mode
                assert network[0]._config == config
                assert len(_tuned.entries(device)) == known
        assert F.get_conv_mode().value == 0
    finally:
        _tuned.forget()
