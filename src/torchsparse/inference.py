"""Deployment: whole networks as CUDA graphs, and kernels compiled before the first scan."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from torchsparse._capacity import Growth
from torchsparse._frozen import Store, keeping
from torchsparse._graphs import (
    Bucket,
    Graphs,
    Parts,
    autocast_without_cache,
    capturable,
    no_waiting,
    padded,
    placed,
)
from torchsparse._warmup import warmup
from torchsparse.tensor import SparseTensor

__all__ = ["Graphed", "graphed", "warmup"]

_IN_TRAINING = "these graphs are for evaluation: call model.eval() before"


def graphed(
    model: nn.Module,
    max_points: int | None = None,
    *,
    wait: bool = True,
    keep: int = 8,
    copy: bool = True,
    frozen: bool = False,
) -> Graphed:
    """A network that runs as one CUDA graph, from voxel coordinates to its output.

    The first scan of each size class runs as usual and is then captured, which takes about a
    second (more if kernels must be compiled). Scans on the CPU, without rows or with more than
    ``max_points`` rows run as usual.

    Args:
        model: In evaluation mode, called with one `SparseTensor`. It may do whatever a CUDA graph
            can hold: what it computes must not depend on values that the host reads. Hooks run
            when a graph is captured, not when it is replayed.
        max_points: Most input voxels of a graph, or None.
        wait: True: levels that layers create have room for what scans needed so far and a little
            more; each call waits once for the device, to see that it sufficed. A scan that needs
            more runs as usual, and the graph is captured anew. False: levels whose voxels come
            from at least one of the level before each, as with kernel 2 and stride 2, have room
            for whatever may come. A call does not wait if all are of this kind and the output has
            the rows of the input or a fixed size; complaints about the input come later
            (`torchsparse.backends.check_errors`).
        keep: Most graphs kept; the one not used for longest goes first. They share their memory.
        copy: False: results lie in the graphs' memory, and the next call overwrites them.
        frozen: True: the weights stay as they are. What convolutions make of them alone, as casts
            under autocast and the layout that TF32 wants, is made once, kept, and read by all
            graphs. Writes to such weights that PyTorch counts are noticed, and the graph is
            captured anew; after others, as through ``.data``, graphs would mix old and new
            weights: make a new `graphed`. False: each replay makes this from the weights that
            there are.

    Returns:
        A callable with the argument and the results of ``model``: sparse and plain tensors, and
        tuples, lists, dictionaries and dataclasses of these. A tensor with as many rows as a level
        has room for is cut to the rows of that level. Return no more than is needed: each tensor
        is copied.

    Raises:
        ValueError: ``max_points`` or ``keep`` below 1.
    """
    return Graphed(model, max_points, wait, keep, copy, frozen)


class Graphed(Graphs):
    """What `graphed` returns.

    Attributes:
        model: The network.
        captures: Graphs captured so far.
        replays: Calls served by a graph.
        overflows: Calls in which a level had too little room.
    """

    def __init__(
        self,
        model: nn.Module,
        max_points: int | None = None,
        wait: bool = True,
        keep: int = 8,
        copy: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__(model, max_points, wait, keep, copy)
        self.frozen = frozen
        self._store: Store | None = None  # of all graphs, if frozen
        self._parts: Parts | None = None  # of the model, when the store began

    def __call__(self, x: SparseTensor) -> Any:
        """``model(x)``, without gradients.

        Raises:
            RuntimeError: The model is in training mode, or does what a graph cannot hold.
            ValueError: What the network's layers raise.
        """
        suits = self._suits(x)
        if self.model.training:
            raise RuntimeError(_IN_TRAINING)
        if not suits:
            with torch.no_grad():
                return self.model(x)
        with self._lock, torch.no_grad(), torch.cuda.device(x.coords.device):
            return self._serve(x)

    def _eager(self, x: SparseTensor, kind: Hashable) -> Any:
        # Parts alone in training mode would take and move statistics.
        if any(module.training for module in self.model.modules()):
            raise RuntimeError(_IN_TRAINING)
        return super()._eager(x, kind)

    def _capture(self, x: SparseTensor, kind: Hashable, rows: int) -> Bucket:
        places = placed(x, rows)
        rooms, wishes = self._rooms(kind, rows), self._wishes[kind]
        on_host: list[torch.Tensor] = []

        def run() -> tuple[Any, Growth]:
            # Autocast keeps casts of weights until its block ends; a graph must not read them.
            with autocast_without_cache():
                output, growth, report = padded(self.model, x, *places, rooms, wishes)
            if not on_host:  # the first run compiles, and fills what is made once per process
                on_host.append(torch.empty(report.shape, dtype=report.dtype, pin_memory=True))
            on_host[0].copy_(report, non_blocking=True)
            return output, growth

        store = self._kept()
        with keeping(store):
            # What the store keeps is made here, outside of the graph's memory, and is there before
            # a graph reads it: recording begins with a wait for the device, and a call in another
            # stream waits for this one.
            run()
            with capturable():
                with no_waiting():
                    run()
                graph, (output, growth) = self._record(run)
        filled = x.coords.shape[0]
        bucket = self._bucket(places, rooms, graph, output, growth, on_host[0], filled)
        bucket.kept = store
        return bucket

    def _kept(self) -> Store | None:
        """What graphs that are captured now find made; None unless weights are frozen."""
        if not self.frozen:
            return None
        known = self._store is not None and self._store.unchanged()
        if not (known and self._parts is not None and self._parts.hold()):
            self._parts = Parts.of(self.model)
            self._store = Store(t for _, _, t, _ in self._parts.tensors if t is not None)
        return self._store

    def _holds(self, bucket: Bucket) -> bool:
        if not super()._holds(bucket):
            return False
        if bucket.kept is not None and not bucket.kept.unchanged():
            return False
        if any(module.training for module in bucket.parts.modules):
            raise RuntimeError(_IN_TRAINING)
        return True
