"""Call every kernel of the library on small inputs, for compute-sanitizer to watch.

    python tests/gpu/sanitize.py                                       # compiles what is missing
    python tests/gpu/sanitize.py --under "compute-sanitizer --tool memcheck --error-exitcode 1"

Sizes lie around the edges of tiles. Parts run beside each other, in processes of their own. At the
end it names the Triton kernels that were never launched; that is a failure too, for then nobody
watched them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pkgutil
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import torchsparse
from tests.gpu.layers import DTYPES, KINDS, Kind, run, surface
from torchsparse import SparseTensor, operators
from torchsparse import nn as spnn
from torchsparse._ops.inputs import place_input
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.backend import GPUHashTable
from torchsparse.nn import functional as F
from torchsparse.nn.utils import get_kernel_offsets
from torchsparse.utils import to_dense, voxelize_points
from torchsparse.utils.quantize import sparse_quantize

CHANNELS = ((1, 1), (4, 16), (5, 7), (32, 64), (64, 96), (128, 128), (256, 256))
ROWS = (1, 2, 70, 129)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kind_of_layer(name: str, gpu: torch.device) -> None:
    """Dtypes, dataflows and numbers of rows, each against a middling choice of the others."""
    for dtype, flow in itertools.product(DTYPES, (0, 1, 2)):
        run(KINDS[name], (32, 64), dtype, gpu, rows=200, dataflow=flow)
    for rows in ROWS:
        run(KINDS[name], (5, 7), "fp16", gpu, rows=rows)


def widths(gpu: torch.device) -> None:
    """Channels and modes."""
    for channels in CHANNELS:
        for dtype in ("fp16", "tf32"):
            run(Kind(3), channels, dtype, gpu, rows=300)
    for mode, kmap in itertools.product((0, 1, 2), ("hashmap", "hashmap_on_the_fly")):
        F.set_conv_mode(mode)
        F.set_kmap_mode(kmap)
        run(Kind(3), (32, 64), "fp16", gpu, rows=300)
        run(Kind(3, 2, 1), (32, 64), "fp16", gpu, rows=300)
    F.set_conv_mode(0)
    F.set_kmap_mode("hashmap_on_the_fly")
    coords = torch.from_numpy(surface(129)).to(gpu)
    for channels, dtype in itertools.product((5, 64, 130), FLOATS):
        feats = torch.ones(129, channels, device=gpu, dtype=dtype, requires_grad=True)
        conv = spnn.Conv3d(channels, channels, 3, groups=channels).to(gpu, dtype)
        conv(SparseTensor(feats, coords)).feats.sum().backward()


def maps(gpu: torch.device) -> None:
    """Ranges, both rules of sites, negative and given sites, sites too far apart for 32 bits."""
    coords = torch.from_numpy(surface(300)).to(gpu)
    for mode in ("spconv", "minkowski"):
        for spatial_range in (None, (2, 64, 64, 24)):
            kmap = F.build_kernel_map(
                coords, 300, 3, 2, 1, spatial_range=spatial_range, downsample_mode=mode
            )
            for view in kmap:
                _ = kmap[view]
    far = coords.clone()
    far[0, 1:] = 2**20 - 1
    torchsparse.tensor.set_allow_negative_coordinates(True)
    for cloud in (far, coords - torch.tensor([0, 30, 30, 10], device=gpu, dtype=torch.int32)):
        x = SparseTensor(torch.ones(len(cloud), 8, device=gpu), cloud)
        weight = torch.ones(27, 8, 8, device=gpu)
        coarse = F.conv3d(x, weight, 3, None, 2, 1)
        F.conv3d(coarse, weight, 3, None, 2, 1, transposed=True)
        F.conv3d(x, weight, 3, coordinates=coords)
    torchsparse.tensor.set_allow_negative_coordinates(False)
    # So many sites that their bins are counted in two steps.
    generator = torch.Generator(gpu).manual_seed(0)
    cloud = torch.randint(0, 256, (60_000, 4), generator=generator, device=gpu)
    cloud = torch.unique(cloud % torch.tensor([2, 256, 256, 32], device=gpu), dim=0).int()
    x = SparseTensor(torch.ones(len(cloud), 8, device=gpu), cloud)
    F.conv3d(x, torch.ones(27, 8, 8, device=gpu), 3, None, 2, 1)


def dimensions(gpu: torch.device) -> None:
    """One, two and four axes: keys, taps and unpacking are other kernels."""
    sites = torch.from_numpy(surface(300)).to(gpu)
    for ndim, conv in ((1, spnn.Conv1d), (2, spnn.Conv2d), (4, spnn.Conv4d)):
        columns = torch.cat([sites, sites[:, 3:] % 5], 1)[:, : 1 + ndim]
        coords = torch.unique(columns, dim=0)
        feats = torch.ones(len(coords), 8, device=gpu, requires_grad=True)
        net = torch.nn.Sequential(
            conv(8, 8, 3), conv(8, 8, 2, 2), conv(8, 8, 2, 2, transposed=True)
        )
        net.to(gpu)
        for _ in range(3):  # maps of the second and third are built together
            net(SparseTensor(feats, coords)).feats.sum().backward()


def windows(gpu: torch.device) -> None:
    """Pools over windows, and back."""
    for rows, dtype in itertools.product(ROWS, FLOATS):
        coords = torch.from_numpy(surface(rows)).to(gpu)
        feats = torch.ones(len(coords), 24, device=gpu, dtype=dtype, requires_grad=True)
        for size, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
            x = SparseTensor(feats, coords)
            top, where = F.max_pool3d(x, size, stride, padding, return_indices=True)
            total = F.sum_pool3d(x, size, stride, padding).feats.sum() + top.feats.sum()
            (total + F.avg_pool3d(x, size, stride, padding).feats.sum()).backward()
            top.feats = top.feats.detach().requires_grad_()
            if stride > 1:
                F.unpool3d(top, size, stride, padding).feats.sum().backward()
                F.max_unpool3d(top, where, size, stride, padding).feats.sum().backward()


def points(gpu: torch.device) -> None:
    """Voxels and points: hash, query, count, voxelize, devoxelize, dense, quantize, tables."""
    for rows in ROWS:
        coords = torch.from_numpy(surface(rows)).to(gpu)
        hashed = F.sphash(coords)
        corners = F.sphash(coords, get_kernel_offsets(2, 1, 1, device=str(gpu)))
        index = F.sphashquery(corners, hashed).t().contiguous()
        shares = F.calc_ti_weights(coords[:, 1:].float() + 0.25, index, 1)
        voxel = (torch.arange(3 * rows, device=gpu) % rows).int()
        counts = F.spcount(voxel, rows)
        for dtype, c in itertools.product(FLOATS, (1, 5, 64, 130)):
            feats = torch.ones(3 * rows, c, device=gpu, dtype=dtype, requires_grad=True)
            mean = F.spvoxelize(feats, voxel, counts)
            out = F.spdevoxelize(mean, index.int(), shares.to(dtype).requires_grad_())
            out.sum().backward()
            grid = to_dense(mean.detach().requires_grad_(), coords, (2, 64, 64, 24))
            grid.sum().backward()
            crowded = coords % torch.tensor([2, 8, 8, 8], device=gpu, dtype=torch.int32)
            to_dense(mean.detach(), crowded, (2, 8, 8, 8))
            to_dense(mean.detach()[:, :0], coords, (2, 64, 64, 24))  # cells alone
        clouds = (
            coords[:, 1:],
            coords[:, 1:].double() / 3,
            torch.cat([coords[:, 1:].half()] * 300),
        )
        for cloud in clouds:
            sparse_quantize(cloud, (0.1, 1, 3))
            ids = torch.arange(len(cloud), device=gpu)
            voxelize_points(cloud[:, :2], 0.7, labels=ids % 5, batch=ids % 3)
        table = GPUHashTable(2 * rows)
        sites = coords[:, [1, 2, 3, 0]].contiguous()
        table.insert_coords(sites)
        table.lookup_coords(sites, (3, 3, 3), (1, 1, 1), 27)
        table = GPUHashTable(rows)
        table.insert_vals(hashed)
        table.lookup_vals(hashed)


def rows_of_samples(gpu: torch.device) -> None:
    """Pools, norms, crops, sums of tensors, bird's-eye views."""
    bev = (
        spnn.ToBEVReduction(2),
        spnn.ToBEVHeightCompression(8, (64, 64, 24), dim=2),
        spnn.ToBEVConvolution(8, 16, 24, dim=2),
        spnn.ToDenseBEVConvolution(8, 16, (64, 64, 24), dim=2),
    )
    for rows, dtype in itertools.product(ROWS, FLOATS):
        coords = torch.from_numpy(surface(rows)).to(gpu)

        def fresh() -> SparseTensor:
            feats = torch.ones(len(coords), 8, device=gpu, dtype=dtype, requires_grad=True)  # noqa: B023
            return SparseTensor(feats, coords, 1, (2, 64, 64, 24))  # noqa: B023

        def back(value: SparseTensor | Tensor) -> None:
            feats: Tensor = value.feats if isinstance(value, SparseTensor) else value
            feats.sum().backward()

        back(F.global_avg_pool(fresh()))
        back(F.global_max_pool(fresh(), 2))
        for module in (spnn.GroupNorm(2, 8), spnn.InstanceNorm(8), spnn.ReLU(), *bev):
            back(module.to(gpu, dtype)(fresh()))
        if rows > 1:
            norm = spnn.BatchNorm(8, momentum=None).to(gpu, dtype)
            back(norm(fresh()))
            back(spnn.ReLU(True)(norm(fresh()) + fresh()))
        back(torchsparse.cat([fresh(), fresh()]))
        back(fresh() + fresh())
        back(F.spcrop(fresh(), (0, 0, 0), (40, 40, 40)))
        other = SparseTensor(fresh().feats, coords + 1)
        back(torchsparse.generative_add(fresh(), other))
        back(operators.mul(fresh(), other))
        operators.intersection(fresh(), other)
        operators.prune(fresh(), coords[:, 1] % 2 == 0)
        vectors = torch.ones(2, 8, device=gpu, dtype=dtype)
        back(operators.broadcast_add(fresh(), vectors))


