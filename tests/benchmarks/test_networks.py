"""The report on whole networks, on a tiny scene."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from benchmarks import engines, judging, networks, scenes, tasks
from benchmarks.cases import NETWORKS, features
from benchmarks.oracle import WrongResult
from benchmarks.reports import read
from benchmarks.timing import Phases, Span
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._autograd import conv as conv_passes
from torchsparse._ops import dispatch
from torchsparse.inference import Graphed

CPU = torch.device("cpu")


@pytest.fixture
def command(folder, tmp_path) -> list[str]:
    return ["--scenes", str(folder), "--seconds", "0", "--out", str(tmp_path)]


@pytest.fixture(scope="module")
def task(folder) -> tasks.Task:
    scan = scenes.load("tiny", folder)
    return tasks.prepare(NETWORKS["resnet21d"], "tiny", scan, "infer", CPU)


def test_a_variant_is_most_of_a_scan_shuffled(small) -> None:
    one, other = scenes.variant(small, 1), scenes.variant(small, 2)
    count = len(small.coords)
    assert len(one.coords) == int(0.99 * count) < count
    whole = {(*c, *f) for c, f in zip(small.coords.tolist(), small.feats.tolist())}
    rows = [(*c, *f) for c, f in zip(one.coords.tolist(), one.feats.tolist())]
    assert set(rows) < whole and len(set(rows)) == len(rows)
    assert not np.array_equal(one.coords, other.coords)
    assert np.array_equal(one.coords, scenes.variant(small, 1).coords)


def test_a_batch_is_one_scan_after_the_other(small) -> None:
    one = scenes.variant(small, 1)
    both = scenes.together(small, one, small)
    ends = np.cumsum([len(small.coords), len(one.coords), len(small.coords)])
    assert np.array_equal(np.unique(both.coords[:, 0], return_counts=True)[1].cumsum(), ends)
    assert np.array_equal(both.coords[ends[0] : ends[1], 1:], one.coords[:, 1:])
    assert both.coords.dtype == np.int32 and len(both.feats) == ends[2]


def test_a_report_prints_and_writes_its_rows(command, folder, tmp_path, capsys) -> None:
    name = f"resnet21d@{folder / 'tiny.npz'}"
    assert networks.main([name, "--dtypes", "fp32", "fp16", *command]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = list(read(tmp_path / "cpu-networks.csv"))
    assert tuple(rows[0]) == networks.COLUMNS
    assert [(r["mode"], r["dtype"]) for r in rows] == [
        (mode, dtype) for mode in ("infer", "train") for dtype in ("fp32", "fp16")
    ]
    for row in rows:
        assert (row["network"], row["scene"]) == ("resnet21d", "tiny")
        assert (row["library"], row["way"]) == ("torchsparse", "eager")
        assert row["wall_ms"] >= row["min_ms"] > 0 and row["repeats"] >= 2
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["wall_ms"], rel=0.01)
        assert row["error"] <= judging.AGREE[row["dtype"]] and row["to_itself"] == 0
        assert row["gpu_ms"] is None
        assert row["device"] and row["version"]
        if row["mode"] == "train":
            assert 0 < row["gradient_error"] < judging.ASTRAY[row["dtype"]]
            assert 0 < row["parameter_error"] < judging.ASTRAY[row["dtype"]]
    assert rows[1]["voxels"] * 2 == rows[2]["voxels"]
    # Machine, rates, head, rows; empty, head, rows again; where they went.
    assert len(printed) == 2 + 1 + 4 + 2 + 4 + 1
    assert printed[-6].split() == [
        "network", "scene", "mode", "type", "way", "wall", "ms", "gpu", "ms", "spconv", "wall",
        "gpu", "ratio", "wall", "gpu",
    ]  # fmt: skip


def test_fresh_processes_give_the_same_rows(command, tmp_path, capsys) -> None:
    options = ["resnet21d@tiny", "--modes", "infer", "--fresh", "--no-floors", *command]
    assert networks.main(options) == 0
    (row,) = read(tmp_path / "cpu-networks.csv")
    assert (row["network"], row["scene"], row["way"]) == ("resnet21d", "tiny", "eager")
    assert row["floor_ms"] is None and row["gflop"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 2 + 1 + 1


def test_kernels_may_be_left_out(command, monkeypatch) -> None:
    """For as long as the rows take, and of this library alone."""
    seen = []

    def rows(self):
        seen.append(dispatch.KERNELS)
        return iter(())

    monkeypatch.setattr(networks.Run, "rows", rows)
    before = dispatch.KERNELS
    assert networks.main([*command, "resnet21d@tiny", "--without", "maps", "pool"]) == 0
    assert seen == [before - {"maps", "pool"}] and dispatch.KERNELS is before
    with pytest.raises(SystemExit):
        networks.main([*command, "--without", "nonsense"])


def test_networks_are_paired_with_scenes() -> None:
    found = networks.pairs(["minkunet", "centerpoint@a.npz"], ["street", "b.npz"])
    assert [(case.name, scene) for case, scene in found] == [
        ("minkunet", "street"), ("minkunet", "b.npz"), ("centerpoint", "a.npz"),
    ]  # fmt: skip
    for wrong in (["nothing@tiny"], ["minkunet", "--ways", "graphed"]):
        with pytest.raises(SystemExit):
            networks.options_of(wrong)


def test_a_wrong_network_is_not_timed(command, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(judging, "AGREE", {"fp32": 1e-9})
    assert networks.main(["resnet21d@tiny", "--modes", "infer", *command]) == 1
    assert "  not timed: resnet21d tiny infer fp32 torchsparse eager: fp32 is off by" in (
        capsys.readouterr().out
    )
    assert list(tmp_path.glob("*.csv")) == []


class Wrong(engines.Torchsparse):
    """Another library whose features are too large."""

    name = "wrong"
    factors = (1.5,)

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def features(self, y: Any) -> torch.Tensor:
        self.asked += 1
        return features(y) * self.factors[self.asked % len(self.factors)]


class Moody(Wrong):
    """And differ from call to call."""

    factors = (1.5, 1.6, 1.0, 1.4, 1.3, 1.2, 1.1)


def test_another_library_may_be_wrong_or_disagree_with_itself(
    command, tmp_path, capsys, monkeypatch
) -> None:
    for name, engine in (("wrong", Wrong), ("moody", Moody)):
        monkeypatch.setitem(engines.ENGINES, name, engine)
    options = ["resnet21d@tiny", "--modes", "infer", "--libraries", "wrong", "moody", *command]
    assert networks.main(options) == 0
    assert "  left out: resnet21d tiny infer fp32 wrong eager: fp32 is off by 5.0e-01" in (
        capsys.readouterr().out
    )
    (row,) = read(tmp_path / "cpu-networks.csv")
    assert row["remarks"].startswith("disagrees with itself by ") and row["wall_ms"] > 0


def test_what_cannot_run_is_said(command, tmp_path, capsys, monkeypatch) -> None:
    def missing() -> Any:
        raise ImportError

    monkeypatch.setitem(engines.ENGINES, "missing", missing)
    options = ["resnet21d@tiny", "--modes", "infer", "--libraries", "torchsparse", "missing"]
    monkeypatch.setattr(networks, "prepare", lambda *_: missing())
    assert networks.main([*options, "--no-floors", *command]) == 1
    printed = capsys.readouterr().out
    assert "  left out: missing cannot be imported" in printed
    assert "  not prepared: resnet21d tiny infer: ImportError" in printed
    assert list(tmp_path.glob("*.csv")) == []


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_what_is_timed_is_computed(mode: str, small, monkeypatch) -> None:
    """Features are put off until somebody reads them: a step must."""
    calls: list[str] = []

    def noted(name: str) -> None:
        right = getattr(conv_passes, name)
        monkeypatch.setattr(conv_passes, name, lambda *args: calls.append(name) or right(*args))

    noted("gather_gemm")
    noted("weight_grad")
    task = tasks.start(NETWORKS["minkunet-half"], "tiny", small, mode)
    subject = tasks.Subject(task, "torchsparse", "eager", "fp32", CPU)
    convolutions = [m for m in subject.network.modules() if isinstance(m, spnn.Conv3d)]
    layers = sum(conv.kernel.dim() == 3 for conv in convolutions)
    training = mode == "train"
    calls.clear()
    subject.step(subject.inputs(task.timed[0]))
    assert calls.count("gather_gemm") == layers * (1 + training)
    assert calls.count("weight_grad") == layers * training


def test_other_bits_are_a_wrong_result(task, monkeypatch) -> None:
    subject = tasks.Subject(task, "torchsparse", "eager", "fp32", CPU)
    timed = [subject.inputs(scene) for scene in task.timed]
    monkeypatch.setattr(subject, "same_bits", lambda a, b: False)
    with pytest.raises(WrongResult, match="other bits"):
        tasks.judge(subject, timed)


def test_a_graph_is_compared_with_eager_calls(task, monkeypatch) -> None:
    """On a CPU it runs as usual."""
    subject = tasks.Subject(task, "torchsparse", "nowait", "fp32", CPU)
    assert isinstance(subject.call, Graphed) and not subject.call.wait
    timed = [subject.inputs(scene) for scene in task.timed]
    assert tasks.judge(subject, timed)["to_eager"] == 0
    assert networks.clock(subject, timed, 0.0, Phases())["wall_ms"] > 0
    right = subject.infer

    def off(x: tasks.Inputs, call: Any) -> Any:
        out = right(x, call)
        if call is subject.network:
            out.feats = out.feats * 1.1
        return out

    monkeypatch.setattr(subject, "infer", off)
    with pytest.raises(WrongResult, match="from eager calls"):
        tasks.judge(subject, timed)


def test_weights_of_graphs_may_be_frozen(task) -> None:
    for way, wait, frozen in (("graphed", True, False), ("frozen", True, True)):
        call: Any = tasks.Subject(task, "torchsparse", way, "fp32", CPU).call
        assert isinstance(call, Graphed) and (call.wait, call.frozen) == (wait, frozen)


def test_a_gpu_is_profiled_when_all_rows_are_timed(monkeypatch) -> None:
    """A profiler slows down the launches that come after it."""
    options = networks.options_of(["resnet21d", "--device", "cuda"])
    seen = []
    row = {"network": "n", "scene": "s", "mode": "m", "dtype": "d", "library": "l", "way": "w"}

    def clocked(run: Any) -> Any:
        for number in range(3):
            seen.append(("timed", number))
            yield None, row | {"number": number}, Phases()

    def accounted(run: Any, task: Any, row: Any, phases: Any) -> Any:
        seen.append(("profiled", row["number"]))
        yield row

    monkeypatch.setattr(networks.Run, "clocked", clocked)
    monkeypatch.setattr(networks.Run, "accounted", accounted)
    assert [row["number"] for row in networks.Run(options).rows()] == [0, 1, 2]
    assert seen == [(what, n) for what in ("timed", "profiled") for n in range(3)]


class Graph(torch.nn.Module):
    """In place of a captured training step; ``factor`` makes its gradients wrong."""

    factor = 1.0

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: SparseTensor) -> SparseTensor:
        out = self.model(x)
        feats = out.feats
        out.feats = feats * self.factor + feats.detach() * (1 - self.factor)
        return out


def test_training_may_be_graphed(folder, monkeypatch) -> None:
    """Beside the truth and eager calls, gradients too."""
    monkeypatch.setattr(tasks.training, "graphed", Graph)
    assert networks.ways("torchsparse", "train", list(networks.WAYS)) == ["eager", "graphed"]
    assert networks.ways("torchsparse", "train", ["nowait"]) == ["eager"]
    assert networks.ways("torchsparse", "train", ["frozen", "graphed"]) == ["graphed"]
    assert networks.ways("torchsparse", "infer", ["frozen", "nowait"]) == ["frozen", "nowait"]
    assert networks.ways("spconv", "train", list(networks.WAYS)) == ["eager"]
    scan = scenes.load("tiny", folder)
    task = tasks.prepare(NETWORKS["resnet21d"], "tiny", scan, "train", CPU)
    subject = tasks.Subject(task, "torchsparse", "graphed", "fp32", CPU)
    timed = [subject.inputs(scene) for scene in task.timed]
    assert subject.warm(timed[0]) == 0
    row = tasks.judge(subject, timed)
    assert 0 < row["parameter_error"] < 0.01 and row["to_eager"] == row["to_itself"] == 0
    assert row["gradient_to_eager"] == row["parameter_to_eager"] == 0
    monkeypatch.setattr(Graph, "factor", 1.009)
    with pytest.raises(WrongResult, match="of its length from eager calls"):
        tasks.judge(subject, timed)
    monkeypatch.setattr(Graph, "factor", 2.0)
    with pytest.raises(WrongResult, match="the gradient of the input is off by 1"):
        tasks.judge(subject, timed)
    monkeypatch.setattr(Graph, "factor", 1.0)
    hook = subject.network.get_parameter("body.0.0.1.bias").register_hook(lambda grad: grad * 0)
    with pytest.raises(WrongResult, match="the gradient of the worst parameter is off by 1"):
        tasks.judge(subject, timed)
    hook.remove()


def test_the_gaps_of_a_replay_are_told() -> None:
    row = {"replay_ms": 1.5, "replay_kernels_ms": 1.0, "replay_nodes": 100.0}
    (text,) = networks.of_gaps(row)
    assert text == "  replay 1.500 ms, its 100 nodes 1.000 ms, gaps 0.500 ms (5.00 us each)"
    assert not list(networks.of_gaps({})) and networks.of_replay([]) == {}

    class Bucket:
        def __init__(self, used: int) -> None:
            self.used, self.graph, self.more = used, torch.cuda.CUDAGraph, None

    class Call:
        _buckets: ClassVar = {1: Bucket(3), 2: Bucket(9), 3: Bucket(4)}

    assert networks.graphs_of(Call()) == [torch.cuda.CUDAGraph]
    assert networks.graphs_of(torch.nn.Identity()) == []


def test_the_time_of_a_gpu_is_accounted_for() -> None:
    spans = [Span("gemm_kernel", 40, 2.0), Span("find_kernel", 9.5, 1.0)]
    found = networks.of_spans(spans, 5.0)
    assert found["gpu_ms"] == 3.0 and found["launches"] == 49.5 and found["host_ms"] == 2.0
    assert (found["maps_ms"], found["convolution_ms"]) == (1.0, 2.0)
    assert networks.of_spans(spans, 2.5)["host_ms"] == 0
    (text,) = networks.costliest(spans, 1)
    assert text.split() == ["40.0", "calls", "2000.0", "us", "convolution", "gemm_kernel"]


def test_the_last_table_joins_the_libraries() -> None:
    case = {"network": "minkunet", "scene": "street", "mode": "infer", "dtype": "fp16"}
    ours = {"library": "torchsparse", "way": "eager", "wall_ms": 4.0, "gpu_ms": 2.0}
    theirs = {"library": "spconv", "way": "eager", "wall_ms": 12.0, "gpu_ms": 5.0}
    graph = ours | {"way": "graphed", "wall_ms": 3.0}
    alone = case | ours | {"mode": "train"}
    head, *lines = networks.joined([case | ours, case | graph, case | theirs, alone])
    assert [text.split()[4:] for text in lines] == [
        ["eager", "4.000", "2.000", "12.000", "5.000", "3.00", "2.50"],
        ["graphed", "3.000", "2.000", "12.000", "5.000", "4.00", "2.50"],
        ["eager", "4.000", "2.000", "-", "-", "-", "-"],
    ]
    assert {len(text) for text in lines} == {len(head)}


def test_first_results_are_timed_in_fresh_processes(command, capsys) -> None:
    assert networks.main(["resnet21d@tiny", "--cold", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-2:]] == ["as it is", "after warmup()"]
    for line in lines[-2:]:
        times = re.findall(r"([\d.]+) \(([\d.]+)\)", line)
        assert len(times) == 2
        assert all(float(first) > float(ready) > 0 for first, ready in times)
