"""Search by 64-bit keys: a hash table for one search, a sorted table for a lasting one."""

# Triton is optional, and its language is Python by syntax only.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._triton.launch import cdiv, launch, next_power
from torchsparse._triton.primitives import mix
from torchsparse._triton.rows import lower_bound

__all__ = ["find_rows", "hash_rows", "insert_", "lookup", "site_keys"]

BLOCK = 256
PROBES = 128  # keys of one warp, which walks until the last of them has found its slot
# FNV-1a with 64 bits (Fowler, Noll, Vo), one step per 32-bit column, as two's complement.
FNV_OFFSET = tl.constexpr(14695981039346656037 - (1 << 64))
FNV_PRIME = tl.constexpr(1099511628211)
LAST = torch.iinfo(torch.int64).max  # key of unused slots: they stand behind the used ones


# ------------------------------------------------------------------ keys
def hash_rows(coords: Tensor, offsets: Tensor | None) -> Tensor:
    """FNV-1a of coordinate rows.  [N, 4], [K, 3] -> [K, N] int64; without offsets [N]."""
    n, columns = coords.shape
    taps = 1 if offsets is None else offsets.shape[0]
    out = torch.empty((taps, n), dtype=torch.int64, device=coords.device)
    launch(
        _hash_kernel, (cdiv(n, BLOCK), taps), coords,
        coords, None if offsets is None else offsets.contiguous(), out,
        n, coords.stride(0), coords.stride(1),
        COLUMNS=columns, OFFSETS=offsets is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out[0] if offsets is None else out


@triton.jit(do_not_specialize=["n"])
def _hash_kernel(
    coords, offsets, out, n, row_stride, stride,
    COLUMNS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1).to(tl.int64)
    state = tl.full([BLOCK], FNV_OFFSET, tl.int64)
    for column in tl.static_range(COLUMNS):
        at = coords + row * row_stride + column * stride
        value = tl.load(at, mask=row < n, other=0).to(tl.int64)
        if OFFSETS and column > 0:
            value += tl.load(offsets + tap * (COLUMNS - 1) + column - 1).to(tl.int64)
        state = (state ^ (value & 0xFFFFFFFF)) * FNV_PRIME
    tl.store(out + tap * n + row, state, mask=row < n)


def site_keys(sites: Tensor) -> Tensor:
    """One key per site (b, x, y, z): exact within 10, 18, 18, 17 bits, a hash with the sign bit
    beyond.  [..., 4] int64 -> [...] int64."""
    keys = torch.empty(sites.shape[:-1], dtype=torch.int64, device=sites.device)
    n = keys.numel()
    launch(_site_kernel, (cdiv(n, BLOCK),), sites, sites.contiguous(), keys, n, BLOCK=BLOCK)
    return keys


@triton.jit(do_not_specialize=["n"])
def _site_kernel(sites, keys, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.zeros([BLOCK], tl.int64)
    mixed = tl.full([BLOCK], FNV_OFFSET, tl.int64)
    inside = row < n
    for column in tl.static_range(4):
        bits = 10 if column == 0 else 17 if column == 3 else 18
        value = tl.load(sites + row * 4 + column, mask=row < n, other=0)
        mixed = (mixed ^ value) * FNV_PRIME
        mixed ^= (mixed >> 29) & 0x7FFFFFFFF  # logical shift: bring high bits down
        if column > 0:
            value += 1 << (bits - 1)
        inside = inside & ((value >> bits) == 0)
        key = (key << bits) | value
    sign = tl.full([BLOCK], -0x8000000000000000, tl.int64)
    tl.store(keys + row, tl.where(inside, key, mixed | sign), mask=row < n)


# ------------------------------------------------------------------ one search
def find_rows(references: Tensor, queries: Tensor) -> Tensor:
    """Lowest row of ``references`` [M] equal to each query, -1 for none.  -> int32.

    A table with open addresses, at most half full, of row numbers: keys are compared where they
    stand, so none is special, and of equal keys the lowest row stays whatever the order.
    """
    m, n = references.shape[0], queries.numel()
    found = torch.empty(queries.shape, dtype=torch.int32, device=queries.device)
    references = references.contiguous()
    slots = torch.full(
        (next_power(2 * m) if m else 2,), -1, dtype=torch.int32, device=queries.device
    )
    capacity = slots.shape[0]
    launch(
        _insert_kernel, (cdiv(m, PROBES),), queries,
        references, slots, m, capacity, BLOCK=PROBES, num_warps=1,
    )  # fmt: skip
    launch(
        _find_kernel, (cdiv(n, PROBES),), queries,
        references, slots, queries.contiguous(), found, n, capacity, BLOCK=PROBES, num_warps=1,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["m", "capacity"])
def _insert_kernel(references, slots, m, capacity, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(references + row, mask=row < m, other=0)
    slot = mix(key) & (capacity - 1)
    busy = row < m
    while tl.max(busy.to(tl.int32), 0) > 0:
        # There is no mask: who is done compares with a number that no slot holds.
        held = tl.atomic_cas(slots + slot, tl.where(busy, -1, -2), row, sem="relaxed")
        busy = busy & (held >= 0)
        other = tl.load(references + held, mask=busy, other=0)
        same = busy & (other == key)
        tl.atomic_min(slots + slot, row, mask=same & (row < held), sem="relaxed")
        busy = busy & (other != key)
        slot = (slot + 1) & (capacity - 1)


@triton.jit(do_not_specialize=["n", "capacity"])
def _find_kernel(references, slots, queries, found, n, capacity, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(queries + at, mask=at < n, other=0)
    slot = mix(key) & (capacity - 1)
    busy = at < n
    row = tl.full([BLOCK], -1, tl.int32)
    while tl.max(busy.to(tl.int32), 0) > 0:
        held = tl.load(slots + slot, mask=busy, other=-1)
        busy = busy & (held >= 0)
        other = tl.load(references + held, mask=busy, other=0)
        row = tl.where(busy & (other == key), held, row)
        busy = busy & (other != key)
        slot = (slot + 1) & (capacity - 1)
    tl.store(found + at, row, mask=at < n)


# ------------------------------------------------------------------ a lasting table
def insert_(keys: Tensor, vals: Tensor, new_keys: Tensor) -> Tensor:
    """Store j + 1 under ``new_keys[j]``, in place.  -> [] bool: distinct keys did not fit.

    Of equal new keys the lowest row counts; a key that is there gets its new value. Entries stand
    sorted: users may fill a table to its last slot, where open addresses would make each failing
    search walk through all of it. Sorting and moving are PyTorch's: deterministic, and the host
    does not wait.
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
    capacity, n = keys.shape[0], queries.numel()
    found = torch.empty(queries.shape, dtype=torch.int32, device=queries.device)
    launch(
        _lookup_kernel, (cdiv(n, BLOCK),), queries,
        keys.contiguous(), vals.contiguous(), queries.contiguous(), found,
        n, capacity, capacity.bit_length(), BLOCK=BLOCK,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["n", "capacity", "steps"])
def _lookup_kernel(keys, vals, queries, found, n, capacity, steps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    query = tl.load(queries + at, mask=at < n, other=0)
    place = lower_bound(keys, capacity, query, steps)
    there = (at < n) & (place < capacity)
    there = there & (tl.load(keys + place, mask=there, other=0) == query)
    tl.store(found + at, tl.load(vals + place, mask=there, other=0), mask=at < n)
