from __future__ import annotations

import runpy
import sys

import pytest
from typer.testing import CliRunner

import torchsparse
from torchsparse.cli import main
from torchsparse.cli.app import app


def test_without_typer_one_line_names_the_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install 'torchsparse[cli]'" in err


def test_python_m_torchsparse_is_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["torchsparse", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("torchsparse", run_name="__main__")
    assert caught.value.code in (0, None)
    assert capsys.readouterr().out == f"torchsparse {torchsparse.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "segment", "tune", "bench", "warmup"]),
        (["tune", "--help"], ["CHECKPOINT", "FOLDER", "--backward", "--seconds", "--device"]),
        (["bench", "--help"], ["CHECKPOINT", "FOLDER", "--tuned", "--fp16"]),
        (["warmup", "--help"], ["CHECKPOINT", "FOLDER", "--samples", "--graph", "--fp16"]),
        (["demo", "--help"], ["checkpoint.pt", "metrics.json", "prediction.png", "--quick"]),
        (["segment", "--help"], ["labels.npy", "--format", "--checkpoint", "--out"]),
    ],
)
def test_help_names_what_there_is(arguments: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for word in words:
        assert word in result.output


@pytest.mark.parametrize("command", [["demo"], ["segment", "x.bin"]])
def test_without_matplotlib_one_line_names_the_extra(monkeypatch, tmp_path, command) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "pip install 'torchsparse[plots]'" in result.stderr
    assert not (tmp_path / "out").exists()
