"""The rule that picks an implementation: one pure function of the tensors at hand."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from torch import Tensor

__all__ = ["twin"]


@cache
def _reference(family: str) -> ModuleType:
    return importlib.import_module(f"torchsparse._reference.{family}")


def twin(family: str, tensor: Tensor) -> ModuleType:
    """The module that implements ``family`` ("conv", "coords", ...) for this tensor.

    Plain PyTorch serves every device and dtype; it is the only implementation so far.
    """
    return _reference(family)
