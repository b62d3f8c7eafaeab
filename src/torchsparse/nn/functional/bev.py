"""From voxels to a bird's-eye view: one spatial axis, the height, is summed or stacked away.

Rows are brought together by height, so that each height is one matrix product, and then by site.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from torchsparse._autograd.points import voxelize
from torchsparse._autograd.reduce import segment_sum
from torchsparse._cache import new_cache
from torchsparse._compiling import left_to_python
from torchsparse._flags import Complaint, complain_if, raise_pending
from torchsparse._geometry import as_tuple
from torchsparse._ops import reduce
from torchsparse._ops.sets import unique_rows
from torchsparse._recipe import sum_dtype
from torchsparse._validate import (
    check_coords,
    check_feats,
    check_rows,
    check_same_device,
    one_of,
)
from torchsparse.nn.functional.conv.choices import compute_dtype
from torchsparse.nn.functional.conv.mapping import int32_coords
from torchsparse.nn.functional.pooling import samples
from torchsparse.tensor import SparseTensor, check_sparse, wrap

__all__ = [
    "to_bev_convolution",
    "to_bev_height_compression",
    "to_bev_reduction",
    "to_dense_bev_convolution",
]

# The methods of a Function have the signature of what they compute, not that of the base class.
# pyright: reportIncompatibleMethodOverride=false


# ------------------------------------------------------------------ sparse to sparse
@left_to_python
def to_bev_reduction(input: SparseTensor, dim: int = 1) -> SparseTensor:
    """Average the rows of each column of voxels.

    Args:
        input: Features [N, C].
        dim: The axis along which columns run, 0 to 2 for x, y, z.

    Returns:
        One row per column, sorted, at coordinate 0 of that axis; features in their dtype, summed
        in float32 (float64 in float64), also under autocast. The stride is that of ``input``,
        the range has extent 1 along the axis, the cache is new. Differentiable.

    Raises:
        ValueError: Shapes that do not fit, another ``dim``, a negative batch index.
    """
    feats, coords = _checked(input, dim)
    complain_if((coords[:, 0] < 0).any(), Complaint.BATCH)
    columns = coords.clone()
    columns[:, 1 + dim] = 0
    sites, row = _sites(columns)
    mean = voxelize(feats, row, reduce.count(row, sites.shape[0]))
    extent = None
    if input.spatial_range is not None:
        extent = _range(input.spatial_range)
        extent = (*extent[: 1 + dim], 1, *extent[2 + dim :])
    return _level(input, mean, sites, input.stride, extent)


@left_to_python
def to_bev_convolution(
    input: SparseTensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    dim: int = 1,
) -> SparseTensor:
    """Multiply each row by the weight of its height, and sum the rows of each site.

    Args:
        input: Features [N, C_in]. The height of a row is its coordinate along ``dim``.
        kernel: [n_kernels, C_in, C_out], one weight per height.
        bias: [C_out] or [1, C_out], added once per row; or None.
        stride: One int or three; divides the coordinates of the other two axes.
        dim: The axis of heights, 0 to 2 for x, y, z.

    Returns:
        One row per site, sorted, at coordinate 0 along ``dim``; features in the dtype of the
        computation (as in ``conv3d``), summed in float32 or better. The tensor stride is that of
        ``input`` times ``stride``, the range ``(r - 1) // stride + 1``, with extent 1 along
        ``dim``; the cache is new. Differentiable in features, kernel and bias.

    Raises:
        ValueError: Shapes or devices that do not fit, another ``dim``, a stride below 1, a height
            outside ``0 <= h < n_kernels`` (noticed later on a GPU).
        TypeError: float16 mixed with bfloat16 outside autocast.
    """
    feats, coords = _checked(input, dim)
    _check_weights(feats, kernel, bias)
    step = as_tuple(stride, 3, "stride", floats=False)
    if min(step) < 1:
        raise ValueError(f"`stride` must be at least 1 on every axis, got {stride!r}")
    complain_if((coords[:, 0] < 0).any(), Complaint.BATCH)
    height, heights = coords[:, 1 + dim], kernel.shape[0]
    _complain_outside(height[:, None], (heights,))
    columns = coords.clone()
    columns[:, 1 + dim] = 0
    for axis, s in enumerate(step):
        if axis != dim and s > 1:
            columns[:, 1 + axis] = torch.div(columns[:, 1 + axis], s, rounding_mode="floor")
    out, sites = _sum_by_site(feats, kernel, bias, height, columns)
    extent = None
    if input.spatial_range is not None:
        batch, *axes = _range(input.spatial_range)[:4]
        extent = (batch, *(1 if i == dim else (axes[i] - 1) // step[i] + 1 for i in range(3)))
    return _level(input, out, sites, tuple(a * b for a, b in zip(input.stride, step)), extent)


def _level(
    input: SparseTensor,
    feats: Tensor,
    sites: Tensor,
    stride: tuple[int, ...],
    extent: tuple[int, ...] | None,
) -> SparseTensor:
    out = wrap(feats, input, sites, stride, extent)
    out._caches = new_cache()
    return out


def _range(spatial_range: tuple[int, ...]) -> tuple[int, ...]:
    if len(spatial_range) < 4:
        raise ValueError(f"`spatial_range` must have 4 entries (batch first), got {spatial_range}")
    return spatial_range


# ------------------------------------------------------------------ sparse to dense
@left_to_python
def to_dense_bev_convolution(
    input: SparseTensor,
    kernel: Tensor,
    shape: Any,
    offset: Any = (0, 0, 0),
    dim: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply each row by the weight of its height, and sum the rows of each cell of an image.

    Args:
        input: Features [N, C_in] at u = (x, y, z) - offset.
        kernel: [shape[dim], C_in, C_out], one weight per height ``u[dim]``.
        shape: Extents of the box in which every u lies, 3 ints on the lattice of ``input``.
        offset: The corner of that box, 3 ints.
        dim: The axis of heights, 0 to 2 for x, y, z.
        bias: [C_out] or [1, C_out], added once per row; or None.

    Returns:
        [B, C_out, A, A'] with the extents of the other two axes in their order, contiguous, in the
        dtype of the computation (as in ``conv3d``), summed in float32 or better; 0 where no row
        is. B is the largest batch index + 1, which waits for the device. Differentiable in
        features, kernel and bias.

    Raises:
        ValueError: Shapes or devices that do not fit, another ``dim``, a negative batch index, a
            row outside the box (noticed later on a GPU).
        TypeError: float16 mixed with bfloat16 outside autocast.
    """
    feats, coords = _checked(input, dim)
    box = _box(shape)
    _check_weights(feats, kernel, bias)
    if kernel.shape[0] != box[dim]:
        raise ValueError(
            f"`kernel` must hold {box[dim]} weights, one per height of `shape` {box}, "
            f"got shape {list(kernel.shape)}"
        )
    batch, num = samples(input)
    inside = _shifted(coords, offset)
    _complain_outside(inside, box)
    columns, extents = _cells(batch, inside, box, dim)
    out, sites = _sum_by_site(feats, kernel, bias, inside[:, dim], columns)
    sites = torch.nn.functional.pad(sites, (0, 1))  # one layer of channels
    return _Image.apply(out, sites, (num, *extents, 1))  # pyright: ignore[reportReturnType]


