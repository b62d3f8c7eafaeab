"""Autograd functions that are called with less in between behave as they do otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from torchsparse._autograd import applied as module
from torchsparse._autograd.applied import applied


class Scaled(Function):
    """x * by, with twice the gradient, so that it is seen whose it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x * by

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return 2 * ctx.by * grads[0], None


def test_values_and_gradients_are_those_of_the_function() -> None:
    x = torch.arange(4.0, requires_grad=True)
    out = applied(Scaled)(x, 3.0)
    assert type(out.grad_fn).__name__ == "ScaledBackward"
    out.sum().backward()
    assert out.tolist() == [0, 3, 6, 9]
    assert x.grad is not None and x.grad.tolist() == [6] * 4


def test_transforms_of_functorch_are_left_to_pytorch() -> None:
    def refused(apply: Any) -> str:
        with pytest.raises(RuntimeError) as found:
            torch.func.grad(lambda x: apply(x, 3.0).sum())(torch.ones(2))
        return str(found.value)

    assert refused(applied(Scaled)) == refused(Scaled.apply)


def test_a_tensor_that_outlived_a_transform_is_its_value() -> None:
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        kept.append(x * 2)
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    assert applied(Scaled)(kept[0], 3.0).tolist() == Scaled.apply(kept[0], 3.0).tolist() == [6, 6]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def test_another_pytorch_applies_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_alive", None)
    assert applied(Scaled) == Scaled.apply
