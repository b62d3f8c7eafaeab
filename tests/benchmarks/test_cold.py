"""The first result of a fresh process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, cold, timing
from torchsparse import nn as spnn
from torchsparse._autograd import conv as passes


def test_what_is_timed_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are put off until somebody reads them: before the clock is read."""
    calls: list[str] = []
    product, wait = passes.gather_gemm, timing.synchronize

    def counted(*args: Any) -> Any:
        calls.append("product")
        return product(*args)

    monkeypatch.setattr(passes, "gather_gemm", counted)
    monkeypatch.setattr(timing, "synchronize", lambda device: calls.append("wait") or wait(device))
    options = argparse.Namespace(
        network="resnet21d", scene="tiny", scenes=folder, device="cpu", dtype="fp32", warmup=False
    )
    found = cold.first_result(options)
    assert 0 < found["ready_s"] < found["first_s"]
    network = cases.NETWORKS["resnet21d"].build()
    convs = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    layers = sum(conv.kernel.dim() == 3 for conv in convs)
    assert calls == ["wait", *["product"] * layers, "wait"]