@left_to_python
def to_bev_height_compression(
    input: SparseTensor, shape: Any, offset: Any = (0, 0, 0), dim: int = 1
) -> Tensor:
    """Write voxels into an image whose channels are stacked by height.

    Args:
        input: Features [N, C] at u = (x, y, z) - offset.
        shape: Extents of the box, 3 ints on the lattice of ``input``; H = ``shape[dim]``.
        offset: The corner of that box, 3 ints.
        dim: The axis of heights, 0 to 2 for x, y, z. Heights are clamped to 0 <= h < H.

    Returns:
        [B, H * C, A, A'] with the extents of the other two axes in their order, contiguous, in the
        dtype of the features; channel ``h * C + c``. Rows of one cell and height are summed in
        float32 (float64 in float64). B is the largest batch index + 1, which waits for the device.
        Differentiable.

    Raises:
        ValueError: Shapes that do not fit, another ``dim``, a negative batch index, a row outside
            the box on one of the other axes (noticed later on a GPU).
    """
    feats, coords = _checked(input, dim)
    box = _box(shape)
    batch, num = samples(input)
    inside = _shifted(coords, offset)
    inside[:, dim].clamp_(0, box[dim] - 1)
    _complain_outside(inside, box)
    columns, extents = _cells(batch, inside, box, dim)
    columns = torch.cat([columns, inside[:, dim, None]], 1)
    sites, row = _sites(columns)
    out = segment_sum(feats, row, sites.shape[0])
    return _Image.apply(out, sites, (num, *extents, box[dim]))  # pyright: ignore[reportReturnType]


