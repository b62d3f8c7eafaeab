"""Points to voxels."""

from __future__ import annotations

from torch import Tensor

from torchsparse._autograd.points import voxelize
from torchsparse._compiling import left_to_python
from torchsparse._validate import check_feats, check_same_device, wide_ints
from torchsparse.nn.functional.count import check_index

__all__ = ["spvoxelize"]


@left_to_python
def spvoxelize(feats: Tensor, coords: Tensor, counts: Tensor) -> Tensor:
    """Average the features of the points of each voxel.

    Args:
        feats: Point features, [N, C] floating.
        coords: [N] integers, voxel of each point; below 0, or M and more: none.
        counts: [M] integers, what each sum is divided by, from ``spcount``; 0 = skip the voxel.

    Returns:
        [M, C] in the dtype of ``feats``, summed in float32 (float64 in float64), also under
        autocast. Differentiable in ``feats``.

    Raises:
        TypeError: Features that are not floating, indices or counts that are not integers.
        ValueError: Shapes that do not fit, tensors on different devices.
    """
    check_feats(feats)
    check_index(coords, 1, "coords")
    check_index(counts, 1, "counts")
    if coords.shape[0] != feats.shape[0]:
        raise ValueError(
            f"`coords` must name one voxel per row of `feats`, "
            f"got {coords.shape[0]} and {feats.shape[0]}"
        )
    check_same_device(feats=feats, coords=coords, counts=counts)
    return voxelize(feats, wide_ints(coords), counts)
