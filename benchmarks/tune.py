"""What `torchsparse.tune` gains on scans that it has not seen, beside the modes of v2.1.

    PYTHONPATH=src python benchmarks/tune.py minkunet --device cuda --dtypes fp16 --seconds 150
    PYTHONPATH=src python benchmarks/tune.py centerpoint@scan.npz --device cuda --seconds 300
    PYTHONPATH=src python benchmarks/tune.py --summary one/tune-cuda.csv two/tune-cuda.csv
    PYTHONPATH=src python benchmarks/tune.py --scans tiny --dtypes fp32     # a trial on a CPU

Each network is tuned once per type, forward and backward together, on scans of some streets, and
timed on others: by default, with conv modes 1 and 2 set globally, and tuned. The four take turns.
Before that each must give what the default gives: output and gradients, or nothing is timed.
Of a file, the scans are variants: 99 % of its rows, shuffled. The exit code is 1 if a result is
wrong or the tuned network takes more than 1.02 times the best of the others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import engines, judging, oracle, scenes, timing
from benchmarks.cases import CASES, Case, tensor
from benchmarks.reports import read, write
from torchsparse import SparseTensor, _tuned
from torchsparse.datasets import TOP64
from torchsparse.inference import warmup
from torchsparse.nn import functional as F

WAYS = ("default", "mode 1", "mode 2", "tuned")
ALLOWED = 1.02  # of the best of the first three
# Of the gradients' length: it tells lost ones, not roundings. Those that differ open other
# rectifiers, which changes gradients far more than outputs.
GRADIENTS = {"fp32": 1e-2, "tf32": 0.25, "fp16": 0.25}
RESULTS = Path(__file__).parent / "results"
# A U-Net on 5 cm voxels, a detector on one frame of another sensor.
NETWORKS = {"minkunet": "street-fine", "centerpoint": "detector"}
SPECS = scenes.SPECS | {"detector": scenes.SceneSpec(TOP64, 0.1, (0,))}
CASE = ("network", "scene", "dtype", "mode")
COLUMNS = (
    "network", "dtype", "mode", "scene", "seed", "voxels", "clock", "default_ms", "mode1_ms",
    "mode2_ms", "tuned_ms", "of_best", "gain", "tuning_s", "device",
)  # fmt: skip


def scan(scene: str, seed: int, folder: Path) -> scenes.Scene:
    """One scan of a street, kept in a file; or a variant of a given file."""
    if scene.endswith(".npz"):
        return scenes.variant(scenes.load(scene), seed)
    path = folder / f"{scene}-{seed}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = scenes.simulate(SPECS[scene]._replace(seeds=(seed,)))
        np.savez_compressed(path, coords=made.coords, feats=made.feats)
    return scenes.load(str(path))


@contextmanager
def way(name: str, network: nn.Module, configs: dict[str, Any], device: Any) -> Iterator[None]:
    """Let one of the `WAYS` hold."""
    tuned = name == "tuned"
    hidden = {} if tuned else dict.fromkeys(_tuned.entries(device))
    for layer, config in configs.items():
        conv: Any = network.get_submodule(layer)
        conv._config = config if tuned else None
    F.set_conv_mode(int(name[-1]) if name.startswith("mode") else 0)
    try:
        with _tuned.trying(hidden, device):
            yield
    finally:
        F.set_conv_mode(0)


def cast(dtype: str, device: torch.device) -> Any:
    """The autocast of a type."""
    half = dtype == "fp16"
    return torch.autocast(device.type, torch.float16 if half else None, enabled=half)


def step_of(
    network: nn.Module, x: SparseTensor, dtype: str, mode: str, device: torch.device
) -> Callable[[], SparseTensor]:
    """One call with new maps: inference, or forward, loss and backward; it gives the output."""
    scale = judging.SCALE.get(dtype, 1.0)

    def step() -> SparseTensor:
        with torch.set_grad_enabled(mode == "train"), cast(dtype, device):
            out = network(SparseTensor(x.feats, x.coords, x.stride, x.spatial_range))
        feats = out.feats  # computed when somebody asks
        if mode == "train":
            network.zero_grad(set_to_none=True)
            (feats.float().square().mean() * scale).backward()
        return out

    return step


def check(
    step: Callable[[], SparseTensor], network: nn.Module, dtype: str, configs: dict[str, Any],
    device: torch.device,
) -> None:  # fmt: skip
    """Put what each way gives beside what the default gives.

    Raises:
        oracle.WrongResult: They differ.
    """
    engine = engines.Torchsparse()
    want: judging.Answer | None = None
    exact: dict[str, Tensor] = {}
    for name in WAYS:
        network.zero_grad(set_to_none=True)
        with way(name, network, configs, device):
            out = step()
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        if want is None:  # the default
            want, exact = judging.by_site(engine.sites(out), engine.features(out)), grads
        away = judging.distance(engine, out, want)
        if not away <= judging.AGREE[dtype]:
            raise oracle.WrongResult(f"{name} is off by {away:.1e} from {WAYS[0]}")
        if grads.keys() != exact.keys():
            raise oracle.WrongResult(f"{name} has other gradients than {WAYS[0]}")
        away = judging.apart(joined(grads), joined(exact)) if exact else 0.0
        if not away <= GRADIENTS[dtype]:
            raise oracle.WrongResult(
                f"the gradients of {name} are off by {away:.1e} of their length from {WAYS[0]}"
            )
    network.zero_grad(set_to_none=True)


def joined(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])


def compile_ways(
    network: nn.Module, x: SparseTensor, dtype: str, configs: dict[str, Any], device: torch.device
) -> None:
    """Compile what a step in any way launches, many kernels at once."""
    for name in WAYS if device.type == "cuda" else ():
        with way(name, network, configs, device), cast(dtype, device):
            warmup(network, x)


def times(
    step: Callable[[], Any], network: nn.Module, configs: dict[str, Any], device: torch.device,
    seconds: float, rounds: int = 3,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Milliseconds by way and clock, the best of some rounds."""

    def wall() -> float:
        return statistics.median(timing.times(step, device, seconds / rounds))

    def kernels() -> float:
        return timing.kernels(step, 3)["kernel_ms"]

    # Once a profiler has listened, each launch costs the host more: walls come first.
    clocks = {"wall": wall} | ({"kernels": kernels} if device.type == "cuda" else {})
    found: dict[str, dict[str, float]] = {name: {} for name in WAYS}
    for clock, read_clock in clocks.items():
        for _ in range(rounds):
            for name in WAYS:
                with way(name, network, configs, device):
                    spent = read_clock()
                found[name][clock] = min(spent, found[name].get(clock, spent))
    return found


