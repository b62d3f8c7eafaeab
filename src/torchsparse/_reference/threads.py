"""Threads that share the pieces of one computation.

PyTorch spreads one operation over its threads at a time: each operation waits for all of them,
some run on one, and what one wrote lies in the cache of another. Where a computation falls into
enough pieces that write to different places, each piece runs on one thread instead. Which thread
took a piece changes nothing about its bits.

There are as many threads as `torch.get_num_threads()` allows; with one, no thread is started. They
sleep between calls, and a forked process starts its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["for_each"]

T = TypeVar("T")


def for_each(
    work: Callable[[T], None], pieces: Sequence[T], device: torch.device, apart: bool = True
) -> None:
    """Call ``work`` on every piece, in any order.

    Args:
        work: Computes without gradients, and writes where no other piece reads or writes.
        pieces: Fewer than two a thread are worked on in turn, with all threads each.
        device: Where it computes; only a CPU is shared.
        apart: False: in turn, with all threads each, however many there are.
    """
    count = torch.get_num_threads() if device.type == "cpu" and apart else 1
    pool = _threads.get(count) if 1 < count <= len(pieces) // 2 else None
    left = deque(pieces)
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def share() -> None:
        with mode():
            while True:
                try:
                    piece = left.popleft()
                except IndexError:
                    return
                work(piece)

    try:
        shares = [pool.submit(share) for _ in range(count)] if pool is not None else []
    except RuntimeError:  # the interpreter is shutting down
        shares = []
    if not shares:
        for piece in pieces:
            work(piece)
        return
    try:
        wait(shares)
    finally:
        left.clear()  # interrupted: what has begun is finished, no more
    for done in shares:
        done.result()


def _compute_alone() -> None:
    torch.get_num_threads()  # the first use of a thread sets the number that all begin with
    torch.set_num_threads(1)


class _Threads:
    """The threads of this process, each of which computes alone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.count = 0

    def get(self, count: int) -> ThreadPoolExecutor | None:
        """At least ``count`` threads; None: they cannot be told to compute alone here."""
        if self.count < count:
            with self.lock:
                if self.count < count:
                    self._start(count)
        return self.pool

    def _start(self, count: int) -> None:
        self.pool = ThreadPoolExecutor(count, "torchsparse", _compute_alone)
        together = threading.Barrier(count)  # passed once every thread has begun
        wait([self.pool.submit(together.wait) for _ in range(count)])
        if torch.get_num_threads() != count:  # the setting is one for all threads
            self.pool = None
        torch.set_num_threads(count)  # what threads begin with that somebody starts later
        self.count = count


_threads = _Threads()


def _forget() -> None:
    global _threads
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
