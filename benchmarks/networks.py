"""Whole networks from raw voxel coordinates, beside SpConv: time, and where it goes.

    python benchmarks/networks.py minkunet@street centerpoint@scan.npz --device cuda
    python benchmarks/networks.py minkunet --scene street room --dtypes fp16 --modes infer
    python benchmarks/networks.py minkunet --device cuda --fresh --kernels 12
    python benchmarks/networks.py minkunet --device cuda --cold

Three variants of a scan take turns, so that every call builds its kernel maps. Each library, type
and way is first compared with this library in float64: ours is not timed when it is wrong, and the
exit code is 1; another library that is wrong is left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import torchsparse
from benchmarks import accounts, cold, engines, floors, scenes, timing
from benchmarks.cases import NETWORKS, Case
from benchmarks.oracle import WrongResult
from benchmarks.reports import machine, number, read, write
from benchmarks.tasks import (
    VARIANTS,
    Inputs,
    Subject,
    Task,
    judge,
    prepare,
    start,
)
from torchsparse._ops import dispatch

DEFAULT = ("minkunet", "centerpoint")
MODES = ("infer", "train")
WAYS = ("eager", "graphed", "frozen", "nowait")
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "network", "scene", "mode", "dtype", "library", "way", "voxels", "gflop", "error",
    "gradient_error", "parameter_error", "to_eager", "gradient_to_eager", "parameter_to_eager",
    "to_itself", "wall_ms", "min_ms", "repeats", "gpu_ms", "launches", "host_ms", "replay_ms",
    "replay_kernels_ms", "replay_nodes",
    *(f"{name}_ms" for name in accounts.GROUPS), "floor_ms", "share_of_floor", "peak_mb",
    "reserved_mb", "remarks", "copy_gb_per_s", "matmul_tflop_per_s", "threads", "device", "torch",
    "triton", "version",
)  # fmt: skip
CASE = ("network", "scene", "mode", "dtype")
HEAD = (
    f"{'network':<14}{'scene':<17}{'mode':<6}{'type':<5}{'library':<12}{'way':<8}{'error':>8}"
    f"{'wall ms':>9}{'min ms':>9}{'gpu ms':>9}{'calls':>6}{'host ms':>9}{'maps':>8}{'conv':>8}"
    f"{'elem':>8}{'other':>8}{'floor':>8}{'of floor':>9}{'peak MB':>9}"
)
NUMBERS = (
    ("error", "8.0e"), ("wall_ms", "9.3f"), ("min_ms", "9.3f"), ("gpu_ms", "9.3f"),
    ("launches", "6.0f"), ("host_ms", "9.3f"), ("maps_ms", "8.3f"), ("convolution_ms", "8.3f"),
    ("elementwise_ms", "8.3f"), ("other_ms", "8.3f"), ("floor_ms", "8.3f"),
    ("share_of_floor", "9.0%"), ("peak_mb", "9.0f"),
)  # fmt: skip


def words(row: dict[str, Any]) -> str:
    return f"{row['network']:<14}{row['scene'][:16]:<17}{row['mode']:<6}{row['dtype']:<5}"


def line(row: dict[str, Any]) -> str:
    start = f"{words(row)}{row['library']:<12}{row['way']:<8}"
    remarks = f"  {row['remarks']}" if row.get("remarks") else ""
    return start + "".join(number(row, *n) for n in NUMBERS) + remarks


def joined(table: list[dict[str, Any]]) -> Iterator[str]:
    """Each way of this library beside the other one; a ratio above 1 says that ours is faster."""
    yield (
        f"{'network':<14}{'scene':<17}{'mode':<6}{'type':<5}{'way':<8}{'wall ms':>9}{'gpu ms':>9}"
        f"{'spconv wall':>13}{'gpu':>9}{'ratio wall':>12}{'gpu':>7}"
    )
    others = {tuple(row[n] for n in CASE): row for row in table if row["library"] == "spconv"}
    for row in table:
        if row["library"] != "torchsparse":
            continue
        other = others.get(tuple(row[n] for n in CASE), {})
        pair = {f"other_{n}": other.get(n) for n in ("wall_ms", "gpu_ms")}
        ratios = {
            f"ratio_{n}": other[n] / row[n]
            for n in ("wall_ms", "gpu_ms")
            if other.get(n) and row.get(n)
        }
        both = row | pair | ratios
        forms = (
            ("wall_ms", "9.3f"), ("gpu_ms", "9.3f"), ("other_wall_ms", "13.3f"),
            ("other_gpu_ms", "9.3f"), ("ratio_wall_ms", "12.2f"), ("ratio_gpu_ms", "7.2f"),
        )  # fmt: skip
        mark = f"  spconv: {other['remarks']}" if other.get("remarks") else ""
        yield f"{words(row)}{row['way']:<8}" + "".join(number(both, *f) for f in forms) + mark


# ------------------------------------------------------------------ measuring
def clock(
    subject: Subject, timed: list[Inputs], seconds: float, phases: timing.Phases
) -> dict[str, Any]:
    """Wall times and memory."""
    device, graph = subject.device, subject.call
    captures = getattr(graph, "captures", 0)
    step = in_turn(subject, timed)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    memory = timing.PeakMemory(device)
    memory.restart()
    with phases("time"):
        found = timing.times(step, device, seconds)
    row: dict[str, Any] = {
        "wall_ms": statistics.median(found), "min_ms": min(found), "repeats": len(found),
        "peak_mb": memory.read(),
    }  # fmt: skip
    if device.type == "cuda":
        row["reserved_mb"] = torch.cuda.max_memory_reserved(device) / 2**20
    if subject.engine.name == "torchsparse":
        torchsparse.backends.check_errors()
    again = getattr(graph, "captures", 0) - captures
    if again:
        row["remarks"] = f"captured anew {again} times while it was timed"
    return row


def profile(
    subject: Subject, timed: list[Inputs], wall_ms: float, phases: timing.Phases
) -> tuple[dict[str, Any], list[timing.Span]]:
    """What a GPU does in a step, and its kernels, longest first."""
    step = in_turn(subject, timed)
    for _ in timed:
        step()
    with phases("profile"):
        spans = timing.spans(step, 2 * VARIANTS)
        found = of_spans(spans, wall_ms) if spans else {}
        return found | of_replay(graphs_of(subject.call)), spans


def in_turn(subject: Subject, timed: list[Inputs]) -> Callable[[], None]:
    """A step of the next scan."""
    turn = itertools.cycle(timed)

    def step() -> None:
        subject.step(next(turn))

    return step


def of_spans(spans: list[timing.Span], wall_ms: float) -> dict[str, Any]:
    """What a GPU did in a step, and how long it waited for the host."""
    busy = sum(span.ms for span in spans)
    return {
        "gpu_ms": busy, "launches": sum(span.calls for span in spans),
        "host_ms": max(wall_ms - busy, 0.0), **accounts.account(spans),
    }  # fmt: skip


def graphs_of(call: Any) -> list[Any]:
    """The CUDA graphs that answered last: one, or one forward and one backward."""
    buckets = list(getattr(call, "_buckets", {}).values())
    if not buckets:
        return []
    last = max(buckets, key=lambda bucket: bucket.used)
    return [last.graph] if last.more is None else [last.graph, last.more.graph]


def of_replay(graphs: list[Any]) -> dict[str, Any]:
    """The time of replays alone, beside that of their kernels: the rest are gaps between nodes."""
    if not graphs:
        return {}

    def step() -> None:
        for graph in graphs:
            graph.replay()

    total = timing.kernels(step)
    return {
        "replay_ms": timing.replayed(graphs), "replay_kernels_ms": total["kernel_ms"],
        "replay_nodes": total["launches"],
    }  # fmt: skip


def of_gaps(row: dict[str, Any]) -> Iterator[str]:
    """A line on the replay of a graph, if there is one."""
    if row.get("replay_ms"):
        busy, nodes = row["replay_kernels_ms"], row["replay_nodes"]
        gaps = row["replay_ms"] - busy
        yield (
            f"  replay {row['replay_ms']:.3f} ms, its {nodes:.0f} nodes {busy:.3f} ms, gaps "
            f"{gaps:.3f} ms ({1e3 * gaps / max(nodes, 1):.2f} us each)"
        )


def against_floor(
    row: dict[str, Any], task: Task, dtype: str, rates: floors.Rates | None
) -> dict[str, Any]:
    """The work of a step, and how close its time comes to the least."""
    training = task.mode == "train"
    found: dict[str, Any] = {"gflop": floors.total_flops(task.works, training) / 1e9}
    if rates is not None:
        least = rates.floor_ms(task.works, dtype, training)
        found |= {
            "floor_ms": least, "share_of_floor": least / row["wall_ms"],
            "copy_gb_per_s": rates.copy / 1e9, "matmul_tflop_per_s": rates.matmul[dtype] / 1e12,
        }  # fmt: skip
    return found


def costliest(spans: list[timing.Span], count: int) -> Iterator[str]:
    for span in spans[:count]:
        times = f"{span.calls:8.1f} calls {1e3 * span.ms:9.1f} us"
        yield f"  {times}  {accounts.group(span.name):<12}{span.name[:110]}"


# ------------------------------------------------------------------ the program
class Run:
    """All rows of a command.

    Attributes:
        failed: This library was wrong, or did not run.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.failed = False

    def rows(self) -> Iterator[dict[str, Any]]:
        """Checked and timed in this process.

        On a GPU all rows are timed before the first is profiled: once a profiler has listened,
        every launch of its process costs the host more.
        """
        waiting = []
        for task, row, phases in self.clocked():
            if self.options.device.type == "cuda":
                wall = number(row, "wall_ms", "9.3f")
                print(f"timed {words(row)}{row['library']:<12}{row['way']:<8}{wall}", flush=True)
                waiting.append((task, row, phases))
            else:
                yield from self.accounted(task, row, phases)
        for task, row, phases in waiting:
            yield from self.accounted(task, row, phases)

    def clocked(self) -> Iterator[tuple[Task, dict[str, Any], timing.Phases]]:
        """Rows as far as a clock can fill them."""
        options = self.options
        device: torch.device = options.device
        rates = floors.measure_rates(device, options.dtypes) if options.floors else None
        if rates is not None:
            products = (f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in rates.matmul.items())
            print(f"copy {rates.copy / 1e9:.0f} GB/s, matmul {', '.join(products)}", flush=True)
        for (case, name), mode in itertools.product(options.pairs, options.modes):
            phases = timing.Phases()
            try:
                task = self.task(case, name, mode, phases)
            except Exception as error:  # the others may do
                self.failed = True
                print(f"  not prepared: {case.name} {name} {mode}: {told(error)}", flush=True)
                continue
            if options.verbose:
                print(f"  prepared in {phases}", flush=True)
            for dtype, library in itertools.product(options.dtypes, options.libraries):
                for way in ways(library, mode, options.ways):
                    phases = timing.Phases()
                    row = self.row(task, library, way, dtype, phases)
                    if row is not None:
                        yield task, row | against_floor(row, task, dtype, rates), phases

    def task(self, case: Case, name: str, mode: str, phases: timing.Phases) -> Task:
        """A task and its truth; the first of its types is compiled on the way, maps and all."""
        options = self.options
        with phases("scan"):
            scan = scenes.load(name, options.scenes)
        with phases("compile"):
            first = start(case, Path(name).stem, scan, mode)
            subject = Subject(first, "torchsparse", "eager", options.dtypes[0], options.device)
            subject.warm(subject.inputs(first.timed[0]))
            del subject
        with phases("truth"):
            return prepare(case, Path(name).stem, scan, mode, options.device)

    def row(
        self, task: Task, library: str, way: str, dtype: str, phases: timing.Phases
    ) -> dict[str, Any] | None:
        options = self.options
        row: dict[str, Any] = {
            "network": task.case.name, "scene": task.scene, "mode": task.mode, "dtype": dtype,
            "library": library, "way": way, "voxels": len(task.timed[0].coords),
        }  # fmt: skip
        gc.collect()  # what the last one left
        try:
            with phases("build"):
                subject = Subject(task, library, way, dtype, options.device)
                timed = [subject.inputs(scene) for scene in task.timed]
            if library == "torchsparse":
                with phases("compile"):
                    subject.warm(timed[0])
                    timing.synchronize(options.device)
            with phases("judge"):
                row |= {"version": subject.engine.version} | judge(subject, timed)
            found = clock(subject, timed, options.seconds, phases)
        except Exception as error:  # what another library cannot do is a result too
            self.refuse(row, error)
            return None
        remarks = [r["remarks"] for r in (row, found) if r.get("remarks")]
        return row | found | {"remarks": "; ".join(remarks)}

    def accounted(
        self, task: Task, row: dict[str, Any], phases: timing.Phases
    ) -> Iterator[dict[str, Any]]:
        """A row with what a GPU does in its step, and lines about it."""
        options, spans = self.options, []
        if options.device.type == "cuda":
            gc.collect()
            try:
                subject = Subject(task, row["library"], row["way"], row["dtype"], options.device)
                timed = [subject.inputs(scene) for scene in task.timed]
                if row["library"] == "torchsparse":
                    subject.warm(timed[0])
                found, spans = profile(subject, timed, row["wall_ms"], phases)
            except Exception as error:
                self.refuse(row, error)
                return
            row |= found
            if row.get("floor_ms") and row.get("gpu_ms"):
                row["share_of_floor"] = row["floor_ms"] / row["gpu_ms"]
        yield row
        for text in (*of_gaps(row), *costliest(spans, options.kernels)):
            print(text, flush=True)
        if options.verbose:
            print(f"  {phases}", flush=True)

    def refuse(self, row: dict[str, Any], error: Exception) -> None:
        ours = row["library"] == "torchsparse"
        self.failed |= ours
        what = "not timed" if ours else "left out"
        names = " ".join(row[name] for name in (*CASE, "library", "way"))
        print(f"  {what}: {names}: {told(error)}", flush=True)

    def fresh(self) -> Iterator[dict[str, Any]]:
        """Each row from a process of its own, so that neither memory nor an algorithm chosen for
        another stays behind."""
        options = self.options
        wanted = itertools.product(options.pairs, options.modes, options.dtypes, options.libraries)
        for (case, scene), mode, dtype, library in wanted:
            for way in ways(library, mode, options.ways):
                with tempfile.TemporaryDirectory() as folder:
                    command = [
                        sys.executable, __file__, f"{case.name}@{scene}", "--dtypes", dtype,
                        "--modes", mode, "--libraries", library, "--ways", way, "--scenes",
                        str(options.scenes), "--device", str(options.device), "--seconds",
                        str(options.seconds), "--kernels", str(options.kernels), "--out", folder,
                        "--floors" if options.floors else "--no-floors",
                        *["--verbose"] * options.verbose,
                        *(["--without", *options.without] if options.without else []),
                    ]  # fmt: skip
                    done = subprocess.run(command, capture_output=True, text=True)
                    rows = [row for path in Path(folder).glob("*.csv") for row in read(path)]
                yield from rows
                texts = [text for text in done.stdout.splitlines() if text.startswith("  ")]
                if done.returncode:
                    self.failed |= library == "torchsparse"
                    texts = texts or [f"  {library} {way}: {done.stderr.strip()[-300:]}"]
                for text in texts:
                    print(text, flush=True)


