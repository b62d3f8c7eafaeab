"""Switches of the computation, in the manner of ``torch.backends``.

Nothing is asked of a device until a value is read.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

from torchsparse._flags import raise_pending
from torchsparse._settings import reset, settings
from torchsparse._validate import one_of

__all__ = [
    "allow_fp16",
    "allow_tf32",
    "benchmark",
    "check_errors",
    "device_capability",
    "float32_precision",
    "fuse",
    "hash_rsv_ratio",
    "infer_spatial_range",
    "init",
]

# Types for readers of this module; the values are properties of _Backends below.
benchmark: bool
"""Accepted for compatibility; no effect."""
hash_rsv_ratio: int
"""Accepted for compatibility; no effect."""
infer_spatial_range: bool
"""Without a spatial range, bound the sites of strided layers by the batch's largest coordinates
(TorchSparse 2.1's rule, which loses sites at the far border). False keeps every site."""
device_capability: int
"""100 x major + 10 x minor of the current GPU; 0 without one."""
allow_tf32: bool
"""Use TF32 in float32 convolutions (default: from capability 8.0)."""
fuse: bool
"""Without gradients, compute what follows a convolution (normalisation by running statistics, a
residual sum, ReLU or LeakyReLU) together with it; results agree up to rounding."""
float32_precision: str
"""How float32 convolutions on a GPU multiply while `allow_tf32` is off: "tf32x3" (three TF32
products, about 22 bits) or "ieee" (the plain units)."""
allow_fp16: bool
"""Compute half inputs in half precision (default: from capability 7.5)."""

NAMES = (
    "benchmark",
    "hash_rsv_ratio",
    "infer_spatial_range",
    "device_capability",
    "allow_tf32",
    "allow_fp16",
    "float32_precision",
    "fuse",
)


def check_errors() -> None:
    """Raise what kernels noticed in the data so far. Waits for the GPU.

    Raises:
        ValueError, RuntimeError: The first complaint.
    """
    raise_pending()


def init() -> None:
    """Put every switch of this module back to its default."""
    reset(*NAMES)


def _capability() -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 100 * major + 10 * minor


def _read(name: str) -> Any:
    value = getattr(settings, name)
    if value is not None:
        return value
    if name == "device_capability":
        return _capability()
    return _read("device_capability") >= {"allow_tf32": 800, "allow_fp16": 750}[name]


def _switch(name: str) -> property:
    def get(self: ModuleType) -> Any:
        return _read(name)

    def put(self: ModuleType, value: Any) -> None:
        if name == "float32_precision":
            one_of(value, ("tf32x3", "ieee"), name)
        setattr(settings, name, value)

    return property(get, put)


class _Backends(ModuleType):
    """This module, with its switches as properties over the settings."""

    benchmark = _switch("benchmark")
    hash_rsv_ratio = _switch("hash_rsv_ratio")
    infer_spatial_range = _switch("infer_spatial_range")
    device_capability = _switch("device_capability")
    allow_tf32 = _switch("allow_tf32")
    allow_fp16 = _switch("allow_fp16")
    float32_precision = _switch("float32_precision")
    fuse = _switch("fuse")


sys.modules[__name__].__class__ = _Backends
