from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from torchsparse.cli.app import app
from torchsparse.cli.demo import simulate
from torchsparse.segmentation import load_checkpoint

LAST_LINE = re.compile(r"mIoU \d\.\d\d \(majority class \d\.\d\d\)")


@pytest.mark.slow
def test_a_quick_demo_writes_all_it_promises(tmp_path) -> None:
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert LAST_LINE.fullmatch(result.stdout.splitlines()[-1])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert result.stdout.splitlines()[-1].startswith(f"mIoU {metrics['miou']:.2f} ")
    assert len(metrics["losses"]) == metrics["steps"] > 0
    assert np.sum(metrics["confusion"]) == sum(metrics["points"].values())
    assert (tmp_path / "prediction.png").read_bytes().startswith(b"\x89PNG")
    segmenter = load_checkpoint(tmp_path / "checkpoint.pt")
    assert segmenter.steps == segmenter.planned == metrics["steps"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path) -> None:
    sizes = ["--streets", "1", "--held-out", "1", "--steps", "500"]
    command = [sys.executable, "-m", "torchsparse", "demo", *sizes, "--out", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # a child ignores what its parent does, as in a shell's background
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        seen = b""
        while b"loss=" not in seen:  # the bar after the first step
            piece = process.stderr.read1(4096)  # pyright: ignore[reportAttributeAccessIssue]
            assert piece, seen.decode()
            seen += piece
        process.send_signal(signal.SIGINT)
        err = (seen + process.stderr.read()).decode()
        assert process.wait(30) == 130, err
    assert "Traceback" not in err
    segmenter = load_checkpoint(tmp_path / "checkpoint.pt")
    assert 1 <= segmenter.steps < segmenter.planned == 500
    assert f"stopped after {segmenter.steps} of 500 steps" in err
    assert segmenter.predict(np.zeros((1, 3))).shape == (1,)


def test_ctrl_c_before_the_training_saves_nothing(tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchsparse.cli.demo.simulate", interrupted)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "nothing to save" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_streets_are_seen_by_several_sensors() -> None:
    first, second = simulate(range(2))
    assert int(first.ring.max()) == 63 and int(second.ring.max()) == 31
