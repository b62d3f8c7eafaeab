"""The clock of the host."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks import host


def test_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main(["--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert len({line[:32] for line in lines}) == len(lines)
    assert all(line.endswith(" us") and float(line.split()[-2]) > 0 for line in lines)


def test_no_kernel_stays_replaced() -> None:
    from torchsparse._triton import launch

    before = launch._resolved, launch.watched, launch.INTERPRETED
    with host.without_kernels():
        assert launch._resolved is not before[0]
    assert before == (launch._resolved, launch.watched, launch.INTERPRETED)
