"""``build_kernel_map`` and ``transpose_kernel_map``, where TorchSparse 2.1 keeps them."""

from torchsparse.nn.functional.conv.maps import build_kernel_map, transpose_kernel_map

__all__ = ["build_kernel_map", "transpose_kernel_map"]
