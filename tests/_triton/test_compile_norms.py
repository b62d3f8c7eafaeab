"""What the compiler makes of batch normalisation, for an A100 and an H100, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_move_16_bytes_at_a_time_and_nothing_spills(arch: int) -> None:
    # A fresh interpreter: here, kernels may be functions of Triton's interpreter.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH", "")])
    script = str(ROOT / "tests" / "_triton" / "compile_norms.py")
    process = subprocess.run(
        [sys.executable, script, str(arch)], capture_output=True, text=True, env=env, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    reports: list[dict[str, Any]] = json.loads(process.stdout)
    names = {report["kernel"] for report in reports}
    assert len(names) == 6 and len(reports) == 48
    for report in reports:
        assert report["load"] == 16, report
        if report["kernel"] in ("_normalise_kernel", "_rows_kernel"):
            assert report["store"] == 16, report
        if report["kernel"] in ("_moments_kernel", "_sums_kernel"):
            assert report["copies"] == report["wide_copies"] > 0, report
            assert report["in_flight"] >= 1, report  # while a tile is summed
        assert (report["stack"], report["local"], report["float_atomics"]) == (0, 0, 0), report
        assert report["registers"] <= 128, report
