"""The benchmark of the tuner, on a layer and a tiny scan."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import judging, tune
from benchmarks.cases import CASES, tensor
from torchsparse import _tuned
from torchsparse import nn as spnn
from torchsparse._autograd import conv as passes
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


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name", ["subm-3-4-32", "down-up-2-64-64"])
def test_what_is_timed_is_computed(
    name: str, mode: str, small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are put off until somebody reads them: a step must."""
    case, device, calls = CASES[name], torch.device("cpu"), []
    product = passes.gather_gemm

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return product(*args)

    monkeypatch.setattr(passes, "gather_gemm", counted)
    network = judging.calibrated(case, small, device).train(mode == "train")
    convolutions = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    layers = sum(conv.kernel.dim() == 3 for conv in convolutions)
    # Nobody wants the gradient of the first layer's input.
    wanted = layers if mode == "infer" else 2 * layers - 1
    x = tensor(small, case.in_channels, device, torch.float32)
    step = tune.step_of(network, x, "fp32", mode, device)
    for name in tune.WAYS:
        calls.clear()
        with tune.way(name, network, {}, device):
            step()
        assert len(calls) == wanted, name
    assert all((p.grad is not None) is (mode == "train") for p in network.parameters())


@pytest.mark.parametrize(
    ("wrong", "factor", "said"),
    [
        ("mode 1", 1.01, "infer 100: mode 1 is off by 1.0e-02 from default"),
        ("mode 2", 0.0, "infer 100: mode 2 is off by 1.0e+00 from default"),
        ("tuned", 1.01, "infer 100: tuned is off by 1.0e-02 from default"),
        ("weight_grad", 0.0, "train 100: the gradients of mode 1 are off by 1.0e+00"),
        ("weight_grad", 1.1, "train 100: the gradients of mode 1 are off by 1.0e-01"),
    ],
)
def test_a_wrong_way_is_not_timed(
    wrong: str, factor: float, said: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tune, "ALLOWED", 100.0)
    name = "weight_grad" if wrong == "weight_grad" else "gather_gemm"
    right, ways, now = getattr(passes, name), tune.way, []

    @contextmanager
    def noted(name: str, *args: Any) -> Iterator[None]:
        now[:] = [name]
        with ways(name, *args):
            yield
        now.clear()

    def product(*args: Any) -> torch.Tensor:
        out = right(*args)
        return out * factor if now == ["mode 1" if name == "weight_grad" else wrong] else out

    monkeypatch.setattr(passes, name, product)
    monkeypatch.setattr(tune, "way", noted)
    options = ["--tuned-on=1", "--judged-on=1", "--search=0.1", "--each=0", f"--out={tmp_path}"]
    assert tune.main([f"subm-3-4-32@{folder / 'tiny.npz'}", *options]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrong, not timed: subm-3-4-32-tiny-fp32 ") and said in last
    rows = tmp_path / "tune-cpu.csv"  # the mode before was right
    assert rows.exists() is (name == "weight_grad")


def test_walls_come_before_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[str] = []
    monkeypatch.setattr(tune.timing, "times", lambda *_: clocks.append("wall") or [1.0])
    monkeypatch.setattr(
        tune.timing, "kernels", lambda *_: clocks.append("kernels") or {"kernel_ms": 2.0}
    )
    monkeypatch.setattr(tune, "way", lambda *_: nullcontext())
    found = tune.times(lambda: None, torch.nn.Identity(), {}, torch.device("cuda"), 1.0, 2)
    assert found == {name: {"wall": 1.0, "kernels": 2.0} for name in tune.WAYS}
    assert clocks == ["wall"] * 8 + ["kernels"] * 8


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
