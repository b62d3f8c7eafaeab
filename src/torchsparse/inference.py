"""Deployment: whole networks as CUDA graphs, and kernels compiled before the first scan.

A scan of a few hundred thousand voxels is a millisecond of work for a GPU, and tens of
milliseconds of Python that starts this work piece by piece. `graphed` records the pieces once,
maps included, for levels with room to spare (`_capacity`), and then starts them all at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchsparse._cache import TensorCache
from torchsparse._capacity import (
    PAD,
    Found,
    Growth,
    Room,
    growing,
    mark_rows,
    rounded,
    row_count,
)
from torchsparse._flags import pending_word, raise_found
from torchsparse._ops.conv import compile_ahead
from torchsparse._settings import settings
from torchsparse._validate import check_coords, check_feats, check_rows, check_same_device
from torchsparse.tensor import SparseTensor, wrap

__all__ = ["Graphed", "graphed", "warmup"]

RATIO = 1.25  # of the capacities of neighbouring buckets
SPARE = 1.15  # room in a level beyond the largest share of the input's rows seen so far
WIDEST = 2**31 - 1  # cells of a level with narrow keys
NARROW = WIDEST // 2  # cells seen, below which keys are planned to be narrow
SMALLEST = 1024  # rows of the smallest bucket


def graphed(
    model: nn.Module,
    max_points: int | None = None,
    *,
    wait: bool = True,
    keep: int = 8,
    copy: bool = True,
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

    Returns:
        A callable with the argument and the results of ``model``: sparse and plain tensors, and
        tuples, lists and dictionaries of these. A tensor with as many rows as a level has room for
        is cut to the rows of that level. Return no more than is needed: each tensor is copied.

    Raises:
        ValueError: ``max_points`` or ``keep`` below 1.
    """
    return Graphed(model, max_points, wait, keep, copy)


def warmup(model: nn.Module, *examples: SparseTensor, graph: Graphed | None = None) -> int:
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
            compiled = _compile(model, served, graph)
        for x in examples:
            _step(model, _fresh(x))
    if graph is not None:
        for x in examples:
            with nullcontext() if model.training else torch.no_grad():
                graph(_fresh(x))
    return compiled


def _compile(model: nn.Module, examples: Sequence[SparseTensor], graph: Any) -> int:
    """First what makes maps, then, with the levels that it makes, all the rest."""
    like = examples[0].coords
    with _unflagged(like.device):
        guesses = [partial(_guess, model, x) for x in examples]
        maps = compile_ahead(like, guesses, maps_only=True)
        passes = [partial(_rehearse, model, x, graph) for x in examples]
        return max(maps, compile_ahead(like, passes, make_maps=True))


def _fresh(x: SparseTensor) -> SparseTensor:
    """The same features on the same coordinates, without maps."""
    out = wrap(x.feats, x)
    out._caches = TensorCache()
    return out


def _guess(model: nn.Module, x: SparseTensor) -> None:
    """A pass in which nothing is launched: sizes are guesses, values garbage."""
    rows = x.coords.shape[0]
    # Values that a network reads may be anything here, and so may be what it makes of them.
    with suppress(Exception), torch.no_grad(), growing(Growth(guess=True, rows=rows)):
        model(_fresh(x))


def _rehearse(model: nn.Module, x: SparseTensor, graph: Any) -> None:
    """Passes in which maps are made; features are garbage."""
    with suppress(Exception), growing(Growth()) as seen:
        _step(model, _fresh(x))
    if graph is not None:
        with suppress(Exception):
            _rehearse_padded(model, x, seen.levels, graph)


def _rehearse_padded(
    model: nn.Module, x: SparseTensor, levels: Sequence[Found], graph: Any
) -> None:
    """The same on padded coordinates, as a graph would have it."""
    n = x.coords.shape[0]
    rows = _room(n, getattr(graph, "max_points", None))
    coords = x.coords.new_full((rows, x.coords.shape[1]), PAD)
    coords[:n] = x.coords
    feats = x.feats.new_zeros(rows, x.feats.shape[1])
    count = torch.full((1,), n, dtype=torch.int64, device=coords.device)
    wait = getattr(graph, "wait", True)
    rooms = [
        Room(None)
        if level.each == 1 and not wait
        else Room(rounded(int(level.sites / n * rows * SPARE) + 1), level.cells < NARROW)
        for level in levels
    ]
    feats.requires_grad_(model.training and x.feats.requires_grad)
    with torch.set_grad_enabled(model.training), _autocast_without_cache():
        output, *_ = _padded(model, x, coords, feats, count, rooms)
    if model.training:
        _differentiate(model, feats, output)


