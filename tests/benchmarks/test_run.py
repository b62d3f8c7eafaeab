"""The benchmarks run on a tiny scene, and print no time for a wrong result."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks import cases, engines, floors, judging, oracle, run, scenes, timing
from benchmarks.cases import CASES, LAYERS, counting, pairs, tensor
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._autograd import conv as conv_passes
from torchsparse._ops import coords as coords_ops
from torchsparse.nn import functional as F

CPU = torch.device("cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_scene_is_a_batch_of_voxels(folder) -> None:
    scene = scenes.load("tiny", folder)
    assert scene.coords.dtype == np.int32 and scene.feats.dtype == np.float32
    assert scene.coords.shape == scene.feats.shape == (len(scene.coords), 4)
    assert len(np.unique(scene.coords, axis=0)) == len(scene.coords) > 1000
    assert scene.coords.min() == 0 and np.abs(scene.feats[:, :3]).max() <= 0.5


def test_a_scene_can_be_any_file(folder, tmp_path) -> None:
    np.savez(tmp_path / "own.npz", coords=np.ones((1, 4), np.int64), feats=np.ones((1, 7)))
    scene = scenes.load(str(tmp_path / "own.npz"), folder)
    assert scene.coords.dtype == np.int32 and scene.feats.dtype == np.float32
    with pytest.raises(FileNotFoundError):
        scenes.load(str(tmp_path / "missing.npz"), folder)


def test_a_crop_is_the_densest_cube(folder) -> None:
    scene = scenes.load("tiny", folder)
    cut = scenes.crop(scene, 16)
    cells = scene.coords // np.array([1, 16, 16, 16])
    assert len(cut.coords) == np.unique(cells, axis=0, return_counts=True)[1].max()
    assert cut.coords.min() >= 0 and cut.coords.max() < 16


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_oracle_agrees_with_every_layer(name: str, dtype: str, small) -> None:
    case, floating = CASES[name], floors.DTYPES[dtype]
    x = tensor(small, case.in_channels, "cpu", floating)
    expected = 2 if name.startswith("down-up") else 1
    assert oracle.check(case.build().to(floating), x, dtype) == expected


def test_operations_are_counted_by_pair(small) -> None:
    """Against a search in a set of sites."""
    conv = spnn.Conv3d(4, 8, 3)
    x = tensor(small, 4, "cpu", torch.float32)
    sites = set(map(tuple, small.coords.tolist()))
    steps = [(a, b, c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)]
    found = sum((s, x + a, y + b, z + c) in sites for s, x, y, z in sites for a, b, c in steps)
    assert pairs(conv, x) == found
    with torch.no_grad(), counting(conv) as works:
        conv(x)
    n = len(sites)
    assert works == [floors.Work(found, n, n, 27, 4, 8)]
    assert works[0].flops == 2.0 * found * 4 * 8
    assert works[0].density == pytest.approx(found / 27 / n)


def test_the_floor_is_the_slower_of_two_limits() -> None:
    work = floors.Work(pairs=10, inputs=4, outputs=5, taps=27, c_in=2, c_out=3)
    forward, kernel = work.bytes(2)
    assert forward == 2 * (4 * 2 + 5 * 3 + 27 * 6) + 4 * 10
    assert kernel == 2 * (4 * 2 + 5 * 3) + 4 * 27 * 6 + 4 * 10
    bound_by_copies = floors.Rates(1e3, {"fp16": 1e12})
    assert bound_by_copies.floor_ms([work], "fp16", False) == pytest.approx(forward)
    total = 2 * forward + kernel
    assert bound_by_copies.floor_ms([work], "fp16", True) == pytest.approx(total)
    assert floors.total_bytes([work], "fp16", True) == total
    bound_by_products = floors.Rates(1e12, {"fp16": 1e3})
    assert bound_by_products.floor_ms([work] * 2, "fp16", False) == pytest.approx(240)


def test_a_run_prints_and_writes_its_rows(folder, tmp_path, capsys) -> None:
    options = ["subm-3-4-32", "centerpoint", "--scene", "tiny", "--seconds", "0"]
    assert run.main([*options, "--scenes", str(folder), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = rows_of(tmp_path / "cpu-tiny.csv")
    # New and kept maps, and the map of a layer alone, in two modes.
    assert [r["maps"] for r in rows] == 2 * ["new", "kept", "only"] + 2 * ["new", "kept"]
    assert len(printed) == 2 + 10 + 1
    assert tuple(rows[0]) == run.COLUMNS
    for row in rows:
        assert float(row["wall_ms"]) >= float(row["min_ms"]) > 0
        assert all(row[name] for name in ("voxels", "density", "device", "torch", "version"))
        if row["maps"] != "only":
            rate = float(row["gflop"]) / float(row["wall_ms"])
            assert float(row["tflop_per_s"]) == pytest.approx(rate, rel=0.01)
            share = float(row["floor_ms"]) / float(row["wall_ms"])
            assert float(row["share_of_floor"]) == pytest.approx(share, rel=0.01)


def test_fresh_processes_give_the_same_rows(folder, tmp_path, capsys) -> None:
    options = ["subm-3-4-32", "--scene", "tiny", "--seconds", "0", "--mode", "infer", "--fresh"]
    options += ["--dtypes", "fp32", "bf16", "--scenes", str(folder), "--out", str(tmp_path)]
    assert run.main(options) == 0
    rows = rows_of(tmp_path / "cpu-tiny.csv")
    assert [(r["dtype"], r["maps"]) for r in rows] == [
        (dtype, maps) for dtype in ("fp32", "bf16") for maps in ("new", "kept", "only")
    ]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6 + 1


def test_the_map_alone_leaves_the_products_out(small, monkeypatch) -> None:
    """And only inside the block."""
    calls: list[str] = []

    def noted(name: str, right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: calls.append(name) or right(*args)

    for name in ("gather_gemm", "weight_grad"):
        monkeypatch.setattr(conv_passes, name, noted(name, getattr(conv_passes, name)))
    conv = spnn.Conv3d(4, 4, 3)
    x = tensor(small, 4, "cpu", torch.float32)
    with engines.Torchsparse().maps_alone(conv, x.feats, x.coords, training=True) as step:
        calls.clear()
        step()
    assert not calls
    x.feats.requires_grad_()
    conv(x).feats.sum().backward()
    assert calls == ["gather_gemm", "gather_gemm", "weight_grad"]


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name", ["subm-3-4-32", "minkunet-half"])
def test_what_is_timed_is_computed(name: str, mode: str, small, monkeypatch) -> None:
    """Features are put off until somebody reads them: a step must. And where maps are alone,
    one is built."""
    case, calls = CASES[name], []

    def noted(module: Any, name: str) -> None:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or right(*args))

    noted(conv_passes, "gather_gemm")
    noted(conv_passes, "weight_grad")
    noted(coords_ops, "find_taps")
    network = judging.calibrated(case, small, CPU)
    subject = run.Subject(engines.Torchsparse(), case, network, small, "fp32", CPU)
    convolutions = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    layers = sum(conv.kernel.dim() == 3 for conv in convolutions)
    training = mode == "train"
    for maps, step in subject.steps(mode):
        calls.clear()
        step()
        forward = layers if maps != "only" else 0  # products are left out where maps are alone
        assert calls.count("gather_gemm") == forward * (1 + training), maps
        assert calls.count("weight_grad") == forward * training, maps
        if maps == "only":
            assert calls.count("find_taps") == 1
        elif maps == "kept":
            assert not calls.count("find_taps")
        else:
            assert calls.count("find_taps") >= 1


def test_weights_follow_the_mode(small) -> None:
    """Float32 ones are for mixed precision alone, whatever was timed before."""
    case = CASES["resnet21d"]
    network = judging.calibrated(case, small, CPU)
    subject = run.Subject(engines.Torchsparse(), case, network, small, "bf16", CPU)
    for mode in ("train", "infer", "train"):
        next(subject.steps(mode))
        wanted = torch.float32 if mode == "train" else torch.bfloat16
        assert {p.dtype for p in subject.network.parameters()} == {wanted}


def test_new_maps_are_timed_before_any_are_kept(small, monkeypatch) -> None:
    kept = []
    keep = engines.Torchsparse.keep
    monkeypatch.setattr(
        engines.Torchsparse, "keep", lambda *args: kept.append(1) or keep(*args)
    )  # fmt: skip
    case = CASES["subm-3-4-32"]
    subject = run.Subject(engines.Torchsparse(), case, case.build(), small, "fp32", CPU)
    assert [(maps, len(kept)) for maps, _ in subject.steps("infer")] == [
        ("new", 0), ("kept", 1), ("only", 1),
    ]  # fmt: skip


def test_walls_come_before_the_first_profile(small, monkeypatch) -> None:
    """Of all libraries and cases; then each row gets what the device did in its own step."""
    seen: list[str] = []
    device = SimpleNamespace(type="cuda")

    def clocked(task: Any, library: str, *rest: Any) -> Any:
        seen.append(f"wall {task} {library}")
        yield {"maps": "new"}

    def profiled(task: Any, library: str, *rest: Any) -> Any:
        seen.append(f"profile {task.case} {library}")
        yield {}

    class Prepared(str):
        case = "c"

    monkeypatch.setattr(run, "prepare", lambda case, *_: Prepared(case))
    monkeypatch.setattr(run, "clocked", clocked)
    monkeypatch.setattr(run, "profiled", profiled)
    options = SimpleNamespace(device=device, libraries=["a", "b"], dtypes=["fp32"], mode=["infer"])
    cases: Any = ["one", "two"]
    rates = floors.Rates(1.0, {})
    assert len(list(run.run_cases(cases, small, rates, cast(Any, options)))) == 4
    assert [text.split()[0] for text in seen] == ["wall"] * 4 + ["profile"] * 4


def test_the_floor_is_compared_with_kernels() -> None:
    """Not with bursts of one library and replays of the other."""
    row = {"maps": "kept", "gflop": 1.0, "floor_ms": 1.0, "wall_ms": 9.0, "gpu_ms": 3.0}
    assert run.beside_floor(row | {"kernel_ms": 2.0, "clock": "graph"})["share_of_floor"] == 0.5
    assert run.beside_floor(dict(row))["share_of_floor"] == pytest.approx(1 / 9)


WRONG_STEPS = {
    "no kernel gradients": ("weight_grad", 0.0),
    "half of a kernel gradient": ("weight_grad", 0.5),
}


@pytest.mark.parametrize("name", ["subm-3-4-32", "resnet21d"])
@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_wrong_training_step_is_refused(name: str, wrong: str, folder, monkeypatch) -> None:
    case, scene = CASES[name], scenes.load("tiny", folder)
    network = judging.calibrated(case, scene, CPU)
    want, _ = judging.truth(case, network, scene, "train", CPU)
    subject = run.Subject(engines.Torchsparse(), case, network, scene, "fp32", CPU)
    for maps, step in subject.steps("train"):
        if maps != "only":
            subject.judge(step(), want)
    place, factor = WRONG_STEPS[wrong]
    right = getattr(conv_passes, place)
    monkeypatch.setattr(conv_passes, place, lambda *args: right(*args) * factor)
    _, step = next(subject.steps("train"))
    with pytest.raises(oracle.WrongResult, match="gradient of the worst parameter"):
        subject.judge(step(), want)


@pytest.mark.parametrize("dtype", floors.DTYPES)
def test_a_result_a_little_too_large_is_refused(dtype: str, folder) -> None:
    """All in one direction; TF32, which may drop bits in each layer, has more room."""
    scene, case = scenes.load("tiny", folder), CASES["centerpoint"]
    network = judging.calibrated(case, scene, CPU)
    want, _ = judging.truth(case, network, scene, "infer", CPU)
    subject = run.Subject(engines.Torchsparse(), case, network, scene, dtype, CPU)
    _, step = next(subject.steps("infer"))
    output, _ = step()
    subject.judge((output, None), want)
    output.feats = output.feats * (1.025 if dtype == "tf32" else 1.015)
    with pytest.raises(oracle.WrongResult):
        subject.judge((output, None), want)


def test_every_parameter_of_another_library_has_a_gradient(folder) -> None:
    class Other(engines.Torchsparse):
        name = "other"

    case, scene = CASES["resnet21d"], scenes.load("tiny", folder)
    network = judging.calibrated(case, scene, CPU)
    want, _ = judging.truth(case, network, scene, "train", CPU)
    subject = run.Subject(Other(), case, network, scene, "fp32", CPU)
    _, step = next(subject.steps("train"))
    subject.judge(step(), want)
    subject.network.requires_grad_(False)
    with pytest.raises(oracle.WrongResult, match="a parameter has no gradient"):
        subject.judge(step(), want)


@pytest.mark.parametrize("name", ["down-up-2-64-64", "resnet21d"])
@pytest.mark.parametrize("rows", [0, 200])
def test_a_lost_tap_is_refused(name: str, rows: int, folder, monkeypatch) -> None:
    """The truth, which is made of the library's own maps, is no exception; nor are maps that are
    larger than those of a crop."""
    case, scene = CASES[name], scenes.load("tiny", folder)
    right = coords_ops.find_taps

    def lossy(*args: Any) -> Any:
        neighbors, keys = right(*args)
        if neighbors.shape[0] > 1 and neighbors.shape[1] > rows:
            neighbors[0] = -1
        return neighbors, keys

    network = case.build()
    judging.truth(case, network, scene, "train", CPU)
    monkeypatch.setattr(coords_ops, "find_taps", lossy)
    with pytest.raises(oracle.WrongResult, match="of the scene is off by"):
        judging.truth(case, network, scene, "train", CPU)


def test_a_wrong_result_is_not_timed(folder, tmp_path, capsys, monkeypatch) -> None:
    right = F.conv3d

    def wrong(*args, **kwargs) -> SparseTensor:
        out = right(*args, **kwargs)
        out.feats = out.feats * 1.001
        return out

    monkeypatch.setattr(F, "conv3d", wrong)
    options = ["subm-3-4-32", "--scene", "tiny", "--scenes", str(folder), "--out", str(tmp_path)]
    assert run.main(options) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrong, not timed: Conv3d(4, 32") and " output is off by " in last
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_network_is_not_timed(folder, tmp_path, capsys, monkeypatch) -> None:
    """Each layer right, their sum wrong: the whole is judged, too."""
    monkeypatch.setattr(judging, "AGREE", {"fp32": 1e-9})
    options = ["resnet21d", "--scene", "tiny", "--scenes", str(folder), "--out", str(tmp_path)]
    assert run.main([*options, "--seconds", "0"]) == 1
    assert "fp32 is off by" in capsys.readouterr().out.splitlines()[-1]


def test_another_library_may_fail(folder, tmp_path, capsys, monkeypatch) -> None:
    class Broken(engines.Torchsparse):
        name = "broken"

        def features(self, y: Any) -> torch.Tensor:
            return cases.features(y) * 1.5

    monkeypatch.setitem(engines.ENGINES, "broken", Broken)
    options = ["subm-3-4-32", "--scene", "tiny", "--scenes", str(folder), "--out", str(tmp_path)]
    options += ["--seconds", "0", "--mode", "infer", "--libraries", "torchsparse", "broken"]
    assert run.main(options) == 0
    assert (
        "subm-3-4-32 broken fp32 infer: WrongResult: fp32 is off by 5.0e-01"
        in capsys.readouterr().out
    )
    assert {row["library"] for row in rows_of(tmp_path / "cpu-tiny.csv")} == {"torchsparse"}


def test_spconv_has_the_same_weights(folder, tmp_path) -> None:
    """In one thread: on several its sums differ from run to run. A row means it agreed."""
    pytest.importorskip("spconv")
    names = ["strided-3-32-64", "down-up-2-64-64", "minkunet-half", "centerpoint", "resnet21d"]
    command = [sys.executable, str(Path(run.__file__)), *names, "--scene", "tiny"]
    command += ["--scenes", str(folder), "--out", str(tmp_path), "--mode", "infer"]
    command += ["--libraries", "spconv", "--seconds", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "cpu-tiny.csv")
    assert {row["library"] for row in rows} == {"spconv"}, done.stdout
    assert {row["case"] for row in rows} == set(names), done.stdout


def test_spconv_has_weights_to_train() -> None:
    """It does not train on a CPU."""
    pytest.importorskip("spconv")
    network = CASES["minkunet-half"].build()
    weights = list(engines.Spconv().adopt(network).parameters())
    assert len(weights) == len(list(network.parameters()))
    assert all(weight.requires_grad for weight in weights)


def test_a_step_is_repeated_until_its_time_is_up() -> None:
    calls: list[int] = []
    found = timing.times(lambda: calls.append(1), CPU, 0.0)
    assert len(found) == 3 and len(calls) == 4
    assert len(timing.times(lambda: None, CPU, 10.0)) == 100
    assert min(timing.times(lambda: time.sleep(0.01), CPU, 0.0)) >= 10
