"""Activations and other layers that look at each row alone, as modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchsparse.nn.functional.activation import leaky_relu, relu, silu
from torchsparse.nn.utils.apply import fapply
from torchsparse.tensor import SparseTensor

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Dropout",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
]

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


def _per_row(dense: type[nn.Module], what: str) -> type[Any]:
    """``dense`` as a module on features: its arguments, parameters and state-dict keys."""

    def forward(self: Any, input: SparseTensor) -> SparseTensor:
        return fapply(input, super(found, self).forward)

    doc = f"{what} Arguments, parameters and state-dict keys of ``torch.nn.{dense.__name__}``."
    body = {"forward": forward, "__doc__": doc, "__module__": __name__}
    found: Any = type(dense.__name__, (dense,), body)
    return found


CELU = _per_row(nn.CELU, "``max(x, 0) + min(0, alpha (exp(x / alpha) - 1))`` on features.")
ELU = _per_row(nn.ELU, "``x`` if positive, ``alpha (exp(x) - 1)`` otherwise, on features.")
GELU = _per_row(nn.GELU, "``x`` times the normal distribution function of x, on features.")
Hardsigmoid = _per_row(nn.Hardsigmoid, "``x / 6 + 1 / 2``, cut to 0..1, on features.")
Hardswish = _per_row(nn.Hardswish, "``x * hardsigmoid(x)`` on features.")
Hardtanh = _per_row(nn.Hardtanh, "``x``, cut to ``min_val..max_val``, on features.")
LogSigmoid = _per_row(nn.LogSigmoid, "``log(sigmoid(x))`` on features.")
Mish = _per_row(nn.Mish, "``x * tanh(softplus(x))`` on features.")
PReLU = _per_row(nn.PReLU, "``x`` if positive, else x times a learned slope, on features.")
ReLU6 = _per_row(nn.ReLU6, "``x``, cut to 0..6, on features.")
SELU = _per_row(nn.SELU, "`ELU` with the two constants of self-normalising networks.")
Sigmoid = _per_row(nn.Sigmoid, "``1 / (1 + exp(-x))`` on features.")
Softplus = _per_row(nn.Softplus, "``log(1 + exp(beta x)) / beta`` on features.")
Softsign = _per_row(nn.Softsign, "``x / (1 + |x|)`` on features.")
Tanh = _per_row(nn.Tanh, "``tanh(x)`` on features.")

Linear = _per_row(nn.Linear, "A matrix for every row: [N, C_in] features -> [N, C_out].")
LayerNorm = _per_row(nn.LayerNorm, "Each row normalised over its channels.")
Dropout = _per_row(nn.Dropout, "In training, features are set to 0 at random.")
