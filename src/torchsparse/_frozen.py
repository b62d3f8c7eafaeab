"""What is made from weights alone, kept for a network whose weights stay as they are.

A product may want its weight in another dtype, or turned. Mostly this is done in every call, and
so in every replay of a CUDA graph, which reads the weights that there are then. A graph of frozen
weights (`inference.graphed`) reads what was made once, before it was captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Store", "cast", "current", "keeping", "made"]


class Store:
    """What was made from the weights of one network.

    Nothing leaves it, since a graph may read it: whoever finds that it is no longer `unchanged`
    starts another one. The memory of the weights is held, too, so that an address tells what lies
    there.

    Args:
        weights: Parameters and buffers. What is made from other tensors is not kept: these may be
            features, or weights that a layer computes.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._made: dict[Any, tuple[Tensor, int]] = {}  # with the writes to the weight before
        self._weights: dict[int, tuple[Tensor, int]] = {}  # that were used, and the same
        self._memory: dict[int, torch.UntypedStorage] = {}  # of weights and of what was made
        for weight in weights:
            self._hold(weight)

    def __len__(self) -> int:
        return len(self._made)

    def made(self, weight: Tensor, kind: Any, make: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """``make(weight, kind)``, or what this gave before.

        Views of a weight are new objects in every call, and are told by where they lie.
        """
        if torch.compiler.is_compiling():  # a program makes it each time it runs
            return make(weight, kind)
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, kind)
        writes = _writes(weight)
        found = self._made.get(key)
        if found is not None and found[1] == writes:
            return found[0]
        value = make(weight, kind)
        # What is made while a graph is captured lies in the memory of graphs, and is there only
        # when this one has been replayed.
        if weight.untyped_storage().data_ptr() in self._memory and not _captured(weight):
            self._made[key] = value, writes
            self._hold(value)
            whole = weight if weight._base is None else weight._base
            self._weights.setdefault(id(whole), (whole, writes))
        return value

    def unchanged(self) -> bool:
        """Whether PyTorch counted no write to the weights that were used."""
        for weight, writes in self._weights.values():
            if writes >= 0 and weight._version != writes:
                return False
        return True

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            self._memory[storage.data_ptr()] = storage


def _writes(tensor: Tensor) -> int:
    """How often it was written to; -1 for a tensor of inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _captured(tensor: Tensor) -> bool:
    """Whether what is done with it becomes part of a graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Current(threading.local):
    store: Store | None = None


current = _Current()  # of this thread; where calls are many, look here before calling `made`


@contextmanager
def keeping(store: Store | None) -> Iterator[None]:
    """Let ``store`` keep what this thread makes from weights; None: nothing is kept."""
    before, current.store = current.store, store
    try:
        yield
    finally:
        current.store = before


def made(weight: Tensor, kind: Any, make: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """``make(weight, kind)``, kept if this thread keeps such things."""
    store = current.store
    return make(weight, kind) if store is None else store.made(weight, kind, make)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype, kept in the same manner."""
    if weight.dtype is dtype:
        return weight
    store = current.store
    return weight.to(dtype) if store is None else store.made(weight, dtype, Tensor.to)
