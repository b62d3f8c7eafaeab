"""Threads that share pieces: all are done, in every mode, and nothing else changes."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from torchsparse._reference.threads import for_each

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def squares(count: int) -> torch.Tensor:
    out = torch.zeros(count)

    def work(i: int) -> None:
        out[i] = i * i

    for_each(work, range(count), CPU)
    return out


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_every_piece_is_done(two_threads: None, count: int) -> None:
    assert torch.equal(squares(count), torch.arange(count).float().square())


def test_pieces_run_on_two_threads_that_compute_alone(two_threads: None) -> None:
    seen: dict[int, int] = {}
    together = threading.Barrier(2, timeout=60)

    def work(piece: int) -> None:
        together.wait()
        seen[threading.get_ident()] = torch.get_num_threads()

    for_each(work, range(4), CPU)
    assert list(seen.values()) == [1, 1] and threading.get_ident() not in seen
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.parametrize("threads", [1, 4])
def test_one_thread_or_few_pieces_stay_where_they_are(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seen: set[int] = set()
    try:
        for_each(lambda _: seen.add(threading.get_ident()), range(3), CPU)
    finally:
        torch.set_num_threads(before)
    assert seen == {threading.get_ident()}


def test_inference_mode_goes_along(two_threads: None) -> None:
    with torch.inference_mode():
        assert squares(5).is_inference()


def test_an_exception_comes_back_after_all_have_stopped(two_threads: None) -> None:
    done: list[int] = []

    def work(i: int) -> None:
        if i == 3:
            raise ValueError("three")
        done.append(i)

    with pytest.raises(ValueError, match="three"):
        for_each(work, range(20), CPU)
    assert len(squares(4)) == 4  # the threads live on


LATE = """
import atexit, torch
from torchsparse._reference.threads import for_each
torch.set_num_threads(2)
atexit.register(lambda: for_each(print, range(4), torch.device("cpu")))
for_each(lambda _: None, range(4), torch.device("cpu"))
"""


def test_it_works_while_the_interpreter_shuts_down() -> None:
    run = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.split() == ["0", "1", "2", "3"], run.stderr


def _child(queue: multiprocessing.SimpleQueue[float]) -> None:
    torch.set_num_threads(2)
    queue.put(float(squares(10).sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on threads
def test_a_forked_process_starts_its_own(two_threads: None) -> None:
    squares(10)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get() == 285.0
