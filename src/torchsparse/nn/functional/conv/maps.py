"""TorchSparse 2.1's functions on coordinates and maps, without a tensor or its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchsparse import _validate
from torchsparse._flags import Complaint, complain_if
from torchsparse._geometry import Geometry, as_tuple
from torchsparse._kernel_map import KernelMap
from torchsparse._recipe import Dataflow
from torchsparse._settings import override
from torchsparse._validate import one_of
from torchsparse.nn.functional.conv.conv import check_parameters
from torchsparse.nn.functional.conv.conv_mode import DOWNSAMPLE_MODES, KMAP_MODES
from torchsparse.nn.functional.conv.mapping import (
    downsampled,
    generated,
    int32_coords,
    same_sites,
    site_coords,
)
from torchsparse.tensor import SparseTensor

__all__ = [
    "build_kernel_map",
    "convert_transposed_out_in_map",
    "spdownsample",
    "spupsample_generative",
    "transpose_kernel_map",
]


def _tensor(coords: Any, spatial_range: Any) -> tuple[SparseTensor, Tensor]:
    """A tensor without features on the given sites, with a cache of its own."""
    _validate.check_coords(coords)
    feats = torch.empty((coords.shape[0], 0), device=coords.device)
    with override(tensor_cache_mode=0):
        x = SparseTensor(feats, coords, 1, spatial_range)
    if x.spatial_range is not None:
        if len(x.spatial_range) < coords.shape[1]:
            raise ValueError(
                f"`spatial_range` must have {coords.shape[1]} entries (batch first), "
                f"got {x.spatial_range}"
            )
        x.spatial_range = x.spatial_range[: coords.shape[1]]
    return x, int32_coords(x._caches, coords)


def build_kernel_map(
    _coords: Tensor,
    input_node_num: int,
    kernel_size: Any = 2,
    stride: Any = 2,
    padding: Any = 0,
    hashmap_keys: Any = None,
    hashmap_vals: Any = None,
    spatial_range: Any = None,
    mode: str = "hashmap",
    dataflow: Dataflow = Dataflow.ImplicitGEMM,
    downsample_mode: str = "spconv",
    training: bool = False,
    ifsort: bool = False,
    generative: bool = False,
    split_mask_num: int = 1,
    split_mask_num_bwd: int = 1,
    dilation: Any = 1,
) -> KernelMap:
    """The kernel map of one layer over given sites.

    Args:
        _coords: [N, 4] int32 (b, x, y, z).
        input_node_num: N.
        kernel_size, stride, padding, dilation: One int or three; stride 1 is submanifold.
        spatial_range: Of the input, (B, X, Y, Z) or None.
        mode, downsample_mode: As in a configuration.
        generative: Create the finer sites that the taps reach.
        hashmap_keys, hashmap_vals, dataflow, training, ifsort, split_mask_num,
            split_mask_num_bwd: Accepted for compatibility; a map serves all of them.

    Returns:
        A mapping: ``out_in_map`` [ceil128(n_out), K] int32 (input rows, -1 = none), ``coords``
        [n_out, 4], ``sizes`` (n_in, n_out), ``spatial_range`` of the output, ``nbmaps`` [M, 2]
        int32 (input, output; by tap, then output row), ``nbsizes`` [K] int32.

    Raises:
        ValueError: Parameters or coordinates that do not fit.
    """
    one_of(mode, KMAP_MODES, "mode")
    one_of(downsample_mode, DOWNSAMPLE_MODES, "downsample_mode")
    size, step, pad, spread = check_parameters(
        3, kernel_size, stride, padding, dilation, generative, generative
    )
    x, coords = _tensor(_coords, spatial_range)
    if input_node_num != coords.shape[0]:
        raise ValueError(
            f"`input_node_num` must be the number of coordinate rows, {coords.shape[0]}, "
            f"got {input_node_num}"
        )
    if generative:
        geometry = Geometry.strided(size, step, pad, spread, downsample_mode, "generative")
        return generated(x, coords, geometry)[0].transposed
    if max(step) == 1:
        return same_sites(x, coords, Geometry.submanifold(size, spread))
    geometry = Geometry.strided(size, step, pad, spread, downsample_mode)
    return downsampled(x, coords, geometry, downsample_mode)


def transpose_kernel_map(kmap: KernelMap, *args: Any, **kwargs: Any) -> KernelMap:
    """The same mapping; its ``out_in_map_t`` [ceil128(n_in), K] holds output rows of each input.

    Args:
        kmap: From `build_kernel_map`.
        args, kwargs: Further arguments of TorchSparse 2.1, accepted without effect.

    Raises:
        TypeError: Something else than a kernel map of this library.
    """
    if not isinstance(kmap, KernelMap):
        raise TypeError(f"`kmap` must come from build_kernel_map, got {type(kmap).__name__}")
    return kmap


def spdownsample(
    _coords: Tensor,
    stride: Any = 2,
    kernel_size: Any = 2,
    padding: Any = 0,
    spatial_range: Any = None,
    downsample_mode: str = "spconv",
) -> Tensor:
    """Sites of a strided layer.

    Args:
        _coords: [N, 4] int32 (b, x, y, z).
        stride, kernel_size, padding: One int or three.
        spatial_range: Of the *output*, (B, X, Y, Z) or None.
        downsample_mode: "spconv" or "minkowski".

    Returns:
        [M, 4] int32, sorted by (b, x, y, z). If the stride is 1 or the kernel size on every axis,
        and in "minkowski" mode: ``unique(coords // stride)`` without bound, as in TorchSparse 2.1.

    Raises:
        ValueError: Parameters or coordinates that do not fit.
    """
    one_of(downsample_mode, DOWNSAMPLE_MODES, "downsample_mode")
    size, step, pad, spread = check_parameters(3, kernel_size, stride, padding, 1, False, False)
    x, coords = _tensor(_coords, None)
    floor = downsample_mode == "minkowski" or all(s in (1, k) for s, k in zip(step, size))
    geometry = Geometry.strided(size, step, pad, spread, downsample_mode)
    out_range = None if spatial_range is None else as_tuple(spatial_range, 4, "spatial_range")
    return site_coords(x, coords, geometry, "minkowski" if floor else "spconv", out_range)


def spupsample_generative(
    _coords: Tensor,
    stride: Any = 2,
    kernel_size: Any = 2,
    padding: Any = 0,
    spatial_range: Any = None,
) -> Tensor:
    """Sites of a generative layer: all ``coords * stride - padding + tap``.

    Args:
        _coords: [N, 4] int32 (b, x, y, z).
        stride, kernel_size, padding: One int or three.
        spatial_range: Of the *output*, (B, X, Y, Z) or None; sites outside are dropped.

    Returns:
        [M, 4] int32, sorted by (b, x, y, z).

    Raises:
        ValueError: Parameters or coordinates that do not fit.
    """
    size, step, pad, spread = check_parameters(3, kernel_size, stride, padding, 1, True, True)
    x, coords = _tensor(_coords, None)
    geometry = Geometry.strided(size, step, pad, spread, "spconv", "generative")
    out_range = None if spatial_range is None else as_tuple(spatial_range, 4, "spatial_range")
    return site_coords(x, coords, geometry, "generative", out_range)


def convert_transposed_out_in_map(out_in_map: Tensor, size: int) -> Tensor:
    """The same pairs seen from the inputs.

    Args:
        out_in_map: [n_out, K] int32, input rows, -1 = none.
        size: Number of input rows.

    Returns:
        [size, K] int32: ``result[out_in_map[o, k], k] = o``, -1 elsewhere.

    Raises:
        ValueError: A row of ``size`` or more (noticed later on a GPU).
    """
    beyond = out_in_map >= size
    complain_if(beyond.any(), Complaint.INDEX, lambda: f"size = {size}")
    out_in_map = out_in_map.masked_fill(beyond, -1)
    # One row more takes the absent ones, which index -1 addresses after the shift.
    n_out, volume = out_in_map.shape
    result = out_in_map.new_full((size + 1, volume), -1, dtype=torch.int32)
    outputs = torch.arange(n_out, dtype=torch.int32, device=out_in_map.device)
    result.scatter_(0, out_in_map.to(torch.int64) + 1, outputs[:, None].expand(n_out, volume))
    return result[1:]
