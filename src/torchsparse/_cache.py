"""What tensors of one network share: coordinates per level and kernel maps.

A map serves only the coordinates it was built from. `Stamp` is the rule that decides it.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._settings import settings

__all__ = [
    "Stamp",
    "Step",
    "TensorCache",
    "TensorCacheMode",
    "Traced",
    "Trail",
    "clear_global_tensor_cache",
    "get_global_tensor_cache",
    "get_tensor_cache_mode",
    "new_cache",
    "set_global_tensor_cache",
    "set_tensor_cache_mode",
]


def _version(tensor: Tensor) -> int | None:
    """How often it was written to; None for a tensor of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


class Stamp:
    """A coordinate tensor as it was at one moment.

    Keeps the tensor alive, so that its address cannot be given to another one.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = None if tensor.is_inference() else tensor._version

    def unchanged(self) -> bool:
        """Whether nobody wrote into the tensor since."""
        return self.version is None or self.version == self.tensor._version

    def fits(self, coords: Tensor) -> bool:
        """Whether ``coords`` is that tensor: same address, shape, strides, device and version."""
        own = self.tensor
        if coords is own:
            return self.unchanged()
        if (
            coords.data_ptr() != own.data_ptr()
            or coords.shape != own.shape
            or coords.stride() != own.stride()
            or coords.device != own.device
            or coords.dtype != own.dtype
        ):
            return False
        return self.version == _version(coords) and self.unchanged()


class TensorCache:
    """Coordinates (``cmaps``), kernel maps (``kmaps``) and search structures (``hashmaps``).

    ``cmaps[stride] = (coords, spatial_range)``; a bare coordinate tensor means no range. The keys
    of the other two are private. All three may be cleared or shared, and further attributes may be
    set on the object; they follow it through convolutions.
    """

    def __init__(self) -> None:
        self.cmaps: dict[Any, Any] = {}
        self.kmaps: dict[Any, Any] = {}
        self.hashmaps: dict[Any, Any] = {}
        self._recorded: dict[tuple[int, ...], Stamp] = {}  # levels that the library entered

    def level(
        self, stride: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, tuple[int, ...] | None] | None:
        """Coordinates [N, 1 + D] and range of a level on ``device``; None if unknown or changed
        since."""
        entry = self.cmaps.get(stride)
        if entry is None:
            return None
        coords, spatial_range = entry if isinstance(entry, tuple) else (entry, None)
        stamp = self._recorded.get(stride)
        if coords.device != device:
            return None
        if stamp is not None and stamp.tensor is coords and not stamp.unchanged():
            return None
        return coords, spatial_range

    def record(
        self, stride: tuple[int, ...], coords: Tensor, spatial_range: tuple[int, ...] | None
    ) -> None:
        """Enter a level with coordinates [N, 1 + D], unless a valid one is known on its device."""
        if self.level(stride, coords.device) is None:
            self.cmaps[stride] = (coords, spatial_range)
            self._recorded[stride] = Stamp(coords)

    def extras(self) -> dict[str, Any]:
        """What users attached to the cache."""
        own = ("cmaps", "kmaps", "hashmaps", "_recorded")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __getstate__(self) -> dict[str, Any]:
        """Kernel maps and search structures are rebuilt, not pickled."""
        return {"cmaps": dict(self.cmaps), **self.extras()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TensorCache.__init__(self)
        vars(self).update(state)


class Traced(NamedTuple):
    """A level that a compiled program went through."""

    coords: Tensor  # [N, 1 + D] int32
    stride: tuple[int, ...]
    spatial_range: tuple[int, ...] | None
    token: Tensor  # whoever has it finds the maps of the run again: see nn.functional.conv.traced


class Step(NamedTuple):
    """A strided layer that a compiled program went through: four D-tuples, and its two ends."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    offset: tuple[int, ...]
    fine: Traced
    coarse: Traced


class Trail(TensorCache):
    """The cache of tensors that a compiled program makes: where they come from.

    It is never changed while a program is traced; each layer that leads to another level begins a
    new one. Afterwards it serves like any cache, without maps at first.
    """

    def __init__(self, levels: tuple[Traced, ...] = (), steps: tuple[Step, ...] = ()) -> None:
        TensorCache.__init__(self)
        self.levels = levels
        self.steps = steps
        for level in levels:
            self.cmaps[level.stride] = (level.coords, level.spatial_range)

    def extras(self) -> dict[str, Any]:
        """What users attached to the cache."""
        found = TensorCache.extras(self)
        return {name: value for name, value in found.items() if name not in ("levels", "steps")}

    def __reduce__(self) -> Any:
        """Pickled and copied as an ordinary cache."""
        return TensorCache, (), self.__getstate__()


class TensorCacheMode(enum.Enum):
    """Whether each constructed tensor has its own cache or all share one."""

    SEPARATE_TENSOR_CACHE = 0
    GLOBAL_TENSOR_CACHE = 1


def get_tensor_cache_mode() -> TensorCacheMode:
    """The mode in force for tensors constructed from now on."""
    return TensorCacheMode(settings.tensor_cache_mode)


def set_tensor_cache_mode(mode: TensorCacheMode) -> None:
    """Choose separate caches (the default) or one global cache.

    Args:
        mode: A `TensorCacheMode` or its number.

    Raises:
        ValueError: Not a `TensorCacheMode` or its number.
    """
    settings.tensor_cache_mode = TensorCacheMode(mode).value


def get_global_tensor_cache() -> TensorCache | None:
    """The cache of the global mode; None before its first use."""
    return settings.global_tensor_cache


def set_global_tensor_cache(cache: TensorCache | None) -> None:
    """Replace the cache of the global mode.

    Args:
        cache: The new one; None: the next tensor makes one.
    """
    settings.global_tensor_cache = cache


def clear_global_tensor_cache() -> None:
    """Forget the global cache's coordinates and maps; do so after each step to free memory."""
    settings.global_tensor_cache = None


def new_cache() -> TensorCache:
    """The cache for a tensor constructed now."""
    if settings.tensor_cache_mode == TensorCacheMode.SEPARATE_TENSOR_CACHE.value:
        return TensorCache()
    if settings.global_tensor_cache is None:
        settings.global_tensor_cache = TensorCache()
    return settings.global_tensor_cache
