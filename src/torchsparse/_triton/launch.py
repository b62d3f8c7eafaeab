"""Launching: the device of the tensors, the current stream, nothing for an empty grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["cdiv", "launch", "next_power"]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of ``like``, in its current stream.

    Pending errors of earlier launches surface here, with the name of this kernel in the traceback.
    """
    if 0 in grid:
        return
    device = like.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
