"""Whole networks as CUDA graphs: size classes, padded inputs, room for levels, results.

A scan of a few hundred thousand voxels is a millisecond of work for a GPU, and tens of
milliseconds of Python that starts this work piece by piece. A graph records the pieces once, maps
included, for levels with room to spare (`_capacity`), and then starts them all at once. What is
recorded is decided by `inference` and `training`.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchsparse import _tuned
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
from torchsparse._frozen import Store
from torchsparse._ops.inputs import place_input
from torchsparse._settings import settings
from torchsparse._validate import check_coords, check_feats, check_rows, check_same_device
from torchsparse.tensor import SparseTensor, check_sparse, wrap

__all__ = [
    "PARALLEL",
    "Bucket",
    "Graphs",
    "Parts",
    "Results",
    "Seen",
    "autocast_without_cache",
    "capturable",
    "check_form",
    "fresh",
    "leaves",
    "mapped",
    "no_waiting",
    "padded",
    "placed",
    "room_for",
    "unwrapped",
]

RATIO = 1.25  # of the capacities of neighbouring buckets
SPARE = 1.15  # room in a level beyond the largest share of the input's rows seen so far
WIDEST = 2**31 - 1  # cells of a level with narrow keys
NARROW = WIDEST // 2  # cells seen, below which keys are planned to be narrow
SMALLEST = 1024  # rows of the smallest bucket
PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel  # around the module that computes


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without what waits for other devices or processes."""
    return model.module if isinstance(model, PARALLEL) else model


def fresh(x: SparseTensor) -> SparseTensor:
    """The same features on the same coordinates, without maps."""
    out = wrap(x.feats, x)
    out._caches = TensorCache()
    return out


@dataclass
class Bucket:
    """A graph for inputs of at most so many rows."""

    rows: int
    coords: Tensor  # [rows, 1 + D] int32
    feats: Tensor  # [rows, C]
    count: Tensor  # [1] int64, rows that are real
    graph: Any
    output: Any
    growth: Growth
    report: Tensor  # [4 L + 1] int64 on the host: the levels' `Growth.infos`, and complaints
    parts: Parts  # of the model, as captured
    unsure: bool  # levels may overflow, or the output needs their sizes
    sized: bool  # the output needs the sizes of levels
    filled: int  # rows that may hold something other than padding
    more: Any = None  # what a subclass captured beside it
    kept: Store | None = None  # what its graph reads of frozen weights
    used: int = 0


class Places(NamedTuple):
    """Where a bucket's input lies."""

    coords: Tensor
    feats: Tensor
    rows: Tensor  # [1] int64, how many are real


class Seen(NamedTuple):
    """A level, as far as scans have shown."""

    share: float  # of rows, per row of the input
    cells: int
    bounded: bool  # no more rows than the level before

    @staticmethod
    def of(level: Found, rows: int) -> Seen:
        """What a scan of so many rows has shown."""
        return Seen(level.sites / rows, level.cells, level.each == 1)

    def room(self, rows: int, wait: bool) -> Room:
        """What to plan for inputs of so many rows; all there can be if nobody waits to see."""
        if self.bounded and not wait:
            return Room(None)
        return Room(rounded(int(self.share * rows * SPARE) + 1), self.cells < NARROW)


