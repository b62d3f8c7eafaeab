"""The U-Nets that MinkowskiEngine's examples number from 14 to 101."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from torchsparse import nn as spnn
from torchsparse._validate import one_of
from torchsparse.models.blocks import EXPANSION, KEEP_ALL, conv_block, residual_stage
from torchsparse.operators import cat
from torchsparse.tensor import SparseTensor

__all__ = ["MINKOWSKI_NAMES", "MINKUNETS", "MinkResUNet", "UNetDesign"]


@dataclass(frozen=True)
class UNetDesign:
    """Blocks and widths of a U-Net with four levels: four encoder stages, four decoder stages."""

    block: str  # "basic" or "bottleneck"
    layers: tuple[int, ...]  # [8] residual blocks per stage
    planes: tuple[int, ...]  # [8] width of each stage
    stem: int = 32  # channels at full resolution


_LAYERS = {
    "14": ("basic", (1, 1, 1, 1, 1, 1, 1, 1)),
    "18": ("basic", (2, 2, 2, 2, 2, 2, 2, 2)),
    "34": ("basic", (2, 3, 4, 6, 2, 2, 2, 2)),
    "50": ("bottleneck", (2, 3, 4, 6, 2, 2, 2, 2)),
    "101": ("bottleneck", (2, 3, 4, 23, 2, 2, 2, 2)),
}
_DECODERS = {
    "14A": (128, 128, 96, 96),
    "14B": (128, 128, 128, 128),
    "14C": (192, 192, 128, 128),
    "14D": (384, 384, 384, 384),
    "18A": (128, 128, 96, 96),
    "18B": (128, 128, 128, 128),
    "18D": (384, 384, 384, 384),
    "34A": (256, 128, 64, 64),
    "34B": (256, 128, 64, 32),
    "34C": (256, 128, 96, 96),
    # MinkowskiEngine leaves the widths of these two open; here they are those of 34C.
    "50": (256, 128, 96, 96),
    "101": (256, 128, 96, 96),
}
MINKUNETS: dict[str, UNetDesign] = {
    name: UNetDesign(*_LAYERS[name.rstrip("ABCD")], (32, 64, 128, 256, *decoder))
    for name, decoder in _DECODERS.items()
}
"""Name, as in ``MinkUNet34C``, to design."""


class MinkResUNet(nn.Module):
    """A class score for every voxel, by one of the designs of `MINKUNETS`.

    With e = 1 for basic blocks and 4 for bottlenecks, and N_j voxels at stride 2^j::

        stem          [N_0, in_channels]     -> [N_0, stem]           one 5x5x5 convolution
        encoder j     [N_j, ...]             -> [N_j+1, e planes[j]]              j = 0..3
        decoder j     [N_4-j, ...], skip     -> [N_3-j, e planes[4 + j]]          j = 0..3
        classifier    [N_0, e planes[7]]     -> [N_0, num_classes]

    `MinkUNet` is the design of the TorchSparse benchmarks instead. Every voxel has a coarse site
    at every level, so samples of a batch do not see each other. Weights of MinkowskiEngine load
    with ``checkpoints.convert(state, "minkowski", names=MINKOWSKI_NAMES)``.

    Args:
        in_channels: Features of a voxel.
        num_classes: Scores of a voxel.
        design: Blocks and widths.
    """

    def __init__(self, in_channels: int, num_classes: int, design: UNetDesign) -> None:
        super().__init__()
        self.design = design
        block, layers, planes = design.block, design.layers, design.planes
        e = EXPANSION[block]
        self.stem = conv_block(in_channels, design.stem, 5)
        self.encoders, self.upsamples, self.fuses = (nn.ModuleList() for _ in range(3))
        c, skips = design.stem, []
        for width, count in zip(planes[:4], layers[:4]):
            skips.append(c)
            down = conv_block(c, c, 2, 2, config=KEEP_ALL)
            self.encoders.append(nn.Sequential(down, residual_stage(block, c, width, count)))
            c = width * e
        for width, count, skip in zip(planes[4:], layers[4:], reversed(skips)):
            self.upsamples.append(conv_block(c, width, 2, 2, transposed=True, config=KEEP_ALL))
            self.fuses.append(residual_stage(block, width + skip, width, count))
            c = width * e
        self.classifier = spnn.Conv3d(c, num_classes, 1, bias=True)

    @classmethod
    def named(cls, name: str, in_channels: int, num_classes: int) -> MinkResUNet:
        """The network of a name in `MINKUNETS`, such as "34C".

        Raises:
            ValueError: Another name; the message lists all.
        """
        design = MINKUNETS[one_of(name, tuple(MINKUNETS), "name")]
        return cls(in_channels, num_classes, design)

    def forward(self, x: SparseTensor) -> Tensor:
        """Score the voxels.

        Args:
            x: Features [N, in_channels] at coordinates [N, 4].

        Returns:
            [N, num_classes], unnormalised, in the row order of ``x``.
        """
        levels = [self.stem(x)]
        for encoder in self.encoders:
            levels.append(encoder(levels[-1]))
        y = levels.pop()
        for upsample, fuse in zip(self.upsamples, self.fuses):
            y = fuse(cat([upsample(y), levels.pop()]))
        return self.classifier(y).feats


def _block_names(old: str, new: str) -> dict[str, str]:
    """Of the blocks of one stage: MinkowskiEngine's convolutions and norms are numbered from 1,
    ours stand in one chain, three places each (with the activation)."""
    block = rf"^{old}\.(\d+)\."
    names = {}
    for n in (1, 2, 3):
        names[rf"{block}conv{n}\."] = rf"{new}.\1.main.{3 * (n - 1)}."
        names[rf"{block}norm{n}\.bn\."] = rf"{new}.\1.main.{3 * (n - 1) + 1}."
    names[rf"{block}downsample\.0\."] = rf"{new}.\1.shortcut.0."
    names[rf"{block}downsample\.1\.bn\."] = rf"{new}.\1.shortcut.1."
    return names


MINKOWSKI_NAMES: dict[str, str] = {
    r"^conv0p1s1\.": "stem.0.",
    r"^bn0\.bn\.": "stem.1.",
    r"^final\.": "classifier.",
    **{rf"^conv{j + 1}p\d+s2\.": f"encoders.{j}.0.0." for j in range(4)},
    **{rf"^bn{j + 1}\.bn\.": f"encoders.{j}.0.1." for j in range(4)},
    **{rf"^convtr{j + 4}p\d+s2\.": f"upsamples.{j}.0." for j in range(4)},
    **{rf"^bntr{j + 4}\.bn\.": f"upsamples.{j}.1." for j in range(4)},
    **dict(
        chain.from_iterable(
            _block_names(f"block{j + 1}", f"encoders.{j}.1").items() for j in range(4)
        )
    ),
    **dict(
        chain.from_iterable(_block_names(f"block{j + 5}", f"fuses.{j}").items() for j in range(4))
    ),
}
"""Regular expressions over the names in MinkowskiEngine's MinkUNets, with ours; the argument
``names`` of ``torchsparse.checkpoints.convert``."""
