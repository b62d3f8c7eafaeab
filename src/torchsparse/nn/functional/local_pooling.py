"""Pooling over windows, and its way back: check, find the map, one call, wrap.

Windows are those of a convolution with the same arguments, and so are the sites: both share their
maps through the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchsparse._autograd.pool import max_pool, max_unpool, sum_pool, top_pool
from torchsparse._compiling import left_to_python
from torchsparse._flags import Complaint, complain_if
from torchsparse._kernel_map import KernelMap
from torchsparse._validate import (
    check_coords,
    check_feats,
    check_rows,
    check_same_device,
    one_of,
)
from torchsparse.nn.functional.conv.conv import check_parameters, find_map, on_level
from torchsparse.nn.functional.conv.conv_config import resolve_config
from torchsparse.nn.functional.conv.mapping import Level
from torchsparse.tensor import SparseTensor, check_sparse

__all__ = [
    "avg_pool3d",
    "max_pool3d",
    "max_unpool3d",
    "pool",
    "pool_max",
    "sum_pool3d",
    "unpool",
    "unpool3d",
    "unpool_max",
]

Config = Mapping[str, Any] | None
Sites = SparseTensor | Tensor | None


def max_pool3d(
    input: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    return_indices: bool = False,
    coordinates: Sites = None,
    config: Config = None,
) -> Any:
    """Maximum of each channel over the active sites of each window.

    Args:
        input: Features [N, C] on [N, 4] coordinates (b, x, y, z).
        kernel_size, stride, padding, dilation: One int or three, as in ``conv3d``: stride 1 keeps
            the sites (submanifold), a larger one creates those of a convolution. None: the stride
            is the kernel size.
        return_indices: Also return where the maxima come from, for `max_unpool3d`.
        coordinates: Sites to pool onto, a tensor or its [M, 4] coordinates, in place of those
            that the layer would create.
        config: Mapping that overrides the global configuration; only ``downsample_mode`` counts.

    Returns:
        [M, C] features in their dtype, also under autocast: 0 where a window has no active site,
        NaN where it has a NaN. With ``return_indices`` a pair: the tensor, and [M, C] int32, the
        row of ``input`` that each value comes from, -1 for none. Differentiable; of equal maxima
        the one in the lowest tap has the gradient.

    Raises:
        ValueError: Shapes, devices or parameters that do not fit; duplicate, negative or
            out-of-range coordinates.
        TypeError: Wrong dtypes.
    """
    return pool_max(
        3, input, kernel_size, stride, padding, dilation, return_indices,
        coordinates=coordinates, config=config,
    )  # fmt: skip


def avg_pool3d(
    input: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    coordinates: Sites = None,
    config: Config = None,
) -> SparseTensor:
    """Mean over the active sites of each window; absent sites do not count.

    The errors are those of `max_pool3d`.

    Args:
        input: Features [N, C] on [N, 4] coordinates.
        kernel_size, stride, padding, dilation, coordinates, config: As in `max_pool3d`.

    Returns:
        [M, C] features in their dtype, summed in float32 (float64 in float64), also under
        autocast; 0 where a window has no active site. Differentiable.
    """
    return pool(
        3, True, input, kernel_size, stride, padding, dilation, coordinates=coordinates,
        config=config,
    )  # fmt: skip


def sum_pool3d(
    input: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    coordinates: Sites = None,
    config: Config = None,
) -> SparseTensor:
    """Sum over the active sites of each window.

    The errors are those of `max_pool3d`.

    Args:
        input: Features [N, C] on [N, 4] coordinates.
        kernel_size, stride, padding, dilation, coordinates, config: As in `max_pool3d`.

    Returns:
        [M, C] features in their dtype, summed in float32 (float64 in float64), also under
        autocast; 0 where a window has no active site. Differentiable.
    """
    return pool(
        3, False, input, kernel_size, stride, padding, dilation, coordinates=coordinates,
        config=config,
    )  # fmt: skip


def unpool3d(
    input: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    mode: str = "mean",
    config: Config = None,
    coordinates: Sites = None,
) -> SparseTensor:
    """Copy coarse features to the finer sites of their windows.

    Args:
        input: Features [N, C] on coarse sites; the finer level is found as by a transposed
            ``conv3d``: an earlier strided layer, or the network's input, has recorded it.
        kernel_size, stride, padding, dilation: Those of the layer to undo. Windows that do not
            overlap give each fine site the value of its one coarse site (nearest neighbour).
        mode: What a fine site in several windows gets: the "mean" or the "sum" of their values.
        config: As in `max_pool3d`.
        coordinates: The fine sites, a tensor or its [M, 4] coordinates, in place of an earlier
            level.

    Returns:
        [M, C] on the fine sites, in the dtype of the features; summed in float32 (float64 in
        float64), also under autocast; 0 for a site in no window. Differentiable.

    Raises:
        ValueError: As `max_pool3d`; also an unknown fine level.
    """
    return unpool(
        3, input, kernel_size, stride, padding, dilation, mode, config, coordinates=coordinates
    )


def max_unpool3d(
    input: SparseTensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    config: Config = None,
) -> SparseTensor:
    """Put values back where `max_pool3d` found its maxima.

    Args:
        input: Features [N, C] on the sites that ``max_pool3d`` created.
        indices: [N, C] integers, what it returned with ``return_indices``.
        kernel_size, stride, padding, dilation, config: Those of ``max_pool3d``.

    Returns:
        [M, C] on the finer sites: each value at the row and channel of its maximum, 0 elsewhere.
        Where windows overlap, several may have found the same row; their values are summed.
        Differentiable.

    Raises:
        ValueError: As `unpool3d`; also indices of another shape, or outside the finer level
            (noticed later on a GPU).
        TypeError: Indices that are not integers.
    """
    return unpool_max(3, input, indices, kernel_size, stride, padding, dilation, config)


# ------------------------------------------------------------------ over any number of axes
@left_to_python
def pool_max(
    ndim: int,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    return_indices: bool = False,
    coordinates: Sites = None,
    config: Config = None,
) -> Any:
    """`max_pool3d` over ``ndim`` spatial axes."""
    kmap, level = _windows(
        ndim, x, kernel_size, stride, padding, dilation, config, coordinates=coordinates
    )
    if not return_indices:
        return on_level(top_pool(x.feats, kmap), x, level)
    feats, rows = max_pool(x.feats, kmap)
    return on_level(feats, x, level), rows


@left_to_python
def pool(
    ndim: int,
    mean: bool,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    coordinates: Sites = None,
    config: Config = None,
) -> SparseTensor:
    """`avg_pool3d` or `sum_pool3d` over ``ndim`` spatial axes."""
    kmap, level = _windows(
        ndim, x, kernel_size, stride, padding, dilation, config, coordinates=coordinates
    )
    return on_level(sum_pool(x.feats, kmap, transposed=False, mean=mean), x, level)


@left_to_python
def unpool(
    ndim: int,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    mode: str = "mean",
    config: Config = None,
    coordinates: Sites = None,
) -> SparseTensor:
    """`unpool3d` over ``ndim`` spatial axes."""
    one_of(mode, ("mean", "sum"), "mode")
    kmap, level = _windows(
        ndim, x, kernel_size, stride, padding, dilation, config, transposed=True,
        coordinates=coordinates,
    )  # fmt: skip
    feats = sum_pool(x.feats, kmap, transposed=True, mean=mode == "mean")
    return on_level(feats, x, level)


@left_to_python
def unpool_max(
    ndim: int,
    x: SparseTensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    config: Config = None,
) -> SparseTensor:
    """`max_unpool3d` over ``ndim`` spatial axes."""
    kmap, level = _windows(
        ndim, x, kernel_size, stride, padding, dilation, config, transposed=True
    )
    rows = _checked_indices(indices, x.feats, level.coords.shape[0])
    return on_level(max_unpool(x.feats, rows, kmap), x, level)


def _windows(
    ndim: int,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    config: Config,
    transposed: bool = False,
    coordinates: Sites = None,
) -> tuple[KernelMap, Level]:
    """The map of a pool, once everything fits, and the level that it reaches."""
    stride = kernel_size if stride is None else stride
    sizes = check_parameters(ndim, kernel_size, stride, padding, dilation, transposed, False)
    check_sparse(x)
    check_feats(x.feats)
    check_coords(x.coords, ndim)
    check_rows(x.feats, x.coords)
    check_same_device(feats=x.feats, coords=x.coords)
    mode = resolve_config(config).downsample_mode
    return find_map(ndim, x, *sizes, mode, transposed, coordinates=coordinates)


def _checked_indices(indices: Any, feats: Tensor, num: int) -> Tensor:
    """Indices of maxima as int32 rows of the fine level."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        found = getattr(indices, "dtype", type(indices).__name__)
        raise TypeError(f"`indices` must hold int32 or int64, got {found}")
    if indices.shape != feats.shape:
        raise ValueError(
            f"`indices` must have the shape of the features, {list(feats.shape)}, "
            f"got {list(indices.shape)}"
        )
    check_same_device(feats=feats, indices=indices)
    complain_if(((indices < -1) | (indices >= num)).any(), Complaint.INDEX)
    return indices.to(torch.int32)
