"""The examples run, and reach what they promise."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    """The module of an example, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classify_learns_three_shapes() -> None:
    assert load("classify").main([]) > 0.6  # chance: 0.33; this seed gives 0.80


def test_segment_trains_and_labels(capsys) -> None:
    miou = load("segment").main(["--steps", "6", "--streets", "1"])
    out = capsys.readouterr().out
    first, last = re.findall(r"loss (\S+) -> (\S+)", out)[0]
    assert float(last) < float(first)
    assert f"mIoU {miou:.2f}" in out.splitlines()[-1]
    assert len(re.findall(r"^  \w+ +\d+% of the points$", out, re.M)) >= 1


def test_complete_fills_the_gaps() -> None:
    completed, seen = load("complete").main([])
    assert seen < 0.3
    assert completed > 0.7  # this seed gives 0.80


@pytest.mark.parametrize("options", [[], ["--amp"]], ids=["float32", "amp"])
def test_a_v21_program_runs_unchanged(options: list[str]) -> None:
    history = load("migrate_from_v21").main(["--device", "cpu", "--steps", "8", *options])
    losses, accuracies = zip(*history)
    assert losses[-1] < 0.5 * losses[0]
    assert accuracies[-1] > 0.9


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_fits_on_two_screens(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 120
    assert path.stem in Path(__file__).read_text("utf-8"), "an example without a test"
