"""Convolution modules in one to four dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from torchsparse._compat import note, old_conv_arguments
from torchsparse._geometry import default_padding
from torchsparse.nn.functional.conv import lead
from torchsparse.nn.functional.conv.conv import (
    Layer,
    check_groups,
    check_parameters,
    layer_of,
    run_layer,
    run_traced,
)
from torchsparse.tensor import SparseTensor

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Conv4d"]


class _Conv(nn.Module):
    """A convolution over ``ndim`` spatial axes; see `Conv3d`."""

    ndim = 3
    _layer: Layer | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = False,
        transposed: bool = False,
        generative: bool = False,
        config: Any = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding, dilation, bias, transposed = old_conv_arguments(
            padding, dilation, bias, transposed
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size, self.stride, padding, self.dilation = check_parameters(
            self.ndim, kernel_size, stride, padding, dilation, transposed, generative
        )
        self.padding = default_padding(self.kernel_size, self.stride, padding, self.dilation)
        self.kernel_volume = math.prod(self.kernel_size)
        self.transposed = transposed
        self.generative = generative
        self._config = config
        self.groups = check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        shape = (in_channels // self.groups, out_channels)
        if self.kernel_volume > 1 or math.prod(self.stride) > 1:
            shape = (self.kernel_volume, *shape)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw kernel, then bias, from U(-a, a) with a = 1 / sqrt(C K), C = C_in / groups (C_out /
        groups if transposed)."""
        channels = (self.out_channels if self.transposed else self.in_channels) // self.groups
        bound = 1 / math.sqrt(max(channels * self.kernel_volume, 1))
        with torch.no_grad():
            self.kernel.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(
        self, input: SparseTensor, coordinates: SparseTensor | Tensor | None = None
    ) -> SparseTensor:
        """[N, C_in] features -> [M, C_out], on ``coordinates`` if they are given."""
        # Straight from the table: `self.kernel` takes a detour of half a microsecond.
        own = self._parameters
        kernel = own["kernel"] if "kernel" in own else self.kernel
        bias = own["bias"] if "bias" in own else self.bias
        if is_compiling():
            traced = lead.Layer(
                self.kernel_size, self.stride, self.padding, self.dilation,
                self.transposed, self.generative, self.groups,
            )  # fmt: skip
            return run_traced(traced, input, kernel, bias, self._config, coordinates)  # pyright: ignore[reportArgumentType]
        return run_layer(
            self._parameters_of(),
            input,
            kernel,  # pyright: ignore[reportArgumentType]  # a parameter is never None
            bias,
            self._config,
            coordinates,
        )

    def _parameters_of(self) -> Layer:
        """The record of this layer, made again if somebody assigned other parameters."""
        layer = self._layer
        if (
            layer is None
            or layer.kernel_size is not self.kernel_size
            or layer.stride is not self.stride
            or layer.padding is not self.padding
            or layer.dilation is not self.dilation
            or layer.transposed is not self.transposed
            or layer.generative is not self.generative
            or layer.groups != self.groups
        ):
            layer = layer_of(
                self.ndim,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.transposed,
                self.generative,
                self.groups,
            )
            # The record's own tuples, so that identity tells next time.
            self.kernel_size, self.stride = layer.kernel_size, layer.stride
            self.padding, self.dilation = layer.padding, layer.dilation
            self.transposed, self.generative = layer.transposed, layer.generative
            self._layer = layer
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": None}

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        ones, zeros = (1,) * self.ndim, (0,) * self.ndim
        if self.stride != ones:
            parts.append(f"stride={self.stride}")
        if self.padding != zeros:
            parts.append(f"padding={self.padding}")
        if self.dilation != ones:
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        parts += [f"{name}=True" for name in ("transposed", "generative") if getattr(self, name)]
        if self.bias is not None:
            parts.append("bias=True")
        return ", ".join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A kernel of volume 1 is understood with and without its first axis."""
        key = prefix + "kernel"
        kernel = state_dict.get(key)
        if self.kernel_volume == 1 and isinstance(kernel, Tensor):
            if kernel.dim() != self.kernel.dim() and kernel.numel() == self.kernel.numel():
                if kernel.dim() < self.kernel.dim():
                    note("a state dict with a kernel [C_in, C_out] of size 1 and a larger stride")
                state_dict[key] = kernel.reshape(self.kernel.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Conv3d(_Conv):
    """Sparse convolution; see `torchsparse.nn.functional.conv3d` for what it computes.

    On an axis with odd kernel size and stride 1 the padding is always d (k - 1) / 2, whatever was
    passed: the kernel stays centred.

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel_size, stride, padding, dilation: One int or three.
        bias: Learn a bias.
        transposed: Return to a finer level.
        generative: With ``transposed``: create the finer coordinates.
        config: Mapping that overrides the global configuration key by key, or None.
        groups: G. Output channel j reads only the C_in / G input channels of group
            j // (C_out / G); C_in of them make a depthwise layer.

    Attributes:
        kernel: [K, C_in / G, C_out]; [C_in / G, C_out] for kernel size 1 and stride 1.
        bias: [C_out] or None.
        kernel_volume: K.

    Raises:
        ValueError, TypeError: Parameters outside their range.
    """


class Conv1d(_Conv):
    """`Conv3d` over one spatial axis: coordinates (b, x)."""

    ndim = 1


class Conv2d(_Conv):
    """`Conv3d` over two spatial axes: coordinates (b, x, y)."""

    ndim = 2


class Conv4d(_Conv):
    """`Conv3d` over four spatial axes: coordinates (b, x, y, z, t)."""

    ndim = 4
