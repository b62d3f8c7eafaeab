"""Time layers and networks of this library on one device.

    python benchmarks/run.py                                  # the default set, some minutes
    python benchmarks/run.py minkunet --scene street-fine --mode train
    python benchmarks/run.py --device cuda

Each case is first checked against a dense float64 convolution on a small crop; where they
disagree, no time is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import torchsparse
from benchmarks import oracle, scenes
from benchmarks.cases import CASES, LAYERS, Case, counting, fresh, result, tensor

DEFAULT = (*LAYERS, "minkunet", "resnet21d")
MODES = ("infer", "train")
RESULTS = Path(__file__).parent / "results"
# Rows of a result, in the order of the file.
COLUMNS = (
    "case", "mode", "maps", "scene", "voxels", "gflop", "median_ms", "min_ms", "gflop_per_s",
    "share_of_matmul", "peak_mb", "repeats", "threads", "device", "torch", "torchsparse",
)  # fmt: skip
HEAD = (
    f"{'case':<17}{'mode':<7}{'maps':<8}{'GFLOP':>8}{'median ms':>11}{'min ms':>9}"
    f"{'GFLOP/s':>9}{'of matmul':>11}{'peak MB':>9}"
)
LINE = (
    "{case:<17}{mode:<7}{maps:<8}{gflop:>8.2f}{median_ms:>11.1f}{min_ms:>9.1f}"
    "{gflop_per_s:>9.1f}{share_of_matmul:>11.0%}{peak_mb:>9.0f}"
)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(step: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of repeated calls: one to warm up, then 3 (2 if they take more than three
    seconds each) to 50 within about ``seconds``."""
    start = time.perf_counter()
    step()
    synchronize(device)
    least = 3 if time.perf_counter() - start < 3 else 2
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < end and len(found) < 50):
        start = time.perf_counter()
        step()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def matmul_rate(device: torch.device, seconds: float = 0.3) -> float:
    """GFLOP/s of a float32 product of 1024 x 1024 matrices: what the machine gives at best."""
    a = torch.randn(1024, 1024, device=device)
    out = torch.empty_like(a)
    best = min(times(lambda: torch.mm(a, a, out=out), device, seconds))
    return 2 * 1024**3 / best / 1e6


class PeakMemory:
    """The most memory in use at once since `restart`, MB (of the process, or of the GPU)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():  # Linux: 5 = reset the high-water mark
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # not allowed: the peak is then that of the whole run
                pass

    def read(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")
        if status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return int(lines["VmHWM"].split()[0]) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    case: Case, mode: str, scene: scenes.Scene, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Time one case: with its kernel maps built in every call, and with maps from the cache."""
    torch.manual_seed(0)
    network = case.build().to(device).train(mode == "train")
    x = tensor(scene, case.in_channels, device, torch.float32)
    with torch.no_grad(), counting(network) as flops:
        network(x)  # also fills the cache of x
    # Backward costs one product for the kernels and one for the inputs.
    gflop = sum(flops) / 1e9 * (3 if mode == "train" else 1)
    memory = PeakMemory(device)
    rows = []
    for maps in ("new", "cached"):

        def step(keep: bool = maps == "cached") -> None:
            if mode == "infer":
                with torch.inference_mode():
                    network(fresh(x, keep))
                return
            network.zero_grad(set_to_none=True)
            out = result(network(fresh(x, keep, requires_grad=True)))
            out.square().mean().backward()

        memory.restart()
        found = times(step, device, seconds)
        rows.append(
            {
                "case": case.name, "mode": mode, "maps": maps, "voxels": len(scene.coords),
                "gflop": gflop, "median_ms": statistics.median(found), "min_ms": min(found),
                "gflop_per_s": gflop / statistics.median(found) * 1e3,
                "peak_mb": memory.read(), "repeats": len(found),
            }
        )  # fmt: skip
    return rows


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on besides the program."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "threads": torch.get_num_threads(),
        "device": name,
        "torch": torch.__version__,
        "torchsparse": torchsparse.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    """Check, time, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--scene", default="street", choices=scenes.SPECS)
    parser.add_argument("--scenes", type=Path, default=scenes.FOLDER, help="folder of the files")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement, about")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known are {', '.join(CASES)}")
    device, about = options.device, machine(options.device)
    torchsparse.backends.allow_tf32 = False
    scene = scenes.load(options.scene, options.scenes)
    small = scenes.crop(scene)
    rate = matmul_rate(device)
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}: matmul "
        f"{rate:.0f} GFLOP/s; scene {options.scene}, {len(scene.coords)} voxels"
    )
    print(HEAD)
    table = []
    for name in options.cases or DEFAULT:
        case = CASES[name]
        rate = max(rate, matmul_rate(device))  # the best so far: machines have slow moments
        torch.manual_seed(0)
        network = case.build().to(device)
        try:
            oracle.check(network, tensor(small, case.in_channels, device, torch.float32))
        except oracle.WrongResult as error:
            print(f"{name}: wrong on a crop of {len(small.coords)} voxels, not timed: {error}")
            return 1
        for mode in MODES if options.mode == "both" else (options.mode,):
            for row in measure(case, mode, scene, device, options.seconds):
                row |= about | {"scene": options.scene}
                row["share_of_matmul"] = row["gflop_per_s"] / rate
                table.append(row)
                print(LINE.format(**row), flush=True)
    path = options.out / f"{device.type}-{options.scene}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
