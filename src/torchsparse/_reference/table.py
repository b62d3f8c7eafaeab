"""Search by 64-bit keys, in plain PyTorch: a table is a pair of tensors sorted by key."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["find_rows", "hash_rows", "insert_", "lookup", "site_keys"]

# FNV-1a with 64 bits (Fowler, Noll, Vo), one step per 32-bit column, as two's complement.
FNV_OFFSET = 14695981039346656037 - (1 << 64)
FNV_PRIME = 1099511628211
LAST = torch.iinfo(torch.int64).max  # key of unused slots: they stand behind the used ones
# Bits of b, x, y, z in the key of a site: 63, so that such keys are not negative.
SITE_BITS = (10, 18, 18, 17)


def hash_rows(coords: Tensor, offsets: Tensor | None) -> Tensor:
    """FNV-1a of coordinate rows.  [N, 4], [K, 3] -> [K, N] int64; without offsets [N]."""
    state = torch.full((), FNV_OFFSET, dtype=torch.int64, device=coords.device)
    for column in range(coords.shape[1]):
        value = coords[:, column].to(torch.int64)
        if offsets is not None and column > 0:
            value = value + offsets[:, column - 1 : column].to(torch.int64)
        state = (state ^ (value & 0xFFFFFFFF)) * FNV_PRIME
    if offsets is not None and coords.shape[1] < 2:
        return state.expand(offsets.shape[0], -1)
    return state


def find_rows(references: Tensor, queries: Tensor) -> Tensor:
    """Lowest row of ``references`` [M] equal to each query, -1 for none.  -> int32."""
    if references.shape[0] == 0:
        return torch.full(queries.shape, -1, dtype=torch.int32, device=queries.device)
    keys, rows = torch.sort(references, stable=True)
    position = torch.searchsorted(keys, queries).clamp_(max=keys.shape[0] - 1)
    return torch.where(keys[position] == queries, rows.to(torch.int32)[position], -1)


def insert_(keys: Tensor, vals: Tensor, new_keys: Tensor) -> Tensor:
    """Store j + 1 under ``new_keys[j]``, in place.  -> [] bool: distinct keys did not fit.

    Of equal new keys the lowest row counts; a key that is there gets its new value.
    """
    capacity, n = keys.shape[0], new_keys.shape[0]
    # Unused slots are LAST with value 0, and zeros before the first insertion.
    old_keys = torch.where(vals == 0, LAST, keys)
    new_vals = torch.arange(1, n + 1, dtype=torch.int32, device=keys.device)
    merged, order = torch.sort(torch.cat([new_keys, old_keys]), stable=True)
    values = torch.cat([new_vals, vals])[order]
    first = torch.ones_like(merged, dtype=torch.bool)
    torch.ne(merged[1:], merged[:-1], out=first[1:])
    first &= values != 0
    slot = torch.where(first, first.cumsum(0) - 1, capacity).clamp_(max=capacity)
    # One spare slot takes repeated keys and what does not fit.
    for own, entries, unused in ((keys, merged, LAST), (vals, values, 0)):
        own.copy_(own.new_full((capacity + 1,), unused).index_copy_(0, slot, entries)[:capacity])
    return torch.count_nonzero(first) > capacity


def lookup(keys: Tensor, vals: Tensor, queries: Tensor) -> Tensor:
    """Value stored under each query, 0 for none.  -> int32 like queries."""
    if keys.shape[0] == 0:
        return torch.zeros(queries.shape, dtype=torch.int32, device=queries.device)
    position = torch.searchsorted(keys, queries).clamp_(max=keys.shape[0] - 1)
    return torch.where(keys[position] == queries, vals[position], 0)


def site_keys(sites: Tensor) -> Tensor:
    """One key per site (b, x, y, z): exact within SITE_BITS, a hash with the sign bit beyond.

    Args:
        sites: [..., 4] int64.

    Returns:
        [...] int64. Sites with 0 <= b < 1024, x and y in ±131072, z in ±65536 have keys of their
        own, none of them negative; two others share one with probability 2^-63.
    """
    key = torch.zeros(sites.shape[:-1], dtype=torch.int64, device=sites.device)
    inside = torch.ones_like(key, dtype=torch.bool)
    mixed = torch.full_like(key, FNV_OFFSET)
    for column, bits in enumerate(SITE_BITS):
        value = sites[..., column]
        mixed = (mixed ^ value) * FNV_PRIME
        mixed ^= (mixed >> 29) & 0x7FFFFFFFF  # logical shift: bring high bits down
        if column > 0:
            value = value + (1 << bits - 1)
        inside &= (value >> bits) == 0
        key = (key << bits) | value
    return torch.where(inside, key, mixed | torch.iinfo(torch.int64).min)
