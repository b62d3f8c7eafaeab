"""The process-wide modes of convolution. Only the downsample mode changes results."""

from __future__ import annotations

import enum

from torchsparse._settings import settings
from torchsparse._validate import one_of

__all__ = [
    "ConvMode",
    "get_conv_mode",
    "get_downsample_mode",
    "get_kmap_mode",
    "set_conv_mode",
    "set_downsample_mode",
    "set_kmap_mode",
]

KMAP_MODES = ("hashmap_on_the_fly", "hashmap")
DOWNSAMPLE_MODES = ("spconv", "minkowski")


class ConvMode(enum.Enum):
    """Row order of implicit GEMM: the library's choice, mask-sorted, mask-sorted in three."""

    mode0 = 0
    mode1 = 1
    mode2 = 2


def get_conv_mode() -> ConvMode:
    """The mode in force; `ConvMode.mode0` by default."""
    return ConvMode(settings.conv_mode)


def set_conv_mode(conv_mode: int | ConvMode) -> None:
    """Choose how rows are ordered. A choice of speed; mode 0 leaves it to the library.

    Args:
        conv_mode: 0, 1, 2 or a `ConvMode`.

    Raises:
        ValueError: Not 0, 1, 2 or a `ConvMode`.
    """
    if not isinstance(conv_mode, ConvMode):
        one_of(conv_mode, (0, 1, 2), "conv_mode")
    settings.conv_mode = ConvMode(conv_mode).value


def get_kmap_mode() -> str:
    """How maps are built: "hashmap_on_the_fly" (default) or "hashmap"."""
    return settings.kmap_mode


def set_kmap_mode(kmap_mode: str) -> None:
    """Choose how maps are built; results do not depend on it.

    Args:
        kmap_mode: "hashmap_on_the_fly" or "hashmap".

    Raises:
        ValueError: Not "hashmap_on_the_fly" or "hashmap".
    """
    settings.kmap_mode = one_of(kmap_mode, KMAP_MODES, "kmap_mode")


def get_downsample_mode() -> str:
    """The rule for the sites of strided layers: "spconv" (default) or "minkowski"."""
    return settings.downsample_mode


def set_downsample_mode(downsample_mode: str) -> None:
    """Choose the rule for the sites of strided layers.

    "spconv": every site that some tap ties to an input. "minkowski": ``unique(in // stride)``
    with centred taps, the padding ignored.

    Args:
        downsample_mode: "spconv" or "minkowski".

    Raises:
        ValueError: Not "spconv" or "minkowski".
    """
    settings.downsample_mode = one_of(downsample_mode, DOWNSAMPLE_MODES, "downsample_mode")
