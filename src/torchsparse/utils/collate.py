"""Samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchsparse._flags import Complaint, complain_if
from torchsparse.tensor import SparseTensor

__all__ = ["as_tensor", "sparse_collate", "sparse_collate_fn"]

INT32 = torch.iinfo(torch.int32)


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, anything else by way of NumPy; memory is shared where possible."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))


def sparse_collate(inputs: Sequence[SparseTensor]) -> SparseTensor:
    """Join samples into one batch; sample j gets batch index j. The inputs stay as they are.

    Args:
        inputs: Coordinates [N_j, 3] = (x, y, z) without the batch index; tensors or arrays.

    Returns:
        Features in sequence; coordinates [sum of N_j, 4] (b, x, y, z), int32 (floating ones stay
        floating); the common stride; the range (number of samples, elementwise maximum of theirs)
        if each has one, given as (X, Y, Z) or (B, X, Y, Z), else None.

    Raises:
        ValueError: No samples, different strides, coordinates of another shape.
    """
    inputs = list(inputs)
    if not inputs:
        raise ValueError("sparse_collate needs at least one sparse tensor, got none")
    strides = {x.stride for x in inputs}
    if len(strides) > 1:
        raise ValueError(f"samples must have the same stride, got {sorted(strides)}")
    coords = torch.cat([_with_batch(x.coords, sample) for sample, x in enumerate(inputs)])
    feats = torch.cat([as_tensor(x.feats) for x in inputs])
    return SparseTensor(feats, coords, inputs[0].stride, _common_range(inputs))


def _with_batch(coords: Any, sample: int) -> Tensor:
    """[N, 3] of any kind -> [N, 4] with the batch index in front, int32 or floating."""
    coords = as_tensor(coords)
    if coords.dim() != 2 or coords.shape[1] != 3:
        raise ValueError(
            f"coordinates of a sample must have shape [N, 3] = (x, y, z) without the batch index, "
            f"got {list(coords.shape)} in sample {sample}"
        )
    if not coords.is_floating_point():
        if coords.dtype == torch.int64:
            outside = (coords < INT32.min) | (coords > INT32.max)
            complain_if(outside.any(), Complaint.OVERFLOW, lambda: f"sample {sample}")
        coords = coords.to(torch.int32)
    return torch.nn.functional.pad(coords, (1, 0), value=sample)


def _common_range(inputs: list[SparseTensor]) -> tuple[int, ...] | None:
    extents = []
    for x in inputs:
        if x.spatial_range is None:
            return None
        extents.append(x.spatial_range[:3] if len(x.spatial_range) == 3 else x.spatial_range[1:4])
    return (len(inputs), *map(max, *extents)) if len(extents) > 1 else (1, *extents[0])


def sparse_collate_fn(inputs: list[Any]) -> Any:
    """The ``collate_fn`` of a data loader over samples that are dicts.

    Args:
        inputs: Dicts with the keys of the first one, whose values decide what happens: dicts are
            collated in turn, arrays and tensors stacked, sparse tensors joined by
            `sparse_collate`, others listed.

    Returns:
        One dict; a list of anything else unchanged.
    """
    if not inputs or not isinstance(inputs[0], dict):
        return inputs
    return {name: _collate([sample[name] for sample in inputs]) for name in inputs[0]}


def _collate(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return sparse_collate_fn(values)
    if isinstance(first, (np.ndarray, Tensor)):
        return torch.stack([as_tensor(value) for value in values])
    if isinstance(first, SparseTensor):
        return sparse_collate(values)
    return values