def networks(gpu: torch.device) -> None:
    """A whole forward and backward pass, where one layer's leftovers meet the next."""
    coords = torch.from_numpy(surface(1200)).to(gpu)  # so many that rows are sorted
    for network in (SparseResUNet42, SparseResNet21D):
        model = network(width_multiplier=0.5).to(gpu)
        for _ in range(2):  # maps of the second are built together
            with torch.autocast("cuda", torch.float16):
                out = model(SparseTensor(torch.ones(len(coords), 4, device=gpu), coords))
            out[-1].feats.float().square().mean().backward()
        with torch.inference_mode():
            model.eval().half()(
                SparseTensor(torch.ones(len(coords), 4, device=gpu).half(), coords)
            )


def inputs(gpu: torch.device) -> None:
    """Rows placed where a graph reads them: fewer and more than before, of 2 and of 4 bytes."""
    for dtype, channels in itertools.product((torch.float16, torch.float32), (3, 4)):
        into = (
            torch.empty(400, 4, dtype=torch.int32, device=gpu),
            torch.empty(400, channels, dtype=dtype, device=gpu),
        )
        count = torch.empty(1, dtype=torch.int64, device=gpu)
        for rows, filled in ((0, 400), (129, 400), (256, 129), (400, 256), (399, 400)):
            coords = torch.from_numpy(surface(rows)).to(gpu)
            feats = torch.ones(len(coords), channels, dtype=dtype, device=gpu)
            place_input(coords, feats, *into, count, filled)


