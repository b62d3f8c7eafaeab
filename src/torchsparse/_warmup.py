"""Kernels compiled before the first scan, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchsparse._capacity import Growth, growing
from torchsparse._flags import pending_word
from torchsparse._graphs import (
    Graphs,
    Seen,
    autocast_without_cache,
    fresh,
    leaves,
    padded,
    placed,
    room_for,
    unwrapped,
)
from torchsparse._ops.conv import compile_ahead
from torchsparse.tensor import SparseTensor

__all__ = ["compile_passes", "warmup"]


def warmup(model: nn.Module, *examples: SparseTensor, graph: Graphs | None = None) -> int:
    """Compile the kernels that a network needs, many at once, and run it on each example.

    A network in training mode runs forward and backward. Its running statistics, the gradients of
    its parameters and the random generators of PyTorch are left as they are. Where mixed precision
    is wanted, call this under autocast.

    Args:
        model: Called with one `SparseTensor` in the mode that it has, without gradients in
            evaluation mode.
        *examples: Typical inputs, on the device that the network will work on. In training, their
            features have gradients if they require them.
        graph: Captured too, if given; what it launches is compiled with the rest.

    Returns:
        The number of different kernels compiled ahead, those in Triton's cache of compiled kernels
        included; 0 on a CPU.
    """
    compiled = 0
    # In float64 PyTorch computes: no kernel to compile, and garbage is no index to read with.
    served = [x for x in examples if x.coords.is_cuda and x.feats.dtype != torch.float64]
    with _left_alone(model, examples) if model.training else nullcontext():
        if served:
            compiled = compile_passes(model, served, graph)
        for x in examples:
            _step(model, fresh(x))
    if graph is not None:
        left = _restored(model, examples) if model.training else nullcontext()
        with left, torch.set_grad_enabled(model.training):
            for x in examples:
                graph(fresh(x))
    return compiled


def compile_passes(
    model: nn.Module, examples: Sequence[SparseTensor], graph: Graphs | None
) -> int:
    """First what makes maps, then, with the levels that it makes, all the rest."""
    like = examples[0].coords
    with _unflagged(like.device):
        guesses = [partial(_guess, model, x) for x in examples]
        maps = compile_ahead(like, guesses, maps_only=True)
        passes = [partial(_rehearse, model, x, graph) for x in examples]
        return max(maps, compile_ahead(like, passes, make_maps=True))


def _guess(model: nn.Module, x: SparseTensor) -> None:
    """A pass in which nothing is launched: sizes are guesses, values garbage."""
    rows = x.coords.shape[0]
    # Values that a network reads may be anything here, and so may be what it makes of them.
    with suppress(Exception), torch.no_grad(), growing(Growth(guess=True, rows=rows)):
        model(fresh(x))


def _rehearse(model: nn.Module, x: SparseTensor, graph: Graphs | None) -> None:
    """Passes in which maps are made; features are garbage."""
    with suppress(Exception), growing(Growth()) as seen:
        _step(model, fresh(x))
    with suppress(Exception):
        for _ in range(2):  # the second builds together the maps that the first asks for
            _step(model, fresh(x))
    if graph is not None:
        with suppress(Exception):
            _rehearse_padded(model, x, seen, graph)


def _rehearse_padded(model: nn.Module, x: SparseTensor, seen: Growth, graph: Graphs) -> None:
    """The same on padded coordinates, as a graph would have it."""
    n = x.coords.shape[0]
    coords, feats, count = placed(x, room_for(n, graph.max_points))
    rooms = [Seen.of(level, n).room(coords.shape[0], graph.wait) for level in seen.levels]
    feats.requires_grad_(model.training and x.feats.requires_grad)
    with torch.set_grad_enabled(model.training), autocast_without_cache():
        output, *_ = padded(model, x, coords, feats, count, rooms, seen.wishes)
    if model.training:
        _differentiate(model, feats, output)


def _step(model: nn.Module, x: SparseTensor) -> None:
    """Forward, and in training mode backward; nobody gets the gradients."""
    training = model.training
    x.feats = x.feats.detach().requires_grad_(training and x.feats.requires_grad)
    with torch.set_grad_enabled(training):
        output = unwrapped(model)(x)
        for _ in leaves(output):
            pass  # computed now
    if training:
        _differentiate(model, x.feats, output)


def _differentiate(model: nn.Module, feats: Tensor, output: Any) -> None:
    wanted = [t for t in (feats, *model.parameters()) if t.requires_grad]
    given = [t for t in leaves(output) if t.requires_grad]
    if wanted and given:
        with torch.autocast(feats.device.type, enabled=False):
            zeros = [torch.zeros_like(t) for t in given]
            torch.autograd.grad(given, wanted, zeros, allow_unused=True)


@contextmanager
def _left_alone(model: nn.Module, examples: Sequence[SparseTensor]) -> Iterator[None]:
    """Let steps write into copies of a model's buffers, and draw random numbers of their own."""
    tables = [module._buffers for module in model.modules()]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({n: None if b is None else b.clone() for n, b in table.items()})
        with _other_numbers(examples):
            yield
    finally:
        for table, buffers in zip(tables, before):
            table.clear()
            table.update(buffers)


@contextmanager
def _restored(model: nn.Module, examples: Sequence[SparseTensor]) -> Iterator[None]:
    """Give buffers their values back: a graph is captured with these very tensors."""
    buffers = list(model.buffers())
    values = [b.clone() for b in buffers]
    try:
        with _other_numbers(examples):
            yield
    finally:
        for buffer, value in zip(buffers, values):
            buffer.data.copy_(value)


def _other_numbers(examples: Sequence[SparseTensor]) -> AbstractContextManager[Any]:
    """Random numbers of one's own."""
    devices = {x.coords.device for x in examples if x.coords.is_cuda}
    return torch.random.fork_rng(devices=list(devices))


@contextmanager
def _unflagged(device: torch.device) -> Iterator[None]:
    """Complaints about garbage are forgotten."""
    word = pending_word(device)
    before = word.clone()
    try:
        yield
    finally:
        word.copy_(before)
