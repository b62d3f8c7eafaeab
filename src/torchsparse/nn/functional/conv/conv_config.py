"""Configurations: what the user wants of a convolution, key by key.

Precedence per key: the layer's own config, then the global one, then the process-wide modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchsparse._recipe import Dataflow
from torchsparse._settings import settings
from torchsparse._validate import one_of
from torchsparse.nn.functional.conv.conv_mode import (
    DOWNSAMPLE_MODES,
    KMAP_MODES,
    ConvMode,
    get_conv_mode,
)

__all__ = [
    "AttributeDict",
    "ConvConfig",
    "Dataflow",
    "clear_global_conv_config",
    "get_default_conv_config",
    "get_global_conv_config",
    "keys_check",
    "resolve_config",
    "set_global_conv_config",
]


class AttributeDict(dict[str, Any]):
    """A dictionary whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no key {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no key {name!r}") from None

    def copy(self) -> AttributeDict:
        """A copy of the same type."""
        return type(self)(self)


ConvConfig = AttributeDict

# (ifsort, split_mask_num) of each conv mode
_ORDERS = {ConvMode.mode0: (False, 1), ConvMode.mode1: (True, 1), ConvMode.mode2: (True, 3)}


def get_default_conv_config(
    conv_mode: int | ConvMode | None = None, training: bool = False
) -> AttributeDict:
    """A fresh configuration, made from the modes in force.

    Args:
        conv_mode: 0, 1, 2, a `ConvMode`, or None for the current one.
        training: Accepted for compatibility; a map serves both.

    Returns:
        dataflow, ifsort, split_mask_num, split_mask_num_bwd, kmap_mode, downsample_mode, epsilon,
        mm_thresh, FOD_fusion, and ``auto``: while it is True, an unsorted row order and one split
        mean "the library chooses"; with False every field is an order.

    Raises:
        ValueError: Unknown conv_mode.
    """
    if conv_mode is None:
        conv_mode = get_conv_mode()
    elif not isinstance(conv_mode, ConvMode):
        conv_mode = ConvMode(one_of(conv_mode, (0, 1, 2), "conv_mode"))
    ifsort, splits = _ORDERS[conv_mode]
    return AttributeDict(
        dataflow=Dataflow.ImplicitGEMM,
        ifsort=ifsort,
        kmap_mode=settings.kmap_mode,
        downsample_mode=settings.downsample_mode,
        split_mask_num=splits,
        split_mask_num_bwd=3,
        epsilon=0.0,
        mm_thresh=0,
        FOD_fusion=True,
        auto=True,
    )


# TorchSparse 2.1's name for its defaults, to copy from. What is written to it changes nothing:
# that is what `set_global_conv_config` is for.
_default_conv_config = get_default_conv_config(ConvMode.mode0)


def get_global_conv_config() -> AttributeDict | None:
    """The global configuration as it was set, or None."""
    return settings.conv_config  # pyright: ignore[reportReturnType]


def set_global_conv_config(conv_config: Mapping[str, Any] | None) -> None:
    """Use a copy of ``conv_config`` for every convolution without one of its own.

    Args:
        conv_config: A mapping, or None to forget the one before. It may be partial: what it lacks
            follows the modes at each call.

    Raises:
        TypeError: Not a mapping.
    """
    settings.conv_config = None if conv_config is None else AttributeDict(_mapping(conv_config))


def clear_global_conv_config() -> None:
    """Forget the global configuration."""
    settings.conv_config = None


def keys_check(conv_config: dict[str, Any]) -> None:
    """Fill missing keys of ``conv_config`` with their defaults, in place.

    Args:
        conv_config: A configuration that may lack keys.
    """
    for key, value in get_default_conv_config().items():
        conv_config.setdefault(key, value)


def resolve_config(config: Mapping[str, Any] | None) -> AttributeDict:
    """The complete configuration of one call; neither argument nor globals are modified.

    Raises:
        ValueError: A value outside its set.
        NotImplementedError: `Dataflow.CodedCSR`, which TorchSparse 2.1 names but lacks, too.
        TypeError: Not a mapping.
    """
    complete = get_default_conv_config()
    if settings.conv_config is not None:
        complete.update(settings.conv_config)
    if config is not None:
        complete.update(_mapping(config))
    _check(complete)
    return complete


def _mapping(config: Any) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        raise TypeError(f"a configuration must be a mapping, got {type(config).__name__}")
    return config


def _check(config: AttributeDict) -> None:
    if not isinstance(config.dataflow, Dataflow):
        raise ValueError(
            f"`dataflow` must be a Dataflow ({', '.join(d.name for d in Dataflow)}), "
            f"got {config.dataflow!r}"
        )
    if config.dataflow is Dataflow.CodedCSR:
        raise NotImplementedError("Dataflow.CodedCSR is not implemented")
    one_of(config.kmap_mode, KMAP_MODES, "kmap_mode")
    one_of(config.downsample_mode, DOWNSAMPLE_MODES, "downsample_mode")
    for name in ("split_mask_num", "split_mask_num_bwd"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}")
