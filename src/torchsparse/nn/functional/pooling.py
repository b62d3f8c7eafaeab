"""Pooling over all rows of a sample."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from torchsparse._autograd.points import voxelize
from torchsparse._autograd.reduce import segment_max, segment_sum
from torchsparse._capacity import PAD, row_count
from torchsparse._compiling import left_to_python
from torchsparse._flags import Complaint, complain_if, raise_pending
from torchsparse._ops import reduce
from torchsparse._validate import (
    check_coords,
    check_feats,
    check_rows,
    check_same_device,
    wide_ints,
)
from torchsparse.tensor import SparseTensor, check_sparse

__all__ = ["global_avg_pool", "global_max_pool", "global_sum_pool", "samples"]


@left_to_python
def global_avg_pool(input: SparseTensor, batch_size: int | None = None) -> Tensor:
    """Mean of the rows of each sample.

    Args:
        input: Features [N, C]; the batch index is the first column of its coordinates.
        batch_size: B. None: the largest batch index + 1, which waits for the device.

    Returns:
        [B, C] in the dtype of the features, summed in float32 (float64 in float64), also under
        autocast; 0 for samples without rows. Differentiable.

    Raises:
        ValueError: A batch index below 0, or of ``batch_size`` and more (noticed later on a GPU).
    """
    batch, num = samples(input, batch_size)
    return voxelize(input.feats, batch, reduce.count(batch, num))


@left_to_python
def global_max_pool(input: SparseTensor, batch_size: int | None = None) -> Tensor:
    """Maximum of each channel over the rows of each sample.

    The errors are those of `global_avg_pool`.

    Args:
        input, batch_size: As in `global_avg_pool`.

    Returns:
        [B, C] in the dtype of the features; 0 for samples without rows. The gradient goes to one
        maximal row (the first).
    """
    batch, num = samples(input, batch_size)
    return segment_max(input.feats, batch, num)


@left_to_python
def global_sum_pool(input: SparseTensor, batch_size: int | None = None) -> Tensor:
    """Sum of the rows of each sample.

    The errors are those of `global_avg_pool`.

    Args:
        input, batch_size: As in `global_avg_pool`.

    Returns:
        [B, C] in the dtype of the features, summed in float32 (float64 in float64), also under
        autocast; 0 for samples without rows. Differentiable.
    """
    batch, num = samples(input, batch_size)
    return segment_sum(input.feats, batch, num)


def samples(input: SparseTensor, batch_size: int | None = None) -> tuple[Tensor, int]:
    """The sample of each row, and their number.

    Returns:
        [N] integers, and ``batch_size`` or, without one, the largest batch index + 1.
    """
    check_sparse(input)
    feats, coords = input.feats, input.coords
    check_feats(feats)
    check_coords(coords, ndim=None)
    check_rows(feats, coords)
    check_same_device(feats=feats, coords=coords)
    if batch_size is not None and operator.index(batch_size) < 0:
        raise ValueError(f"`batch_size` must not be negative, got {batch_size}")
    batch = wide_ints(coords[:, 0]).contiguous()
    if batch_size is not None:
        negative = batch < 0
        if row_count(coords) is not None:  # padding belongs to no sample
            negative &= batch != PAD
        complain_if(negative.any(), Complaint.BATCH)
        complain_if(
            (batch >= batch_size).any(), Complaint.BATCH_SIZE, lambda: f"batch_size = {batch_size}"
        )
        return batch, int(batch_size)
    if batch.shape[0] == 0:
        return batch, 0
    lowest, highest = torch.stack(torch.aminmax(batch)).tolist()
    raise_pending(batch.device)  # the line above has waited for the device
    if lowest < 0:
        raise ValueError(f"{Complaint.BATCH.value} (got {lowest})")
    if highest > torch.iinfo(torch.int32).max:
        raise ValueError(f"{Complaint.OVERFLOW.value} (got the batch index {highest})")
    return batch, highest + 1
