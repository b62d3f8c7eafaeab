"""The class of versions before 2.0 that listed kernel offsets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchsparse._compat import note
from torchsparse.nn.utils.kernel import get_kernel_offsets

__all__ = ["KernelRegion"]


class KernelRegion:
    """The taps of a kernel, [K, 3]; now ``torchsparse.nn.utils.get_kernel_offsets``.

    Args:
        kernel_size, tensor_stride, dilation: One int or three.
    """

    def __init__(self, kernel_size: Any, tensor_stride: Any = 1, dilation: Any = 1) -> None:
        note("torchsparse.utils.kernel_region.KernelRegion(...).get_kernel_offset()")
        self.kernel_size = kernel_size
        self.tensor_stride = tensor_stride
        self.dilation = dilation

    def get_kernel_offset(self) -> Tensor:
        """[K, 3] int32; see ``torchsparse.nn.utils.get_kernel_offsets``."""
        return get_kernel_offsets(self.kernel_size, self.tensor_stride, self.dilation)
