"""The clock of the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import host
from torchsparse import nn as spnn
from torchsparse._autograd import conv as passes
from torchsparse.backbones import SparseResUNet42


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


def test_what_is_timed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are put off until somebody reads them: a call must."""
    calls: list[str] = []

    def counted(name: str, right: Any) -> Any:
        return lambda *args: calls.append(name) or right(*args)

    for name in ("gather_gemm", "weight_grad"):
        monkeypatch.setattr(passes, name, counted(name, getattr(passes, name)))
    convs = [m for m in SparseResUNet42().modules() if isinstance(m, spnn.Conv3d)]
    many = sum(conv.kernel.dim() == 3 for conv in convs)
    device, names = torch.device("cpu"), []
    with host.without_kernels():
        for rows, layers in ((host.layers(device), 1), (host.networks(device), many)):
            for name, call in rows.items():
                forward = 0 if name.startswith(("norm", "relu")) else layers
                back = "backward" in name
                # Nobody wants the gradient of a network's input.
                inputs = (layers - (layers > 1)) * back
                for _ in range(2):
                    calls.clear()
                    with torch.set_grad_enabled("training" in name or back):
                        call()
                assert calls.count("gather_gemm") == forward + inputs, name
                assert calls.count("weight_grad") == layers * back, name
                names.append(name)
    assert len(names) == 11
