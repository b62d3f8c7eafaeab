"""Which implementation serves a tensor, and what is said where Triton cannot."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from torchsparse._ops import dispatch
from torchsparse._ops.dispatch import forced, has_triton, twin

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


class OnGpu:
    """Stands for a tensor there."""

    is_cuda = True


def ask() -> bool:
    """`has_triton` without what it remembers."""
    return has_triton.__wrapped__()


def test_the_cpu_has_plain_pytorch() -> None:
    for family in ("conv", "coords", "points", "reduce", "norm", "table"):
        assert twin(family, torch.zeros(1)).__name__ == f"torchsparse._reference.{family}"


def test_without_triton_one_warning_says_so(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed: .* plain PyTorch"):
        assert not ask()


@needs_triton
def test_without_a_compiler_one_warning_says_so(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="needs a C compiler"):
        assert not ask()
    monkeypatch.setenv("CC", "some-compiler")
    assert ask()


@pytest.mark.parametrize("usable", [True, False])
def test_gpus_have_kernels_where_they_can_be_used(monkeypatch, usable) -> None:
    if usable and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(dispatch, "has_triton", lambda: usable)
    package = "_triton" if usable else "_reference"
    there: object = OnGpu()
    assert twin("conv", there).__name__ == f"torchsparse.{package}.conv"  # pyright: ignore[reportArgumentType]
    assert twin("pool", there).__name__ == f"torchsparse.{package}.pool"  # pyright: ignore[reportArgumentType]
    # No kernels: plain PyTorch.
    assert twin("sets", there).__name__ == "torchsparse._reference.sets"  # pyright: ignore[reportArgumentType]


def test_tests_may_force_one() -> None:
    with forced("_reference"):
        there: object = OnGpu()
        assert twin("conv", there).__name__ == "torchsparse._reference.conv"  # pyright: ignore[reportArgumentType]
    assert not dispatch._forced
