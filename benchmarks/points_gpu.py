"""Moves between points, voxels and grids on a GPU: each checked, then timed.

    python benchmarks/points_gpu.py                     # everything, 100 000 and 1 000 000 rows
    python benchmarks/points_gpu.py to_dense --rows 100000

One line per operation: the median time on the GPU, with the host out of the way and the L2 cache
flushed; the median time that the host needs for the call; the bytes that must move at least, per
second; for dense grids the time over that of writing such a grid once with zeros, and at the end
those grids that took more than LIMIT of it. The exit code is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchsparse import SparseTensor
from torchsparse.backend import GPUHashTable
from torchsparse.nn import functional as F
from torchsparse.nn.functional.norm import group_norm
from torchsparse.utils.quantize import sparse_quantize
from torchsparse.utils.to_dense import to_dense
from torchsparse.utils.voxelize import voxelize_points

FLUSH = 128 << 20  # bytes: more than twice the L2 cache of an H100
LIMIT = 1.3  # times the writing of a dense grid
# Of the largest entry, where sums may be in another order: they are in float32 on both sides, so
# a half type is off by one rounding on each.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class WrongResult(Exception):
    """A result is not that of the CPU, or another one when the call is repeated."""


@dataclass(frozen=True)
class Case:
    """A call, what it must agree with, and the bytes that it must read and write."""

    name: str
    run: Callable[[], Any]
    nbytes: int
    want: Callable[[], Any] | None = None  # on the CPU; None = checked by another case
    once: Callable[[], Any] | None = None  # the time to compare with
    rounded: bool = False  # sums in another order: see TOLERANCE; otherwise the same bits
    waits: bool = False  # the call waits for the device: only its whole duration means something


# ------------------------------------------------------------------ examples
def cloud(rows: int, extents: tuple[int, ...], seed: int = 0) -> Tensor:
    """Distinct voxels on two rough surfaces, sorted: [N, 4] int32, N is ``rows`` or a bit less."""
    generator = torch.Generator().manual_seed(seed)
    batch, *axes = extents
    columns = [torch.randint(0, n, (2 * rows,), generator=generator) for n in (batch, *axes[:2])]
    wave = (columns[1] / 37).sin() + (columns[2] / 23).cos() + 2
    z = wave * axes[2] / 5 + torch.randn(2 * rows, generator=generator) * axes[2] / 20
    columns.append(z.long().clamp(0, axes[2] - 1))
    coords = torch.unique(torch.stack(columns, 1), dim=0)
    keep = torch.randperm(len(coords), generator=generator)[:rows].sort().values
    return coords[keep].int()


def features(rows: int, channels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator).to(dtype)


def numbers(index: Tensor, dtype: torch.dtype) -> Tensor:
    """The same on every device, from -125 to 125: exact in each type, and gradients that a mean
    over 250 000 rows divides stay above what half types round to nothing."""
    return index.remainder(251).to(dtype) - 125


def both(x: Any, device: str) -> Any:
    """Nested tuples of tensors on another device."""
    if isinstance(x, Tensor):
        return x.detach().to(device)
    return tuple(both(y, device) for y in x) if isinstance(x, (tuple, list)) else x


def with_grad(f: Callable[..., Tensor], *args: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; all floating arguments get gradients.

    A push of ones would leave nothing of a norm's gradient, and gather ones from anywhere.
    """
    leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    out = f(*leaves)
    index = torch.arange(out.numel(), dtype=torch.int32, device=out.device)
    grad = numbers(index, out.dtype).view(out.shape)
    return lambda: torch.autograd.grad(f(*leaves), wanted, grad)


