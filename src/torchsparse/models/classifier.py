"""Residual networks that name the shape in a cloud."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchsparse import nn as spnn
from torchsparse._validate import one_of
from torchsparse.models.blocks import EXPANSION, KEEP_ALL, conv_block, residual_stage
from torchsparse.tensor import SparseTensor

__all__ = ["RESNETS", "ResNetClassifier"]

RESNETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "14": ("basic", (1, 1, 1, 1)),
    "18": ("basic", (2, 2, 2, 2)),
    "34": ("basic", (3, 4, 6, 3)),
    "50": ("bottleneck", (3, 4, 6, 3)),
    "101": ("bottleneck", (3, 4, 23, 3)),
}
"""Name to kind of residual block, and blocks per stage."""

_POOLS = {"avg": spnn.GlobalAvgPool, "max": spnn.GlobalMaxPool}


class ResNetClassifier(nn.Module):
    """A class score for every sample.

    With e = 1 for basic blocks and 4 for bottlenecks, and N_j voxels at stride 2^j::

        stem       [N_0, in_channels]              -> [N_0, stem]
        stage j    [N_j, ...]                      -> [N_j+1, e planes[j]]
        pool       [N_L, e planes[-1]]             -> [B, e planes[-1]]
        head                                       -> [B, num_classes]

    Every voxel has a coarse site at every level, so samples of a batch do not see each other.

    Args:
        in_channels: Features of a voxel.
        num_classes: Scores of a sample.
        block: "basic" or "bottleneck".
        layers: Residual blocks per stage.
        stem: Channels at full resolution.
        planes: Width of each stage.
        pool: "avg" or "max" over the voxels of a sample.
        dropout: Before the head.

    Raises:
        ValueError: ``layers`` and ``planes`` differ in length or are empty; an unknown block or
            pool.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        block: str = "basic",
        layers: Sequence[int] = (2, 2, 2, 2),
        stem: int = 64,
        planes: Sequence[int] = (64, 128, 256, 512),
        pool: str = "avg",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of(block, tuple(EXPANSION), "block")
        one_of(pool, tuple(_POOLS), "pool")
        if not layers or len(layers) != len(planes):
            raise ValueError(
                f"`layers` and `planes` must have the same number of stages, at least one, "
                f"got {list(layers)} and {list(planes)}"
            )
        self.stem = conv_block(in_channels, stem, 3)
        self.stages = nn.ModuleList()
        c = stem
        for width, count in zip(planes, layers):
            down = conv_block(c, c, 2, 2, config=KEEP_ALL)
            self.stages.append(nn.Sequential(down, residual_stage(block, c, width, count)))
            c = width * EXPANSION[block]
        self.pool = _POOLS[pool]()
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(c, num_classes))

    @classmethod
    def named(
        cls, name: str, in_channels: int, num_classes: int, **kwargs: Any
    ) -> ResNetClassifier:
        """The network of a name in `RESNETS`, such as "18".

        Raises:
            ValueError: Another name; the message lists all.
        """
        block, layers = RESNETS[one_of(name, tuple(RESNETS), "name")]
        return cls(in_channels, num_classes, block=block, layers=layers, **kwargs)

    def forward(self, x: SparseTensor, batch_size: int | None = None) -> Tensor:
        """Score the samples.

        Args:
            x: Features [N, in_channels] at coordinates [N, 4].
            batch_size: B; None: the largest batch index + 1, which waits for the device.

        Returns:
            [B, num_classes], unnormalised. A sample without voxels has the head's bias.
        """
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.pool(x, batch_size))