def tuned(
    network: nn.Module, seen: list[SparseTensor], tag: str, dtype: str, options: argparse.Namespace
) -> tuple[dict[str, Any], float]:
    """What the tuner chose, and its seconds without the first compilation."""
    device = seen[0].coords.device
    _tuned.forget()
    with cast(dtype, device):
        warmup(network.eval(), seen[0])  # the tuner runs the network as it is
    start = time.perf_counter()
    configs = torchsparse.tune(
        network,
        seen,
        enable_fp16=dtype == "fp16",
        save_dir=str(options.out / "tune"),
        tune_tag=tag,
        force_retune=True,
        tune_with_bwd=True,
        verbose=options.verbose,
        seconds=options.search,
    )
    return configs, time.perf_counter() - start


def judge(
    case: Case, scene: str, dtype: str, device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Tune one network in one type and time it, on at least one other scan.

    Raises:
        oracle.WrongResult: A way gives something else than the default.
    """
    begun = time.perf_counter()
    torchsparse.backends.allow_tf32 = dtype == "tf32"
    network = judging.calibrated(case, scan(scene, 0, options.scenes), device)
    name = Path(scene).stem

    def input_of(seed: int) -> SparseTensor:
        return tensor(scan(scene, seed, options.scenes), case.in_channels, device, torch.float32)

    seen = [input_of(seed) for seed in range(options.tuned_on)]
    tag = f"{case.name}-{name}-{dtype}"
    configs, took = tuned(network, seen, tag, dtype, options)
    print(
        f"{case.name} {name} {dtype}: tuned on {len(seen)} scans in {took:.1f} s, "
        f"{time.perf_counter() - begun:.1f} s so far"
    )
    for seed in range(100, 100 + options.judged_on):
        start = time.perf_counter()
        x = input_of(seed)
        for mode in ("infer", "train"):
            network.train(mode == "train")
            compile_ways(network, x, dtype, configs, device)
            compiled = time.perf_counter() - start
            step = step_of(network, x, dtype, mode, device)
            try:
                check(step, network, dtype, configs, device)
            except oracle.WrongResult as error:
                raise oracle.WrongResult(f"{tag} {mode} {seed}: {error}") from error
            found = times(step, network, configs, device, options.each)
            about = {
                "network": case.name, "dtype": dtype, "mode": mode, "scene": name, "seed": seed,
                "voxels": len(x.coords), "tuning_s": took, "device": _name(device),
            }  # fmt: skip
            yield from rows_of(about, found)
            if options.verbose:
                spent = time.perf_counter() - start
                print(f"  {mode} {seed}: {spent:.1f} s, until compiled {compiled:.1f} s")
        now = time.perf_counter()
        if options.seconds and now + 0.7 * (now - start) > begun + options.seconds:
            left = 99 + options.judged_on - seed
            print(*[f"  {left} scans left out: no time"] * (left > 0), sep="\n", end="")
            return


def rows_of(about: dict[str, Any], found: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """A row for each clock."""
    for clock in found["tuned"]:
        default, one, two, tuned = (found[name][clock] for name in WAYS)
        yield about | {
            "clock": clock, "default_ms": default, "mode1_ms": one, "mode2_ms": two,
            "tuned_ms": tuned, "of_best": tuned / min(default, one, two),
            "gain": default / tuned,
        }  # fmt: skip


LINE = (
    "{network:<12}{dtype:<5}{mode:<6}{seed:>5}{voxels:>9}  {clock:<8}{default_ms:>9.3f}"
    "{mode1_ms:>9.3f}{mode2_ms:>9.3f}{tuned_ms:>9.3f}{of_best:>9.3f}{gain:>8.3f}"
)
HEAD = (
    f"{'network':<12}{'type':<5}{'mode':<6}{'scan':>5}{'voxels':>9}  {'clock':<8}{'default':>9}"
    f"{'mode 1':>9}{'mode 2':>9}{'tuned':>9}{'of best':>9}{'gain':>8}"
)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[dict[str, Any]]) -> int:
    """Print what is gained, network by network and in all; returns the exit code."""
    worst = 0.0
    for clock in dict.fromkeys(row["clock"] for row in rows):
        here = [row for row in rows if row["clock"] == clock]
        cases: dict[str, list[dict[str, Any]]] = {}
        for row in here:
            cases.setdefault(" ".join(row[n] for n in CASE), []).append(row)
        for case, mine in [*cases.items(), (f"all {len(here)}", here)]:
            of_best = [float(row["of_best"]) for row in mine]
            gains = [float(row["gain"]) for row in mine]
            print(
                f"{clock}, {case}: geometric mean of the gains {mean(gains):.3f}; of the best "
                f"other way {mean(of_best):.3f} in the mean, {max(of_best):.3f} at worst"
            )
            worst = max(of_best)  # of all by the last clock: on a GPU the kernels', not the host's
    return int(worst > ALLOWED)


def written(rows: Iterator[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Print and write rows as they come."""
    found = []
    for row in rows:
        found.append(row)
        print(LINE.format(**row), flush=True)
        write(path, COLUMNS, found)
    return found


def pairs(names: list[str], scans: str | None) -> list[tuple[Case, str]]:
    """(network, scene) of NETWORK or NETWORK@FILE.

    Raises:
        KeyError: An unknown network.
    """
    found = []
    for text in names or NETWORKS:
        name, _, scene = text.partition("@")
        found.append((CASES[name], scene or scans or NETWORKS[name]))
    return found


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("networks", nargs="*", help=f"NETWORK or NETWORK@FILE.npz; {', '.join(NETWORKS)}")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--dtypes", nargs="+", choices=("fp16", "tf32", "fp32"))
    add("--scans", choices=SPECS, help="in place of the network's own kind")
    add("--scenes", type=Path, default=scenes.FOLDER, help="folder of the files")
    add("--tuned-on", type=int, default=3, help="scans")
    add("--judged-on", type=int, default=3, help="other scans, at most")
    add("--seconds", type=float, help="for each network and type, about, compilation included; "
        "one scan is judged at least")  # fmt: skip
    add("--search", type=float, help="seconds of tuning, about; 40, or a third of --seconds")
    add("--each", type=float, default=1.0, help="seconds per way and step, about")
    add("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    add("--summary", type=Path, nargs="+", help="only sum up these CSV files")
    add("--verbose", action="store_true", help="show what the tuner chose, and the seconds spent")
    options = parser.parse_args(argv)
    try:
        options.pairs = pairs(options.networks, options.scans)
    except KeyError as error:
        parser.error(f"unknown network {error}; known are {', '.join(NETWORKS)}")
    if options.search is None:
        options.search = min(40.0, options.seconds / 3) if options.seconds else 40.0
    if options.device.type == "cuda" and options.device.index is None:
        options.device = torch.device("cuda", 0)
    gpu = options.device.type == "cuda"
    options.dtypes = options.dtypes or (["fp16", "tf32"] if gpu else ["fp32"])
    return options


@contextmanager
def on_its_own() -> Iterator[None]:
    """Neither helped by earlier tuning of this machine nor remembered."""
    before = os.environ.get(_tuned.VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_tuned.VARIABLE] = folder
        try:
            yield
        finally:
            os.environ.pop(_tuned.VARIABLE)
            if before is not None:
                os.environ[_tuned.VARIABLE] = before
            _tuned.forget()


def main(argv: list[str] | None = None) -> int:
    """Tune, time, print and write; returns the exit code."""
    options = options_of(argv)
    if options.summary:
        return summary([row for path in options.summary for row in read(path)])

    wrong: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for (case, scene), dtype in itertools.product(options.pairs, options.dtypes):
            try:
                yield from judge(case, scene, dtype, options.device, options)
            except oracle.WrongResult as error:  # the other networks are still wanted
                wrong.append(f"wrong, not timed: {error}")
                print(wrong[-1], flush=True)

    print(HEAD)
    with on_its_own():
        slow = summary(written(rows(), options.out / f"tune-{options.device.type}.csv"))
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return int(slow or bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
