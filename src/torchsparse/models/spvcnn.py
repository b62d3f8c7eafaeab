"""The point-voxel network of segmentation: a U-Net on voxels beside a small network on points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from torchsparse.models.minkunet import MinkUNet
from torchsparse.nn.functional.point_voxel import (
    initial_voxelize,
    point_to_voxel,
    voxel_to_point,
)
from torchsparse.operators import cat
from torchsparse.tensor import PointTensor, SparseTensor

__all__ = ["SPVCNN", "SPVNAS_NAMES"]


class SPVCNN(MinkUNet):
    """A class score for every point.

    The voxels go through a `MinkUNet`. At three stations points read from the voxels, add what a
    linear layer makes of their own features, and (but for the last) hand the sum back::

        station 0    after the stem       [P, stem]                      read only
        station 1    after the encoders   [P, encoder[-1]]
        station 2    half-way up          [P, decoder[L // 2 - 1]]       if L > 1
        station 3    at the end           [P, decoder[-1]] -> [P, num_classes]

    so points that share a voxel differ by where in it they lie. Parameters of the U-Net have the
    names of `MinkUNet`. Weights of the SPVNAS repository load with
    ``checkpoints.convert(state, "torchsparse1.4", names=SPVNAS_NAMES)``.

    Args:
        in_channels: Features of a point.
        num_classes: Scores of a point.
        voxel_size: Edge of a voxel, in the unit of the positions.
        stem, encoder, decoder, depth: As for `MinkUNet`.
        dropout: Share of channels dropped where points hand their features back.

    Raises:
        ValueError: As `MinkUNet`; a voxel size that is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        voxel_size: float = 1.0,
        stem: int = 32,
        encoder: Sequence[int] = (32, 64, 128, 256),
        decoder: Sequence[int] = (256, 128, 96, 96),
        depth: int = 2,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(
            in_channels, num_classes, stem=stem, encoder=encoder, decoder=decoder, depth=depth
        )
        if not voxel_size > 0:
            raise ValueError(f"`voxel_size` must be positive, got {voxel_size}")
        self.voxel_size = voxel_size
        half = len(decoder) // 2
        # Decoder stages that are done at each station from 1 on, and channels there.
        self.stations = [0, half, len(decoder)] if half else [0, len(decoder)]
        widths = [stem, encoder[-1], *(decoder[done - 1] for done in self.stations[1:])]
        self.point_transforms = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(True))
            for a, b in pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: PointTensor | SparseTensor) -> Tensor:
        """Score the points.

        Args:
            x: Features [P, in_channels] and positions [P, 4], columns (b, x, y, z), floating (or
                integers, which are cast to float32). It stays as it is.

        Returns:
            [P, num_classes], unnormalised, in the row order of ``x``.
        """
        positions = x.C if x.C.is_floating_point() else x.C.float()
        points = PointTensor(x.F, positions)
        levels = [self.stem(initial_voxelize(points, 1.0, self.voxel_size))]
        points = voxel_to_point(levels[0], points)
        y = point_to_voxel(levels[0], points)
        for encoder in self.encoders:
            y = encoder(y)
            levels.append(y)
        points = self._meet(levels.pop(), points, 0)
        for done, (upsample, fuse) in enumerate(zip(self.upsamples, self.fuses)):
            if done in self.stations:
                y = point_to_voxel(y, points)
                y.feats = self.dropout(y.feats)
            y = fuse(cat([upsample(y), levels.pop()]))
            if done + 1 in self.stations:
                points = self._meet(y, points, self.stations.index(done + 1))
        return self.classifier(points.F)

    def _meet(self, voxels: SparseTensor, points: PointTensor, station: int) -> PointTensor:
        """What points read from voxels, plus what becomes of their own features."""
        found = voxel_to_point(voxels, points)
        found.F = found.F + self.point_transforms[station](points.F)
        return found


SPVNAS_NAMES: dict[str, str] = {
    r"^stem\.0\.": "stem.0.0.",
    r"^stem\.1\.": "stem.0.1.",
    r"^stem\.3\.": "stem.1.0.",
    r"^stem\.4\.": "stem.1.1.",
    **{rf"^stage{j + 1}\.0\.net\.": f"encoders.{j}.0." for j in range(4)},
    **{rf"^stage{j + 1}\.{i + 1}\.": f"encoders.{j}.1.{i}." for j in range(4) for i in range(2)},
    **{rf"^up{j + 1}\.0\.net\.": f"upsamples.{j}." for j in range(4)},
    **{rf"^up{j + 1}\.1\.": f"fuses.{j}." for j in range(4)},
    r"^((encoders\.\d+\.1|fuses\.\d+)\.\d+)\.net\.": r"\1.main.",
    r"^((encoders\.\d+\.1|fuses\.\d+)\.\d+)\.downsample\.": r"\1.shortcut.",
    r"^classifier\.0\.": "classifier.",
}
"""Regular expressions over the names in the SPVCNN of the SPVNAS repository, with ours; the
argument ``names`` of ``torchsparse.checkpoints.convert``."""