def _box(shape: Any) -> tuple[int, ...]:
    box = as_tuple(shape, 3, "shape")
    if min(box) < 1:
        raise ValueError(f"`shape` must be at least 1 on every axis, got {shape!r}")
    return box


def _shifted(coords: Tensor, offset: Any) -> Tensor:
    """(x, y, z) - offset.  [N, 4] -> [N, 3] int64, a new tensor."""
    shifted = coords[:, 1:].to(torch.int64, copy=True)
    for axis, o in enumerate(as_tuple(offset, 3, "offset")):
        shifted[:, axis] -= o
    return shifted


def _cells(
    batch: Tensor, inside: Tensor, box: tuple[int, ...], dim: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Rows (b, a, a') of the two axes besides ``dim``, and the extents of those axes."""
    axes = [axis for axis in range(3) if axis != dim]
    columns = torch.stack([batch.to(torch.int64), *(inside[:, axis] for axis in axes)], 1)
    return columns, tuple(box[axis] for axis in axes)


class _Image(Function):
    """Rows at distinct (b, a, a', h) -> [B, H * C, A, A'], 0 elsewhere.

    Writing channels first at once spares a transposed copy of an image that is mostly empty. All
    rows are inside: whoever found another one has raised.
    """

    @staticmethod
    def forward(ctx: Any, feats: Tensor, sites: Tensor, extents: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(sites)
        batch, a, b, heights = extents
        channels = feats.shape[1]
        ctx.stack = (heights, channels)
        out = feats.new_zeros((batch, heights, channels, a, b))
        at_b, at_a, at_a2, at_h = sites.to(torch.int64).unbind(1)
        out[at_b, at_h, :, at_a, at_a2] = feats
        # Not a view: the output of a Function can then be changed in place.
        return out.resize_(batch, heights * channels, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (sites,) = ctx.saved_tensors
        at_b, at_a, at_a2, at_h = sites.to(torch.int64).unbind(1)
        return grad.unflatten(1, ctx.stack)[at_b, at_h, :, at_a, at_a2], None, None


# ------------------------------------------------------------------ checks
def _checked(input: SparseTensor, dim: int) -> tuple[Tensor, Tensor]:
    """Features and coordinates, once they fit."""
    check_sparse(input)
    one_of(dim, (0, 1, 2), "dim")
    feats, coords = input.feats, input.coords
    check_feats(feats)
    check_coords(coords)
    check_rows(feats, coords)
    check_same_device(feats=feats, coords=coords)
    return feats, int32_coords(input._caches, coords)


def _check_weights(feats: Tensor, kernel: Tensor, bias: Tensor | None) -> None:
    check_same_device(feats=feats, kernel=kernel, bias=bias)
    if kernel.dim() != 3 or kernel.shape[1] != feats.shape[1]:
        raise ValueError(
            f"`kernel` must have shape [n_kernels, {feats.shape[1]}, C_out] for `feats` "
            f"{list(feats.shape)}, got {list(kernel.shape)}"
        )
    if not kernel.is_floating_point():
        raise TypeError(f"`kernel` must be floating, got {kernel.dtype}")
    channels = kernel.shape[2]
    if bias is not None and tuple(bias.shape) not in ((channels,), (1, channels)):
        raise ValueError(
            f"`bias` must have shape [{channels}] or [1, {channels}], got {list(bias.shape)}"
        )


def _complain_outside(inside: Tensor, box: tuple[int, ...]) -> None:
    """Rows [N, A] must lie in ``0 <= u < box``."""

    def found() -> str:
        lower, upper = (f(0).values.tolist() for f in (inside.min, inside.max))
        return f"got rows from {lower} to {upper} in shape {list(box)}"

    bad = torch.zeros((), dtype=torch.bool, device=inside.device)
    for axis, extent in enumerate(box):
        u = inside[:, axis]
        bad = bad | ((u < 0) | (u >= extent)).any()
    complain_if(bad, Complaint.BEV, found)


# ------------------------------------------------------------------ sums
def _sites(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, sorted, and where each given row went.

    [N, A] integers -> [M, A] int32, [N] int64.
    """
    raise_pending(columns.device)  # the next line waits for the device anyway
    return unique_rows(columns)


def _sum_by_site(
    feats: Tensor, kernel: Tensor, bias: Tensor | None, height: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of ``feats[n] @ kernel[height[n]] + bias`` over equal rows of ``columns``.

    Args:
        feats: [N, C_in].
        kernel: [H, C_in, C_out].
        bias: [C_out], [1, C_out] or None.
        height: [N] integers; rows outside 0 <= h < H are left out.
        columns: [N, A] integers.

    Returns:
        [M, C_out] in the dtype of the computation, and the sorted sites [M, A] int32.
    """
    dtype = compute_dtype(feats, kernel, bias)
    order, starts = reduce.group_rows(height, kernel.shape[0])
    begins: list[int] = starts.tolist()  # waits for the device
    rows = order[: begins[-2]]
    products = _ByHeight.apply(feats, kernel, bias, rows, begins, dtype)
    sites, row = _sites(columns.index_select(0, rows))
    sums = segment_sum(products, row, sites.shape[0])  # pyright: ignore[reportArgumentType]
    return sums.to(dtype), sites


class _ByHeight(Function):
    """``feats[order[p]] @ kernel[h] + bias`` for ``starts[h] <= p < starts[h + 1]``.

    Operands are rounded to ``dtype``; products are float32, or float64 for float64. Gradients are
    summed so too, and returned in the dtype of what they belong to. Autocast leaves products with
    ``out=`` alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        order: Tensor,
        starts: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(feats, kernel, order)
        ctx.starts, ctx.dtype = starts, dtype
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        weight = _rounded(kernel, dtype)
        feats = _rounded(feats, dtype)
        out = feats.new_empty((order.shape[0], kernel.shape[2]))
        for h, rows in _groups(starts):
            torch.mm(feats.index_select(0, order[rows]), weight[h], out=out[rows])
        return out if bias is None else out.add_(_rounded(bias, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, kernel, order = ctx.saved_tensors
        grad_feats = grad_kernel = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _rounded(kernel, ctx.dtype)
            rows_grad = grad.new_empty((order.shape[0], feats.shape[1]))
            for h, rows in _groups(ctx.starts):
                torch.mm(grad[rows], weight[h].mT, out=rows_grad[rows])
            grad_feats = torch.zeros_like(feats)
            grad_feats.index_copy_(0, order, rows_grad.to(feats.dtype))
        if ctx.needs_input_grad[1]:
            rounded = _rounded(feats, ctx.dtype)
            sums = grad.new_zeros(kernel.shape)
            for h, rows in _groups(ctx.starts):
                torch.mm(rounded.index_select(0, order[rows]).mT, grad[rows], out=sums[h])
            grad_kernel = sums.to(kernel.dtype)
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias_like
            grad_bias = grad.sum(0).to(dtype).reshape(shape)
        return grad_feats, grad_kernel, grad_bias, None, None, None


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of ``dtype`` in the type in which sums are made."""
    return tensor.to(dtype).to(sum_dtype(dtype))


def _groups(starts: list[int]) -> list[tuple[int, slice]]:
    """Heights that have rows, and where these are. The last group holds the rows left out."""
    bounds = enumerate(pairwise(starts[:-1]))
    return [(h, slice(begin, end)) for h, (begin, end) in bounds if end > begin]
