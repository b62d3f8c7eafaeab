"""Time layers and networks of this library on one device, beside SpConv if it is there.

    python benchmarks/run.py                                  # the default set, some minutes
    python benchmarks/run.py minkunet --scene street-fine --mode train
    python benchmarks/run.py --device cuda --dtypes fp16 tf32 --fresh
    python benchmarks/run.py minkunet --scene path/to/scan.npz --libraries torchsparse spconv

Each case is first checked against float64: where this library disagrees, no time is printed and
the exit code is 1; where the other one does, it is left out.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import torchsparse
from benchmarks import engines, floors, judging, oracle, scenes, timing
from benchmarks.cases import CASES, LAYERS, Case, counting, tensor
from benchmarks.judging import calibrated, check_sites, distance, truth
from benchmarks.reports import machine, number, read, write

DEFAULT = (*LAYERS, "minkunet", "centerpoint")
MODES = ("infer", "train")
RESULTS = Path(__file__).parent / "results"
# Rows of a result, in the order of the file. Empty: not measured on this device.
COLUMNS = (
    "case", "library", "mode", "maps", "dtype", "scene", "voxels", "density", "gflop", "mb",
    "wall_ms", "min_ms", "gpu_ms", "clock", "kernel_ms", "launches", "floor_ms",
    "share_of_floor", "tflop_per_s", "peak_mb", "repeats", "copy_gb_per_s", "matmul_tflop_per_s",
    "threads", "device", "torch", "triton", "version",
)  # fmt: skip
HEAD = (
    f"{'case':<17}{'library':<12}{'mode':<6}{'maps':<7}{'type':<5}{'GFLOP':>8}{'wall ms':>9}"
    f"{'gpu ms':>9}{'kernels':>9}{'calls':>6}{'floor ms':>9}{'of floor':>9}{'peak MB':>9}"
)


def line(row: dict[str, Any]) -> str:
    numbers = (
        ("gflop", "8.2f"), ("wall_ms", "9.3f"), ("gpu_ms", "9.3f"), ("kernel_ms", "9.3f"),
        ("launches", "6.0f"), ("floor_ms", "9.3f"), ("share_of_floor", "9.0%"),
        ("peak_mb", "9.0f"),
    )  # fmt: skip
    words = f"{row['case']:<17}{row['library']:<12}{row['mode']:<6}{row['maps']:<7}"
    return f"{words}{row['dtype']:<5}" + "".join(number(row, *n) for n in numbers)


# ------------------------------------------------------------------ measuring
class Subject:
    """One case in one library and one dtype, on one scene.

    Layers and inference have weights of the dtype; networks train with float32 weights under
    autocast.
    """

    def __init__(
        self, engine: Any, case: Case, network: nn.Module, scene: scenes.Scene, dtype: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.engine, self.case, self.dtype = engine, case, dtype
        engine.allow_tf32(dtype == "tf32")
        floors.allow_tf32(dtype == "tf32")
        self.single = hasattr(network, "kernel")  # one convolution: its map can be timed alone
        self.floating, self.device = floors.DTYPES[dtype], device
        self.network = engine.adopt(network).to(device, self.floating)
        x = tensor(scene, case.in_channels, device, self.floating)
        self.feats, self.coords = x.feats, x.coords

    def infer(self) -> Any:
        with torch.no_grad():
            return self.network.eval()(self.engine.start(self.feats, self.coords))

    def steps(self, mode: str) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What to time: with new maps in every call, with kept ones, the map alone."""
        training = mode == "train"
        network, engine = self.network.train(training), self.engine
        mixed = training and self.case.name not in LAYERS and self.floating != torch.float32
        if mixed:
            network.float()
        cast = torch.autocast(self.device.type, self.floating, enabled=mixed)
        with torch.no_grad(), cast:
            kept = engine.keep(network, engine.start(self.feats, self.coords))

        def call(maps: Any) -> None:
            if not training:
                with torch.inference_mode():
                    engine.features(network(engine.start(self.feats, self.coords, maps)))
                return  # computed when asked for, so they were asked for
            engines.training_step(engine, network, self.feats, self.coords, cast, maps)

        yield "new", lambda: call(None)
        if kept is not None:
            yield "kept", lambda: call(kept)
        if self.single:
            with engine.maps_alone(network, self.feats, self.coords, training) as step:
                yield "only", step


