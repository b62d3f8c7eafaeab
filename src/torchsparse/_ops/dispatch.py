"""The rule that picks an implementation: one pure function of the tensors at hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from torch import Tensor, float64

__all__ = ["forced", "has_triton", "is_served", "reference", "twin"]

# Families with Triton kernels.
KERNELS = frozenset(
    {
        "batch_norm", "conv", "coords", "depthwise", "inputs", "maps", "norm", "points", "pool",
        "reduce", "table", "voxels",
    }
)  # fmt: skip
_forced: list[str] = []


@cache
def _module(package: str, family: str) -> ModuleType:
    return importlib.import_module(f"torchsparse.{package}.{family}")


@cache
def has_triton() -> bool:
    """Whether Triton can be used here; if not, one warning says what is missing."""
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif not (os.environ.get("CC") or any(map(shutil.which, ("clang", "gcc", "cc", "cl")))):
        missing = "Triton needs a C compiler (gcc, clang, or one named by CC) to launch kernels"
    else:
        return True
    warnings.warn(
        f"{missing}: convolutions on the GPU use plain PyTorch, which is slower", stacklevel=2
    )
    return False


@contextmanager
def forced(package: str) -> Iterator[None]:
    """Use ``_reference`` or ``_triton`` for every tensor, for tests."""
    _forced.append(package)
    try:
        yield
    finally:
        _forced.pop()


def is_served(family: str, tensor: Tensor) -> bool:
    """Whether kernels implement ``family`` for this tensor, or a test chose who does.

    For what PyTorch has too, and does faster than the reference.
    """
    if _forced:
        return True
    return tensor.is_cuda and tensor.dtype != float64 and family in KERNELS and has_triton()


def reference(family: str) -> ModuleType:
    """The implementation in plain PyTorch."""
    return _module("_reference", family)


def twin(family: str, tensor: Tensor) -> ModuleType:
    """The module that implements ``family`` ("conv", "coords", ...) for this tensor.

    Triton kernels serve CUDA (and ROCm) devices; plain PyTorch serves everything else.
    """
    package = _forced[-1] if _forced else "_triton" if tensor.is_cuda else "_reference"
    if package == "_triton" and family in KERNELS and has_triton():
        return _module("_triton", family)
    return _module("_reference", family)
