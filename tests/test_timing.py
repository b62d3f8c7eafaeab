"""The clock of the tuner, with a clock that the test winds."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchsparse import _timing
from torchsparse._timing import Timing, busy, measure


class Clock:
    """Stands still but for what a call takes: the given seconds, call after call."""

    def __init__(self, *takes: float) -> None:
        self.now, self.takes, self.calls = 100.0, takes, 0

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self.takes[min(self.calls, len(self.takes) - 1)]
        self.calls += 1


def test_the_first_call_does_not_count() -> None:
    clock = Clock(50.0, 0.25)
    found = measure(clock.work, seconds=1.0, clock=clock)
    assert found == Timing(0.25, 0.25, 0.25, 4) and clock.calls == 5


def test_a_slow_call_is_timed_the_least_number_of_times() -> None:
    clock = Clock(2.0)
    assert measure(clock.work, seconds=1.0, least=3, clock=clock).calls == 3


def test_a_fast_call_is_timed_the_largest_number_of_times() -> None:
    clock = Clock(1e-6)
    assert measure(clock.work, seconds=1.0, most=7, clock=clock).calls == 7
    still = Clock(0.0)
    found = measure(still.work, seconds=1.0, most=7, clock=still)
    assert found.median == 0.0 and found.spread == 0.0 and found.calls == 7


def test_one_hiccup_does_not_move_the_median() -> None:
    clock = Clock(1.0, 1.0, 9.0, 2.0, 3.0, 4.0)
    found = measure(clock.work, seconds=19.0, clock=clock)
    assert found == Timing(3.0, 1.0, 9.0, 5)
    assert found.spread == pytest.approx(8 / 3)


def test_the_outer_tenths_are_left_out_of_the_spread() -> None:
    found = Timing.of([0.0, *[1.0] * 9, *[2.0] * 9, 90.0])
    assert (found.low, found.median, found.high) == (1.0, 1.5, 2.0)


def test_a_cpu_is_as_busy_as_in_its_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(9.0, 3.0, 2.0, 4.0)
    monkeypatch.setattr(
        measure, "__kwdefaults__", {**(measure.__kwdefaults__ or {}), "clock": clock}
    )
    assert busy(clock.work, calls=3) == 2.0 and clock.calls == 4


def test_a_failing_call_fails() -> None:
    def work() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure(work)


def test_the_time_of_a_gpu_is_that_of_its_kernels(gpu: torch.device) -> None:
    """A product of 4096 x 4096 takes longer than one of 512 x 512, whatever the host does."""
    small, large = (torch.randn(n, n, device=gpu, dtype=torch.float16) for n in (512, 4096))
    short = measure(lambda: small @ small, gpu)
    long = measure(lambda: large @ large, gpu)
    assert 0 < short.low <= short.median <= short.high < long.median < 0.1
    assert short.calls >= 3


class Device:
    """A GPU whose work starts when both it and the host have come to it; it has its own clock."""

    def __init__(self, launch: float) -> None:
        self.launch, self.host, self.free = launch, 0.0, 0.0

    def start(self, seconds: float) -> float:
        """Queue so much work; returns the moment at which it is done."""
        self.host += self.launch
        self.free = max(self.free, self.host) + seconds
        return self.free

    def wait(self, *_: Any) -> None:
        self.host = max(self.host, self.free)

    def event(self, **_: Any) -> Any:
        own = SimpleNamespace(at=None)

        def record() -> None:
            self.host += 5e-6 if own.at is None else 0.0  # made when first used
            own.at = self.start(0.0)

        own.record = record
        own.elapsed_time = lambda end: 1e3 * (end.at - own.at)
        return own


@pytest.mark.parametrize("launch", [1e-6, 1e-5, 2e-5, 3e-5])
@pytest.mark.parametrize("work", [2e-6, 3e-4])
def test_gaps_of_a_slow_host_are_not_part_of_the_time(
    work: float, launch: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush takes 45 us, the call 100 us of the host."""
    device = Device(launch)
    cuda = SimpleNamespace(
        Event=device.event, synchronize=device.wait, device=lambda _: nullcontext(),
        get_device_properties=lambda _: SimpleNamespace(L2_cache_size=50 << 20),
    )  # fmt: skip
    cache = SimpleNamespace(zero_=lambda: device.start(45e-6))
    fake = SimpleNamespace(
        cuda=cuda, device=torch.device, int32=torch.int32, empty=lambda *_, **__: cache
    )
    monkeypatch.setattr(_timing, "torch", fake)
    monkeypatch.setattr(_timing, "time", SimpleNamespace(perf_counter=lambda: device.host))

    def slow() -> None:
        device.host += 1e-4
        device.start(work)

    found = measure(slow, "cuda")
    assert 0.99 * work < found.median < work + 1e-5