def _step(model: nn.Module, x: SparseTensor) -> None:
    """Forward, and in training mode backward; nobody gets the gradients."""
    training = model.training
    x.feats = x.feats.detach().requires_grad_(training and x.feats.requires_grad)
    with torch.set_grad_enabled(training):
        output = _read(_inner(model)(x))
    if training:
        _differentiate(model, x.feats, output)


def _inner(model: nn.Module) -> nn.Module:
    """Without what waits for the gradients of other processes."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else model


def _differentiate(model: nn.Module, feats: Tensor, output: Any) -> None:
    wanted = [t for t in (feats, *model.parameters()) if t.requires_grad]
    given = [t for t in _features(output) if t.requires_grad]
    if wanted and given:
        with torch.autocast(feats.device.type, enabled=False):
            zeros = [torch.zeros_like(t) for t in given]
            torch.autograd.grad(given, wanted, zeros, allow_unused=True)


def _features(value: Any) -> Iterator[Tensor]:
    if isinstance(value, SparseTensor):
        yield value.feats
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _features(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _features(entry)


@contextmanager
def _left_alone(model: nn.Module, examples: Sequence[SparseTensor]) -> Iterator[None]:
    """Let steps write into copies of a model's buffers, and draw random numbers of their own."""
    tables = [module._buffers for module in model.modules()]
    before = [dict(table) for table in tables]
    devices = {x.coords.device for x in examples if x.coords.is_cuda}
    try:
        for table in tables:
            table.update({n: None if b is None else b.clone() for n, b in table.items()})
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for table, buffers in zip(tables, before):
            table.clear()
            table.update(buffers)


@contextmanager
def _unflagged(device: torch.device) -> Iterator[None]:
    """Complaints about garbage are forgotten."""
    word = pending_word(device)
    before = word.clone()
    try:
        yield
    finally:
        word.copy_(before)


@dataclass
class _Bucket:
    """A graph for inputs of at most so many rows."""

    rows: int
    coords: Tensor  # [rows, 1 + D] int32
    feats: Tensor  # [rows, C]
    count: Tensor  # [1] int64, rows that are real
    graph: Any
    output: Any
    growth: Growth
    report: Tensor  # [4 L + 1] int64 on the host: the levels' `Growth.infos`, and complaints
    parts: _Parts  # of the model, as captured
    unsure: bool  # levels may overflow, or the output needs their sizes
    sized: bool  # the output needs the sizes of levels
    filled: int = 0  # rows that may hold something other than padding
    used: int = 0


class _Seen(NamedTuple):
    """A level, as far as scans have shown."""

    share: float  # of rows, per row of the input
    cells: int
    bounded: bool  # no more rows than the level before


