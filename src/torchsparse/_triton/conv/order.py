"""Row order and tiles: which rows share a tile, and which taps a tile needs.

A tile of the implicit GEMM visits every tap that one of its rows has. Rows are therefore sorted
by a key made of their taps: the rare taps, far from the centre, are its high bits (rows that own
a rare tap gather in few tiles), neighbouring keys differ in few taps (Gray code), and heavy rows
come first, so that no long tile runs alone at the end. Sixteen bits keep the radix sort short;
where there are more taps, rare ones share a bit. docs/how-it-works has the measurements.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsparse._geometry import Geometry, tap_list
from torchsparse._triton.launch import cdiv, launch

__all__ = ["Tiles", "key_bits", "make_tiles", "row_sort_keys", "sort_key"]

TILE_ROWS = 64  # the smallest tile; taller ones unite the masks of several
KEY_BITS = 16
OWN_BITS = 6  # frequent taps that have a bit of their own where not all taps have one


class Tiles(NamedTuple):
    """A neighbour table in tile order.

    1-D, kernel 3, rows at [4, 5, 9], tiles of 2:  order = [1, 0, 2],
        table = [[0, -1, -1], [1, 0, 2], [-1, 1, -1]],  masks = [[0b111, 0b010]]
    """

    order: Tensor | None  # [M] int64, the output row at each place; None: they are equal
    table: Tensor  # [K, M] int32, input row under tap k at place m, -1 = none
    masks: Tensor  # [ceil(K / 32), ceil(M / 64)] int32, bit k: some row of the tile has the tap


def bit_of_taps(geometry: Geometry, first: int, last: int) -> list[int]:
    """The key bit of each tap from first to last - 1, -1 for the one that every row has.

    High bits are rare taps.
    """
    taps = tap_list(geometry.kernel_size)[first:last]
    # Ground is flat: a step along the last axis (z) is rarer than one along the others.
    weights = [1.0] * (geometry.ndim - 1) + [1.6 if geometry.ndim == 3 else 1.0]
    distance = [
        sum(w * abs(d * t - o) for w, d, t, o in zip(weights, geometry.dilation, tap, offset))
        for tap in taps
        for offset in (geometry.offset,)
    ]
    ranked = sorted(range(len(taps)), key=lambda k: (distance[k], k))
    bits = [-1] * len(taps)
    if geometry.is_symmetric:
        centre = geometry.volume // 2 - first
        ranked = [k for k in ranked if k != centre]
    if len(ranked) <= KEY_BITS:
        own, shared = len(ranked), 1
    else:
        own = OWN_BITS
        shared = KEY_BITS - OWN_BITS
    for place, tap in enumerate(ranked):
        if place < own:
            bits[tap] = place
        else:
            bits[tap] = own + (place - own) * shared // (len(ranked) - own)
    return bits


@lru_cache(maxsize=256)
def key_bits(
    geometry: Geometry, device: torch.device, first: int = 0, last: int | None = None
) -> Tensor:
    """[32 ceil(K / 32)] int32 on the device: the key bit of each tap as a number, 0 for none."""
    last = geometry.volume if last is None else last
    bits = [0 if bit < 0 else 1 << bit for bit in bit_of_taps(geometry, first, last)]
    bits += [0] * (-len(bits) % 32)
    with torch.inference_mode(False):
        return torch.tensor(bits, dtype=torch.int32, device=device)


@triton.jit
def sort_key(word):
    """The place of a 16-bit word in the Gray sequence, as int16 around 0."""
    word = word ^ (word >> 1)
    word = word ^ (word >> 2)
    word = word ^ (word >> 4)
    word = word ^ (word >> 8)
    return ((word & 0xFFFF) - 32768).to(tl.int16)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def row_key_kernel(neighbors, bits, keys, M, n_row, n_tap, K: tl.constexpr, BR: tl.constexpr):
    """keys[m] = the sort key of row m, from its taps."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    live = rows < M
    word = tl.zeros((BR,), dtype=tl.int32)
    for first in range(0, K, 32):
        taps = first + tl.arange(0, 32)
        at = rows.to(tl.int64)[:, None] * n_row + taps[None, :] * n_tap
        idx = tl.load(neighbors + at, mask=live[:, None] & (taps < K)[None, :], other=-1)
        bit = tl.load(bits + taps)
        word |= tl.reduce(tl.where(idx >= 0, bit[None, :], 0), 1, _or)
    tl.store(keys + rows, sort_key(word), mask=live)


@triton.jit
def tile_kernel(
    neighbors, order, table, masks, M, T, n_row, n_tap,
    K: tl.constexpr, BR: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Bring 64 rows into tile order and collect their taps."""
    tile = tl.program_id(0)
    places = tile * BR + tl.arange(0, BR)
    live = places < M
    if SORTED:
        rows = tl.load(order + places, mask=live, other=0).to(tl.int64)
    else:
        rows = places.to(tl.int64)
    taps = tl.program_id(1) * 32 + tl.arange(0, 32)
    at = rows[:, None] * n_row + taps[None, :] * n_tap
    there = live[:, None] & (taps < K)[None, :]
    idx = tl.load(neighbors + at, mask=there, other=-1)
    target = table + taps.to(tl.int64)[None, :] * M + places[:, None]
    tl.store(target, idx, mask=there)
    own = tl.max((idx >= 0).to(tl.int32), axis=0)
    mask = tl.sum(own << tl.arange(0, 32), axis=0)
    tl.store(masks + tl.program_id(1) * T + tile, mask)


def row_sort_keys(neighbors: Tensor, bits: Tensor) -> Tensor:
    """[M] int16 sort keys of the rows of a table [K, M] int32, any strides; bits of `key_bits`."""
    volume, m = neighbors.shape
    keys = torch.empty(m, dtype=torch.int16, device=neighbors.device)
    launch(
        row_key_kernel, (cdiv(m, 64),), neighbors, neighbors, bits, keys, m,
        neighbors.stride(1), neighbors.stride(0), K=volume, BR=64,
    )  # fmt: skip
    return keys


def make_tiles(neighbors: Tensor, keys: Tensor | None) -> Tiles:
    """Sort the rows of a table by ``keys`` (largest first; None: leave them) and tile them.

    Args:
        neighbors: [K, M] int32, -1 = none; any strides.
        keys: [M] int16 or None.
    """
    volume, m = neighbors.shape
    device = neighbors.device
    tiles, words = cdiv(m, TILE_ROWS), cdiv(volume, 32)
    order = None
    if keys is not None:
        order = torch.sort(keys, descending=True, stable=True).indices
    table = torch.empty((volume, m), dtype=torch.int32, device=device)
    masks = torch.empty((words, tiles), dtype=torch.int32, device=device)
    launch(
        tile_kernel, (tiles, words), neighbors, neighbors, order, table, masks, m, tiles,
        neighbors.stride(1), neighbors.stride(0),
        K=volume, BR=TILE_ROWS, SORTED=order is not None,
    )  # fmt: skip
    return Tiles(order, table, masks)
