"""From voxels to a bird's-eye view, as modules.

``dim`` is the spatial axis that goes away: 0, 1, 2 for x, y, z.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchsparse._geometry import as_tuple
from torchsparse._validate import one_of
from torchsparse.nn.functional.bev import (
    to_bev_convolution,
    to_bev_height_compression,
    to_bev_reduction,
    to_dense_bev_convolution,
)
from torchsparse.tensor import SparseTensor

__all__ = [
    "ToBEVConvolution",
    "ToBEVHeightCompression",
    "ToBEVReduction",
    "ToDenseBEVConvolution",
]


class ToBEVReduction(nn.Module):
    """Average the voxels along one axis; see ``functional.bev.to_bev_reduction``.

    [N, C] features -> [M, C], in their dtype: one row per column of voxels.

    Args:
        dim: The axis, 0 to 2.

    Raises:
        ValueError: Another ``dim``.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = one_of(dim, (0, 1, 2), "dim")

    def forward(self, input: SparseTensor) -> SparseTensor:
        return to_bev_reduction(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class _HeightKernel(nn.Module):
    """One weight per height, and a bias."""

    def __init__(
        self, in_channels: int, out_channels: int, n_kernels: int, dim: int, bias: bool
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.n_kernels = n_kernels
        self.dim = one_of(dim, (0, 1, 2), "dim")
        if n_kernels < 1:
            raise ValueError(f"`n_kernels` must be at least 1, got {n_kernels}")
        self.kernel = nn.Parameter(torch.empty(n_kernels, in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernel from U(-a, a), a = 1 / sqrt(C_in); the bias starts at 0."""
        bound = 1 / math.sqrt(max(self.in_channels, 1))
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, n_kernels={self.n_kernels}"]
        parts.append(f"dim={self.dim}")
        if self.bias is not None:
            parts.append("bias=True")
        return ", ".join(parts)


class ToBEVConvolution(_HeightKernel):
    """Multiply each voxel by the weight of its height and sum per column; see
    ``functional.bev.to_bev_convolution``.

    Args:
        in_channels, out_channels: C_in and C_out.
        n_kernels: Number of heights; every row has ``0 <= (x, y, z)[dim] < n_kernels``.
        stride: Divides the coordinates of the other two axes.
        dim: The axis of heights, 0 to 2.
        bias: Learn a bias, added once per row.

    Attributes:
        kernel: [n_kernels, C_in, C_out].
        bias: [1, C_out] or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_kernels: int,
        stride: Any = 1,
        dim: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, n_kernels, dim, bias)
        if min(as_tuple(stride, 3, "stride", floats=False)) < 1:
            raise ValueError(f"`stride` must be at least 1 on every axis, got {stride!r}")
        self.stride = stride

    def forward(self, input: SparseTensor) -> SparseTensor:
        return to_bev_convolution(input, self.kernel, self.bias, self.stride, self.dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}"


class _Box(nn.Module):
    """The box that becomes an image: buffers for the state dict, the same numbers as ints.

    Reading the buffers would wait for the GPU; they are read when a state dict was loaded.
    """

    shape: Tensor  # [3] int32
    offset: Tensor  # [1, 4] int32, (ox, oy, oz, 0)

    def _set_box(self, shape: Any, offset: Any) -> None:
        self._extents = as_tuple(shape, 3, "shape")
        self._corner = as_tuple(offset, 3, "offset")
        if min(self._extents) < 1:
            raise ValueError(f"`shape` must be at least 1 on every axis, got {shape!r}")
        self.register_buffer("shape", torch.tensor(self._extents, dtype=torch.int32))
        self.register_buffer("offset", torch.tensor([[*self._corner, 0]], dtype=torch.int32))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.shape.is_meta:
            self._extents = tuple(self.shape.tolist())
        if not self.offset.is_meta:
            self._corner = tuple(self.offset[0, :3].tolist())

    def _describe_box(self) -> str:
        return f"shape={self._extents}, offset={self._corner}"


class ToDenseBEVConvolution(_Box, _HeightKernel):
    """Multiply each voxel by the weight of its height and sum into an image; see
    ``functional.bev.to_dense_bev_convolution``.

    Args:
        in_channels, out_channels: C_in and C_out.
        shape: Extents of the box, 3 ints on the lattice of the input; n_kernels = ``shape[dim]``.
        offset: The corner of the box.
        dim: The axis of heights, 0 to 2.
        bias: Learn a bias, added once per row.

    Attributes:
        kernel: [n_kernels, C_in, C_out].
        bias: [1, C_out] or None.
        shape, offset: Buffers, [3] and [1, 4] = (ox, oy, oz, 0) int32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shape: Any,
        offset: Any = (0, 0, 0),
        dim: int = 1,
        bias: bool = False,
    ) -> None:
        n_kernels = as_tuple(shape, 3, "shape")[one_of(dim, (0, 1, 2), "dim")]
        _HeightKernel.__init__(self, in_channels, out_channels, n_kernels, dim, bias)
        self._set_box(shape, offset)

    def forward(self, input: SparseTensor) -> Tensor:
        return to_dense_bev_convolution(
            input, self.kernel, self._extents, self._corner, self.dim, self.bias
        )

    def extra_repr(self) -> str:
        return f"{_HeightKernel.extra_repr(self)}, {self._describe_box()}"


class ToBEVHeightCompression(_Box):
    """Stack the channels of all heights in an image; see
    ``functional.bev.to_bev_height_compression``.

    Args:
        channels: C.
        shape: Extents of the box, 3 ints on the lattice of the input; H = ``shape[dim]``.
        offset: The corner of the box.
        dim: The axis of heights, 0 to 2; heights are clamped to the box.

    Attributes:
        shape, offset: Buffers, [3] and [1, 4] = (ox, oy, oz, 0) int32.
    """

    def __init__(self, channels: int, shape: Any, offset: Any = (0, 0, 0), dim: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.dim = one_of(dim, (0, 1, 2), "dim")
        self._set_box(shape, offset)

    def forward(self, input: SparseTensor) -> Tensor:
        feats = input.feats
        if feats.dim() == 2 and feats.shape[1] != self.channels:
            raise ValueError(
                f"`feats` must have shape [N, {self.channels}], got {list(feats.shape)}"
            )
        return to_bev_height_compression(input, self._extents, self._corner, self.dim)

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}, {self._describe_box()}"
