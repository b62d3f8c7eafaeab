"""What the three classes of TorchSparse 2.1 share: features, weight and a map in, features out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._autograd.conv import sparse_conv
from torchsparse._kernel_map import KernelMap
from torchsparse._recipe import Dataflow
from torchsparse.nn.functional.conv.choices import resolve

__all__ = ["apply"]


def apply(
    dataflow: Dataflow,
    feats: Tensor,
    weight: Tensor,
    kmap: KernelMap,
    config: Any = None,
    transposed: bool = False,
) -> Tensor:
    """Convolve features along a map from `build_kernel_map`.

    Args:
        dataflow: How.
        feats: [N, C_in], on the map's inputs (its outputs if ``transposed``).
        weight: [K, C_in, C_out].
        kmap: A kernel map.
        config: Mapping that overrides the global configuration key by key, or None.
        transposed: Read the map backwards.

    Returns:
        [M, C_out], differentiable in feats and weight.

    Raises:
        TypeError: Something else than a kernel map of this library.
    """
    if not isinstance(kmap, KernelMap):
        raise TypeError(f"`kmap` must come from build_kernel_map, got {type(kmap).__name__}")
    recipe = resolve({**(config or {}), "dataflow": dataflow}, feats, weight, None)
    return sparse_conv(feats, weight, None, kmap, transposed, recipe)