class Graphs:
    """Graphs of one network for scans of several size classes.

    A subclass says what is captured, and when a graph serves: `_capture`, `__call__`. It describes
    the attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        max_points: int | None,
        wait: bool,
        keep: int,
        copy: bool,
    ) -> None:
        if max_points is not None and max_points < 1:
            raise ValueError(f"`max_points` must be at least 1, got {max_points}")
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, got {keep}")
        self.model = model
        self.max_points, self.wait, self.keep, self.copy = max_points, wait, keep, copy
        self.captures = self.replays = self.overflows = 0
        self._buckets: dict[Hashable, Bucket] = {}
        self._seen: dict[Hashable, list[Seen]] = {}
        self._wishes: dict[Hashable, Any] = {}  # maps that the network asks for
        self._pool: Any = None  # of memory, shared by all graphs
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()  # graphs
        self._stream: Any = None  # of the last call
        self._replayed: Any = None  # event of the last call
        self._replays: dict[torch.device, Any] = {}  # events, each of one device
        self._lock = threading.Lock()
        self._clock = 0

    def _suits(self, x: SparseTensor) -> bool:
        """Whether a graph may serve ``x``.

        Raises:
            TypeError, ValueError: It is no sparse tensor, or its parts do not fit.
        """
        check_sparse(x, "x")
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
        rows = room_for(x.coords.shape[0], self.max_points)
        bucket = self._buckets.get((kind, rows))
        if bucket is not None:
            self._clock += 1
            bucket.used = self._clock
            served, result = self._replay(bucket, x)
            if served:
                return result
            del self._buckets[kind, rows], bucket  # its memory is free for what follows
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
            settings.decisive(),
            _tuned.generation(),  # also whether determinism is asked for
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        )

    def _eager(self, x: SparseTensor, kind: Hashable) -> Any:
        """The ordinary pass, which tells how large the levels are."""
        with growing(Growth()) as seen:
            result = self.model(fresh(x))
        rows = x.coords.shape[0]
        now = [Seen.of(level, rows) for level in seen.levels]
        before = self._seen.get(kind, now)
        if len(before) != len(now):
            raise RuntimeError(
                "the network created other levels than before: what it computes must not depend "
                "on the data"
            )
        self._wishes[kind] = seen.wishes
        self._seen[kind] = [
            Seen(max(a.share, b.share), max(a.cells, b.cells), b.bounded)
            for a, b in zip(before, now)
        ]
        check_form(result)
        for _ in leaves(result):
            pass  # computed now
        return result

    def __call__(self, x: SparseTensor) -> Any:
        """What ``model(x)`` returns."""
        raise NotImplementedError

    # ------------------------------------------------------------------ capture
    def _capture(self, x: SparseTensor, kind: Hashable, rows: int) -> Bucket:
        """Record what a call for a scan of the size and kind of ``x`` does."""
        raise NotImplementedError

    def _record(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """A graph of what ``run`` launches, and its result.

        A capture that fails leaves PyTorch's random generator unable to capture again: look before
        (`capturable`, `no_waiting`) for what would make it fail.
        """
        if not self._alive:
            # PyTorch takes a pool that no graph uses any longer for gone, although results may
            # still lie in it.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, as those that pin memory for a data loader, go on.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = run()
        self._alive.add(graph)
        return graph, found

    def _bucket(
        self, places: Places, rooms: list[Room], graph: Any, output: Any, growth: Growth,
        report: Tensor, filled: int,
    ) -> Bucket:  # fmt: skip
        self.captures += 1
        self._clock += 1
        sized = _needs_counts(output, growth)
        return Bucket(
            places.coords.shape[0], *places, graph, output, growth, report, Parts.of(self.model),
            unsure=any(room.rows is not None for room in rooms) or sized, sized=sized,
            filled=filled, used=self._clock,
        )  # fmt: skip

    def _rooms(self, kind: Hashable, rows: int) -> list[Room]:
        """What to plan for each level."""
        return [level.room(rows, self.wait) for level in self._seen[kind]]

    # ------------------------------------------------------------------ replay
    def _replay(self, bucket: Bucket, x: SparseTensor) -> tuple[bool, Any]:
        """(True, result), or False if the graph does not suit any more."""
        self._fill(bucket, x)
        bucket.graph.replay()
        if bucket.unsure:
            device = x.coords.device
            if device not in self._replays:
                self._replays[device] = torch.cuda.Event()
            self._replayed = self._replays[device]
            self._replayed.record()
        # The device is busy: time to begin the copies, and to see whether the network still is
        # what was captured.
        results = self._results(bucket, x)
        result = None if results.needs_counts else results.made()
        if not self._holds(bucket):
            return False, None
        if bucket.unsure:
            counts = self._checked(bucket)
            if counts is None:
                self.overflows += 1
                return False, None
            if results.needs_counts:
                result = results.knowing(counts).made()
        self.replays += 1
        return True, result

    def _fill(self, bucket: Bucket, x: SparseTensor) -> None:
        """Bring the input to where the graph reads it."""
        place_input(x.coords, x.feats, bucket.coords, bucket.feats, bucket.count, bucket.filled)
        bucket.filled = x.coords.shape[0]

    def _results(self, bucket: Bucket, x: SparseTensor) -> Results:
        return Results(bucket, x, self.copy)

    def _holds(self, bucket: Bucket) -> bool:
        """Whether the network still is what was captured."""
        return bucket.parts.hold()

    def _await(self, bucket: Bucket) -> None:
        """Wait for the report."""
        self._replayed.synchronize()

    def _checked(self, bucket: Bucket) -> list[int] | None:
        """The sizes of the levels; None if one had no room. Waits for the device."""
        self._await(bucket)
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


@contextmanager
def capturable() -> Iterator[None]:
    """Say what to do if something cannot be captured."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"the network cannot be captured as a CUDA graph: {error}. It must not wait for the "
            f"device: use batch_size= of global pools, and no sizes that depend on values"
        ) from error


