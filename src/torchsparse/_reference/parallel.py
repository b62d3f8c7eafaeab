"""Independent pieces of work on several CPU threads.

BLAS libraries scale poorly over threads on products of a few thousand rows and 32 to 96 columns
(two threads of MKL are slower than one at [4096, 96] x [96, 96]), while two such products side by
side run at twice the speed. So work is cut into pieces whose count depends on the data alone, each
piece runs on one thread from start to end, and results do not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["run_pieces"]

T = TypeVar("T")


class _Pool:
    """Worker threads that keep to one thread inside PyTorch, made when first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None
        self.workers = 0

    def get(self, workers: int) -> ThreadPoolExecutor:
        with self.lock:
            if self.executor is None or self.workers != workers:
                if self.executor is not None:
                    self.executor.shutdown(wait=False)
                self.executor, self.workers = _executor(workers), workers
            return self.executor


def _executor(workers: int) -> ThreadPoolExecutor:
    # torch.set_num_threads acts on the calling thread, and on threads that have not started
    # parallel work yet; hence the last line, which gives later threads the old number back.
    before = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(1)
        ready.wait()

    executor = ThreadPoolExecutor(workers, "torchsparse", initializer=start)
    for _ in range(workers):
        executor.submit(int)
    ready.wait()
    torch.set_num_threads(before)
    return executor


_pool = _Pool()
_inside = threading.local()


def _forget_threads() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_forget_threads)


def run_pieces(work: Callable[[T], None], pieces: Sequence[T]) -> None:
    """Call ``work`` on every piece, on as many threads as ``torch.get_num_threads()``.

    Pieces must not write to the same memory. Grad mode inside is off. An exception of any piece
    is raised here after the others have ended.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2 or getattr(_inside, "worker", False):
        with torch.no_grad():
            for piece in pieces:
                work(piece)
        return
    queue = iter(pieces)
    lock = threading.Lock()

    def drain() -> None:
        _inside.worker = True
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
            while True:
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                work(piece)

    futures = [_pool.get(torch.get_num_threads()).submit(drain) for _ in range(threads)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
