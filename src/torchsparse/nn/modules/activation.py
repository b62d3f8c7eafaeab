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
    """``max(x, 0)``: [N, C] features -> [N, C], in their dtype.

    Args:
        inplace: Write into the features of the input.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        return relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """``x`` if positive, ``negative_slope * x`` otherwise.

    [N, C] features -> [N, C], in their dtype.

    Args:
        negative_slope: By default 0.01.
        inplace: Write into the features of the input.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class SiLU(nn.SiLU):
    """``x * sigmoid(x)``: [N, C] features -> [N, C], in their dtype.

    Args:
        inplace: Write into the features of the input.
    """

    def forward(self, input: SparseTensor) -> SparseTensor:
        return silu(input, self.inplace)


def _per_row(dense: type[nn.Module], what: str) -> type[Any]:
    """``dense`` as a module on features: its arguments, parameters and state-dict keys."""

    def forward(self: Any, input: SparseTensor) -> SparseTensor:
        return fapply(input, super(found, self).forward)

    doc = (
        f"{what}\n\n"
        f"Arguments, dtypes, parameters and state-dict keys of ``torch.nn.{dense.__name__}``."
    )
    body = {"forward": forward, "__doc__": doc, "__module__": __name__}
    found: Any = type(dense.__name__, (dense,), body)
    return found


_SAME = "[N, C] features -> [N, C]."

CELU = _per_row(nn.CELU, f"``max(x, 0) + min(0, alpha (exp(x / alpha) - 1))``: {_SAME}")
ELU = _per_row(nn.ELU, f"``x`` if positive, ``alpha (exp(x) - 1)`` otherwise: {_SAME}")
GELU = _per_row(nn.GELU, f"``x`` times the normal distribution function of x: {_SAME}")
Hardsigmoid = _per_row(nn.Hardsigmoid, f"``x / 6 + 1 / 2``, cut to 0..1: {_SAME}")
Hardswish = _per_row(nn.Hardswish, f"``x * hardsigmoid(x)``: {_SAME}")
Hardtanh = _per_row(nn.Hardtanh, f"``x``, cut to ``min_val..max_val``: {_SAME}")
LogSigmoid = _per_row(nn.LogSigmoid, f"``log(sigmoid(x))``: {_SAME}")
Mish = _per_row(nn.Mish, f"``x * tanh(softplus(x))``: {_SAME}")
PReLU = _per_row(nn.PReLU, f"``x`` if positive, else x times a learned slope, [1] or [C]: {_SAME}")
ReLU6 = _per_row(nn.ReLU6, f"``x``, cut to 0..6: {_SAME}")
SELU = _per_row(nn.SELU, f"`ELU` with the two constants of self-normalising networks: {_SAME}")
Sigmoid = _per_row(nn.Sigmoid, f"``1 / (1 + exp(-x))``: {_SAME}")
Softplus = _per_row(nn.Softplus, f"``log(1 + exp(beta x)) / beta``: {_SAME}")
Softsign = _per_row(nn.Softsign, f"``x / (1 + |x|)``: {_SAME}")
Tanh = _per_row(nn.Tanh, f"``tanh(x)``: {_SAME}")

Linear = _per_row(nn.Linear, "A matrix for every row: [N, C_in] features -> [N, C_out].")
LayerNorm = _per_row(
    nn.LayerNorm, f"Each row normalised over its channels: {_SAME} Weight and bias are [C]."
)
Dropout = _per_row(nn.Dropout, f"In training, features are set to 0 at random: {_SAME}")
