"""Training steps as CUDA graphs: the forward and the backward pass of a network, each one launch.

What `inference.graphed` does for evaluation is done here for both directions: levels have room to
spare (`_capacity`), rows of padding are zeros in every feature and every gradient, and batch
statistics count real rows alone. The loss, the optimiser and whatever else a step consists of
stay outside and see ordinary tensors. This is the way of `torch.cuda.make_graphed_callables`, for
inputs whose sizes change.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from torchsparse._cache import TensorCache
from torchsparse._capacity import Growth
from torchsparse._graphs import (
    PARALLEL,
    Bucket,
    Graphs,
    Results,
    autocast_without_cache,
    capturable,
    leaves,
    mapped,
    no_waiting,
    padded,
    placed,
)
from torchsparse.nn.modules.norm import BatchNorm, InstanceNorm, SyncBatchNorm
from torchsparse.tensor import SparseTensor, wrap

__all__ = ["Graphed", "graphed"]

UNSEEN = torch.iinfo(torch.int64).min  # in a report that has not arrived
OWN = BatchNorm, InstanceNorm, SyncBatchNorm  # they know which rows are real, or refuse
DENSE = nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d  # not over rows


def graphed(
    model: nn.Module, max_points: int | None = None, *, keep: int = 4, copy: bool = True
) -> Graphed:
    """A network whose training passes run as CUDA graphs, from voxel coordinates to gradients::

        net = torchsparse.training.graphed(model)
        for x, labels in loader:
            with torch.autocast("cuda", torch.float16):
                loss = criterion(net(x).feats, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    The first scan of each size class runs as usual; both passes are then captured, which takes a
    few seconds. Calls on the CPU, without gradients, in evaluation mode, in float64, with fewer
    than two rows or with more than ``max_points`` run as usual. Each call waits once for the
    device, to see that the levels that layers create had enough room; a scan that needs more runs
    as usual, and the graphs are captured anew.

    Args:
        model: In training mode, called with one `SparseTensor`. It may do whatever a CUDA graph
            can hold: what it computes must not depend on values that the host reads. Operations
            of its own over all rows, as a mean, would see rows of padding, which are zeros. What
            it computes for these, and its derivative, must be finite. Hooks run when a graph is
            captured, not when it is replayed.
        max_points: Most input voxels of a graph, or None.
        keep: Most size classes kept; the one not used for longest goes first. They share their
            memory: the backward pass of a call must come before the next call.
        copy: False: results lie in the graphs' memory, and the next call overwrites them.

    Returns:
        A callable with the argument and the results of ``model``, as of `inference.graphed`.
        Gradients reach the parameters, and the features of the input if they require some.
        Parameters and buffers are the model's own.

    Raises:
        ValueError: ``max_points`` or ``keep`` below 1; a batch or instance norm of ``torch.nn``
            that could count rows of padding; ``DataParallel`` or ``DistributedDataParallel``,
            which would not see the replays.
    """
    _check_modules(model)
    return Graphed(model, max_points, keep, copy)


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, PARALLEL):
            raise ValueError(
                f"gradients of a replayed graph would not be shared: {name or 'the model'} must "
                f"be the module without {kind}"
            )
        if isinstance(module, _NormBase) and not isinstance(module, OWN + DENSE):
            raise ValueError(
                f"batch statistics of {name or 'the model'} would count rows of padding: it must "
                f"be a torchsparse.nn.BatchNorm, got {kind}"
            )


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the tensors of each dtype."""
    groups: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(place)
    return list(groups.values())


class _Packed:
    """Tensors side by side, so that they are copied at once: one by one takes too long."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._groups = _by_dtype(tensors)

    def pack(self) -> list[Tensor]:
        """Their values, flat, one tensor for each dtype."""
        return [
            torch.cat([self.tensors[place].reshape(-1) for place in places])
            for places in self._groups
        ]

    def unpack(self, packed: list[Tensor]) -> None:
        """Write values back."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, self.parts(packed)):
                tensor.data.copy_(value)  # not counted: a pass before may have kept it

    def parts(self, packed: list[Tensor]) -> list[Tensor]:
        """Views of what `pack` gave, in the shapes and the order of the tensors."""
        found: list[Tensor] = list(self.tensors)
        for flat, places in zip(packed, self._groups):
            sizes = [self.tensors[place].numel() for place in places]
            for place, part in zip(places, flat.split(sizes)):
                found[place] = part.view(self.tensors[place].shape)
        return found


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each, in one launch for each dtype: of mixed ones PyTorch copies one by one."""
    copies = list(tensors)
    for places in _by_dtype(tensors):
        group = [tensors[place] for place in places]
        found = torch._foreach_mul(group, 1.0)  # pyright: ignore[reportPrivateImportUsage]
        for place, copy in zip(places, found):
            copies[place] = copy
    return copies


class _Backward(NamedTuple):
    """The backward pass of a bucket, and what goes in and out of both.

    Attributes:
        modes: How modules train and which parameters learn, as captured.
        graph: Of the backward pass.
        outputs: Those that have gradients.
        grads: Theirs, which the graph reads; zeros in rows of padding.
        filled: Rows of each that may hold something else than zeros.
        params: Of the model, all.
        places: Of the gradients found: 0 for the input's features, 1 + place in ``params``.
        found: These gradients, written by the graph.
        buffers: Of the model; the forward pass changes them.
        before: What they held before it, packed.
    """

    modes: list[Any]
    graph: Any
    outputs: list[Tensor]
    grads: list[Tensor]
    filled: list[int]
    params: Sequence[Tensor]
    places: list[int]
    found: list[Tensor]
    buffers: _Packed
    before: list[Tensor]


class Graphed(Graphs):
    """What `graphed` returns.

    Attributes:
        model: The network.
        captures: Size classes captured so far.
        replays: Calls served by a graph.
        overflows: Calls in which a level had too little room.
    """

    def __init__(
        self,
        model: nn.Module,
        max_points: int | None = None,
        keep: int = 4,
        copy: bool = True,
    ) -> None:
        super().__init__(model, max_points, True, keep, copy)
        self.turn = 0  # of the last forward pass
        self.spent = False  # its backward pass has run

    def __call__(self, x: SparseTensor) -> Any:
        """``model(x)``.

        Raises:
            RuntimeError: The model does what a graph cannot hold.
            ValueError: What the network's layers raise.
        """
        suits = self._suits(x) and x.coords.shape[0] > 1 and x.feats.dtype != torch.float64
        if not (suits and self.model.training and torch.is_grad_enabled()):
            return self.model(x)
        with self._lock, torch.cuda.device(x.coords.device):
            return self._serve(x)

    def _kind(self, x: SparseTensor) -> Hashable:
        return super()._kind(x), x.feats.requires_grad

    # ------------------------------------------------------------------ capture
    def _capture(self, x: SparseTensor, kind: Hashable, rows: int) -> Bucket:
        _check_modules(self.model)
        places = placed(x, rows)
        places.feats.requires_grad_(x.feats.requires_grad)
        rooms, wishes = self._rooms(kind, rows), self._wishes[kind]
        # Where they lie now: a tensor whose data are replaced must not receive what was here.
        on_device = [b for b in self.model.buffers() if b.device == x.coords.device]
        buffers = _Packed([b.detach() for b in on_device])
        params = dict(self.model.named_parameters())
        # Leaves of their own: those of the model may belong to passes of other streams, for which
        # a captured one would have to wait.
        own = {name: p.detach().requires_grad_(p.requires_grad) for name, p in params.items()}
        inputs = [places.feats, *own.values()]
        on_host: list[Tensor] = []

        def call(x: SparseTensor) -> Any:
            with _lent(self.model, {id(p): own[name] for name, p in params.items()}):
                return self.model(x)

        def deliver(report: Tensor) -> None:
            if not on_host:  # the first run compiles, and fills what is made once per process
                on_host.append(torch.empty(report.shape, dtype=report.dtype, pin_memory=True))
            on_host[0].copy_(report, non_blocking=True)

        def forward() -> tuple[Any, Growth, list[Tensor]]:
            before = buffers.pack()
            with autocast_without_cache():
                output, growth, _ = padded(call, x, *places, rooms, wishes, deliver)
            return output, growth, before

        def backward(output: Any, grads: list[Tensor]) -> list[Tensor | None]:
            wanted = [t for t in inputs if t.requires_grad]
            with torch.autocast("cuda", enabled=False):  # as outside of the caller's block
                found = torch.autograd.grad(_learned(output), wanted, grads, allow_unused=True)
            by_input = dict(zip(map(id, wanted), found))
            return [by_input.get(id(t)) for t in inputs]

        kept = buffers.pack()
        try:
            with _same_buffers(self.model):
                output, *_ = forward()
            grads = [torch.zeros_like(t) for t in _learned(output)]
            if not grads:
                raise RuntimeError("no output has a gradient to any parameter that learns")
            backward(output, grads)
            with capturable():
                with no_waiting():
                    output, *_ = forward()
                    backward(output, grads)
                del output
                graph, (output, growth, before) = self._record(forward)
                back, found = self._record(lambda: backward(output, grads))
        finally:
            buffers.unpack(kept)
        outputs = {id(t): t.detach() for t in _learned(output)}
        output = mapped(output, lambda t: outputs.get(id(t), t), lambda y: _relieved(y, outputs))
        bucket = self._bucket(places, rooms, graph, output, growth, on_host[0], x.coords.shape[0])
        bucket.more = _Backward(
            _modes(bucket), back, list(outputs.values()), grads, [0] * len(grads),
            list(params.values()),
            [place for place, t in enumerate(found) if t is not None],
            [t for t in found if t is not None], buffers, before,
        )  # fmt: skip
        return bucket

    # ------------------------------------------------------------------ replay
    def _replay(self, bucket: Bucket, x: SparseTensor) -> tuple[bool, Any]:
        self.turn += 1
        self.spent = False
        passes: _Backward = bucket.more
        bucket.report.fill_(UNSEEN)
        served = False
        try:
            served, result = super()._replay(bucket, x)
        finally:
            if not served:  # as if it had not been tried
                passes.buffers.unpack(passes.before)
                torch.cuda.current_stream().synchronize()  # it may be gone before it has ended
        return served, result

    def _await(self, bucket: Bucket) -> None:
        # Looked for where it arrives. An event that the graph records could not be waited for
        # before it is: it would be that of the last replay.
        while UNSEEN in bucket.report.tolist() and not self._replayed.query():
            time.sleep(0)

    def _results(self, bucket: Bucket, x: SparseTensor) -> Results:
        return _Differentiable(self, bucket, x)

    def _holds(self, bucket: Bucket) -> bool:
        return super()._holds(bucket) and bucket.more.modes == _modes(bucket)

    def _checked(self, bucket: Bucket) -> list[int] | None:
        counts = super()._checked(bucket)
        # Batch statistics of a single row are an error, and the usual pass says so.
        return None if counts is None or 1 in counts else counts


class _Differentiable(Results):
    """Results with gradients."""

    def __init__(self, owner: Graphed, bucket: Bucket, x: SparseTensor) -> None:
        super().__init__(bucket, x, owner.copy)
        self.owner, self.bucket = owner, bucket
        self._found: dict[int, Tensor] = {}

    def made(self) -> Any:
        """What the network returns."""
        passes: _Backward = self.bucket.more
        found = _Pass.apply(self, self.x.feats, *passes.params)
        self._found = dict(zip(map(id, passes.outputs), found))
        return super().made()

    def _tensor(self, value: Tensor) -> Tensor:
        found = self._found.get(id(value))
        return super()._tensor(value) if found is None else found

    def copies(self) -> tuple[Tensor, ...]:
        """The outputs that have gradients."""
        found = [super(_Differentiable, self)._tensor(t) for t in self.bucket.more.outputs]
        # The bucket's own tensors must not get a history.
        return tuple(found if self.copy else [t.view_as(t) for t in found])


class _Pass(torch.autograd.Function):
    """What the forward graph has computed, and how its gradients are found."""

    @staticmethod
    def forward(ctx: Any, results: _Differentiable, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.owner, ctx.bucket, ctx.turn = results.owner, results.bucket, results.owner.turn
        ctx.rows = results.x.coords.shape[0]
        return results.copies()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # names hidden
        owner, passes = ctx.owner, ctx.bucket.more
        if ctx.turn != owner.turn or owner.spent:
            raise RuntimeError(
                "the backward pass of a captured network must come before its next call, and "
                "once: what it would read is overwritten"
            )
        owner.spent = True
        _bring(grads, passes)
        passes.graph.replay()
        found: list[Tensor | None] = [None] * (1 + len(passes.params))
        for place, grad in zip(passes.places, _copies(passes.found)):
            found[place] = grad
        if found[0] is not None:
            found[0] = found[0][: ctx.rows]
        return None, *found


def _bring(grads: Sequence[Tensor], passes: _Backward) -> None:
    """Copy gradients to where the graph reads them."""
    for place, (grad, kept) in enumerate(zip(grads, passes.grads)):
        if grad.dim() == 0:
            kept.copy_(grad)
            continue
        rows, before = grad.shape[0], passes.filled[place]
        kept[:rows].copy_(grad)
        if rows < before:
            kept[rows:before].zero_()
        passes.filled[place] = rows


def _modes(bucket: Bucket) -> list[Any]:
    """How modules train, and which tensors learn; schedules may change the two numbers."""
    parts = bucket.parts
    learns = [tensor is not None and tensor.requires_grad for _, _, tensor, _ in parts.tensors]
    trains = [
        (m.training, m.momentum if isinstance(m, _NormBase) else None,
         m.p if isinstance(m, _DropoutNd) else None)
        for m in parts.modules
    ]  # fmt: skip
    return [*trains, *learns]


@contextmanager
def _lent(model: nn.Module, leaves: dict[int, Tensor]) -> Iterator[None]:
    """Let a network compute with other tensors in place of its parameters, given by their ids.

    As `torch.func.functional_call`, which would leave them in a module that has two names.
    """
    tables: list[dict[str, Any]] = [module._parameters for module in model.modules()]
    kept = [dict(table) for table in tables]
    try:
        for table, params in zip(tables, kept):
            table.update({name: leaves[id(p)] for name, p in params.items() if p is not None})
        yield
    finally:
        for table, params in zip(tables, kept):
            table.update(params)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Raise RuntimeError if a pass puts other tensors in place of buffers, and put them back."""
    tables = [module._buffers for module in model.modules()]
    before = [dict(table) for table in tables]
    try:
        yield
        for table, buffers in zip(tables, before):
            for name, buffer in buffers.items():
                if table.get(name) is not buffer:
                    raise RuntimeError(
                        f"a graph writes to the same buffers every time: `{name}` must be changed "
                        f"in place, the network replaces it"
                    )
    finally:
        for table, buffers in zip(tables, before):
            table.update(buffers)


def _learned(value: Any) -> list[Tensor]:
    """Tensors of a result that have gradients, each once."""
    return list({id(t): t for t in leaves(value) if t.requires_grad}.values())


def _relieved(y: SparseTensor, outputs: dict[int, Tensor]) -> SparseTensor:
    """A sparse output that keeps neither maps nor the tape."""
    feats = y.feats
    out = wrap(outputs.get(id(feats), feats), y)
    out._caches = TensorCache()
    return out
