"""The benchmarks run on a tiny scene, and print no time for a wrong result."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, oracle, run, scenes
from benchmarks.cases import CASES, LAYERS, counting, pairs, tensor
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The tiny scene, simulated once."""
    path = tmp_path_factory.mktemp("scenes")
    scenes.main(["tiny", "--out", str(path)])
    return path


@pytest.fixture
def small(folder) -> scenes.Scene:
    return scenes.crop(scenes.load("tiny", folder))


def test_a_scene_is_a_batch_of_voxels(folder) -> None:
    scene = scenes.load("tiny", folder)
    assert scene.coords.dtype == np.int32 and scene.feats.dtype == np.float32
    assert scene.coords.shape == scene.feats.shape == (len(scene.coords), 4)
    assert len(np.unique(scene.coords, axis=0)) == len(scene.coords) > 1000
    assert scene.coords.min() == 0 and np.abs(scene.feats[:, :3]).max() <= 0.5


def test_a_crop_is_the_densest_cube(folder) -> None:
    scene = scenes.load("tiny", folder)
    cut = scenes.crop(scene, 16)
    cells = scene.coords // np.array([1, 16, 16, 16])
    assert len(cut.coords) == np.unique(cells, axis=0, return_counts=True)[1].max()
    assert cut.coords.min() >= 0 and cut.coords.max() < 16


@pytest.mark.parametrize("name", LAYERS)
def test_the_oracle_agrees_with_every_layer(name: str, small) -> None:
    case = CASES[name]
    x = tensor(small, case.in_channels, "cpu", torch.float32)
    assert oracle.check(case.build(), x) == (2 if name.startswith("down-up") else 1)


def test_operations_are_counted_by_pair(small) -> None:
    """Against a search in a set of sites."""
    conv = spnn.Conv3d(4, 8, 3)
    x = tensor(small, 4, "cpu", torch.float32)
    sites = set(map(tuple, small.coords.tolist()))
    steps = [(a, b, c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)]
    found = sum((s, x + a, y + b, z + c) in sites for s, x, y, z in sites for a, b, c in steps)
    assert pairs(conv, x) == found
    with torch.no_grad(), counting(conv) as flops:
        conv(x)
    assert flops == [2.0 * found * 4 * 8]


def test_a_run_prints_and_writes_its_rows(folder, tmp_path, capsys) -> None:
    options = ["subm-3-4-32", "resnet21d", "--scene", "tiny", "--seconds", "0"]
    assert run.main([*options, "--scenes", str(folder), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    with (tmp_path / "cpu-tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and len(printed) == 2 + 8 + 1  # 2 cases x 2 modes x 2 kinds of maps
    assert tuple(rows[0]) == run.COLUMNS
    for row in rows:
        assert all(row.values())
        assert float(row["median_ms"]) >= float(row["min_ms"]) > 0
        rate = float(row["gflop"]) / float(row["median_ms"]) * 1e3
        assert float(row["gflop_per_s"]) == pytest.approx(rate, rel=0.01)


def test_a_wrong_result_is_not_timed(folder, tmp_path, capsys, monkeypatch) -> None:
    right = F.conv3d

    def wrong(*args, **kwargs) -> SparseTensor:
        out = right(*args, **kwargs)
        out.feats = out.feats * 1.001
        return out

    monkeypatch.setattr(F, "conv3d", wrong)
    options = ["subm-3-4-32", "--scene", "tiny", "--scenes", str(folder), "--out", str(tmp_path)]
    assert run.main(options) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("subm-3-4-32: wrong on a crop") and " output is off by " in last
    assert list(tmp_path.iterdir()) == []


def test_compare_runs_without_its_rival(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare, "spconv", lambda *args: None)
    options = ["--scene", "tiny", "--scenes", str(folder), "--rounds", "1"]
    assert compare.main([*options, "--network", "encoder"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "without spconv: timing torchsparse alone"
    assert lines[1].startswith("torchsparse  encoder infer: median ")
