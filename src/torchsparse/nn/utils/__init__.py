"""Helpers for modules over sparse tensors."""

from torchsparse.nn.utils.apply import fapply
from torchsparse.nn.utils.kernel import get_kernel_offsets

__all__ = ["fapply", "get_kernel_offsets"]
