"""Clocks: what a step costs the one who waits for it, and what it costs the device alone."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]
BURST = 10  # steps or replays between two events


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(step: Step, device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of repeated calls: one to warm up (on a GPU some), then 3 (2 if they take more
    than three seconds each) to 100 within about ``seconds``."""
    start = time.perf_counter()
    step()
    synchronize(device)
    least = 3 if time.perf_counter() - start < 3 else 2
    for _ in range(4 if device.type == "cuda" else 0):
        step()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < end and len(found) < 100):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def fastest(step: Step, device: torch.device, seconds: float) -> float:
    """Milliseconds of a call at best, without the host's part on a GPU."""
    if device.type == "cpu":
        return min(times(step, device, seconds))
    for _ in range(3):
        step()
    return min(_bursts(step))


def _bursts(step: Step, count: int = 7) -> list[float]:
    """Milliseconds per step of some bursts of steps, between CUDA events."""
    found = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(BURST):
            step()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / BURST)
    return found


def captured(step: Step) -> Step:
    """The replay of a step as a CUDA graph.

    Raises:
        RuntimeError: It cannot be captured: it waits for the device on its way.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Span(NamedTuple):
    """All calls of one kernel, copy or fill."""

    name: str
    calls: float  # per step
    ms: float  # per step


def spans(step: Step, runs: int = 5) -> list[Span]:
    """What a GPU did in a step, those inside the replays of CUDA graphs, too; longest first."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    # With events of one cycle alone, PyTorch 2.11 warns that those before it are gone.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(runs):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA" and event.device_time > 0:
            found.setdefault(event.name, []).append(event.device_time)
    totals = [Span(name, len(us) / runs, sum(us) / runs / 1e3) for name, us in found.items()]
    return sorted(totals, key=lambda span: -span.ms)


def kernels(step: Step, runs: int = 5) -> dict[str, float]:
    """Per step: the sum of the durations of all kernels, copies and fills, and their number."""
    found = spans(step, runs)
    return {"kernel_ms": sum(s.ms for s in found), "launches": sum(s.calls for s in found)}


class Phases:
    """Seconds of the parts of a program, by name, in their order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what is done meanwhile to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


def replayed(graphs: Sequence[Any], repeats: int = 20) -> float:
    """Milliseconds of CUDA graphs replayed one after the other, the median, gaps included."""
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for graph in graphs:
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


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


def walls(step: Step, device: torch.device, seconds: float) -> dict[str, Any]:
    """wall_ms (median), min_ms, repeats and peak_mb of a step."""
    memory = PeakMemory(device)
    memory.restart()
    found = times(step, device, seconds)
    return {
        "wall_ms": statistics.median(found), "min_ms": min(found), "repeats": len(found),
        "peak_mb": memory.read(),
    }  # fmt: skip


def on_gpu(step: Step, graph: bool) -> dict[str, Any]:
    """What a GPU does in a step. Walls come first: once a profiler has listened, every launch of
    its process costs the host more.

    Args:
        graph: Try a CUDA graph for ``gpu_ms``; otherwise, and where that fails, bursts of calls.

    Returns:
        kernel_ms and launches; gpu_ms (median) and its ``clock`` ("graph" or "stream": then it
        holds the gaps in which the GPU waits for the host).
    """
    row: dict[str, Any] = kernels(step)
    if graph:
        try:
            return row | {"gpu_ms": statistics.median(_bursts(captured(step))), "clock": "graph"}
        except RuntimeError:
            torch.cuda.synchronize()
    return row | {"gpu_ms": statistics.median(_bursts(step)), "clock": "stream"}
