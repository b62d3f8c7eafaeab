"""Sparse tensors: features on voxels, and features on points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
from torchsparse._settings import settings

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
        non_blocking: bool = True,
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


def _moved(value: Any, device: Any, dtype: torch.dtype | None, non_blocking: bool) -> Any:
    """A tensor on another device; ``dtype`` applies to floating tensors. Others are returned."""
    if not isinstance(value, Tensor):
        return value
    if dtype is not None and not value.is_floating_point():
        dtype = None
    # A copy to the CPU that does not wait could be read before it has arrived.
    wait = device is not None and torch.device(device).type == "cpu"
    return value.to(device=device, dtype=dtype, non_blocking=non_blocking and not wait)


class SparseTensor(OldNames, _OnDevice):
    """Features on the voxels of a sparse lattice.

    The constructor stores what it is given; each operation checks what it uses.

    Args:
        feats: [N, C] floating. Anything else (labels [N], NumPy arrays) can be stored.
        coords: [N, 4] int32, columns (b, x, y, z), unique rows in any order. [N, 3] without the
            batch index can be stored before collation.
        stride: Step of this lattice in input voxels, one int or one per axis.
        spatial_range: (B, X, Y, Z) with ``0 <= b < B, 0 <= x < X, ...``, or None if unbounded.

    Attributes:
        F, C, s: The same as ``feats``, ``coords``, ``stride``.
    """

    def __init__(
        self, feats: Any, coords: Any, stride: Any = 1, spatial_range: Any = None
    ) -> None:
        self.feats = feats
        self.coords = coords
        self.stride = (
            stride if type(stride) is tuple else as_tuple(stride, _ndim(coords), "stride")
        )
        self.spatial_range = None if spatial_range is None else _range_tuple(spatial_range)
        self._caches = new_cache()

    @property
    def F(self) -> Any:
        return self.feats

    @F.setter
    def F(self, value: Any) -> None:
        self.feats = value

    @property
    def C(self) -> Any:
        return self.coords

    @C.setter
    def C(self, value: Any) -> None:
        self.coords = value

    @property
    def s(self) -> tuple[int, ...]:
        return self.stride

    @s.setter
    def s(self, value: Any) -> None:
        self.stride = as_tuple(value, _ndim(self.coords), "stride")

    def to(
        self,
        device: Any = None,
        non_blocking: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> SparseTensor:
        """Move and cast in place, and return self. A dtype applies to features alone.

        Args:
            device: Where to; a dtype is understood too.
            non_blocking: Let copies to a GPU overlap. Copies to the CPU always wait.
            dtype: Floating type of the features.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
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

    def __add__(self, other: Any) -> SparseTensor:
        if not isinstance(other, SparseTensor):
            return NotImplemented
        check_same_sites(self, other)
        return wrap(self.feats + other.feats, self)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __repr__(self) -> str:
        feats = self.feats
        if isinstance(feats, Tensor):
            shape = ", ".join(map(str, feats.shape))
            what = f"feats=[{shape}] {str(feats.dtype).removeprefix('torch.')} on {feats.device}"
        else:
            what = f"feats={type(feats).__name__}"
        extent = "" if self.spatial_range is None else f", spatial_range={self.spatial_range}"
        return f"{type(self).__name__}({what}, stride={self.stride}{extent})"


def _ndim(coords: Any) -> int:
    """Spatial axes of a coordinate array. Three columns are x, y, z before collation."""
    columns = coords.shape[1] if getattr(coords, "ndim", 0) == 2 else 4
    return 3 if columns == 3 else max(columns - 1, 1)


def _range_tuple(value: Any) -> tuple[int, ...]:
    """A range from a list, tuple, array or tensor, as plain ints."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(int(entry) for entry in value)


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
    out.feats = feats
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
        non_blocking: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> PointTensor:
        """Move (features, coordinates and tables) and cast (features alone) in place."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
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
        return f"PointTensor(F={list(self.F.shape)}, C={list(self.C.shape)})"
