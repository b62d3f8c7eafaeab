"""What the compiler makes of the convolutions, for an A100 and an H100, on any machine.

The inner loops are written for Triton's pipeliner, and natural variations of them silently lose
every copy in flight (docs/how-it-works): numbers stay right and only the time shows it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchsparse._triton import tiles

ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, Any]
ARCHS = (80, 90)
# The largest tile of the weight gradient was chosen on an H100; 32 bytes per thread spill here.
KNOWN_SPILLS = {(80, "backward 27 256 256 float16"): 32}


@pytest.fixture(scope="module")
def reports() -> dict[int, list[Report]]:
    """From fresh interpreters: here, kernels may be functions of Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH", "")])
    script = str(ROOT / "tests" / "_triton" / "compile_layers.py")
    running = {
        arch: subprocess.Popen(
            [sys.executable, script, str(arch)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for arch in ARCHS
    }
    found: dict[int, list[Report]] = {}
    for arch, process in running.items():
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        found[arch] = json.loads(out)
    return found


def of(reports: dict[int, list[Report]], arch: int, kind: str) -> list[Report]:
    found = [r for r in reports[arch] if r["layer"].startswith(kind)]
    assert len(found) >= 10
    return found


def tensor_cores(report: Report, arch: int) -> int:
    """Instructions for whole warp groups on sm_90, for warps on sm_80."""
    return report["hgmma"] if arch == 90 else report["hmma"]


@pytest.mark.parametrize("arch", ARCHS)
def test_products_have_copies_in_flight_and_use_tensor_cores(reports, arch: int) -> None:
    shared = [r for r in reports[arch] if r["layer"].startswith("shared")]
    assert len(shared) == 4
    for report in of(reports, arch, "forward") + shared:
        # Of weights that the copy engine reads in blocks, only the gathered rows are counted.
        assert report["in_flight"] >= (1 if report["blocks"] else 2), report
        assert report["copies"] == report["wide_copies"] > 0, report  # 16 bytes each
        assert tensor_cores(report, arch) > 0, report


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_what_tiles_are_fitted_by(reports, arch: int) -> None:
    """`tiles.fitting` asks how much a tile holds; a GPU that has less refuses the launch."""
    for kind in ("forward", "shared", "backward"):
        found = [r for r in reports[arch] if r["layer"].startswith(kind)]
        assert found
        for report in found:
            size = 2 if report["layer"].endswith("float16") else 4
            rows, columns, step = report["tile"]
            held = tiles._held(rows, columns, step, report["stages"], size)
            assert report["shared"] <= held, report


def test_wide_half_weights_are_read_in_blocks(reports) -> None:
    """By the copy engine of an H100."""
    found = {r["layer"]: r["blocks"] > 0 for r in of(reports, 90, "forward")}
    wide = {f"forward 27 {c} {c} float16" for c in (64, 128, 256)}
    wide.add("forward 27 64 64 bfloat16")
    assert {layer for layer, blocks in found.items() if blocks} == wide
    assert not any(r["blocks"] for r in of(reports, 80, "forward"))


@pytest.mark.parametrize("arch", ARCHS)
def test_half_weight_gradients_copy_ahead_and_use_tensor_cores(reports, arch: int) -> None:
    halves = [r for r in of(reports, arch, "backward") if r["layer"].endswith("float16")]
    assert len(halves) == 4
    for report in halves:
        # One wait may cover both operands.
        assert report["in_flight"] >= 1, report
        assert report["copies"] == report["wide_copies"] > 0, report
        assert report["hgmma"] + report["hmma"] > 0, report
    if arch == 90:
        assert [r["hgmma"] > 0 for r in halves] == [False, True, True, True]  # from 64 channels


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_weight_gradients_use_tensor_cores(reports, arch: int) -> None:
    """Those for warps: operands that lie across the summed axis suit no others."""
    floats = [r for r in of(reports, arch, "backward") if not r["layer"].endswith("float16")]
    assert len(floats) == 6
    for report in floats:
        assert report["hmma"] > 0 and report["hgmma"] == 0, report
        assert report["in_flight"] >= 2 and report["wide_copies"] > 0, report


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_nothing_adds_floats_atomically(reports, arch: int) -> None:
    for report in reports[arch]:
        assert report["stack"] <= KNOWN_SPILLS.get((arch, report["layer"]), 0), report
        assert report["float_atomics"] == 0, report


def test_every_kernel_was_compiled(reports) -> None:
    source = ROOT / "src" / "torchsparse" / "_triton"
    files = [*source.glob("conv/*.py"), *source.glob("coords/*.py"), source / "maps.py"]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    defined = {
        line.removeprefix("def ").partition("(")[0]
        for line in lines
        if line.startswith("def ") and "_kernel(" in line
    }
    assert len(defined) > 15
    assert {r["kernel"] for r in reports[90]} == defined
