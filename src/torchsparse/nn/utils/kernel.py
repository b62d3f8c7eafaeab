"""The coordinate offsets of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._geometry import as_tuple, tap_list

__all__ = ["get_kernel_offsets"]


def get_kernel_offsets(
    size: Any, stride: Any = 1, dilation: Any = 1, device: Any = "cpu"
) -> Tensor:
    """Offsets of the taps of a kernel, in the order of the weight.

    Args:
        size, stride, dilation: One int or three.
        device: Of the result.

    Returns:
        [K, 3] int32, row t = (t_i - (k_i - 1) // 2) * stride_i * dilation_i: -1..1 for size 3,
        0..1 for size 2. For an odd volume x runs fastest, for an even one z. A new tensor each
        call.

    Raises:
        ValueError: Not one or three ints, or an int below 1.
    """
    k, s = as_tuple(size, 3, "size"), as_tuple(stride, 3, "stride")
    d = as_tuple(dilation, 3, "dilation")
    for name, values in (("size", k), ("stride", s), ("dilation", d)):
        if min(values) < 1:
            raise ValueError(f"`{name}` must be at least 1 on every axis, got {values}")
    centres = [(n - 1) // 2 for n in k]
    offsets = [
        [(t - centre) * a * b for t, centre, a, b in zip(tap, centres, s, d)]
        for tap in tap_list(k)
    ]
    return torch.tensor(offsets, dtype=torch.int32, device=device)
