"""Hashes and search by 64-bit keys: the choice of implementation."""

from __future__ import annotations

from torch import Tensor

from torchsparse._ops.dispatch import twin

__all__ = ["find_rows", "hash_rows", "insert_", "lookup", "site_keys"]


def hash_rows(coords: Tensor, offsets: Tensor | None) -> Tensor:
    """64-bit FNV-1a of coordinate rows, one step per 32-bit column.

    Args:
        coords: [N, 4] int32.
        offsets: [K, 3] int32, added to the last three columns; None = no offsets.

    Returns:
        [K, N] int64, or [N] without offsets.
    """
    return twin("table", coords).hash_rows(coords, offsets)


def find_rows(references: Tensor, queries: Tensor) -> Tensor:
    """Where keys stand.

    Args:
        references: [M] int64.
        queries: int64, any shape.

    Returns:
        int32 in the shape of ``queries``: the lowest row of ``references`` with that key, or -1.
    """
    return twin("table", queries).find_rows(references, queries)


def insert_(keys: Tensor, vals: Tensor, new_keys: Tensor) -> Tensor:
    """Store j + 1 under ``new_keys[j]``, in place.

    Args:
        keys, vals: [capacity] int64 and int32, zeros at first; the arrangement within is private.
        new_keys: [N] int64. Of equal ones the lowest row counts; stored ones are overwritten.

    Returns:
        [] bool: there are more distinct keys than slots (the rest is not stored).
    """
    return twin("table", keys).insert_(keys, vals, new_keys)


def lookup(keys: Tensor, vals: Tensor, queries: Tensor) -> Tensor:
    """Values under keys.

    Args:
        keys, vals: [capacity] int64 and int32, as `insert_` left them.
        queries: int64, any shape.

    Returns:
        int32 in the shape of ``queries``, 0 = absent.
    """
    return twin("table", keys).lookup(keys, vals, queries)


def site_keys(sites: Tensor) -> Tensor:
    """One 64-bit key per site.

    Args:
        sites: [..., 4] int64, columns (b, x, y, z).

    Returns:
        [...] int64, distinct for 0 <= b < 1024, -2^17 <= x, y < 2^17, -2^16 <= z < 2^16; beyond
        that box 63-bit hashes, which differ from all keys of the box.
    """
    return twin("table", sites).site_keys(sites)
