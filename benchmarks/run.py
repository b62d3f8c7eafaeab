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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import engines, floors, judging, oracle, scenes, timing
from benchmarks.cases import CASES, LAYERS, Case, tensor
from benchmarks.judging import calibrated
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
    f"{'gpu ms':>9}{'clock':>7}{'kernels':>9}{'calls':>6}{'floor ms':>9}{'of floor':>9}"
    f"{'peak MB':>9}"
)


def line(row: dict[str, Any]) -> str:
    numbers = (
        ("kernel_ms", "9.3f"), ("launches", "6.0f"), ("floor_ms", "9.3f"),
        ("share_of_floor", "9.0%"), ("peak_mb", "9.0f"),
    )  # fmt: skip
    words = f"{row['case']:<17}{row['library']:<12}{row['mode']:<6}{row['maps']:<7}"
    first = (("gflop", "8.2f"), ("wall_ms", "9.3f"), ("gpu_ms", "9.3f"))
    start = f"{words}{row['dtype']:<5}" + "".join(number(row, *n) for n in first)
    return f"{start}{row.get('clock') or '-':>7}" + "".join(number(row, *n) for n in numbers)


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
        self.engine, self.case, self.original, self.dtype = engine, case, network, dtype
        engine.allow_tf32(dtype == "tf32")
        floors.allow_tf32(dtype == "tf32")
        self.single = hasattr(network, "kernel")  # one convolution: its map can be timed alone
        self.floating, self.device = floors.DTYPES[dtype], device
        self.scale = judging.SCALE.get(dtype, 1.0)
        x = tensor(scene, case.in_channels, device, self.floating)
        self.feats, self.coords = x.feats, x.coords

    def steps(self, mode: str) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What to time: with new maps in every call, with kept ones, the map alone.

        The first two return the output and, in training, the gradient of the input.
        """
        training, engine = mode == "train", self.engine
        mixed = training and self.case.name not in LAYERS and self.floating != torch.float32
        network = engine.adopt(self.original).train(training)
        network = network.to(self.device, torch.float32 if mixed else self.floating)
        self.network: nn.Module = network
        cast = torch.autocast(self.device.type, self.floating, enabled=mixed)

        def call(maps: Any) -> tuple[Any, Tensor | None]:
            if not training:
                with torch.inference_mode():
                    output = network(engine.start(self.feats, self.coords, maps))
                    engine.features(output)  # computed when asked for, so they were asked for
                return output, None
            return engines.training_step(
                engine, network, self.feats, self.coords, cast, maps, self.scale
            )

        yield "new", lambda: call(None)
        with torch.no_grad(), cast:  # now: the peak of new maps is without these
            kept = engine.keep(network, engine.start(self.feats, self.coords))
        if kept is not None:
            yield "kept", lambda: call(kept)
        if self.single:
            with engine.maps_alone(network, self.feats, self.coords, training) as step:
                yield "only", step

    def judge(self, found: tuple[Any, Tensor | None], want: judging.Truth) -> None:
        """What a step returned, and the gradients that it left behind.

        Raises:
            oracle.WrongResult: They are not the truth's.
        """
        output, gradient = found
        judging.judge_output(self.engine, output, want.answer, self.dtype)
        if want.gradient is None:
            return
        parts = {"gradient": [] if gradient is None else [gradient]}
        parts["parameter"] = judging.gradients(self.network)
        unscaled = {name: [g.double() / self.scale for g in part] for name, part in parts.items()}
        alone = self.case.name in LAYERS  # no ReLU that a rounding could turn
        limits = judging.OTHERS_AGREE if alone else judging.ASTRAY
        judging.judge_gradients(self.engine, unscaled, want, self.dtype, limits)


class Task(NamedTuple):
    """A case that was found right layer by layer, and its truths."""

    case: Case
    network: nn.Module  # on the CPU
    scene: scenes.Scene
    truths: dict[str, judging.Truth]  # by mode
    works: list[floors.Work]

    def subject(self, library: str, dtype: str, device: torch.device) -> Subject:
        engine = engines.ENGINES[library]()
        return Subject(engine, self.case, self.network, self.scene, dtype, device)


Row = dict[str, Any]


def clocked(
    task: Task, library: str, dtype: str, mode: str, rates: floors.Rates,
    options: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    """A row for each way to time a case, as far as a clock can fill it; judged first."""
    device, works, training = options.device, task.works, mode == "train"
    subject = task.subject(library, dtype, device)
    engine = subject.engine
    for maps, step in subject.steps(mode):
        row: Row = {
            "case": task.case.name, "library": engine.name, "mode": mode, "maps": maps,
            "dtype": dtype, "voxels": len(subject.coords), "density": works[0].density,
            "version": engine.version, "copy_gb_per_s": rates.copy / 1e9,
            "matmul_tflop_per_s": rates.matmul[dtype] / 1e12,
        }  # fmt: skip
        if maps != "only":
            subject.judge(step(), task.truths[mode])
            row |= {
                "gflop": floors.total_flops(works, training) / 1e9,
                "mb": floors.total_bytes(works, dtype, training) / 1e6,
                "floor_ms": rates.floor_ms(works, dtype, training),
            }
        yield row | timing.walls(step, device, options.seconds)


def profiled(
    task: Task, library: str, dtype: str, mode: str, rows: list[Row], device: torch.device
) -> Iterator[Row]:
    """The same rows with what the device did; the same steps once more."""
    if device.type != "cuda":
        yield from map(beside_floor, rows)
        return
    subject = task.subject(library, dtype, device)
    for (maps, step), row in zip(subject.steps(mode), rows):
        row |= timing.on_gpu(step, graph=subject.engine.captures and maps == "kept")
        if maps != "only" and not row["launches"]:
            raise oracle.WrongResult(f"{task.case.name}, {dtype}: a step launches nothing")
        yield beside_floor(row)


def beside_floor(row: Row) -> Row:
    """Of a GPU the kernels, for every library: other clocks may hold gaps."""
    if row["maps"] != "only":
        spent = row.get("kernel_ms") or row["wall_ms"]
        row["tflop_per_s"] = row["gflop"] / spent
        row["share_of_floor"] = row["floor_ms"] / spent
    return row


# ------------------------------------------------------------------ the program
def prepare(case: Case, scene: scenes.Scene, options: argparse.Namespace) -> Task:
    """Check the layers of a case in every dtype, and find its truths.

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
    truths = {}
    works: list[floors.Work] = []
    for mode in options.mode:
        truths[mode], works = judging.truth(case, network, scene, mode, device)
    return Task(case, network.cpu(), scene, truths, works)


