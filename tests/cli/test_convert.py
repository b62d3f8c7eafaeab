from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from torchsparse import nn as spnn
from torchsparse.checkpoints import convert as convert_state
from torchsparse.cli.convert import convert

APP = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
APP.command()(convert)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


@pytest.fixture
def spconv2() -> dict[str, Any]:
    return {
        "module.stem.weight": torch.randn(8, 3, 1, 2, 4),
        "module.stem.bias": torch.randn(8),
        "module.norm.weight": torch.randn(8),
        "module.out.weight": torch.randn(5, 1, 1, 1, 8),
    }


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_a_checkpoint_becomes_a_state_dict_and_a_table(
    spconv2: dict[str, Any], tmp_path: Path
) -> None:
    source = saved({"epoch": 3, "model_state": spconv2}, tmp_path / "in.pth")
    target = tmp_path / "out.pt"
    result = run(source, target, "--from", "spconv2", "--rename", r"^module\.=")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["IN", "OUT"]
    assert lines[1] == "module.stem.weight [8, 3, 1, 2, 4] stem.kernel [6, 4, 8]".split()
    assert lines[2] == "module.out.weight [5, 1, 1, 1, 8] out.kernel [8, 5]".split()
    assert "2 converted, 2 passed through" in result.stdout and str(target) in result.stdout
    assert len(lines) == 4
    found = torch.load(target, weights_only=True)
    expected = convert_state(spconv2, "spconv2", names={r"^module\.": ""})
    assert (
        list(found) == list(expected) == ["stem.kernel", "stem.bias", "norm.weight", "out.kernel"]
    )
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.pt"]
    layer = spnn.Conv3d(4, 8, (2, 1, 3), 2, bias=True)
    layer.load_state_dict({"kernel": found["stem.kernel"], "bias": found["stem.bias"]})


def test_the_options_reach_the_function_and_there_is_a_way_back(
    spconv2: dict[str, Any], tmp_path: Path
) -> None:
    there, back = tmp_path / "there.pt", tmp_path / "back.pt"
    source = saved({"ema": spconv2, "model": {}}, tmp_path / "in.pt")
    sides = ["--axes", "xyz", "--strided", "module.out"]
    result = run(source, there, "--from", "spconv2", "--to", "minkowski", "--key", "ema", *sides)
    assert result.exit_code == 0, result.output
    assert torch.load(there)["module.out.kernel"].shape == (1, 8, 5)
    assert torch.load(there)["module.stem.bias"].shape == (1, 8)
    size = ["--kernel-size", "module.stem=3,1,2", "--kernel-size", "module.out=1"]
    result = run(there, back, "--from", "minkowski", "--to", "spconv2", *sides, *size)
    assert result.exit_code == 0, result.output
    found = torch.load(back)
    assert list(found) == list(spconv2)
    assert all(torch.equal(found[name], spconv2[name]) for name in found)
    result = run(there, back, "--from=minkowski", r"--skip=\.stem\.", "--rename=module=m")
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.load(back)["m.stem.kernel"], torch.load(there)["module.stem.kernel"])


def test_whatever_is_wrong_gets_one_line_and_no_file(
    spconv2: dict[str, Any], tmp_path: Path
) -> None:
    good = saved(spconv2, tmp_path / "good.pt")
    objects = saved({"state_dict": spconv2, "meta": Path("x")}, tmp_path / "objects.pt")
    nothing = saved({"epoch": 1}, tmp_path / "nothing.pt")
    kernels = saved({"a.kernel": torch.zeros(6, 4, 8)}, tmp_path / "kernels.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "empty.pt").touch()
    out = tmp_path / "out.pt"
    spconv = ["--from", "spconv2"]
    for arguments, words in [
        ([tmp_path / "none.pt", out, *spconv], "No such file"),
        ([tmp_path, out, *spconv], "directory"),
        ([tmp_path / "text.pt", out, *spconv], "not a readable"),
        ([tmp_path / "cut.pt", out, *spconv], "not a readable"),
        ([tmp_path / "empty.pt", out, *spconv], "not a readable"),
        ([objects, out, *spconv], "objects of pathlib"),
        ([nothing, out, *spconv], "'epoch'"),
        ([good, out, *spconv, "--key", "model"], "'module.stem.weight'"),
        ([good, out, "--from", "spconv9"], "spconv2.1-native"),
        ([good, out, "--from", "minkowski"], "spconv2"),
        ([good, out, *spconv, "--axes", "zzz"], "'zzz'"),
        ([good, out, *spconv, "--kernel-size", "module.stem=3,1"], "3,1,1"),
        ([good, out, *spconv, "--kernel-size", "module.stem=3,x,1"], "3,x,1"),
        ([good, out, *spconv, "--kernel-size", "module.stem"], "LEFT=RIGHT"),
        ([good, out, *spconv, "--rename", "(="], "missing )"),
        ([good, out, *spconv, "--rename", r"m=\g<a>"], "unknown group name"),
        ([good, out, *spconv, "--skip", "["], "unterminated"),
        ([kernels, out, "--from", "torchsparse", "--to", "spconv1"], "kernel_sizes={'a'"),
        ([good, tmp_path / "no" / "out.pt", *spconv], "No such file"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1 and words in result.stderr, result.stderr
        assert result.stderr.startswith("torchsparse: ")
        assert sorted(tmp_path.rglob("*")) == before


def test_help_lists_the_layouts() -> None:
    result = CliRunner().invoke(APP, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for word in (
        "minkowski",
        "spconv1",
        "torchsparse1.4",
        "--kernel-size",
        "--axes",
        "exit code 2",
    ):
        assert word in result.output
