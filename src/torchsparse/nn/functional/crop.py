"""Cutting a box out of a sparse tensor."""

from __future__ import annotations

from typing import Any

import torch

from torchsparse._cache import new_cache
from torchsparse._compiling import left_to_python
from torchsparse._geometry import as_tuple
from torchsparse._validate import check_coords, check_rows, check_same_device, wide_ints
from torchsparse.tensor import SparseTensor, check_sparse, wrap

__all__ = ["spcrop"]


@left_to_python
def spcrop(input: SparseTensor, coords_min: Any = None, coords_max: Any = None) -> SparseTensor:
    """Keep the rows with ``coords_min <= (x, y, z) < coords_max``.

    Args:
        input: Features [N, C] of any dtype on [N, 4] coordinates (b, x, y, z), which are compared
            as they are, on its own lattice. Other numbers of axes work too.
        coords_min, coords_max: 3 ints each (one per axis, or one for all), None = unbounded.

    Returns:
        [M, C] features in their dtype: the kept rows in their order, with the stride and range of
        ``input`` and a cache of its own. Differentiable.

    Raises:
        ValueError: Shapes that do not fit, bounds that are not whole numbers.
        TypeError: Coordinates that are not integers.
    """
    check_sparse(input)
    feats, coords = input.feats, input.coords
    check_coords(coords, ndim=None)
    check_rows(feats, coords)
    check_same_device(feats=feats, coords=coords)
    ndim, sites = coords.shape[1] - 1, wide_ints(coords)
    keep = torch.ones(coords.shape[0], dtype=torch.bool, device=coords.device)
    if coords_min is not None:
        lower = as_tuple(coords_min, ndim, "coords_min")
        for axis, bound in enumerate(lower):
            keep &= sites[:, 1 + axis] >= bound
    if coords_max is not None:
        upper = as_tuple(coords_max, ndim, "coords_max")
        for axis, bound in enumerate(upper):
            keep &= sites[:, 1 + axis] < bound
    rows = keep.nonzero().squeeze(1)
    out = wrap(feats[rows], input, sites[rows], input.stride, input.spatial_range)
    out._caches = new_cache()
    return out
