"""Activations of sparse tensors."""

from __future__ import annotations

import torch

from torchsparse.nn.utils.apply import fapply
from torchsparse.tensor import SparseTensor, pending, wrap

__all__ = ["leaky_relu", "relu", "silu"]


def _join(input: SparseTensor, slope: float, inplace: bool) -> SparseTensor | None:
    """The activation as the end of a convolution that is still to be computed, if it can be."""
    chain = pending(input)
    if chain is None:
        return None
    joined = chain.rectified(slope, inplace)
    return None if joined is None else wrap(joined, input)


def relu(input: SparseTensor, inplace: bool = True) -> SparseTensor:
    """``max(x, 0)``.

    Args:
        input: Features [N, C].
        inplace: The features of ``input`` change too.

    Returns:
        [N, C] features in their dtype, on the same sites. Differentiable.
    """
    joined = _join(input, 0.0, inplace)
    if joined is not None:
        return joined
    return fapply(input, torch.relu_ if inplace else torch.relu)


def silu(input: SparseTensor, inplace: bool = True) -> SparseTensor:
    """``x * sigmoid(x)``.

    Args:
        input: Features [N, C].
        inplace: The features of ``input`` change too.

    Returns:
        [N, C] features in their dtype, on the same sites. Differentiable.
    """
    return fapply(input, torch.nn.functional.silu, inplace=inplace)


def leaky_relu(
    input: SparseTensor, negative_slope: float = 0.1, inplace: bool = True
) -> SparseTensor:
    """``x`` if positive, ``negative_slope * x`` otherwise.

    Args:
        input: Features [N, C].
        negative_slope: A number; that of the module is 0.01 by default.
        inplace: The features of ``input`` change too.

    Returns:
        [N, C] features in their dtype, on the same sites. Differentiable.
    """
    joined = _join(input, float(negative_slope), inplace)
    if joined is not None:
        return joined
    return fapply(
        input, torch.nn.functional.leaky_relu, negative_slope=negative_slope, inplace=inplace
    )
