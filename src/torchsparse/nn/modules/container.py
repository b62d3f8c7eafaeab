"""Chains of modules over sparse tensors and over features."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchsparse.nn.utils.apply import fapply
from torchsparse.tensor import SparseTensor

__all__ = ["OnFeats", "Sequential"]


class OnFeats(nn.Module):
    """A module of [N, C] tensors, applied to the features of a sparse tensor.

    Args:
        module: Keeps the number of rows. Its state-dict keys begin with ``module.``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: SparseTensor) -> SparseTensor:
        """[N, C] features -> [N, any].

        Raises:
            ValueError: The module changed the number of rows.
        """
        return fapply(input, self.module)


class Sequential(nn.Sequential):
    """``torch.nn.Sequential`` that understands sparse modules and plain ones in one chain.

    A layer of ``torch.nn`` is applied to the features of a sparse tensor, an ``nn.Sequential`` if
    it contains such layers alone. Every other module gets what its predecessor gave, so after a
    global pool plain modules see plain tensors. A plain module of your own is told by `OnFeats`::

        Sequential(spnn.Conv3d(4, 16, 3), nn.LayerNorm(16), nn.GELU(), OnFeats(MyMLP()))

    A plain layer takes [N, C] features to [N, any].

    Raises:
        ValueError: A plain layer changed the number of rows.
    """

    def forward(self, input: Any) -> Any:
        for module in self:
            on_feats = isinstance(input, SparseTensor) and _is_plain(module)
            input = fapply(input, module) if on_feats else module(input)
        return input


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer of ``torch.nn`` is at work: it has never heard of sparse tensors."""
    # By where `forward` was written: wrappers such as parametrisations make classes of their own.
    writer = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if not writer.__module__.startswith("torch.nn.modules."):
        return False
    return not isinstance(module, nn.Sequential) or all(map(_is_plain, module))
