"""One clock for the tuner and the commands: how long a call takes, and how sure that is."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Timing", "busy", "measure"]

L2_BYTES = 64 << 20  # where the device does not say; an H100 has 50 MB
LEAD = 1.5  # times what the host seems to need
MOST_LEAD = 0.05  # seconds that the host may run ahead


class Timing(NamedTuple):
    """Repeated calls of one function.

    Of calls that took [1, 2, 3, 4, 9] ms: median = 0.003, low = 0.001, high = 0.009, spread = 8/3.
    """

    median: float  # seconds per call
    low: float  # a tenth of the calls were faster
    high: float  # a tenth were slower
    calls: int

    @property
    def spread(self) -> float:
        """(high - low) / median, 0 for calls that take no time."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        """From the duration of each call."""
        ranked = sorted(seconds)
        tenth = len(ranked) // 10
        return Timing(statistics.median(ranked), ranked[tenth], ranked[-1 - tenth], len(ranked))


def measure(
    fn: Callable[[], Any],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 0.05,
    least: int = 3,
    most: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time a function.

    The first call warms up and does not count. On a CUDA device each call is timed by a pair of
    events, with the L2 cache overwritten before it, as a layer finds it within a network; the host
    starts ahead, so that its gaps between launches are not part of the time.

    Args:
        fn: What to time; must be repeatable.
        device: Where it runs.
        seconds: How long to go on, about.
        least, most: Calls, whatever they take.
        clock: For a CPU: seconds since some moment.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _on_gpu(fn, device, seconds, least, most)
    fn()
    found: list[float] = []
    end = clock() + seconds
    while len(found) < least or (clock() < end and len(found) < most):
        start = clock()
        fn()
        found.append(clock() - start)
    return Timing.of(found)


def busy(fn: Callable[[], Any], device: torch.device | str = "cpu", calls: int = 5) -> float:
    """Seconds per call that a device computes.

    On a GPU the durations of all kernels and copies, as PyTorch's profiler has them: the host may
    be as slow as it likes. Where that is not to be had, since another profiler runs, `measure`. On
    a CPU the fastest call. One more call warms up.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return measure(fn, device, seconds=0.0, least=calls).low
    fn()
    torch.cuda.synchronize(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of events that end with a cycle: there is one
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(calls):
                    fn()
                torch.cuda.synchronize(device)
        events = profiled.events() or ()
    except RuntimeError:
        events = ()
    total = sum(event.device_time for event in events if event.device_type.name == "CUDA")
    return total / calls / 1e6 if total else measure(fn, device).median


def _on_gpu(
    fn: Callable[[], Any], device: torch.device, seconds: float, least: int, most: int
) -> Timing:
    properties = torch.cuda.get_device_properties(device)
    size = 2 * (getattr(properties, "L2_cache_size", 0) or L2_BYTES)
    cache = torch.empty(size // 4, dtype=torch.int32, device=device)
    fn()  # compiles
    cache.zero_()
    flush, to_flush = _between(cache.zero_, 3)

    def cold(begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        cache.zero_()
        begin.record()
        fn()
        end.record()

    on_device, on_host = _between(partial(cold, *_events()), 3)
    count = min(max(math.ceil(seconds / max(on_device, 1e-6)), least), most)
    # Where the host is slower than the device, work in front of it hides that. How long the
    # function alone keeps the device busy is not known yet, for gaps are part of `on_device`.
    lag = min(LEAD * count * max(on_host - flush, 0.0), MOST_LEAD)
    ahead = max(flush - to_flush, flush / 4, 1e-6)  # of the host, by each such work
    events = [_events() for _ in range(count)]
    torch.cuda.synchronize(device)
    works = min(math.ceil(lag / ahead) + 1, math.ceil(MOST_LEAD / max(flush, 1e-6)))
    for _ in range(works):
        cache.zero_()
    for begin, end in events:
        cold(begin, end)
    torch.cuda.synchronize(device)
    return Timing.of([begin.elapsed_time(end) / 1e3 for begin, end in events])


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _between(fn: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds per call on the device, gaps included, and on the host."""
    begin, end = _events()
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats, host / repeats