class Graphed:
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
    ) -> None:
        if max_points is not None and max_points < 1:
            raise ValueError(f"`max_points` must be at least 1, got {max_points}")
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, got {keep}")
        self.model = model
        self.max_points, self.wait, self.keep, self.copy = max_points, wait, keep, copy
        self.captures = self.replays = self.overflows = 0
        self._buckets: dict[Hashable, _Bucket] = {}
        self._seen: dict[Hashable, list[_Seen]] = {}
        self._pool: Any = None
        self._stream: Any = None  # of the last call
        self._replayed: Any = None  # event
        self._lock = threading.Lock()
        self._clock = 0

    def __call__(self, x: SparseTensor) -> Any:
        """``model(x)``, without gradients.

        Raises:
            RuntimeError: The model is in training mode, or does what a graph cannot hold.
            ValueError: What the network's layers raise.
        """
        if not isinstance(x, SparseTensor):
            raise TypeError(f"`x` must be a SparseTensor, got {type(x).__name__}")
        if self.model.training:
            raise RuntimeError("graphs are for evaluation: call model.eval() before")
        if not self._suits(x):
            with torch.no_grad():
                return self.model(x)
        with self._lock, torch.no_grad(), torch.cuda.device(x.coords.device):
            return self._serve(x)

    def _suits(self, x: SparseTensor) -> bool:
        coords, feats = x.coords, x.feats
        check_feats(feats)
        check_coords(coords, ndim=None)
        check_rows(feats, coords)
        check_same_device(feats=feats, coords=coords)
        rows = coords.shape[0]
        most = self.max_points
        fits = coords.is_cuda and coords.dtype == torch.int32 and rows > 0
        return fits and (most is None or rows <= most)

    def _serve(self, x: SparseTensor) -> Any:
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_event(self._stream.record_event())
        self._stream = stream
        kind = self._kind(x)
        rows = _room(x.coords.shape[0], self.max_points)
        bucket = self._buckets.get((kind, rows))
        if bucket is not None:
            self._clock += 1
            bucket.used = self._clock
            served, result = self._replay(bucket, x)
            if served:
                return result
            del self._buckets[kind, rows]
        result = self._eager(x, kind)
        self._buckets[kind, rows] = self._capture(x, kind, rows)
        while len(self._buckets) > self.keep:
            oldest = min(self._buckets, key=lambda key: self._buckets[key].used)
            del self._buckets[oldest]
        return result

    def _kind(self, x: SparseTensor) -> Hashable:
        """What a graph depends on, besides the number of rows."""
        return (
            x.coords.device,
            x.coords.shape[1],
            x.feats.shape[1],
            x.feats.dtype,
            x.stride,
            x.spatial_range,
            settings.version,
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.backends.cuda.matmul.allow_tf32,
        )

    def _eager(self, x: SparseTensor, kind: Hashable) -> Any:
        """The ordinary pass, which tells how large the levels are."""
        with growing(Growth()) as seen:
            result = self.model(_fresh(x))
        rows = x.coords.shape[0]
        now = [_Seen(level.sites / rows, level.cells, level.each == 1) for level in seen.levels]
        before = self._seen.get(kind, now)
        if len(before) != len(now):
            raise RuntimeError(
                "the network created other levels than before: what it computes must not depend "
                "on the data"
            )
        self._seen[kind] = [
            _Seen(max(a.share, b.share), max(a.cells, b.cells), b.bounded)
            for a, b in zip(before, now)
        ]
        return _read(result)

    # ------------------------------------------------------------------ capture
    def _capture(self, x: SparseTensor, kind: Hashable, rows: int) -> _Bucket:
        device = x.coords.device
        with torch.inference_mode(False):
            coords = torch.full((rows, x.coords.shape[1]), PAD, dtype=torch.int32, device=device)
            feats = x.feats.new_zeros((rows, x.feats.shape[1]))
            count = torch.zeros(1, dtype=torch.int64, device=device)
        n = x.coords.shape[0]
        coords[:n].copy_(x.coords)
        feats[:n].copy_(x.feats)
        count.fill_(n)
        rooms = self._rooms(kind, rows)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()

        def run() -> tuple[Any, Growth, Tensor]:
            # Autocast keeps casts of weights until its block ends; a graph must not read them.
            with _autocast_without_cache():
                return _padded(self.model, x, coords, feats, count, rooms)

        *_, report = run()  # compiles, and fills what is made once per process
        on_host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves PyTorch's random generator unable to capture again, so
            # that what would make it fail is looked for before.
            with _no_waiting():
                run()
            with torch.cuda.graph(graph, pool=self._pool):
                output, growth, report = run()
                on_host.copy_(report, non_blocking=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the network cannot be captured as a CUDA graph: {error}. It must not wait for "
                f"the device: use batch_size= of global pools, and no sizes that depend on values"
            ) from error
        self.captures += 1
        self._clock += 1
        sized = _needs_counts(output, growth)
        return _Bucket(
            rows, coords, feats, count, graph, output, growth, on_host, _Parts.of(self.model),
            unsure=any(room.rows is not None for room in rooms) or sized, sized=sized,
            filled=n, used=self._clock,
        )  # fmt: skip

    def _rooms(self, kind: Hashable, rows: int) -> list[Room]:
        """What to plan for each level."""
        return [
            Room(None)
            if level.bounded and not self.wait
            else Room(rounded(int(level.share * rows * SPARE) + 1), level.cells < NARROW)
            for level in self._seen[kind]
        ]

    # ------------------------------------------------------------------ replay
    def _replay(self, bucket: _Bucket, x: SparseTensor) -> tuple[bool, Any]:
        """(True, result), or False if the graph does not suit any more."""
        n = x.coords.shape[0]
        bucket.coords[:n].copy_(x.coords)
        if n < bucket.filled:
            bucket.coords[n : bucket.filled].fill_(PAD)
        bucket.filled = n
        bucket.feats[:n].copy_(x.feats)
        bucket.count.fill_(n)
        bucket.graph.replay()
        if bucket.unsure:
            self._replayed = self._replayed or torch.cuda.Event()
            self._replayed.record()
        # The device is busy: time to begin the copies, and to see whether the network still is
        # what was captured.
        results = _Results(bucket, x, self.copy)
        result = None if results.needs_counts else results.of(bucket.output)
        if not bucket.parts.hold():
            return False, None
        if any(module.training for module in bucket.parts.modules):
            raise RuntimeError("graphs are for evaluation: call model.eval() before")
        if bucket.unsure:
            counts = self._checked(bucket)
            if counts is None:
                self.overflows += 1
                return False, None
            if results.needs_counts:
                result = results.knowing(counts).of(bucket.output)
        self.replays += 1
        return True, result

    def _checked(self, bucket: _Bucket) -> list[int] | None:
        """The sizes of the levels; None if one had no room. Waits for the device."""
        self._replayed.synchronize()
        *levels, found = bucket.report.tolist()
        if found:
            pending_word(bucket.coords.device).zero_()
            raise_found(found, bucket.coords.device)
        counts, lost, cells = levels[0::4], levels[1::4], levels[3::4]
        growth = bucket.growth
        if any(lost) or any(c > room for c, room in zip(counts, growth.given)):
            return None
        if any(room.narrow and c > WIDEST for room, c in zip(growth.rooms or (), cells)):
            return None
        return counts


