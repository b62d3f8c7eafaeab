"""Caches of coordinates and kernel maps, and how tensors share them."""

from torchsparse._cache import (
    TensorCache,
    TensorCacheMode,
    clear_global_tensor_cache,
    get_global_tensor_cache,
    get_tensor_cache_mode,
    set_global_tensor_cache,
    set_tensor_cache_mode,
)

__all__ = [
    "TensorCache",
    "TensorCacheMode",
    "clear_global_tensor_cache",
    "get_global_tensor_cache",
    "get_tensor_cache_mode",
    "set_global_tensor_cache",
    "set_tensor_cache_mode",
]
