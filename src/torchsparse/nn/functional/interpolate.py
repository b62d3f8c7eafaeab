"""Features of voxels at points between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse._autograd.points import devoxelize
from torchsparse._compiling import left_to_python
from torchsparse._ops import table
from torchsparse._validate import (
    check_coords,
    check_feats,
    check_rows,
    check_same_device,
    one_of,
)
from torchsparse.tensor import SparseTensor, check_sparse

__all__ = ["interpolate_points", "on_lattice"]


@left_to_python
def interpolate_points(
    input: SparseTensor,
    points: Tensor,
    mode: str = "trilinear",
    *,
    anchor: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """Features at any positions, from the voxels around them. Never waits for the device.

    Voxel c of a tensor with stride S lies at position ``(c + anchor) * S``, in input voxels. With
    u = p / S - anchor, f = floor(u) and t = u - f, corner f + j (each j_i 0 or 1) has the share
    prod_i (t_i if j_i else 1 - t_i).

    Args:
        input: Features [N, C] at distinct coordinates [N, 4].
        points: [Q, 4] floating, columns (b, x, y, z); a batch index and a position in input
            voxels, so that the same points serve the tensors of every stride.
        mode: "trilinear", or "nearest": the voxel at floor(u + 1/2) alone.
        anchor: Where in its cell a voxel's features are: 0 = its lower corner, as in
            `calc_ti_weights`; 0.5 = its middle, which keeps the levels of a network aligned.
        normalize: Divide the shares of the voxels that exist by their sum. Otherwise absent
            voxels count as zeros. No effect on "nearest".

    Returns:
        [Q, C] in the dtype of the features, summed in float32 (float64 in float64), also under
        autocast; 0 where no voxel is near. Differentiable in the features and, if trilinear, in
        the positions (within a cell; the batch column gets 0).

    Raises:
        TypeError: Features or points that are not floating, coordinates that are not integers.
        ValueError: An unknown mode, shapes that do not fit, tensors on different devices.
    """
    one_of(mode, ("trilinear", "nearest"), "mode")
    check_sparse(input)
    feats, coords = input.feats, input.coords
    check_feats(feats)
    check_coords(coords)
    check_rows(feats, coords)
    _check_points(points)
    check_same_device(feats=feats, coords=coords, points=points)
    # The features may be half numbers, positions in a large scene may not.
    exact = points.to(torch.promote_types(points.dtype, torch.float32))
    u = on_lattice(exact, input.stride) - anchor
    batch = exact[:, :1].detach().to(torch.int64)
    if mode == "nearest":
        cell = torch.floor(u.detach() + 0.5).to(torch.int64)
        rows = _rows_at(coords, torch.cat([batch, cell], 1))[:, None]
        return devoxelize(feats, rows, torch.ones_like(rows, dtype=exact.dtype))
    low = torch.floor(u.detach())
    corners = _corners(exact.device)  # [8, 3]
    cells = low.to(torch.int64)[:, None] + corners
    sites = torch.cat([batch[:, None].expand(-1, 8, -1), cells], 2)
    rows = _rows_at(coords, sites)  # [Q, 8]
    inner = (u - low)[:, None]
    shares = torch.where(corners == 1, inner, 1 - inner).prod(2)
    shares = shares.masked_fill(rows < 0, 0)
    if normalize:
        total = shares.sum(1, keepdim=True)
        shares = shares / total.masked_fill(total == 0, 1)
    return devoxelize(feats, rows, shares)


def on_lattice(points: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Positions in steps of a stride.  [Q, 4] with the batch index, in input voxels -> [Q, 3]."""
    # By a tensor made on the device: a GPU multiplies by the reciprocal of a number, which rounds
    # otherwise, and a tensor of strides would have to be sent.
    axes = [
        axis if step == 1 else axis / torch.full_like(axis[:1], step)
        for axis, step in zip(points[:, 1:].unbind(1), stride)
    ]
    return torch.stack(axes, 1)


def _check_points(points: Any) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"`points` must be a tensor, got {type(points).__name__}")
    if not points.is_floating_point():
        raise TypeError(f"`points` must be floating, got {points.dtype}")
    if points.dim() != 2 or points.shape[1] != 4:
        raise ValueError(
            f"`points` must have shape [Q, 4] with the columns (b, x, y, z), "
            f"got {list(points.shape)}"
        )


def _corners(device: torch.device) -> Tensor:
    """The 8 corners of a cell, z fastest.  [8, 3] int64."""
    number = torch.arange(8, device=device)
    return torch.stack([number >> 2, number >> 1, number], 1) & 1


def _rows_at(coords: Tensor, sites: Tensor) -> Tensor:
    """Row of each site among the coordinates, -1 = none.  [..., 4] int64 -> [...] int32."""
    return table.find_rows(table.site_keys(coords.to(torch.int64)), table.site_keys(sites))
