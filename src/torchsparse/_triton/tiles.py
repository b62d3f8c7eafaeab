"""Tile shapes: a pure function from the sizes of a layer to how one launch does it.

The rows are measurements on an H100 (benchmarks/README.md); other GPUs start from them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from torchsparse._triton.launch import cdiv, next_power

__all__ = [
    "DepthwiseTile",
    "GemmTile",
    "GradTile",
    "NarrowTile",
    "depthwise_grad_tile",
    "depthwise_tile",
    "gemm_tile",
    "grad_tile",
    "loop_step",
    "narrow_tile",
]

# Programs that keep the multiprocessors of a large GPU busy (132 on an H100).
PROCESSORS = 132
NARROW_CHANNELS = 8  # up to so many input channels, taps and channels form one axis
NARROW_VOLUME = 512  # K C_in up to which that pays


class GemmTile(NamedTuple):
    """One program of the implicit GEMM: BM rows, BN channels, BK input channels per step."""

    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    splits: int  # shares of a tile's taps, summed by a second kernel


class GradTile(NamedTuple):
    """One program of the weight gradient: a BM x BN block, BK pairs per step."""

    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    target: int  # chunks of pairs over all taps, about


class NarrowTile(NamedTuple):
    """One program for few input channels."""

    BM: int
    BN: int
    BK: int
    warps: int


class DepthwiseTile(NamedTuple):
    """One program of a depthwise convolution: BM rows or pairs, BC channels."""

    BM: int
    BC: int
    warps: int
    stages: int  # gathers in flight: 1 = left to the other programs of the multiprocessor


def _block_k(channels: int, widest: int) -> int:
    """The widest step that wastes no multiplication, at least 16."""
    for width in (widest, widest // 2, widest // 4):
        if width >= 16 and channels % width == 0:
            return width
    return min(max(next_power(channels), 16), widest)


def _splits(rows: int, tile_rows: int, cols: int, volume: int) -> int:
    """Shares of the taps, so that small maps fill the GPU."""
    programs = cdiv(rows, tile_rows) * cols
    splits = 1
    while splits < min(8, volume // 2) and programs * splits < PROCESSORS:
        splits *= 2
    return splits


@lru_cache(maxsize=4096)
def gemm_tile(
    rows: int, c_in: int, c_out: int, volume: int, dtype: torch.dtype, precision: str
) -> GemmTile:
    """The tile for an implicit GEMM. ``rows`` may be rounded: it matters only for small maps."""
    bn = min(max(next_power(c_out), 16), 128)
    if dtype != torch.float32:
        bm, bk, stages, warps = 64, _block_k(c_in, 64), 3, 4
        if bk < 64:
            stages = 4
        if c_out > 128 and cdiv(rows, 128) * cdiv(c_out, 128) >= 2 * PROCESSORS:
            bm, warps = 128, 8
    elif precision == "tf32":
        bm, bk, stages, warps = 64, _block_k(c_in, 32), 3, 4
        if c_out > 128 and cdiv(rows, 128) * cdiv(c_out, 128) >= PROCESSORS:
            bm = 128
    else:
        bm, bn, bk, warps = 64, min(bn, 64), _block_k(c_in, 32), 4
        stages = 2 if precision == "ieee" else 3
    splits = _splits(rows, bm, cdiv(c_out, bn), volume)
    return GemmTile(bm, bn, bk, stages, warps, splits)


@lru_cache(maxsize=4096)
def narrow_tile(rows: int, c_in: int, c_out: int, volume: int) -> NarrowTile | None:
    """The tile for few input channels, or None where the masked GEMM is better."""
    if c_in > NARROW_CHANNELS or volume * c_in > NARROW_VOLUME or volume == 1:
        return None
    return NarrowTile(64, min(max(next_power(c_out), 16), 64), 64, 4)


def loop_step(block: int, dtype: torch.dtype, precision: str) -> int:
    """BK of a loop that may have a single turn.

    Then nothing is copied to shared memory, and plain float32 products keep both operands in
    registers: 32 columns of them spill 4 KB per thread.
    """
    return min(block, 16) if dtype == torch.float32 and precision == "ieee" else block


@lru_cache(maxsize=4096)
def grad_tile(pairs: int, c_in: int, c_out: int, dtype: torch.dtype, precision: str) -> GradTile:
    """The tile for a weight gradient over at most ``pairs`` pairs."""
    ci, co = max(next_power(c_in), 16), max(next_power(c_out), 16)
    if dtype != torch.float32:
        bm, bn, bk, stages, warps, waves = min(ci, 64), min(co, 128), 64, 3, 4, 2
        if ci > 128 and co > 128:
            bm, bn, warps = 128, 256, 8
    # Of float32 operands the tensor cores of sm_90 take only those that lie along the summed
    # axis; a gathered row does not. Small tiles use the older instruction, which takes any.
    elif co > 128:
        bm, bn, bk, stages, warps, waves = min(ci, 32), 256, 32, 3, 8, 8
    elif co > 64:
        bm, bn, bk, stages, warps, waves = min(ci, 32), 128, 16, 4, 4, 4
    elif ci > 32 and co > 32:
        bm, bn, bk, stages, warps, waves = 64, 64, 32, 3, 2, 4
        if precision == "tf32x3":  # three parts of 32 rows do not fit into the registers
            bk, stages = 16, 4
    else:
        bm, bn, bk, stages, warps, waves = min(ci, 32), min(co, 64), 32, 3, 4, 4
    blocks = cdiv(c_in, bm) * cdiv(c_out, bn)
    target = max(min(waves * PROCESSORS // blocks, cdiv(pairs, 4 * bk)), 1)
    return GradTile(bm, bn, bk, stages, warps, target)


def _depthwise_columns(channels: int) -> int:
    """Channels of a program: a block of 64, or less where that leaves lanes idle; at least 16.

    As many channels as lanes or more, and the compiler would pass weights through shared memory.
    """
    if channels % 64 == 0 or channels > 96:
        return 64
    return 32 if channels % 32 == 0 else min(max(next_power(channels), 16), 64)


# Each lane loads 16 bytes of a row and keeps the sums of 16 channels: few registers, so that many
# programs share a multiprocessor and hide each other's gathers.
@lru_cache(maxsize=4096)
def depthwise_tile(channels: int) -> DepthwiseTile:
    """The tile for a depthwise convolution; at most 64 rows share a mask of taps."""
    columns = _depthwise_columns(channels)
    return DepthwiseTile(min(2048 // columns, 64), columns, 4, 1)


@lru_cache(maxsize=4096)
def depthwise_grad_tile(channels: int) -> DepthwiseTile:
    """The same for the weight gradient, whose rows are pairs."""
    columns = _depthwise_columns(channels)
    return DepthwiseTile(min(2048 // columns, 64), columns, 4, 1)
