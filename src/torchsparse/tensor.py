"""Sparse tensors: features on voxels, and features on points."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchsparse import _forms
from torchsparse._autograd.points import to_dense
from torchsparse._cache import (
    TensorCache,
    TensorCacheMode,
    clear_global_tensor_cache,
    get_global_tensor_cache,
    get_tensor_cache_mode,
    new_cache,
    set_global_tensor_cache,
    set_tensor_cache_mode,
)
from torchsparse._compat import OldNames
from torchsparse._flags import Complaint, complain_if
from torchsparse._geometry import as_tuple
from torchsparse._lazy import Lazy, close_chain
from torchsparse._ops.conv import finish
from torchsparse._recipe import Epilogue
from torchsparse._settings import settings
from torchsparse._validate import check_coords, check_feats, check_rows, check_same_device

__all__ = [
    "PointTensor",
    "SparseTensor",
    "TensorCache",
    "TensorCacheMode",
    "clear_global_tensor_cache",
    "get_allow_negative_coordinates",
    "get_global_tensor_cache",
    "get_tensor_cache_mode",
    "set_allow_negative_coordinates",
    "set_global_tensor_cache",
    "set_tensor_cache_mode",
]


def get_allow_negative_coordinates() -> bool:
    """Whether sites may have negative coordinates (default: False)."""
    return settings.allow_negative_coordinates


def set_allow_negative_coordinates(allow_negative_coordinates: bool) -> None:
    """Allow or forbid negative coordinates from now on."""
    settings.allow_negative_coordinates = bool(allow_negative_coordinates)


class _OnDevice:
    """In-place moves and casts that both tensor classes share."""

    def to(
        self,
        device: Any = None,
        non_blocking: bool | torch.dtype = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        raise NotImplementedError

    def cuda(self, device: Any = None) -> Any:
        """Move to a GPU (the current one by default), in place."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Any:
        """Move to the CPU, in place."""
        return self.to("cpu")

    def half(self) -> Any:
        """Cast features to float16, in place."""
        return self.to(dtype=torch.float16)

    def float(self) -> Any:
        """Cast features to float32, in place."""
        return self.to(dtype=torch.float32)

    def bfloat16(self) -> Any:
        """Cast features to bfloat16, in place."""
        return self.to(dtype=torch.bfloat16)

    def double(self) -> Any:
        """Cast features to float64, in place."""
        return self.to(dtype=torch.float64)


def _destination(
    device: Any, non_blocking: bool | torch.dtype, dtype: torch.dtype | None
) -> tuple[Any, bool, torch.dtype | None]:
    """The arguments of `to`, with a dtype in the place of the others put into its own."""
    if isinstance(non_blocking, torch.dtype):
        non_blocking, dtype = True, non_blocking
    if isinstance(device, torch.dtype):
        device, dtype = None, device
    return device, non_blocking, dtype


def _moved(value: Any, device: Any, dtype: torch.dtype | None, non_blocking: bool) -> Any:
    """A tensor on another device; ``dtype`` applies to floating tensors. Others are returned."""
    if not isinstance(value, Tensor):
        return value
    if dtype is not None and not value.is_floating_point():
        dtype = None
    # A copy to the CPU that does not wait could be read before it has arrived.
    wait = device is not None and torch.device(device).type == "cpu"
    return value.to(device=device, dtype=dtype, non_blocking=non_blocking and not wait)


def _operator(
    apply: Callable[[Any, Any], Any], reflected: bool = False
) -> Callable[[SparseTensor, Any], SparseTensor]:
    """``apply(self.feats, other)``, in the other order if ``reflected``."""

    def operate(self: SparseTensor, other: Any) -> SparseTensor:
        if isinstance(other, SparseTensor):
            check_same_sites(self, other)
            if apply is operator.add and (joined := _joined(self, other)) is not None:
                return wrap(joined, self)
            other = other.feats
        elif not isinstance(other, (Tensor, Number)):
            return NotImplemented
        _check_broadcast(self.feats, other)
        return wrap(apply(other, self.feats) if reflected else apply(self.feats, other), self)

    return operate


def _check_broadcast(feats: Any, other: Any) -> None:
    """The other operand has a value for every row and channel."""
    if not isinstance(other, Tensor) or not isinstance(feats, Tensor):
        return
    mine, theirs = list(feats.shape), list(other.shape)
    fits = len(theirs) <= len(mine)
    for a, b in zip(mine[::-1], theirs[::-1]):
        # Not `&=`, which a traced program of PyTorch 2.11 would write as `True &= ...`.
        fits = fits and (a == b or b == 1 or a == 1)
    if len(theirs) == len(mine) and theirs:
        fits = fits and theirs[0] in (mine[0], 1)  # no operand adds rows
    if not fits:
        raise ValueError(
            f"the operand must broadcast over the features {mine}, as [C], [N, 1] or [N, C] do, "
            f"got {theirs}"
        )


