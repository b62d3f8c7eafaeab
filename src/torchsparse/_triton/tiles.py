"""Tile shapes: a function from the sizes of a layer to how one launch does it.

The rows are measurements on an H100 (benchmarks/RESULTS.md); other GPUs start from them. What
`torchsparse.tune` found on this machine (`_tuned`) goes before them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from torchsparse import _tuned
from torchsparse._triton.launch import Blocks, cdiv, next_power

__all__ = [
    "DepthwiseTile",
    "WIDE_TURN",
    "GemmTile",
    "GradTile",
    "Limits",
    "NarrowTile",
    "alike",
    "dense_tile",
    "depthwise_grad_tile",
    "depthwise_tile",
    "fitting",
    "gemm_tile",
    "gemm_tiles",
    "grad_tile",
    "grad_tiles",
    "has_blocks",
    "loop_step",
    "narrow_tile",
    "shares_of",
    "shipped_gemm_tile",
    "shipped_grad_tile",
]

# Programs that keep the multiprocessors of a large GPU busy (132 on an H100).
PROCESSORS = 132
NARROW_CHANNELS = 8  # up to so many input channels, taps and channels form one axis
WIDE_TURN = 64  # input channels of a turn from which a weight of a half type is read in blocks
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


_Tile = TypeVar("_Tile", GemmTile, GradTile)


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


@lru_cache(maxsize=64)
def has_blocks(device: torch.device) -> bool:
    """Whether the GPU has an engine that copies blocks of a matrix (TMA), as tried on sm_90."""
    if device.type != "cuda" or torch.version.hip or Blocks is None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def _block_k(channels: int, widest: int) -> int:
    """The widest step that wastes no multiplication, at least 16."""
    for width in (widest, widest // 2, widest // 4):
        if width >= 16 and channels % width == 0:
            return width
    return min(max(next_power(channels), 16), widest)


# Up to FEW, programs wait for each turn's loads longer than they multiply, and take up to 128
# channels in one turn, with three turns on their way. Up to SOME, 128 channels still go in one
# turn, but with two on their way, so that a multiprocessor holds two programs.
FEW, SOME = 300, 400
# Turns of a program's loop from which its shares pay for their sum, and programs at most then.
LONG_LOOP, MOST_SHARES = 54, 600


# Blocks of 64 rows up to which the taps of a map come in 4, 3 and 2 shares with an order of the
# rows for each. The slower the products are, the longer it pays to waste few of them.
SHARED_BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    "half": ((48, 4), (140, 3), (220, 2)),
    "tf32": ((132, 4), (220, 3), (400, 2)),
    "tf32x3": ((340, 4), (1200, 2)),
    "ieee": ((340, 4), (1200, 2)),  # not measured, but slower than three products of TF32
}
SHARED_TAPS = 16  # from so many taps


def shares_of(rows: int, volume: int, dtype: torch.dtype, precision: str) -> int:
    """Shares of the taps of a sorted map. Each is sorted apart, so that its tiles waste little.

    Small maps fill a GPU by sharing out the taps anyway. On others, to write parts and add them up
    costs more than what is wasted.

    Args:
        rows, volume: Of the map.
        dtype, precision: Of the operands.
    """
    if volume < SHARED_TAPS:
        return 1
    limits = SHARED_BLOCKS[precision if dtype == torch.float32 else "half"]
    return next((shares for most, shares in limits if rows <= 64 * most), 1)


def _splits(rows: int, tile_rows: int, cols: int, volume: int, turns: int) -> int:
    """Shares of the taps, so that small maps fill the GPU.

    Tiles have 1 to K taps, and all of them begin at once: the heaviest is the last to end, unless
    it is shared out.

    Args:
        rows, tile_rows, cols, volume: Of the map and of its tiles.
        turns: Of the loop, for a tile that has all taps.
    """
    programs = cdiv(rows, tile_rows) * cols
    splits = 1
    while splits < min(8, volume // 2) and programs * splits < PROCESSORS:
        splits *= 2
    while turns >= LONG_LOOP and splits < 4 and programs * splits * 2 <= MOST_SHARES:
        splits *= 2
    return splits


def gemm_tile(
    rows: int,
    c_in: int,
    c_out: int,
    volume: int,
    dtype: torch.dtype,
    precision: str,
    swapped: bool = False,
    device: torch.device | None = None,
    blocks: bool = False,
    shares: int = 1,
) -> GemmTile:
    """The tile for an implicit GEMM. ``rows`` may be rounded: it matters only for small maps.

    Args:
        rows, c_in, c_out, volume: M, C_in, C_out and K.
        dtype, precision: Of the operands.
        swapped: The weight lies with its input channels innermost, as in an input gradient.
        device: Whose measurements may count; None: the shipped rows alone.
        blocks: The weight is read in blocks: see `has_blocks`.
        shares: Of the taps, if each has its own order of the rows: then they are the splits.
    """
    rows = alike(rows)
    # The last argument makes remembered answers go out of date.
    return _gemm_tile(
        rows, c_in, c_out, volume, dtype, precision, swapped, device, blocks, shares,
        _tuned.generation(),
    )  # fmt: skip


def alike(rows: int, plenty: int = 1 << 16) -> int:
    """A number of rows for which everything is chosen as for ``rows``: each cloud has another,
    and shall find the answers of those before it. From ``plenty`` on, the power of two decides.
    """
    if rows & (rows - 1) == 0:
        return rows
    return 1 << (rows.bit_length() - 1) if rows >= plenty else (rows - 1) // 64 * 64 + 1


@lru_cache(maxsize=4096)
def _gemm_tile(
    rows: int, c_in: int, c_out: int, volume: int, dtype: torch.dtype, precision: str,
    swapped: bool, device: torch.device | None, blocks: bool, shares: int, generation: int,
) -> GemmTile:  # fmt: skip
    shipped = shipped_gemm_tile(rows, c_in, c_out, volume, dtype, precision, blocks, shares)
    if device is None:
        return shipped
    shipped = fitting(shipped, dtype, Limits.of(device))
    op, bits = "dgrad" if swapped else "fwd", rows.bit_length()
    name, measured = _measured(op, bits, c_in, c_out, volume, dtype, precision, device, generation)
    if measured is None and not _tuned.heard():
        return shipped

    def others() -> list[_tuned.Entry]:
        limits = Limits.of(device)
        found = gemm_tiles(shipped, rows, c_in, c_out, volume, dtype, precision, limits, shares)
        return [tuple(tile) for tile in found]

    tile = GemmTile(*_tuned.choose(name, device, shipped, others))
    return tile if shares == 1 else tile._replace(splits=shares)


@lru_cache(maxsize=4096)
def _measured(
    op: str, bits: int, c_in: int, c_out: int, volume: int, dtype: torch.dtype, precision: str,
    device: torch.device, generation: int,
) -> tuple[str, _tuned.Entry | None]:  # fmt: skip
    """Name and answer of a question about rows or pairs of so many bits."""
    short, arch = str(dtype).removeprefix("torch."), _tuned.architecture(device)
    name = _tuned.key(op, (1 << bits) - 1, c_in, c_out, volume, short, precision, arch)
    return name, _tuned.lookup(name, device)


def shipped_gemm_tile(
    rows: int, c_in: int, c_out: int, volume: int, dtype: torch.dtype, precision: str,
    blocks: bool = False, shares: int = 1,
) -> GemmTile:  # fmt: skip
    """The tile without measurements of this machine; arguments as for `gemm_tile`."""
    bn = min(max(next_power(c_out), 16), 128)
    if dtype != torch.float32:
        bm, bk, stages, warps = 64, _block_k(c_in, 64), 3, 4
        if bk < 64:
            stages = 4
        programs = cdiv(rows, bm) * cdiv(c_out, bn)
        if 64 < c_in < 128 and bk < 64 and programs <= FEW and shares == 1:
            bk, stages = 128, 3
        elif c_in == 128 and programs * shares <= FEW:
            bk, stages = 128, 3
        elif c_in == 128 and programs <= SOME:
            bk, stages = 128, 2
        elif shares > 1:
            stages = 4
        if shares > 1 and blocks and c_out % 256 == 0:
            bn, bk, stages = 256, _block_k(c_in, 64), 4
        elif c_out > 128 and cdiv(rows, 128) * cdiv(c_out, 128) >= 2 * PROCESSORS:
            bm, warps = 128, 8 if rows >= 1 << 15 else 4
            programs = cdiv(rows, 128) * c_out // 256
            if blocks and c_out % 256 == 0 and 2 * programs > MOST_SHARES:
                bn, warps = 256, 8  # each row is gathered once, and no taps are shared out
    elif precision == "tf32":
        bm, bk, stages, warps = 64, _block_k(c_in, 32), 4 if shares > 2 else 3, 4
        if c_out > 128 and cdiv(rows, 128) * cdiv(c_out, 128) >= PROCESSORS:
            bm, stages = 128, 3
    elif precision == "tf32x3":
        # 128 columns are 4 to 7 % faster on an H100, from 40 thousand rows on, but spill on sm_80.
        bm, bn, bk, stages, warps = 64, min(bn, 64), _block_k(c_in, 32), 3, 4
    else:
        bm, bn, bk, stages, warps = 64, min(bn, 64), _block_k(c_in, 32), 2, 4
    if shares > 1:
        return GemmTile(bm, bn, bk, stages, warps, shares)
    turns = volume * cdiv(c_in, bk)
    splits = _splits(rows, bm, cdiv(c_out, bn), volume, turns)
    return GemmTile(bm, bn, bk, stages, warps, splits)


def narrow_tile(
    c_in: int, c_out: int, volume: int, dtype: torch.dtype, precision: str
) -> NarrowTile | None:
    """The tile for few input channels, or None where the masked GEMM is better."""
    if c_in > NARROW_CHANNELS or volume * c_in > NARROW_VOLUME or volume == 1:
        return None
    bn = min(max(next_power(c_out), 16), 64)
    if dtype == torch.float32 and precision != "tf32":
        return NarrowTile(64, bn, loop_step(64, dtype, precision), 4)
    # One turn, if that is wide enough: nothing to copy ahead, and 5 to 7 times as fast as two.
    return NarrowTile(64, bn, 128, 2)


def dense_tile(rows: int, c_in: int, c_out: int, device: torch.device) -> GemmTile:
    """The tile for a product of rows with one matrix of a half type: bytes decide, not FLOPs."""
    bn = min(max(next_power(c_out), 16), 128)
    bm = 128 if cdiv(rows, 128) * cdiv(c_out, bn) >= 2 * PROCESSORS else 64
    return _dense_tile(bm, bn, _block_k(c_in, 64), device)


@lru_cache(maxsize=256)
def _dense_tile(bm: int, bn: int, bk: int, device: torch.device) -> GemmTile:
    return fitting(GemmTile(bm, bn, bk, 3, bm // 16, 1), torch.float16, Limits.of(device))


def loop_step(block: int, dtype: torch.dtype, precision: str) -> int:
    """BK of a loop that may have a single turn.

    Then nothing is copied to shared memory, and plain float32 products keep both operands in
    registers: 32 columns of them spill 4 KB per thread.
    """
    return min(block, 16) if dtype == torch.float32 and precision == "ieee" else block


def grad_tile(
    pairs: int,
    c_in: int,
    c_out: int,
    dtype: torch.dtype,
    precision: str,
    volume: int = 0,
    device: torch.device | None = None,
) -> GradTile:
    """The tile for a weight gradient over at most ``pairs`` pairs of ``volume`` taps."""
    # So many are enough for every target of `shipped_grad_tile`; 4 BK are a multiple of 64.
    pairs = alike(pairs, 1 << 18)
    return _grad_tile(pairs, c_in, c_out, dtype, precision, volume, device, _tuned.generation())


@lru_cache(maxsize=4096)
def _grad_tile(
    pairs: int, c_in: int, c_out: int, dtype: torch.dtype, precision: str,
    volume: int, device: torch.device | None, generation: int,
) -> GradTile:  # fmt: skip
    shipped = shipped_grad_tile(pairs, c_in, c_out, dtype, precision)
    if device is None:
        return shipped
    shipped = fitting(shipped, dtype, Limits.of(device))
    bits = pairs.bit_length()
    name, measured = _measured(
        "wgrad", bits, c_in, c_out, volume, dtype, precision, device, generation
    )
    if measured is None and not _tuned.heard():
        return shipped

    def others() -> list[_tuned.Entry]:
        found = grad_tiles(shipped, pairs, c_in, c_out, dtype, Limits.of(device))
        return [tuple(tile) for tile in found]

    return GradTile(*_tuned.choose(name, device, shipped, others))


def shipped_grad_tile(
    pairs: int, c_in: int, c_out: int, dtype: torch.dtype, precision: str
) -> GradTile:
    """The tile without measurements of this machine."""
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


# ------------------------------------------------------------------ what a search may try
MOST_TRIED = 7  # tiles besides the shipped one: each costs a compilation of about a second

# (BM, BN, BK, stages, warps), before they are cut to the channels of a layer
_HALF_GEMM = (
    (64, 64, 64, 4, 4), (64, 128, 64, 3, 4), (64, 128, 32, 4, 4), (64, 256, 64, 3, 4),
    (128, 64, 64, 4, 4), (128, 64, 64, 3, 8), (128, 128, 64, 3, 8), (128, 128, 64, 4, 8),
    (128, 128, 32, 4, 4), (128, 256, 64, 3, 8), (128, 32, 32, 4, 4), (64, 32, 32, 3, 2),
)  # fmt: skip
_FULL_GEMM = (
    (64, 64, 32, 3, 4), (64, 64, 32, 4, 4), (64, 128, 32, 3, 4), (64, 128, 32, 4, 4),
    (64, 128, 16, 4, 4), (128, 64, 32, 3, 4), (128, 128, 32, 3, 8), (128, 128, 32, 3, 4),
    (128, 32, 32, 4, 4), (64, 32, 32, 3, 2),
)  # fmt: skip
_HALF_GRAD = (
    (64, 64, 64, 3, 4), (64, 128, 64, 3, 4), (64, 128, 32, 4, 4), (128, 64, 64, 3, 4),
    (128, 128, 64, 3, 8), (64, 256, 64, 3, 8), (128, 256, 64, 3, 8), (32, 128, 64, 3, 4),
    (64, 64, 32, 4, 2), (32, 64, 64, 3, 2),
)  # fmt: skip
_FULL_GRAD = (
    (64, 64, 32, 3, 2), (64, 64, 16, 4, 4), (32, 64, 32, 3, 4), (32, 128, 16, 4, 4),
    (32, 128, 32, 3, 4), (64, 128, 32, 3, 4), (32, 256, 32, 3, 8), (32, 256, 16, 3, 4),
)  # fmt: skip


class Limits(NamedTuple):
    """What one GPU can hold."""

    processors: int
    shared: int  # bytes of shared memory per program

    @staticmethod
    def of(device: torch.device) -> Limits:
        """Of a CUDA device; for Triton's interpreter on a CPU, those of an H100."""
        if device.type != "cuda":
            return Limits(PROCESSORS, 227 << 10)
        about = torch.cuda.get_device_properties(device)
        known = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}
        usual = 64 if torch.version.hip else known.get((about.major, about.minor), 99)
        shared = getattr(about, "shared_memory_per_block_optin", usual << 10)
        return Limits(about.multi_processor_count, shared)


