"""What the three classes of TorchSparse 2.1 share: features, weight and a map in, features out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._autograd.conv import sparse_conv
from torchsparse._kernel_map import KernelMap
from torchsparse.nn.functional.conv.conv import compute_dtype

__all__ = ["apply"]


def apply(
    feats: Tensor, weight: Tensor, kmap: KernelMap, config: Any = None, transposed: bool = False
) -> Tensor:
    """Convolve features along a map from `build_kernel_map`.

    Args:
        feats: [N, C_in], on the map's inputs (its outputs if ``transposed``).
        weight: [K, C_in, C_out].
        kmap: A kernel map.
        config: Accepted for compatibility.
        transposed: Read the map backwards.

    Returns:
        [M, C_out], differentiable in feats and weight.

    Raises:
        TypeError: Something else than a kernel map of this library.
    """
    if not isinstance(kmap, KernelMap):
        raise TypeError(f"`kmap` must come from build_kernel_map, got {type(kmap).__name__}")
    return sparse_conv(feats, weight, None, kmap, transposed, compute_dtype(feats, weight, None))
