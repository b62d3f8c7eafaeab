"""The judges of depthwise layers and of batch norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import batch_norm, depthwise
from benchmarks.cases import tensor
from torchsparse._autograd import depthwise as passes

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_wrong_depthwise_layer_is_refused(
    dtype: str, small, monkeypatch: pytest.MonkeyPatch
) -> None:
    depthwise.check(small, 8, dtype, CPU)
    for name, factor in (("depthwise", 1.01), ("weight_grad", 0.0), ("weight_grad", 1.01)):
        right = getattr(passes, name)
        with monkeypatch.context() as patch:
            patch.setattr(passes, name, lambda *a, r=right, f=factor, **kw: r(*a, **kw) * f)
            with pytest.raises(SystemExit, match=" is off by "):
                depthwise.check(small, 8, dtype, CPU)


def test_what_is_timed_of_a_depthwise_layer_is_checked(
    small, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    right = passes.depthwise
    monkeypatch.setattr(passes, "depthwise", lambda *a, **kw: calls.append(a) or right(*a, **kw))
    x = tensor(small, 8, CPU, torch.float32)
    for step, products in zip(
        depthwise.steps(depthwise.layer_of(x), x, torch.ones_like(x.feats)), (1, 2), strict=True
    ):
        calls.clear()
        step()
        assert len(calls) == products
    monkeypatch.setattr(depthwise, "steps", lambda *_: (lambda: x.feats, lambda: (x.feats,)))
    with pytest.raises(SystemExit, match="output is off by"):
        depthwise.check(small, 8, "fp32", CPU)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_wrong_batch_norm_is_refused(
    dtype: str, added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = batch_norm.Case(400, 32, dtype, added, CPU)
    batch_norm.check(case, dtype)
    for change in (
        lambda found: tuple(t * 1.01 for t in found),
        lambda found: (*found[:2], 0 * found[2], *found[3:]),
        lambda found: found[:1],
        lambda found: (*found, found[0]),
    ):
        case = batch_norm.Case(400, 32, dtype, added, CPU)
        right = case.ours
        monkeypatch.setattr(case, "ours", lambda r=right, c=change: c(r()))
        with pytest.raises((SystemExit, ValueError)):
            batch_norm.check(case, dtype)
