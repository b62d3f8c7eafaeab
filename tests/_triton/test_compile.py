"""What the compiler makes of the kernels, for an H100, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Kernels that move or sum feature rows: these must read 16 bytes at once.
READ_ROWS = {
    "scatter", "gather", "share", "devoxelize", "weight_grad", "chunks", "groups", "groups2",
    "max", "argmax", "affine", "pool_sum", "pool_sum2", "pool_max", "pool_max2", "unpool_max",
}  # fmt: skip
WRITE_ROWS = {
    "claim", "scatter", "gather", "share", "devoxelize", "affine", "gather_strided", "pool_sum",
    "pool_sum2", "pool_max", "pool_max2", "unpool_max", "pick_rows",
}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    # A fresh interpreter: here, kernels may be functions of Triton's interpreter.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH", "")])
    script = ROOT / "tests" / "_triton" / "compile_points.py"
    process = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def test_rows_of_128_bytes_move_16_at_a_time(reports):
    assert {name: reports[name]["load"] for name in READ_ROWS} == dict.fromkeys(READ_ROWS, 16)
    assert {name: reports[name]["store"] for name in WRITE_ROWS} == dict.fromkeys(WRITE_ROWS, 16)


def test_nothing_spills_and_nothing_adds_floats_atomically(reports):
    assert len(reports) >= 47
    for name, report in reports.items():
        assert (report["stack"], report["local"], report["float_atomics"]) == (0, 0, 0), name
        assert report["registers"] <= 128, name
