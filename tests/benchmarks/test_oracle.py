"""What the dense convolution in float64 refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import floors, oracle, scenes
from benchmarks.cases import CASES, tensor
from torchsparse._autograd import conv as passes

LAYERS = ("subm-3-16-16", "strided-3-32-64", "down-up-2-64-64")
OFF = {"fp32": 1.01, "tf32": 1.01, "fp16": 1.02, "bf16": 1.02}


@pytest.fixture
def few(folder) -> scenes.Scene:
    return scenes.crop(scenes.load("tiny", folder), 12)


def judge(name: str, dtype: str, scene: Any) -> int:
    case, floating = CASES[name], floors.DTYPES[dtype]
    x = tensor(scene, case.in_channels, "cpu", floating)
    torch.manual_seed(0)
    return oracle.check(case.build().to(floating), x, dtype)


def times(factor: float, right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: right(*args, **kwargs) * factor


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("name", LAYERS)
def test_a_small_factor_is_refused(
    name: str, dtype: str, few, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge(name, dtype, few) > 0
    monkeypatch.setattr(passes, "conv_forward", times(OFF[dtype], passes.conv_forward))
    with pytest.raises(oracle.WrongResult, match=" output is off by "):
        judge(name, dtype, few)


@pytest.mark.parametrize(("dtype", "factor"), [("fp32", 1.01), ("fp16", 1.05), ("bf16", 0.95)])
@pytest.mark.parametrize("which", ["feats", "weight"])
def test_gradients_are_judged(
    which: str, dtype: str, factor: float, few, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"conv_{which}_grad"
    what = {"feats": "input", "weight": "kernel"}[which]
    monkeypatch.setattr(passes, name, times(factor, getattr(passes, name)))
    with pytest.raises(oracle.WrongResult, match=f" {what} gradient is off by "):
        judge("subm-3-16-16", dtype, few)


@pytest.mark.parametrize(
    "change", [lambda found: found[:1], lambda found: (None, found[1]), lambda _: ()]
)
def test_no_gradient_may_be_missing(
    change: Callable[[Any], Any], few, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.autograd.grad

    def kept(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return found if found[0].dtype == torch.float64 else change(found)

    monkeypatch.setattr(torch.autograd, "grad", kept)
    with pytest.raises(oracle.WrongResult, match="a gradient is missing"):
        judge("subm-3-16-16", "fp32", few)
