"""What negative coordinates cost when maps are built: checked, then timed.

    python benchmarks/negative.py --device cuda
    python benchmarks/negative.py --device cuda --scene street-fine --rounds 9

One cloud in three ways: as it is with negative coordinates forbidden, as it is with them allowed,
and moved below zero with them allowed. All must give the same map, which a search in a dict judges
on some of its sites. ``kernels`` is the sum of the
durations of all kernels, copies and fills of a call that builds the map of a layer and what its
forward pass reads of it (`run.py`, maps "only"); ``wall`` is until the device has finished. Ways
take turns, medians count. Ratios are to the first way; allowing may cost 5 % at most, or the exit
code is 1, as for a wrong map.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import engines, oracle, scenes
from benchmarks.reports import machine
from benchmarks.timing import kernels, times
from torchsparse import nn as spnn
from torchsparse import tensor
from torchsparse.nn import functional as F

LIMIT = 1.05
SAMPLE = 200  # sites
LAYERS = {
    "submanifold 3x3x3": {"kernel_size": 3},
    "strided 2x2x2 / 2": {"kernel_size": 2, "stride": 2},
    "strided 3x3x3 / 2": {"kernel_size": 3, "stride": 2, "padding": 1},
}


class Way(NamedTuple):
    """A cloud, and whether negative coordinates are allowed."""

    name: str
    coords: Tensor  # [N, 4] int32
    moved: Tensor  # [4] int32, by how much
    allowed: bool


@contextmanager
def allowing(allowed: bool) -> Iterator[None]:
    before = tensor.get_allow_negative_coordinates()
    tensor.set_allow_negative_coordinates(allowed)
    try:
        yield
    finally:
        tensor.set_allow_negative_coordinates(before)


def ways(coords: Tensor) -> list[Way]:
    """The three; moved by a multiple of every stride, so that maps stay the same."""
    still = torch.zeros_like(coords[0])
    down = -(coords.amax(0) // 64 + 1) * 64
    down[0] = 0
    return [
        Way("forbidden", coords, still, False),
        Way("allowed", coords, still, True),
        Way("allowed, negative", coords + down, down, True),
    ]


def check(layer: dict[str, Any], found: list[Way]) -> int:
    """Compare the maps; the rows of the output.

    Raises:
        oracle.WrongResult: They differ.
    """
    sizes: dict[str, Any] = {"stride": 1, "padding": 0} | layer
    maps = []
    for way in found:
        with allowing(way.allowed):
            kmap = F.build_kernel_map(way.coords, len(way.coords), **sizes)
        step = torch.tensor([1, *kmap.geometry.stride], dtype=torch.int32, device=way.moved.device)
        maps.append((kmap["out_in_map"], kmap["coords"] - way.moved // step))
    for way, one in zip(found, maps):
        for name, got, want in zip(("neighbours", "sites"), one, maps[0]):
            if not torch.equal(got, want):
                raise oracle.WrongResult(f"{way.name}: the {name} are others")
    neighbors, sites = maps[0]
    search(found[0].coords.cpu(), neighbors.cpu(), sites.cpu(), sizes)
    return len(maps[0][1])


def search(coords: Tensor, neighbors: Tensor, sites: Tensor, sizes: dict[str, Any]) -> None:
    """Compare a map with a search in a dict, for `SAMPLE` of its sites and of its inputs.

    Args:
        coords: [N, 4], not negative.
        neighbors: [M, K], -1 for none.
        sites: [M, 4].
        sizes: Of the layer: the same along each axis.

    Raises:
        oracle.WrongResult: They differ.
    """
    size, stride, padding = sizes["kernel_size"], sizes["stride"], sizes["padding"]
    before = padding if stride > 1 else size // 2 * (size % 2)
    taps = list(itertools.product(range(size), repeat=3))
    if size % 2:  # the first axis runs fastest
        taps = [tap[::-1] for tap in taps]
    rows = {tuple(site): row for row, site in enumerate(coords.tolist())}
    places = {tuple(site): row for row, site in enumerate(sites.tolist())}
    if len(places) != len(sites) or (stride == 1 and places != rows):
        raise oracle.WrongResult("the sites are not those of a search")
    for (batch, *place), m in few(places):
        want = [
            rows.get((batch, *(n * stride - before + t for n, t in zip(place, tap))), -1)
            for tap in taps
        ]
        if neighbors[m].tolist() != want or max(want) < 0:
            raise oracle.WrongResult(f"the neighbours of {place} are not those of a search")
    # Each tap of an input has a site within the borders of a dense convolution.
    extent = (coords.amax(0)[1:] + 1).tolist()
    last = [(n + 2 * padding - size) // stride for n in extent]
    for (batch, *place), _ in few(rows) if stride > 1 else ():
        for tap in taps:
            above = [n + padding - t for n, t in zip(place, tap)]
            site = [n // stride for n in above]
            inside = all(0 <= n <= most for n, most in zip(site, last))
            if inside and not any(n % stride for n in above) and (batch, *site) not in places:
                raise oracle.WrongResult(f"no site {site}, which {place} reaches")


def few(found: dict[Any, int]) -> Iterator[tuple[Any, int]]:
    """Some, evenly."""
    return itertools.islice(found.items(), 0, None, max(1, len(found) // SAMPLE))


def measure(
    layer: dict[str, Any], found: list[Way], device: torch.device, rounds: int, seconds: float
) -> list[tuple[float, float]]:
    """Microseconds of the kernels (NaN on a CPU) and of the wall, for each way."""
    engine = engines.Torchsparse()
    conv = spnn.Conv3d(1, 1, **layer).to(device)
    feats = torch.ones(len(found[0].coords), 1, device=device)

    def turns(clock: Callable[[Callable[[], Any]], float]) -> list[float]:
        """Medians of a clock, for each way."""
        spent: list[list[float]] = [[] for _ in found]
        for _ in range(rounds):
            for way, one in zip(found, spent):
                with ExitStack() as stack:
                    stack.enter_context(allowing(way.allowed))
                    step = stack.enter_context(engine.maps_alone(conv, feats, way.coords, False))
                    one.append(1e3 * clock(step))
        return [statistics.median(one) for one in spent]

    # Once a profiler has listened, each launch costs the host more: walls come first.
    walls = turns(lambda step: statistics.median(times(step, device, seconds / rounds)))
    if device.type == "cpu":
        return [(float("nan"), wall) for wall in walls]
    return list(zip(turns(lambda step: kernels(step, 20)["kernel_ms"]), walls))


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; returns the exit code."""
    parser = argparse.ArgumentParser(description="Maps of negative coordinates beside others")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--scene", default="street", help=f"{', '.join(scenes.SPECS)} or a .npz")
    parser.add_argument("--scenes", type=Path, default=scenes.FOLDER, help="folder of the files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per way and layer, about")
    options = parser.parse_args(argv)
    device: torch.device = options.device
    coords = torch.from_numpy(scenes.load(options.scene, options.scenes).coords).to(device)
    coords[:, 1:] -= coords[:, 1:].amin(0)
    found = ways(coords)
    print(f"{machine(device)['device']}, torch {torch.__version__}; {len(coords)} voxels")
    print(f"{'map':<20}{'outputs':>8}  {'negative coordinates':<22}{'kernels us':>11}{'ratio':>7}"
          f"{'wall us':>10}{'ratio':>7}")  # fmt: skip
    worst = 0.0
    for name, layer in LAYERS.items():
        try:
            outputs = check(layer, found)
        except oracle.WrongResult as error:
            print(f"{name}: wrong, not timed: {error}")
            return 1
        spent = measure(layer, found, device, options.rounds, options.seconds)
        for way, (gpu, wall) in zip(found, spent):
            ratios = gpu / spent[0][0], wall / spent[0][1]
            worst = max(worst, ratios[device.type == "cpu"])
            print(f"{name:<20}{outputs:>8}  {way.name:<22}{gpu:>11.1f}{ratios[0]:>7.3f}"
                  f"{wall:>10.1f}{ratios[1]:>7.3f}", flush=True)  # fmt: skip
    print(f"at most {worst:.3f} times as long; {LIMIT} is allowed")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