def measure(
    subject: Subject, mode: str, works: list[floors.Work], rates: floors.Rates,
    device: torch.device, seconds: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each way to time a subject."""
    engine, dtype, training = subject.engine, subject.dtype, mode == "train"
    for maps, step in subject.steps(mode):
        row: dict[str, Any] = {
            "case": subject.case.name, "library": engine.name, "mode": mode, "maps": maps,
            "dtype": dtype, "voxels": len(subject.coords), "density": works[0].density,
            "version": engine.version, "copy_gb_per_s": rates.copy / 1e9,
            "matmul_tflop_per_s": rates.matmul[dtype] / 1e12,
        }  # fmt: skip
        row |= timing.measure(step, device, seconds, graph=engine.captures and maps == "kept")
        if maps != "only":
            if row.get("launches") == 0:
                raise oracle.WrongResult(f"{subject.case.name}, {dtype}: a step launches nothing")
            # Bursts of calls hold the gaps in which a GPU waits for the host: kernels do not.
            spent = row["gpu_ms"] if row.get("clock") == "graph" else row.get("kernel_ms")
            spent = spent or row["wall_ms"]
            flops = floors.total_flops(works, training)
            row |= {
                "gflop": flops / 1e9, "mb": floors.total_bytes(works, dtype, training) / 1e6,
                "floor_ms": rates.floor_ms(works, dtype, training),
                "tflop_per_s": flops / spent / 1e9,
            }  # fmt: skip
            row["share_of_floor"] = row["floor_ms"] / spent
        yield row


# ------------------------------------------------------------------ the program
def run_case(
    case: Case, scene: scenes.Scene, rates: floors.Rates, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Check and time one case in every dtype and library.

    Raises:
        oracle.WrongResult: This library is wrong.
    """
    device: torch.device = options.device
    torchsparse.backends.allow_tf32 = False
    network = calibrated(case, scene, device)
    small = scenes.crop(scene)
    for dtype in options.dtypes:  # layer by layer, forward and backward
        floating = floors.DTYPES[dtype]
        torchsparse.backends.allow_tf32 = dtype == "tf32"
        ours = engines.Torchsparse().adopt(network).to(floating)
        oracle.check(ours, tensor(small, case.in_channels, device, floating), dtype)
    torchsparse.backends.allow_tf32 = False
    check_sites(network, tensor(scene, case.in_channels, device, torch.float32))
    want = truth(case, network, scene, device)
    with torch.no_grad(), counting(network) as works:
        network(tensor(scene, case.in_channels, device, torch.float32))
    network.cpu()
    for dtype in options.dtypes:
        for name in options.libraries:
            engine = engines.ENGINES[name]()
            try:
                subject = Subject(engine, case, network, scene, dtype, device)
                error = distance(engine, subject.infer(), want)
                if not error <= judging.AGREE[dtype]:
                    raise oracle.WrongResult(f"{dtype} is off by {error:.1e} of the largest entry")
            except Exception as error:
                _forgive(error, case, name, dtype)
                continue
            for mode in options.mode:
                try:
                    yield from measure(subject, mode, works, rates, device, options.seconds)
                except Exception as error:
                    _forgive(error, case, name, f"{dtype} {mode}")


def _forgive(error: Exception, case: Case, library: str, what: str) -> None:
    """What another library cannot do is a result too."""
    if library == "torchsparse":
        raise error
    print(f"{case.name} {library} {what}: {type(error).__name__}: {str(error)[:150]}", flush=True)


def in_fresh_processes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every case, dtype, mode and library in a process of its own, so that no memory and no
    algorithm chosen for another stays behind."""
    wanted = (options.cases or DEFAULT, options.dtypes, options.mode, options.libraries)
    for case, dtype, mode, library in itertools.product(*wanted):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, __file__, case, "--dtypes", dtype, "--mode", mode, "--libraries",
                library, "--scene", options.scene, "--scenes", str(options.scenes), "--device",
                str(options.device), "--seconds", str(options.seconds), "--out", folder,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise oracle.WrongResult((done.stdout + done.stderr)[-500:])
            for text in done.stdout.splitlines():
                if text.startswith(f"{case} {library} "):  # what it cannot do
                    print(text, flush=True)
            for path in Path(folder).glob("*.csv"):
                yield from read(path)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--scene", default="street", help=f"{', '.join(scenes.SPECS)} or a .npz")
    parser.add_argument("--scenes", type=Path, default=scenes.FOLDER, help="folder of the files")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtypes", nargs="+", choices=floors.DTYPES, help="all on a GPU")
    parser.add_argument("--libraries", nargs="+", choices=engines.ENGINES,
                        help="on a GPU all that are there")  # fmt: skip
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement, about")
    parser.add_argument("--fresh", action="store_true", help="a process for every measurement")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known are {', '.join(CASES)}")
    gpu = options.device.type == "cuda"
    options.dtypes = options.dtypes or (list(floors.DTYPES) if gpu else ["fp32"])
    options.libraries = options.libraries or (engines.importable() if gpu else ["torchsparse"])
    return options


def main(argv: list[str] | None = None) -> int:
    """Check, time, print and write; returns the exit code."""
    options = options_of(argv)
    device: torch.device = options.device
    # SpConv keeps every border site of its extent; so must this library beside it.
    torchsparse.backends.infer_spatial_range = False
    scene = scenes.load(options.scene, options.scenes)
    name = Path(options.scene).stem
    table = []
    if options.fresh:
        rows = in_fresh_processes(options)
    else:
        rates = floors.measure_rates(device, options.dtypes)
        products = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in rates.matmul.items())
        print(f"{machine(device)['device']}, {torch.get_num_threads()} threads, torch "
              f"{torch.__version__}: copy {rates.copy / 1e9:.0f} GB/s, matmul {products}; scene "
              f"{name}, {len(scene.coords)} voxels")  # fmt: skip
        cases = (CASES[n] for n in options.cases or DEFAULT)
        rows = (row for case in cases for row in run_case(case, scene, rates, options))
    print(HEAD)
    try:
        for row in rows:
            row = machine(device) | {"scene": name} | row
            table.append(row)
            print(line(row), flush=True)
    except oracle.WrongResult as error:
        print(f"wrong, not timed: {error}")
        return 1
    path = options.out / f"{device.type}-{name}.csv"
    write(path, COLUMNS, table)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