PARTS: dict[str, Callable[[torch.device], None]] = {
    **{name: partial(kind_of_layer, name) for name in KINDS},
    **{
        f.__name__: f
        for f in (widths, maps, dimensions, windows, points, rows_of_samples, networks, inputs)
    },
}


def kernels() -> dict[str, bool]:
    """The library's Triton kernels, and whether this process has launched them."""
    try:
        jit = import_module("triton").runtime.jit.JITFunction
        home = import_module("torchsparse._triton")
    except ImportError:
        return {}
    found: dict[str, bool] = {}
    for info in pkgutil.walk_packages(home.__path__, home.__name__ + "."):
        for name, value in vars(import_module(info.name)).items():
            if isinstance(value, jit) and name.endswith("_kernel"):
                caches = value.device_caches.values()
                found[f"{value.module}.{name}"] = any(len(cache[0]) for cache in caches)
    return found


def watch(part: str) -> None:
    """Run a part here, and print `kernels` as the last line."""
    gpu = torch.device("cuda", 0)
    PARTS[part](gpu)
    torch.cuda.synchronize(gpu)
    torchsparse.backends.check_errors()
    print(json.dumps(kernels()))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--under", default="", help="command that each process is started with")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    if options.part:
        watch(options.part)
        return 0

    def child(part: str) -> subprocess.CompletedProcess[str]:
        command = [*shlex.split(options.under), sys.executable, __file__, "--part", part]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed: list[str] = []
    launched: dict[str, bool] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for part, result in zip(PARTS, pool.map(child, PARTS)):
            lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
            if result.returncode or not lines:
                failed.append(part)
                print(f"{part}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
                continue
            print(f"{part}: passed", flush=True)
            for name, done in json.loads(lines[-1]).items():
                launched[name] = launched.get(name, False) or done
    missed = sorted(name for name, done in launched.items() if not done)
    print(f"{len(launched) - len(missed)} of {len(launched)} Triton kernels were launched")
    for name in missed:
        print(f"never launched: {name}")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