def autocast_without_cache() -> AbstractContextManager[Any]:
    """Autocast as it is, casting weights whenever they are used."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


@contextmanager
def no_waiting() -> Iterator[None]:
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


def placed(x: SparseTensor, rows: int) -> Places:
    """Room for inputs of so many rows, holding ``x``."""
    n, device = x.coords.shape[0], x.coords.device
    with torch.inference_mode(False):
        coords = torch.full((rows, x.coords.shape[1]), PAD, dtype=torch.int32, device=device)
        feats = x.feats.detach().new_zeros((rows, x.feats.shape[1]))
        real = torch.full((1,), n, dtype=torch.int64, device=device)
    coords[:n].copy_(x.coords)
    feats[:n].copy_(x.feats.detach())
    return Places(coords, feats, real)


@lru_cache(maxsize=1024)
def room_for(rows: int, most: int | None) -> int:
    """Rows of the bucket for so many: sizes grow by RATIO."""
    room = SMALLEST
    while room < rows:
        room = rounded(int(room * RATIO))
    return room if most is None else min(room, rounded(most))


def padded(
    model: Callable[[SparseTensor], Any],
    like: SparseTensor,
    coords: Tensor,
    feats: Tensor,
    count: Tensor,
    rooms: list[Room],
    wishes: Any = None,
    early: Callable[[Tensor], None] | None = None,
) -> tuple[Any, Growth, Tensor]:
    """One pass over padded coordinates, in which nothing waits for the device.

    Args:
        model, like: What to call, and an input like its own.
        coords, feats, count: From `placed`.
        rooms: For the levels.
        wishes: The maps that the network asked for when the levels were seen, or None.
        early: Called with the report when the last level is there, before most of the work.

    Returns:
        The output, what the levels were given, and [4 L + 1] int64: of each level its sites, those
        lost, and two more numbers; then complaints, of an early report those up to then.
    """
    coords = coords.view_as(coords)  # a tensor of this pass: notes and maps go with it
    mark_rows(coords, count)
    x = wrap(feats, like, coords, like.stride, like.spatial_range)
    x._caches = TensorCache()
    reports: list[Tensor] = []

    def report() -> None:
        word = pending_word(coords.device).view(1)
        reports.append(torch.cat([*growth.infos, word]))
        if early is not None:
            early(reports[0])

    with growing(Growth(rooms, rows=coords.shape[0])) as growth:
        growth.wishes = wishes
        if early is not None:
            growth.complete = report
        output = model(x)
        for _ in leaves(output):
            pass  # computed now
    if not reports:
        report()
    return output, growth, reports[0]


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a result; of sparse ones the features, which are computed if need be."""
    if isinstance(value, SparseTensor):
        yield value.feats
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from leaves(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry)
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))