def run_cases(
    cases: Iterable[Case], scene: scenes.Scene, rates: floors.Rates, options: argparse.Namespace
) -> Iterator[Row]:
    """Check and time every case in every dtype and library.

    On a GPU all walls are taken before the first step is profiled, so that no library is timed
    before and another after it.

    Raises:
        oracle.WrongResult: This library is wrong.
    """
    device: torch.device = options.device
    waiting = []
    for case in cases:
        task = prepare(case, scene, options)
        for what in itertools.product(options.libraries, options.dtypes, options.mode):
            rows: list[Row] = []
            with forgiving(case, *what):
                rows += clocked(task, *what, rates, options)
            if device.type == "cuda":
                waiting.append((task, what, rows))
            else:
                yield from profiled(task, *what, rows, device)
    for task, what, rows in waiting:
        found: list[Row] = []
        with forgiving(task.case, *what):
            found += profiled(task, *what, rows, device)
        yield from found


@contextmanager
def forgiving(case: Case, library: str, dtype: str, mode: str) -> Iterator[None]:
    """What another library cannot do is a result too."""
    try:
        yield
    except Exception as error:
        if library == "torchsparse":
            raise
        what = f"{case.name} {library} {dtype} {mode}"
        print(f"{what}: {type(error).__name__}: {str(error)[:150]}", flush=True)


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
        rows = run_cases(cases, scene, rates, options)
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