# ------------------------------------------------------------------ cases
def dense_cases(rows: int) -> Iterator[Case]:
    for extents, channels, dtype, times in (
        ((1, 1024, 1024, 32), 32, torch.float16, 1),  # 2 GiB
        ((1, 512, 512, 32), 64, torch.float16, 1),  # 1 GiB
        ((1, 512, 512, 32), 64, torch.float32, 1),
        ((4, 256, 256, 32), 16, torch.float16, 1),
        ((1, 1024, 1024, 40), 4, torch.float32, 1),
        ((1, 1024, 1024, 40), 3, torch.float16, 1),
        ((1, 1024, 1024, 40), 1, torch.float16, 1),  # cells of 2 bytes
        ((1, 1024, 1024, 40), 1, torch.float16, 2),
        ((1, 512, 512, 40), 1, torch.bfloat16, 1),
        ((1, 128, 128, 32), 64, torch.float16, 1),  # 64 MiB, dense
        ((1, 128, 128, 32), 64, torch.float16, 2),
        ((2, 128, 128, 16), 32, torch.float16, 1),
    ):
        coords = cloud(min(rows, math.prod(extents) // 4), extents)
        cells = math.prod(extents)
        share = len(coords) / cells
        if times > 1:  # every other voxel twice, as many rows as before
            coords = coords[: len(coords) // 2 * 2 : 2].repeat(2, 1)
        feats = features(len(coords), channels, dtype)
        f, c = feats.cuda(), coords.cuda()
        shape, size = (*extents, channels), feats.element_size()
        label = (
            f"{len(coords)} x {channels} {str(dtype)[6:]} in {'x'.join(map(str, extents))}: "
            f"{cells * channels * size / 1e6:.0f} MB, {share / times:.1%}"
            + ", each twice"
            * (times > 1)
        )
        yield Case(
            f"to_dense {label}",
            lambda f=f, c=c, e=extents: to_dense(f, c, e),
            math.prod(shape) * size + coords.nbytes + feats.nbytes,
            lambda f=feats, c=coords, e=extents: to_dense(f, c, e),
            lambda s=shape, d=dtype: torch.zeros(s, dtype=d, device="cuda"),
        )
        if channels == 64 and times == 1:
            yield Case(
                f"fwd+bwd  {label}",
                with_grad(lambda f, c, e=extents: to_dense(f, c, e), f, c),
                math.prod(shape) * size + 2 * coords.nbytes + 3 * feats.nbytes,
                lambda c=coords, s=shape, d=dtype: (pushed(c, s, d),),
            )


def pushed(coords: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `with_grad` pushes into the cells of ``coords`` of a grid.  [N, A] -> [N, C]."""
    cell = torch.zeros(len(coords), dtype=torch.int64)
    for column, extent in zip(coords.unbind(1), shape[:-1], strict=True):
        cell = cell * extent + column
    return numbers(cell[:, None] * shape[-1] + torch.arange(shape[-1]), dtype)


def point_cases(rows: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    voxels = rows // 3
    index = torch.randint(0, voxels, (rows,), generator=generator).int()
    counts = torch.bincount(index, minlength=voxels).int()
    around = torch.randint(-1, voxels, (rows, 8), generator=generator).int()
    shares = torch.rand(rows, 8, generator=generator)
    i, n, a, s = (t.cuda() for t in (index, counts, around, shares))
    for channels, dtype in ((64, torch.float16), (64, torch.float32), (4, torch.float32)):
        x, y = features(rows, channels, dtype), features(voxels, channels, dtype)
        f, v = x.cuda(), y.cuda()
        label = f"{rows} x {channels} {str(dtype)[6:]}"
        yield Case(
            f"spvoxelize      {label}",
            lambda f=f: F.spvoxelize(f, i, n),
            x.nbytes + y.nbytes + index.nbytes + counts.nbytes,
            lambda x=x: F.spvoxelize(x, index, counts),
            rounded=True,
        )
        yield Case(
            f"spvoxelize f+b  {label}",
            with_grad(lambda f: F.spvoxelize(f, i, n), f),
            2 * (x.nbytes + y.nbytes + index.nbytes + counts.nbytes),
            with_grad(lambda f: F.spvoxelize(f, index, counts), x),
            rounded=True,
        )
        yield Case(
            f"spdevoxelize    {label}",
            lambda v=v: F.spdevoxelize(v, a, s),
            y.nbytes + x.nbytes + around.nbytes + shares.nbytes,
            lambda y=y: F.spdevoxelize(y, around, shares),
            rounded=True,
        )
        yield Case(
            f"spdevoxelize f+b {label}",
            with_grad(lambda v, a, s: F.spdevoxelize(v, a, s), v, a, s),
            3 * y.nbytes + 2 * x.nbytes + 2 * around.nbytes + 3 * shares.nbytes,
            with_grad(lambda v, a, s: F.spdevoxelize(v, a, s), y, around, shares),
            rounded=True,
        )
    yield Case(
        f"spcount         {rows} in {voxels}",
        lambda: F.spcount(i, voxels), index.nbytes + counts.nbytes, lambda: counts,
    )  # fmt: skip
    batch = torch.arange(rows).div(rows / 4).int()
    b = batch.cuda()
    yield Case(
        f"spcount         {rows} in 4",
        lambda: F.spcount(b, 4), batch.nbytes, lambda: F.spcount(batch, 4),
    )  # fmt: skip
    xyz = 100 * torch.rand(rows, 3, generator=generator)
    p = xyz.cuda()
    yield Case(
        f"calc_ti_weights {rows}",
        lambda: F.calc_ti_weights(p, a, 2), xyz.nbytes + around.nbytes + shares.nbytes,
        lambda: F.calc_ti_weights(xyz, around, 2), rounded=True,
    )  # fmt: skip


def search_cases(rows: int) -> Iterator[Case]:
    coords = cloud(rows, (2, 1024, 1024, 64))
    offsets = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).int()
    hashes, shifted = F.sphash(coords), F.sphash(coords, offsets)
    c, o, h, q = (t.cuda() for t in (coords, offsets, hashes, shifted))
    n = len(coords)
    yield Case(
        f"sphash          {n} x 27",
        lambda: F.sphash(c, o), coords.nbytes + shifted.nbytes, lambda: shifted,
    )  # fmt: skip
    for name, few in (("1", slice(13, 14)), ("27", slice(None))):
        yield Case(
            f"sphashquery     {n} x {name}",
            lambda few=few: F.sphashquery(q[few], h),
            shifted[few].nbytes * 3 // 2 + hashes.nbytes,
            lambda few=few: F.sphashquery(shifted[few], hashes),
        )

    def filled() -> GPUHashTable:
        table = GPUHashTable(torch.zeros(2 * n, dtype=torch.int64, device=h.device),
                             torch.zeros(2 * n, dtype=torch.int32, device=h.device))  # fmt: skip
        table.insert_vals(h)
        return table

    table = filled()
    yield Case(f"insert_vals     {n} in {2 * n}", filled, n * 8 + 2 * n * 12)
    yield Case(
        f"lookup_vals     {n} in {2 * n}",
        lambda: table.lookup_vals(h)[:n], n * 12 + n * 12, lambda: torch.arange(1, n + 1).int(),
    )  # fmt: skip
    points = coords[:, 1:] * 0.05 + 0.001
    p = points.cuda()
    yield Case(
        f"sparse_quantize {n}",
        lambda: tuple(sparse_quantize(p, 0.1, return_index=True, return_inverse=True)),
        points.nbytes + n * 8,
        lambda: tuple(sparse_quantize(points, 0.1, return_index=True, return_inverse=True)),
        waits=True,
    )


def voxel_cases(rows: int) -> Iterator[Case]:
    coords = cloud(rows, (2, 1024, 1024, 64))
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 20, (len(coords),), generator=generator)
    points, feats = coords[:, 1:] * 0.05 + 0.001, features(len(coords), 4, torch.float32)
    p, f, y = points.cuda(), feats.cuda(), labels.cuda()
    kinds: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("mean", {"feats": feats}, {"feats": f}),
        ("max", {"feats": feats, "reduce": "max"}, {"feats": f, "reduce": "max"}),
        ("first", {"feats": feats, "reduce": "first"}, {"feats": f, "reduce": "first"}),
        ("majority", {"labels": labels}, {"labels": y}),
        ("mean, majority", {"feats": feats, "labels": labels}, {"feats": f, "labels": y}),
    )
    for name, more, moved in kinds:
        size = sum(t.nbytes for t in (points, *more.values()) if isinstance(t, Tensor))
        yield Case(
            f"voxelize_points {len(points)} {name}",
            lambda moved=moved: present(voxelize_points(p, 0.1, **moved)),
            size + 8 * len(points),
            lambda more=more: present(voxelize_points(points, 0.1, **more)),
            rounded=True,
            waits=True,
        )


def present(found: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(t for t in found if t is not None)


def sample_cases(rows: int) -> Iterator[Case]:
    batch = torch.arange(rows).div(rows / 4).int()
    coords = torch.stack([batch, *[torch.arange(rows).int()] * 3], 1)
    c = coords.cuda()
    for channels, dtype in ((64, torch.float16), (96, torch.float32)):
        x = features(rows, channels, dtype)
        f = x.cuda()
        label = f"{rows} x {channels} {str(dtype)[6:]}"
        for pool in (F.global_avg_pool, F.global_max_pool):
            run = lambda f, c, pool=pool: pool(SparseTensor(f, c), 4)  # noqa: E731
            yield Case(
                f"{pool.__name__} {label}",
                lambda f=f, run=run: run(f, c),
                x.nbytes + 4 * rows,
                lambda x=x, run=run: run(x, coords),
                rounded=True,
            )
            yield Case(
                f"{pool.__name__} f+b {label}",
                with_grad(run, f, c),
                (3 if pool is F.global_max_pool else 2) * x.nbytes + 8 * rows,
                with_grad(run, x, coords),
                rounded=True,
            )
        norm = lambda f, c: group_norm(SparseTensor(f, c), 8).feats  # noqa: E731
        yield Case(
            f"group_norm f+b  {label}",
            with_grad(norm, f, c),
            7 * x.nbytes + 8 * rows,
            with_grad(norm, x, coords),
            rounded=True,
            waits=True,
        )


def window_cases(rows: int) -> Iterator[Case]:
    """Local pools on maps that exist. Each neighbour counts, also those that the cache had."""
    coords = cloud(rows, (2, 1024, 1024, 64))
    n = len(coords)
    for size, stride in ((2, 2), (3, 2), (3, 1)):
        levels = [SparseTensor(torch.empty(n, 1, device=d), coords.to(d)) for d in ("cuda", "cpu")]
        levels[1].feats.fill_(1)
        counts = [F.sum_pool3d(level, size, stride).feats for level in levels][1]
        m, pairs, taps = len(counts), int(counts.double().sum()), size**3
        for channels, dtype in ((64, torch.float16), (64, torch.float32), (96, torch.float16)):
            x = features(n, channels, dtype)
            f, e = x.cuda(), channels * x.element_size()
            for name, pool in (("max", F.max_pool3d), ("avg", F.avg_pool3d)):

                def run(
                    level: SparseTensor, f: Tensor,
                    pool: Any = pool, size: int = size, stride: int = stride,
                ) -> Tensor:  # fmt: skip
                    there = SparseTensor(f, level.coords, level.stride)
                    there._caches = level._caches
                    return pool(there, size, stride).feats

                label = f"{name} {size} / {stride}, {n} to {m} x {channels} {str(dtype)[6:]}"
                forward = e * (pairs + m) + 4 * taps * m
                back = e * (pairs + n) + 4 * taps * n
                if name == "max":  # rows of the maxima are written, and read as often as values
                    back += 4 * channels * (pairs + m)
                yield Case(
                    f"pool     {label}", lambda f=f, run=run, x=levels[0]: run(x, f), forward,
                    lambda f=x, run=run, x=levels[1]: run(x, f),
                    rounded=name == "avg",
                )  # fmt: skip
                yield Case(
                    f"pool f+b {label}", with_grad(partial(run, levels[0]), f), forward + back,
                    with_grad(partial(run, levels[1]), x), rounded=True,
                )  # fmt: skip


CASES = {
    "to_dense": dense_cases,
    "points": point_cases,
    "search": search_cases,
    "voxels": voxel_cases,
    "samples": sample_cases,
    "windows": window_cases,
}


# ------------------------------------------------------------------ checking and timing
def check(case: Case) -> None:
    """The result agrees with the CPU, and has the same bits three times more.

    Raises:
        WrongResult: It does not.
    """
    first = case.run()
    if case.want is not None:
        compare(first, both(case.want(), "cuda"), case.rounded)
    if isinstance(first, (Tensor, tuple)):
        for _ in range(3):
            compare(case.run(), first, rounded=False)


def compare(got: Any, want: Any, rounded: bool) -> None:
    """Compare nested tuples of tensors.

    Raises:
        WrongResult: One is missing, of another type or shape, or off.
    """
    if isinstance(want, tuple):
        if not isinstance(got, tuple) or len(got) != len(want):
            raise WrongResult(f"{type(got).__name__} is not {len(want)} results")
        for a, b in zip(got, want, strict=True):
            compare(a, b, rounded)
        return
    if not isinstance(got, Tensor):
        raise WrongResult(f"{type(got).__name__} is not a tensor")
    if got.dtype != want.dtype or got.shape != want.shape:
        raise WrongResult(f"{got.dtype} {list(got.shape)} is not {want.dtype} {list(want.shape)}")
    if not rounded or not want.is_floating_point():
        if not torch.equal(got, want):
            raise WrongResult(f"{(got != want).sum().item()} of {got.numel()} numbers differ")
    elif want.numel():
        error = (got.double() - want.double()).abs().max().item()
        largest = want.double().abs().max().item()
        if not error <= TOLERANCE[want.dtype] * largest:
            raise WrongResult(f"off by {error:.2e}, largest entry {largest:.2e}")


def gpu_time(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds between events; the host is ahead of the device, the cache is cold."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host queues the call
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
        torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in pairs)[repeats // 2] / 1e3


def host_time(run: Callable[[], Any], repeats: int, wait: bool) -> float:
    """Median seconds of the call as the host sees it; with ``wait`` until the device is done."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if wait:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; returns the exit code."""
    parser = argparse.ArgumentParser(description="Moves between points, voxels and grids")
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(CASES)}; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a call")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("it needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'operation':<74}{'GPU us':>9}{'host us':>9}{'GB/s':>8}{'x write':>9}")
    slow: list[str] = []
    wrong = 0
    for rows in args.rows:
        for family in args.families or CASES:
            for case in CASES[family](rows):
                try:
                    check(case)
                except Exception as error:  # the other lines are still wanted
                    wrong += 1
                    print(f"{case.name:<74} WRONG: {type(error).__name__}: {error}"[:400])
                    continue
                host = host_time(case.run, args.repeats, case.waits)
                gpu = host if case.waits else gpu_time(case.run, args.repeats)
                times = gpu / gpu_time(case.once, args.repeats) if case.once else 0.0
                ratio = f"{times:9.2f}" if case.once else ""
                if times > LIMIT:
                    slow.append(f"{times:.2f}  {case.name}")
                rate = case.nbytes / gpu / 1e9
                print(
                    f"{case.name:<74}{gpu * 1e6:9.1f}{host * 1e6:9.1f}{rate:8.0f}{ratio}",
                    flush=True,
                )
                if args.profile:
                    with torch.profiler.profile() as profile:
                        case.run()
                        torch.cuda.synchronize()
                    for event in profile.events() or []:
                        if event.device_type.name == "CUDA":
                            print(f"    {event.device_time:8.1f} us  {event.name[:90]}")
    if "to_dense" in (args.families or CASES):
        print(f"{len(slow)} grids took more than {LIMIT} times their writing", *slow, sep="\n")
    if wrong:
        print(f"{wrong} results are wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