BESIDE = 1024  # bytes of shared memory that a kernel may need besides its operands, at most


def _held(bm: int, bn: int, bk: int, stages: int, size: int) -> int:
    """Bytes of shared memory for operands of so many bytes a number."""
    return stages * (bm + bn) * bk * size + BESIDE


def _fits(bm: int, bn: int, bk: int, stages: int, warps: int, size: int, limits: Limits) -> bool:
    """Whether the buffers fit into shared memory and the sums into registers."""
    # A thread has 255 registers; beyond 128 for sums, addresses spill.
    return _held(bm, bn, bk, stages, size) <= limits.shared and bm * bn <= 128 * 32 * warps


def fitting(tile: _Tile, dtype: torch.dtype, limits: Limits) -> _Tile:
    """The tile, with fewer or shorter turns on their way where a GPU cannot hold these.

    Shipped tiles are those of an H100; most GPUs have less than half of its shared memory.
    """
    size = dtype.itemsize
    while _held(tile.BM, tile.BN, tile.BK, tile.stages, size) > limits.shared:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.BK > 16:
            tile = tile._replace(BK=tile.BK // 2)
        else:
            break
    return tile


REGISTERS = 1 << 16  # of a multiprocessor
PLENTY = 232  # of a thread


def registers(tile: GemmTile, dtype: torch.dtype, limits: Limits) -> int | None:
    """Most registers that a thread of a product may take; None: as many as the compiler likes.

    Left to itself the compiler spends instructions on saving registers, so that more programs
    stand beside each other. Where shared memory has room for two at most that gains nothing, and
    half types lose up to a fifth of the time. Measured on GPUs that read weights in blocks
    (`has_blocks`); on an A100 some products would spill.
    """
    if dtype == torch.float32:
        return None
    held = _held(tile.BM, tile.BN, tile.BK, tile.stages, dtype.itemsize)
    beside = max(limits.shared // held, 1)
    room = REGISTERS // (32 * tile.warps * beside)
    return PLENTY if beside <= 2 and room >= PLENTY else None


def _filled(programs: int, limits: Limits) -> float:
    """The share of the GPU that works, over the waves of a launch."""
    return programs / (cdiv(programs, limits.processors) * limits.processors)


def gemm_tiles(
    shipped: GemmTile, rows: int, c_in: int, c_out: int, volume: int, dtype: torch.dtype,
    precision: str, limits: Limits, shares: int = 1,
) -> list[GemmTile]:  # fmt: skip
    """Tiles worth timing, the shipped one first, then by the estimate of a cost model."""
    half = dtype != torch.float32
    size, widest = (2, 64) if half else (4, 32)
    found: dict[GemmTile, float] = {}

    def add(bm: int, bn: int, bk: int, stages: int, warps: int, splits: int) -> None:
        tile = GemmTile(bm, bn, bk, stages, warps, splits)
        cols = cdiv(c_out, bn)
        if _fits(bm, bn, bk, stages, warps, size, limits):
            filled = _filled(cdiv(rows, bm) * cols * splits, limits)
            # Taller tiles visit more taps than their rows have; small ones load more per product;
            # each split writes and reads a float32 copy of the output.
            work = cols * bn / c_out * (1.08 if bm > 64 and volume > 8 else 1.0)
            loads = 24 / bm + 24 / bn + (splits - 1) * 4 / c_in
            found.setdefault(tile, work * (1 + loads) / filled)

    for bm, bn, bk, stages, warps in _HALF_GEMM if half else _FULL_GEMM:
        if precision == "tf32x3" and (bm > 64 or bn > 64):
            continue  # registers run out
        bn = min(bn, max(next_power(c_out), 16))
        bk = min(bk, _block_k(c_in, widest))
        splits = _splits(rows, bm, cdiv(c_out, bn), volume, volume * cdiv(c_in, bk))
        add(bm, bn, bk, stages, warps, splits if shares == 1 else shares)
    for splits in (shipped.splits * 2, shipped.splits // 2):
        if shares == 1 and 1 <= splits <= max(min(8, volume // 2), 1):
            add(*shipped[:5], splits)
    found.pop(shipped, None)
    return [shipped, *sorted(found, key=found.__getitem__)[:MOST_TRIED]]


def grad_tiles(
    shipped: GradTile, pairs: int, c_in: int, c_out: int, dtype: torch.dtype, limits: Limits
) -> list[GradTile]:
    """Tiles worth timing, the shipped one first, then by the estimate of a cost model."""
    half = dtype != torch.float32
    size = 2 if half else 4
    ci, co = max(next_power(c_in), 16), max(next_power(c_out), 16)
    found: dict[GradTile, float] = {}

    def add(bm: int, bn: int, bk: int, stages: int, warps: int, waves: float) -> None:
        blocks = cdiv(c_in, bm) * cdiv(c_out, bn)
        target = int(waves * limits.processors / blocks)
        target = max(min(target, cdiv(pairs, 4 * bk)), 1)
        if _fits(bm, bn, bk, stages, warps, size, limits):
            tile = GradTile(bm, bn, bk, stages, warps, target)
            # Every pair is loaded once per block; each chunk is written and read in float32.
            work = blocks * bm * bn / (c_in * c_out)
            loads = 24 / bm + 24 / bn + 8 * target * ci * co / max(pairs * (ci + co), 1)
            found.setdefault(tile, work * (1 + loads))

    for bm, bn, bk, stages, warps in _HALF_GRAD if half else _FULL_GRAD:
        add(min(bm, ci), min(bn, co), bk, stages, warps, 2 if half else 4)
    blocks = cdiv(c_in, shipped.BM) * cdiv(c_out, shipped.BN)
    waves = shipped.target * blocks / limits.processors
    for scale in (2.0, 0.5):
        add(*shipped[:5], waves * scale)
    found.pop(shipped, None)
    return [shipped, *sorted(found, key=found.__getitem__)[:MOST_TRIED]]