def check_form(value: Any) -> None:
    """Look for tensors where `leaves` sees none.

    Raises:
        RuntimeError: An object of another kind has some.
    """
    if isinstance(value, (SparseTensor, Tensor)):
        return
    if isinstance(value, dict):
        held = value.values()
    elif isinstance(value, (list, tuple)):
        held = value
    elif is_dataclass(value):
        held = [getattr(value, field.name) for field in fields(value)]
    else:
        held = ()
        own = getattr(value, "__dict__", {}).values()
        if any(isinstance(entry, (Tensor, SparseTensor)) for entry in own):
            raise RuntimeError(
                f"a captured network returns sparse and plain tensors, and tuples, lists, "
                f"dictionaries and dataclasses of these, got {type(value).__name__}"
            )
    for entry in held:
        check_form(entry)


def mapped(
    value: Any, tensor: Callable[[Tensor], Any], sparse: Callable[[SparseTensor], Any]
) -> Any:
    """The same result with other tensors."""
    if isinstance(value, SparseTensor):
        return sparse(value)
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, dict):
        other = copy.copy(value)
        other.update({key: mapped(entry, tensor, sparse) for key, entry in value.items()})
        return other
    if isinstance(value, (list, tuple)):
        entries = [mapped(entry, tensor, sparse) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for field in fields(value):
            entry = mapped(getattr(value, field.name), tensor, sparse)
            object.__setattr__(other, field.name, entry)  # also of a frozen one
        return other
    return value


class Parts(NamedTuple):
    """What a network was when it was captured."""

    modules: list[nn.Module]
    children: list[tuple[dict[str, Any], dict[str, Any]]]  # of each module: now, and then
    tensors: list[tuple[dict[str, Any], str, Tensor | None, int]]  # and their addresses
    memory: list[Any]  # theirs, which a replay may use before it is known that they moved

    @staticmethod
    def of(model: nn.Module) -> Parts:
        modules = list(model.modules())
        children = [(m._modules, dict(m._modules)) for m in modules]
        tensors = [
            (table, name, tensor, 0 if tensor is None else tensor.data_ptr())
            for m in modules
            for table in (m._parameters, m._buffers)
            for name, tensor in table.items()
        ]
        memory = [t.untyped_storage() for _, _, t, _ in tensors if t is not None]
        return Parts(modules, children, tensors, memory)

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
    rooms = set(growth.given)
    return any(t.dim() > 0 and t.shape[0] in rooms for t in leaves(output))


class Results:
    """A graph's output without padding, copied or as it lies."""

    def __init__(self, bucket: Bucket, x: SparseTensor, copy: bool) -> None:
        self.output = bucket.output
        self.x, self.copy, self.given = x, copy, bucket.growth.given
        self.rows = {bucket.rows: x.coords.shape[0]}
        self.input_rows = bucket.count
        self.needs_counts = bucket.sized

    def knowing(self, counts: list[int]) -> Results:
        """The same, with the sizes of the levels."""
        self.rows = {**dict(zip(self.given, counts)), **self.rows}
        return self

    def made(self) -> Any:
        """What the network returns."""
        return mapped(self.output, self._tensor, self._sparse)

    def real(self, value: Tensor) -> Tensor:
        """Its rows without padding, where they lie."""
        rows = self.rows.get(value.shape[0]) if value.dim() else None
        return value if rows is None else value[:rows]

    def _tensor(self, value: Tensor) -> Tensor:
        value = self.real(value)
        return value.clone() if self.copy else value

    def _sparse(self, value: SparseTensor) -> SparseTensor:
        feats = self._tensor(value.feats)
        if row_count(value.coords) is self.input_rows:
            return wrap(feats, self.x, self.x.coords, value.stride, value.spatial_range)
        out = wrap(feats, value, self._tensor(value.coords), value.stride, value.spatial_range)
        out._caches = TensorCache()
        return out