def told(error: Exception) -> str:
    """An error on one line."""
    kind = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


def ways(library: str, mode: str, wanted: list[str]) -> list[str]:
    """Graphs are for this library, and one kind of them for training."""
    if library != "torchsparse":
        return ["eager"]
    if mode == "infer":
        return wanted
    there = ["eager", "graphed"]
    return [way for way in there if way in wanted] or ["eager"]


def pairs(names: Sequence[str], given: list[str]) -> list[tuple[Case, str]]:
    """(network, scene): "network@scene" as it says, other networks on each of the given ones.

    Raises:
        KeyError: An unknown network.
    """
    found = []
    for name in names:
        network, at, scene = name.partition("@")
        found += [(NETWORKS[network], s) for s in ([scene] if at else given)]
    return found


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("networks", nargs="*", help=f"NETWORK or NETWORK@SCENE; {', '.join(NETWORKS)}")
    add("--scene", nargs="+", default=["street"], help=f"{', '.join(scenes.SPECS)} or .npz files")
    add("--scenes", type=Path, default=scenes.FOLDER, help="folder of the named scenes")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--dtypes", nargs="+", choices=floors.DTYPES, help="on a GPU fp16 and tf32")
    add("--libraries", nargs="+", choices=engines.ENGINES, help="on a GPU all that are there")
    add(
        "--ways",
        nargs="+",
        choices=WAYS,
        help="on a GPU all, else eager; frozen and nowait are for inference",
    )
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--seconds", type=float, default=1.0, help="per measurement, about")
    add("--fresh", action="store_true", help="a process for every row")
    add("--floors", action=argparse.BooleanOptionalAction, default=True,
        help="measure the rates of the machine")  # fmt: skip
    add("--kernels", type=int, default=0, help="print so many of the costliest of each row")
    add("--verbose", action="store_true", help="say how many seconds each part of a row took")
    add("--without", nargs="+", choices=sorted(dispatch.KERNELS), default=[], metavar="FAMILY",
        help="kernels left to PyTorch; without maps, each is built when a layer asks")  # fmt: skip
    add("--cold", action="store_true", help="time first results in fresh processes instead")
    add("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    gpu = options.device.type == "cuda"
    options.dtypes = options.dtypes or (["fp16", "tf32"] if gpu else ["fp32"])
    options.libraries = options.libraries or (engines.importable() if gpu else ["torchsparse"])
    if set(options.libraries) != {"torchsparse"}:
        there = engines.importable()
        for name in set(options.libraries) - set(there):
            print(f"  left out: {name} cannot be imported", flush=True)
        options.libraries = [name for name in options.libraries if name in there]
    options.ways = options.ways or (list(WAYS) if gpu else ["eager"])
    if not gpu and options.ways != ["eager"]:
        parser.error("graphs need a GPU")
    default = ["minkunet"] if options.cold else list(DEFAULT)
    try:
        options.pairs = pairs(options.networks or default, options.scene)
    except KeyError as error:
        parser.error(f"unknown network {error}; known are {', '.join(NETWORKS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Check, time, print and write; returns the exit code."""
    options = options_of(argv)
    if options.cold:
        for case, scene in options.pairs:
            cold.report(case.name, scene, options)
        return 0
    # SpConv keeps every border site of its extent; so must this library beside it.
    torchsparse.backends.infer_spatial_range = False
    about = machine(options.device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}")
    print(HEAD)
    run = Run(options)
    table: list[dict[str, Any]] = []
    path = options.out / f"{options.device.type}-networks.csv"
    with mock.patch.object(dispatch, "KERNELS", dispatch.KERNELS - set(options.without)):
        for row in run.fresh() if options.fresh else run.rows():
            table.append(machine(options.device) | row)
            print(line(row), flush=True)
            write(path, COLUMNS, table)
    if table:
        print("", *joined(table), f"wrote {path}", sep="\n")
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