def _autocast_without_cache() -> AbstractContextManager[Any]:
    """Autocast as it is, casting weights whenever they are used."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError where PyTorch would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # Once per process PyTorch says that this is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@lru_cache(maxsize=1024)
def _room(rows: int, most: int | None) -> int:
    """Rows of the bucket for so many: sizes grow by RATIO."""
    room = SMALLEST
    while room < rows:
        room = rounded(int(room * RATIO))
    return room if most is None else min(room, rounded(most))


def _padded(
    model: Callable[[SparseTensor], Any],
    like: SparseTensor,
    coords: Tensor,
    feats: Tensor,
    count: Tensor,
    rooms: list[Room],
) -> tuple[Any, Growth, Tensor]:
    """One pass over padded coordinates, in which nothing waits for the device.

    Returns:
        The output, what the levels were given, and [4 L + 1] int64: of each level its sites, those
        lost, and two more numbers; then complaints.
    """
    coords = coords.view_as(coords)  # a tensor of this pass: notes and maps go with it
    mark_rows(coords, count)
    x = wrap(feats, like, coords, like.stride, like.spatial_range)
    x._caches = TensorCache()
    with growing(Growth(rooms, rows=coords.shape[0])) as growth:
        output = _read(model(x))
    word = pending_word(coords.device).view(1)
    report = torch.cat([*growth.infos, word])
    return output, growth, report


def _read(value: Any) -> Any:
    """A result whose features are computed."""
    if isinstance(value, SparseTensor):
        _ = value.feats
    elif isinstance(value, dict):
        for entry in value.values():
            _read(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _read(entry)
    return value


class _Parts(NamedTuple):
    """What a network was when it was captured."""

    modules: list[nn.Module]
    children: list[tuple[dict[str, Any], dict[str, Any]]]  # of each module: now, and then
    tensors: list[tuple[dict[str, Any], str, Tensor | None, int]]  # and their addresses

    @staticmethod
    def of(model: nn.Module) -> _Parts:
        modules = list(model.modules())
        children = [(m._modules, dict(m._modules)) for m in modules]
        tensors = [
            (table, name, tensor, 0 if tensor is None else tensor.data_ptr())
            for m in modules
            for table in (m._parameters, m._buffers)
            for name, tensor in table.items()
        ]
        return _Parts(modules, children, tensors)

    def hold(self) -> bool:
        """Whether a graph would read what the modules hold: values may change, places may not."""
        for table, then in self.children:
            if table != then:
                return False
        for table, name, tensor, address in self.tensors:
            if table.get(name) is not tensor:
                return False
            if tensor is not None and tensor.data_ptr() != address:
                return False
        return True


def _needs_counts(output: Any, growth: Growth) -> bool:
    """Whether an output has rows of a level that a layer created."""
    return _mentions(output, set(growth.given))


def _mentions(value: Any, rooms: set[int]) -> bool:
    if isinstance(value, SparseTensor):
        return value.feats.shape[0] in rooms
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] in rooms
    if isinstance(value, dict):
        return any(_mentions(entry, rooms) for entry in value.values())
    return isinstance(value, (list, tuple)) and any(_mentions(entry, rooms) for entry in value)


class _Results:
    """A graph's output without padding, copied or as it lies."""

    def __init__(self, bucket: _Bucket, x: SparseTensor, copy: bool) -> None:
        self.x, self.copy, self.given = x, copy, bucket.growth.given
        self.rows = {bucket.rows: x.coords.shape[0]}
        self.input_rows = bucket.count
        self.needs_counts = bucket.sized

    def knowing(self, counts: list[int]) -> _Results:
        """The same, with the sizes of the levels."""
        self.rows = {**dict(zip(self.given, counts)), **self.rows}
        return self

    def of(self, value: Any) -> Any:
        if isinstance(value, SparseTensor):
            return self._sparse(value)
        if isinstance(value, Tensor):
            real = self.rows.get(value.shape[0]) if value.dim() else None
            value = value if real is None else value[:real]
            return value.clone() if self.copy else value
        if isinstance(value, dict):
            return type(value)((key, self.of(entry)) for key, entry in value.items())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.of, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.of, value))
        return value

    def _sparse(self, value: SparseTensor) -> SparseTensor:
        feats = self.of(value.feats)
        if row_count(value.coords) is self.input_rows:
            return wrap(feats, self.x, self.x.coords, value.stride, value.spatial_range)
        out = wrap(feats, value, self.of(value.coords), value.stride, value.spatial_range)
        out._caches = TensorCache()
        return out
