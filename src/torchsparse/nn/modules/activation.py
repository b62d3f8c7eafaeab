"""Activations as modules."""

from __future__ import annotations

from torch import nn

from torchsparse.nn.functional.activation import leaky_relu, relu, silu
from torchsparse.tensor import SparseTensor

__all__ = ["LeakyReLU", "ReLU", "SiLU"]

# The base classes take dense tensors.
# pyright: reportIncompatibleMethodOverride=false


class ReLU(nn.ReLU):
    """``max(x, 0)`` on features. Args: inplace (default False)."""

    def forward(self, input: SparseTensor) -> SparseTensor:
        return relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """``x`` if positive, ``negative_slope * x`` otherwise.

    Args: negative_slope (default 0.01), inplace (default False).
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class SiLU(nn.SiLU):
    """``x * sigmoid(x)`` on features. Args: inplace (default False)."""

    def forward(self, input: SparseTensor) -> SparseTensor:
        return silu(input, self.inplace)
