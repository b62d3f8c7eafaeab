"""What the user asked for: one record, read at call time, written by the public setters.

Nothing here touches a device. Values that depend on the GPU are None until somebody asks
(`torchsparse.backends`) or assigns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Settings", "override", "reset", "settings"]


@dataclass
class Settings:
    """Every process-wide switch of the library, with its default."""

    # convolution modes (nn.functional)
    conv_mode: int = 0
    kmap_mode: str = "hashmap_on_the_fly"
    downsample_mode: str = "spconv"
    conv_config: dict[str, Any] | None = None  # set_global_conv_config
    # tensors
    allow_negative_coordinates: bool = False
    tensor_cache_mode: int = 0  # TensorCacheMode
    global_tensor_cache: Any = None  # the TensorCache of the global mode, made when first needed
    # backends
    infer_spatial_range: bool = True
    fuse: bool = True  # let normalisation, sums and activations join a convolution in evaluation
    benchmark: bool = False
    hash_rsv_ratio: int = 2
    device_capability: int | None = None  # None: ask the device when read
    allow_tf32: bool | None = None
    float32_precision: str = "tf32x3"  # of float32 convolutions on a GPU without TF32
    allow_fp16: bool | None = None
    version: int = 0  # counts assignments, so that what was derived can be remembered

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "global_tensor_cache":  # is replaced between steps, and decides nothing
            object.__setattr__(self, "version", getattr(self, "version", 0) + 1)

    def decisive(self) -> tuple[Any, ...]:
        """What decides how a network is computed, as values that can be compared."""
        config = self.conv_config
        return (
            self.conv_mode,
            self.downsample_mode,
            None if config is None else repr(sorted(config.items(), key=str)),
            self.allow_negative_coordinates,
            self.infer_spatial_range,
            self.fuse,
            self.allow_tf32,
            self.float32_precision,
            self.allow_fp16,
        )


settings = Settings()


def reset(*names: str) -> None:
    """Put the named settings back to their defaults."""
    defaults = Settings()
    for name in names:
        setattr(settings, name, getattr(defaults, name))


@contextmanager
def override(**values: Any) -> Iterator[Settings]:
    """Change settings for the length of a ``with`` block."""
    known = {field.name for field in fields(Settings)}
    unknown = set(values) - known
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
    saved = {name: getattr(settings, name) for name in values}
    for name, value in values.items():
        setattr(settings, name, value)
    try:
        yield settings
    finally:
        for name, value in saved.items():
            setattr(settings, name, value)
