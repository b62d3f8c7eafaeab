"""From what the user wants to what one call does: configuration, modes, dtypes, autocast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchsparse import backends
from torchsparse._recipe import ConvRecipe
from torchsparse._settings import settings
from torchsparse.nn.functional.conv.conv_config import resolve_config

__all__ = ["compute_dtype", "resolve", "resolve_for"]

HALVES = (torch.float16, torch.bfloat16)


_recipes: dict[Any, ConvRecipe] = {}
MOST_RECIPES = 1024  # forgotten beyond: settings that change all the time


def resolve(
    config: Mapping[str, Any] | None, feats: Tensor, weight: Tensor, bias: Tensor | None
) -> ConvRecipe:
    """Turn configuration, modes, dtypes and autocast into one record."""
    return resolve_for(config, compute_dtype(feats, weight, bias), feats.device)


def resolve_for(
    config: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> ConvRecipe:
    """The same for results of ``dtype`` on ``device``."""
    shared = settings.conv_config
    key = (
        settings.version,
        dtype,
        device,
        None if shared is None else tuple(shared.items()),
        None if config is None else tuple(config.items()) if hasattr(config, "items") else 0,
    )
    try:
        known = _recipes.get(key)
    except TypeError:  # a value without a hash, which the checks below refuse
        return _resolve(config, dtype, device)
    if known is None:
        if len(_recipes) >= MOST_RECIPES:
            _recipes.clear()
        known = _recipes[key] = _resolve(config, dtype, device)
    return known


def _resolve(
    config: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> ConvRecipe:
    complete = resolve_config(config)
    on_gpu = device.type == "cuda"
    full = on_gpu and dtype in HALVES and not backends.allow_fp16
    if on_gpu and dtype == torch.float32:
        precision = "tf32" if backends.allow_tf32 else settings.float32_precision
    else:
        precision = "ieee"
    return ConvRecipe(
        dataflow=complete.dataflow,
        sort=bool(complete.ifsort),
        splits=complete.split_mask_num,
        splits_bwd=complete.split_mask_num_bwd,
        literal=not complete.auto,
        kmap_mode=complete.kmap_mode,
        downsample_mode=complete.downsample_mode,
        dtype=dtype,
        compute=torch.float32 if full else dtype,
        precision=precision,
    )


def compute_dtype(feats: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of a product of features and weights.

    Raises:
        TypeError: float16 meets bfloat16 outside autocast.
    """
    device = "cuda" if feats.is_cuda else "cpu" if feats.is_cpu else feats.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = feats.dtype
    if not autocast and dtype is weight.dtype and (bias is None or dtype is bias.dtype):
        return dtype
    operands = (feats, weight) if bias is None else (feats, weight, bias)
    found = {t.dtype for t in operands}
    if autocast and torch.float64 not in found:
        return torch.get_autocast_dtype(device)
    if len(found) == 1:
        return feats.dtype
    halves = {t.dtype for t in (feats, weight)} & set(HALVES)
    if len(halves) > 1:
        raise TypeError(f"float16 and bfloat16 cannot be mixed, got {feats.dtype}, {weight.dtype}")
    if halves:
        return halves.pop()
    return torch.promote_types(feats.dtype, weight.dtype)
