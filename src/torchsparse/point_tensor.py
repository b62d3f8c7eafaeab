"""Where ``PointTensor`` was before 2.0; now it is ``torchsparse.PointTensor``."""

from __future__ import annotations

from typing import Any

from torchsparse import _compat, tensor

__all__ = ["PointTensor"]

PointTensor: type[tensor.PointTensor]  # handed out by __getattr__, with a note


def __getattr__(name: str) -> Any:
    return _compat.moved(__name__, tensor, name, __all__)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
