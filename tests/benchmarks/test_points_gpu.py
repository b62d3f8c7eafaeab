"""The judge of moves between points, voxels and grids, with a CPU in the place of the GPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import points_gpu
from benchmarks.points_gpu import Case, WrongResult

ROWS = 600


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(points_gpu, "both", lambda x, device: x)


def cases(*families: str) -> Iterator[Case]:
    return itertools.chain(*(points_gpu.CASES[family](ROWS) for family in families))


def changed(case: Case, change: Any) -> Case:
    """With another result."""

    def run() -> Any:
        found = case.run()
        return tuple(map(change, found)) if isinstance(found, tuple) else change(found)

    return dataclasses.replace(case, run=run)


def refused(case: Case) -> bool:
    try:
        points_gpu.check(case)
    except WrongResult:
        return True
    return False


def test_right_results_pass_and_wrong_ones_do_not() -> None:
    """Every operation but the filling of a table, which searches in it judge."""
    names = []
    for case in cases("points", "search", "voxels", "samples"):
        points_gpu.check(case)
        names.append(case.name)
        if case.name.startswith("insert_vals"):
            continue
        assert refused(changed(case, torch.zeros_like)), case.name
        assert refused(dataclasses.replace(case, run=lambda: ())), case.name
        assert refused(changed(case, lambda t: t[:-1])), case.name
        found = case.run()
        parts = found if isinstance(found, tuple) else (found,)
        if len(parts) > 1:
            assert refused(dataclasses.replace(case, run=lambda p=parts: p[:-1])), case.name
        for place, part in enumerate(parts):  # each of them alone
            wrong = part * 1.01 if part.is_floating_point() else part + 1
            other = (*parts[:place], wrong.to(part.dtype), *parts[place + 1 :])
            run = lambda o=other, alone=parts is not found: o[0] if alone else o  # noqa: E731
            assert refused(dataclasses.replace(case, run=run)), (case.name, place)
    assert sum(name.startswith("group_norm f+b") for name in names) == 2


def test_gradients_of_a_grid_come_from_their_cells() -> None:
    coords = points_gpu.cloud(50, (2, 5, 6, 7))
    feats = points_gpu.features(len(coords), 3, torch.float16)
    shape = (2, 5, 6, 7, 3)

    def run(there: Tensor) -> Any:
        return points_gpu.with_grad(
            lambda f, c: points_gpu.to_dense(f, c, shape[:-1]), feats, there
        )

    case = Case("", run(coords), 0, lambda: (points_gpu.pushed(coords, shape, torch.float16),))
    points_gpu.check(case)
    assert refused(dataclasses.replace(case, run=run(coords.flip(0))))
    assert refused(changed(case, torch.ones_like))


def test_rounding_is_no_mistake() -> None:
    want = torch.randn(100, 8)
    points_gpu.compare(want * (1 + 1e-6), want, rounded=True)
    points_gpu.compare(want.half() * (1 + 2**-10), want.half(), rounded=True)
    for got, rounded in ((want * (1 + 1e-6), False), (want * (1 + 1e-4), True),
                         (want.double(), True), (want * float("nan"), True)):  # fmt: skip
        with pytest.raises(WrongResult):
            points_gpu.compare(got, want, rounded)


def test_another_result_the_next_time_is_wrong() -> None:
    turns = itertools.count()
    case = Case("", lambda: torch.full((3,), 1 + 1e-6 * next(turns)), 0, lambda: torch.ones(3),
                rounded=True)  # fmt: skip
    assert refused(case)


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Case("right", lambda: torch.ones(3), 12, lambda: torch.ones(3))
    wrong = Case("other", lambda: torch.zeros(3), 12, lambda: torch.ones(3))
    broken = Case("broken", lambda: torch.ones(3) + torch.ones(4), 12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    for name in ("gpu_time", "host_time"):
        monkeypatch.setattr(points_gpu, name, lambda *_: 1e-6)
    for family, code in (((right,), 0), ((wrong, right), 1), ((broken, right), 1)):
        monkeypatch.setattr(points_gpu, "CASES", {"all": lambda rows, f=family: iter(f)})
        assert points_gpu.main(["--rows", "3"]) == code
        printed = capsys.readouterr().out
        assert printed.count("WRONG") == len(family) - 1
        assert printed.count("\nright ") == 1
        assert ("1 results are wrong" in printed) is bool(code)