class SparseTensor(OldNames, _OnDevice):
    """Features on the voxels of a sparse lattice.

    The constructor stores what it is given; each operation checks what it uses.

    ``+ - * /`` combine the features with a number, with a tensor that broadcasts over them ([C],
    [N, 1], [N, C]), or with another sparse tensor on the same coordinates; the result has the
    coordinates, stride, range and caches of this one. For other coordinates there are `add`,
    `sub` and `mul` of ``torchsparse.operators``.

    Args:
        feats: [N, C] floating. Anything else (labels [N], NumPy arrays) can be stored.
        coords: [N, 4] int32, columns (b, x, y, z), unique rows in any order. [N, 3] without the
            batch index can be stored before collation.
        stride: Step of this lattice in input voxels, one int or one per axis.
        spatial_range: (B, X, Y, Z) with ``0 <= b < B, 0 <= x < X, ...``, or None if unbounded.

    Attributes:
        F, C, s: The same as ``feats``, ``coords``, ``stride``.
    """

    _given = False  # whether the features came from outside, where somebody may write to them

    def __init__(
        self, feats: Any, coords: Any, stride: Any = 1, spatial_range: Any = None
    ) -> None:
        self.feats = feats
        self.coords = coords
        self.stride = _stride_of(stride, coords)
        self.spatial_range = None if spatial_range is None else _range_tuple(spatial_range)
        self._caches = new_cache()

    @property
    def feats(self) -> Any:
        """The features; those of a convolution that was put off are computed now."""
        close_chain()
        feats = self._feats
        if isinstance(feats, Lazy):
            feats = self._feats = feats.value()
        return feats

    @feats.setter
    def feats(self, value: Any) -> None:
        self._feats = value
        self._given = True

    @property
    def F(self) -> Any:
        """The same as ``feats``."""
        return self.feats

    @F.setter
    def F(self, value: Any) -> None:
        self.feats = value

    @property
    def C(self) -> Any:
        """The same as ``coords``."""
        return self.coords

    @C.setter
    def C(self, value: Any) -> None:
        self.coords = value

    @property
    def s(self) -> tuple[int, ...]:
        """The same as ``stride``."""
        return self.stride

    @s.setter
    def s(self, value: Any) -> None:
        self.stride = _stride_of(value, self.coords)

    def to(
        self,
        device: Any = None,
        non_blocking: bool | torch.dtype = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> SparseTensor:
        """Move and cast in place, and return self. A dtype applies to features alone.

        Args:
            device: Where to; a dtype is understood too.
            non_blocking: Let copies to a GPU overlap. Copies to the CPU always wait. A dtype in
                this place, as in ``torch.Tensor.to``, is understood.
            dtype: Floating type of the features.
        """
        device, non_blocking, dtype = _destination(device, non_blocking, dtype)
        before = getattr(self.coords, "device", None)
        self.feats = _moved(self.feats, device, dtype, non_blocking)
        self.coords = _moved(self.coords, device, None, non_blocking)
        if getattr(self.coords, "device", None) != before:
            self._leave_cache()
        return self

    def _leave_cache(self) -> None:
        """Maps stay behind on the old device; what users attached comes along."""
        if get_tensor_cache_mode() is TensorCacheMode.GLOBAL_TENSOR_CACHE:
            return
        extras = self._caches.extras()
        self._caches = TensorCache()
        vars(self._caches).update(extras)

    def detach(self) -> SparseTensor:
        """Detach the features from the graph, in place."""
        self.feats = self.feats.detach()
        return self

    def dense(self) -> Tensor:
        """[B, X, Y, Z, C] with zeros where no voxel is.

        Raises:
            ValueError: Without a ``spatial_range``, or a voxel outside it.
        """
        if self.spatial_range is None:
            raise ValueError(
                "dense() needs a `spatial_range` = (B, X, Y, Z), this tensor has none"
            )
        return to_dense(self.feats, self.coords, self.spatial_range)

    @staticmethod
    def from_dense(
        dense: Tensor, mask: Tensor | None = None, stride: int | Sequence[int] = 1
    ) -> SparseTensor:
        """Voxels from a dense grid; the inverse of `dense`. Waits for the device.

        Args:
            dense: [B, X, Y, Z, C], channels last.
            mask: [B, X, Y, Z] bool, the cells to keep, zeros included. None: cells in which some
                channel is not 0 (NaN is not).
            stride: Of the result, one int or one per axis.

        Returns:
            Features [N, C], coordinates [N, 4] int32 sorted by (b, x, y, z) and the range
            (B, X, Y, Z). Differentiable in ``dense``.

        Raises:
            TypeError: No tensor.
            ValueError: Fewer than 3 axes, a mask of another shape or dtype.
        """
        feats, coords = _forms.from_grid(dense, mask)
        extents = tuple(dense.shape[:-1])
        return SparseTensor(feats, coords, as_tuple(stride, len(extents) - 1, "stride"), extents)

    def to_sparse_coo(self) -> Tensor:
        """A hybrid COO tensor of PyTorch, [B, X, Y, Z] sparse and [C] dense; not coalesced.

        Its size is the ``spatial_range``; without one the smallest that holds every row, which
        waits for the device. Differentiable in the features.

        Raises:
            TypeError: Features that are not floating, coordinates that are not integers.
            ValueError: Shapes that do not fit, a row outside the range.
        """
        self._check()
        return _forms.to_coo(self.feats, self.coords, self.spatial_range)

    @staticmethod
    def from_sparse_coo(coo: Tensor, stride: int | Sequence[int] = 1) -> SparseTensor:
        """Voxels from a COO tensor of PyTorch. Entries of one site are added up.

        Args:
            coo: [B, X, Y, Z] sparse, with one dense axis [C] or none (one channel).
            stride: Of the result, one int or one per axis.

        Returns:
            Coordinates [N, 4] int32 sorted by (b, x, y, z) and the range (B, X, Y, Z).
            Differentiable in the values.

        Raises:
            TypeError: Another layout.
            ValueError: Fewer than 2 sparse axes, more than one dense one; a site that does not
                fit into int32.
        """
        feats, coords, extents = _forms.from_coo(coo)
        return SparseTensor(feats, coords, as_tuple(stride, len(extents) - 1, "stride"), extents)

    def samples(self, which: int | slice | Sequence[int] | Tensor) -> SparseTensor:
        """The voxels of some samples of the batch, numbered from 0. Waits for the device.

        Args:
            which: A batch index, several distinct ones in the wanted order, or a slice (of the
                samples of the range, else up to the largest batch index).

        Returns:
            Rows by sample, in their order within each; stride and range (with the new batch size)
            of this tensor, a cache of its own. Differentiable.

        Raises:
            TypeError: Coordinates that are not integers.
            ValueError: A negative or repeated index, shapes that do not fit.
        """
        self._check(feats=False)
        if isinstance(which, slice):
            size = _forms.batch_size_of(self.coords, self.spatial_range)
            chosen = list(range(*which.indices(size)))
        else:
            listed: Any = which.tolist() if isinstance(which, (Tensor, np.ndarray)) else which
            several = listed if isinstance(listed, Sequence) else [listed]
            chosen = [operator.index(sample) for sample in several]
        feats, coords = _forms.pick_samples(self.feats, self.coords, chosen)
        extents = None if self.spatial_range is None else (len(chosen), *self.spatial_range[1:])
        return SparseTensor(feats, coords, self.stride, extents)

    def decompose(self, batch_size: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The samples of the batch, one by one; the inverse of collation. Waits for the device.

        Args:
            batch_size: B. None: that of the range, else the largest batch index + 1.

        Returns:
            Coordinates [N_b, 3] = (x, y, z) and features [N_b, C] of each sample b, in their row
            order; no rows for a sample without any. Differentiable.

        Raises:
            TypeError: Coordinates that are not integers.
            ValueError: A batch index below 0 or of ``batch_size`` and more, shapes that do not
                fit.
        """
        self._check(feats=False)
        if batch_size is None:
            batch_size = _forms.batch_size_of(self.coords, self.spatial_range)
        if operator.index(batch_size) < 0:
            raise ValueError(f"`batch_size` must not be negative, got {batch_size}")
        return _forms.split_samples(self.feats, self.coords, batch_size)

    def clone(self) -> SparseTensor:
        """A copy of the features (differentiable) on the same coordinates and caches."""
        return wrap(self.feats.clone(), self)

    def requires_grad_(self, requires_grad: bool = True) -> SparseTensor:
        """Let autograd record operations on the features, in place."""
        self.feats.requires_grad_(requires_grad)
        return self

    __add__ = _operator(operator.add)
    __radd__ = _operator(operator.add, reflected=True)
    __sub__ = _operator(operator.sub)
    __rsub__ = _operator(operator.sub, reflected=True)
    __mul__ = _operator(operator.mul)
    __rmul__ = _operator(operator.mul, reflected=True)
    __truediv__ = _operator(operator.truediv)
    __rtruediv__ = _operator(operator.truediv, reflected=True)
    __array_ufunc__ = None  # NumPy numbers leave the operators to this class

    def __neg__(self) -> SparseTensor:
        return wrap(-self.feats, self)

    def _check(self, feats: bool = True) -> None:
        """Coordinates, and features that fit them (floating [N, C] ones if ``feats``)."""
        if feats:
            check_feats(self.feats)
        elif not isinstance(self.feats, Tensor):
            raise TypeError(f"`feats` must be a tensor, got {type(self.feats).__name__}")
        check_coords(self.coords, ndim=None)
        check_rows(self.feats, self.coords)
        check_same_device(feats=self.feats, coords=self.coords)

    def __getstate__(self) -> dict[str, Any]:
        state = {"feats": self.feats, **vars(self)}
        del state["_feats"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._feats = vars(self).pop("feats")
        self._given = True

    def __repr__(self) -> str:
        parts = [f"feats={_described(self.feats)}", f"coords={_described(self.coords)}"]
        parts.append(f"stride={self.stride}")
        if self.spatial_range is not None:
            parts.append(f"spatial_range={self.spatial_range}")
        if self._caches.cmaps:  # the levels that a transposed layer can return to
            parts.append(f"levels={list(self._caches.cmaps)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _described(value: Any) -> str:
    """Shape, dtype and device, which are known without waiting."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    words = [str(list(value.shape)), str(value.dtype).removeprefix("torch."), f"on {value.device}"]
    return " ".join(words + ["with grad"] * value.requires_grad)


def _ndim(coords: Any) -> int:
    """Spatial axes of a coordinate array. Three columns are x, y, z before collation."""
    columns = coords.shape[1] if getattr(coords, "ndim", 0) == 2 else 4
    return 3 if columns == 3 else max(columns - 1, 1)


def _stride_of(value: Any, coords: Any) -> tuple[int, ...]:
    """A stride as one positive int per axis. Three columns may also have two axes.

    Raises:
        ValueError: Other entries, or not as many as axes.
    """
    ndim = _ndim(coords)
    if type(value) is not tuple or any(type(entry) is not int for entry in value):
        several: Any = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
        columns = coords.shape[1] if getattr(coords, "ndim", 0) == 2 else 0
        if columns == 3 and isinstance(several, (list, tuple)) and len(several) == 2:
            ndim = 2
        elif type(value) is tuple:
            ndim = len(value)
        value = as_tuple(value, ndim, "stride")
    if any(entry < 1 for entry in value):
        raise ValueError(f"`stride` must be at least 1 on every axis, got {value}")
    return value


def _range_tuple(value: Any) -> tuple[int, ...]:
    """A range from a list, tuple, array or tensor, as plain ints."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(int(entry) for entry in value)


def pending(x: SparseTensor) -> Lazy | None:
    """The features of ``x``, if they are still to be computed."""
    try:
        feats = x._feats
    except AttributeError:
        raise TypeError(f"expected a SparseTensor, got {type(x).__name__}") from None
    return feats if isinstance(feats, Lazy) and feats._value is None else None


def may_put_off(x: SparseTensor) -> bool:
    """Whether what is computed from ``x`` may be computed later: nobody asks for gradients, and a
    write to its features would be seen. Not while tracing."""
    return settings.fuse and not torch.is_grad_enabled() and not _may_change_unseen(x)


def _may_change_unseen(x: SparseTensor) -> bool:
    """Whether a write to the features of ``x`` would go unnoticed: others hold them, and tensors
    of inference mode count no writes."""
    return x._given and isinstance(x._feats, Tensor) and x._feats.is_inference()


def put_off(x: SparseTensor) -> Lazy | None:
    """Begin a chain with the features that ``x`` has, where one pass for all is faster."""
    if torch.compiler.is_compiling():
        return None
    feats = x.feats
    if (
        not may_put_off(x)
        or not isinstance(feats, Tensor)
        or not feats.is_cuda
        or feats.dim() != 2
    ):
        return None
    shape = (feats.shape[0], feats.shape[1])

    def make(epilogue: Epilogue | None) -> Tensor:
        return feats if epilogue is None else finish(feats, epilogue)

    return Lazy(make, shape, feats.dtype, feats.device, (feats,))


def _joined(a: SparseTensor, b: SparseTensor) -> Lazy | None:
    """``a + b`` as part of a chain that one of them ends."""
    for one, other in ((a, b), (b, a)):
        chain = pending(one)
        if chain is not None and pending(other) is None and not _may_change_unseen(other):
            feats = other._feats.value() if isinstance(other._feats, Lazy) else other._feats
            if isinstance(feats, Tensor):
                return chain.plus(feats)
    return None


def wrap(
    feats: Any,
    like: SparseTensor,
    coords: Any = None,
    stride: tuple[int, ...] | None = None,
    spatial_range: tuple[int, ...] | None = None,
) -> SparseTensor:
    """New features on the sites of ``like``, or on ``coords`` of the same network.

    Always a plain SparseTensor that shares the cache; ``__init__`` of a subclass is not called.
    """
    out = object.__new__(SparseTensor)
    out._feats = feats
    out._caches = like._caches
    if coords is None:
        out.coords, out.stride, out.spatial_range = like.coords, like.stride, like.spatial_range
    else:
        out.coords, out.stride, out.spatial_range = coords, stride or like.stride, spatial_range
    return out


def site_stride(x: SparseTensor) -> tuple[int, ...]:
    """The stride with one entry per spatial axis of the coordinates.

    Three columns may be (x, y, z) before collation or (b, x, y), so a tensor of two axes that was
    given one int as stride holds three entries.

    Raises:
        ValueError: Another number of entries than axes.
    """
    axes = x.coords.shape[1] - 1
    if len(x.stride) == axes:
        return x.stride
    if len(x.stride) == 3 and axes == 2 and len(set(x.stride)) == 1:
        return x.stride[:2]
    raise ValueError(
        f"`stride` must have one entry per spatial axis, {axes} for `coords` "
        f"{list(x.coords.shape)}, got {x.stride}"
    )


def check_sparse(x: Any, name: str = "input") -> None:
    """Raise TypeError unless ``x`` is a sparse tensor."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"`{name}` must be a SparseTensor, got {type(x).__name__}")


def check_same_sites(a: SparseTensor, b: SparseTensor) -> None:
    """Raise ValueError unless both tensors have the same rows of coordinates."""
    if a.coords is b.coords:
        return
    if a.coords.shape != b.coords.shape:
        raise ValueError(
            f"tensors must have the same coordinates, got {list(a.coords.shape)} "
            f"and {list(b.coords.shape)}"
        )
    if a.coords.device != b.coords.device:
        raise ValueError(
            f"tensors must be on one device, got {a.coords.device} and {b.coords.device}"
        )
    if a.coords.data_ptr() == b.coords.data_ptr() and a.coords.stride() == b.coords.stride():
        return
    complain_if((a.coords != b.coords).any(), Complaint.DISAGREE)


class PointTensor(_OnDevice):
    """Features on points, with the voxels around them.

    Args:
        feats: [N, C].
        coords: [N, any] float or int.
        idx_query: Rows of voxels around each point, by level.
        weights: Interpolation weights, by level.

    Attributes:
        F, C: The features and coordinates.
        idx_query, weights: Dictionaries.
        additional_features: ``{"idx_query": {}, "counts": {}}``.
    """

    def __init__(
        self,
        feats: Any,
        coords: Any,
        idx_query: dict[Any, Any] | None = None,
        weights: dict[Any, Any] | None = None,
    ) -> None:
        self.F = feats
        self.C = coords
        self.idx_query: dict[Any, Any] = {} if idx_query is None else idx_query
        self.weights: dict[Any, Any] = {} if weights is None else weights
        self.additional_features: dict[str, dict[Any, Any]] = {"idx_query": {}, "counts": {}}

    def to(
        self,
        device: Any = None,
        non_blocking: bool | torch.dtype = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> PointTensor:
        """Move (features, coordinates and tables) and cast (features alone) in place."""
        device, non_blocking, dtype = _destination(device, non_blocking, dtype)
        self.F = _moved(self.F, device, dtype, non_blocking)
        self.C = _moved(self.C, device, None, non_blocking)
        for table in (self.idx_query, self.weights, *self.additional_features.values()):
            for name, value in table.items():
                table[name] = _moved(value, device, None, non_blocking)
        return self

    def detach(self) -> PointTensor:
        """Detach the features from the graph, in place."""
        self.F = self.F.detach()
        return self

    def __add__(self, other: Any) -> PointTensor:
        if not isinstance(other, PointTensor):
            return NotImplemented
        out = PointTensor(self.F + other.F, self.C, self.idx_query, self.weights)
        out.additional_features = self.additional_features
        return out

    def __repr__(self) -> str:
        return f"PointTensor(F={_described(self.F)}, C={_described(self.C)})"
