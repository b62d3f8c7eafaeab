"""Pooling over windows and its way back, as modules in one to four dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchsparse._geometry import default_padding
from torchsparse._validate import one_of
from torchsparse.nn.functional.conv.conv import check_parameters
from torchsparse.nn.functional.local_pooling import pool, pool_max, unpool, unpool_max
from torchsparse.tensor import SparseTensor

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "AvgPool4d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxPool4d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "MaxUnpool4d",
    "SumPool1d",
    "SumPool2d",
    "SumPool3d",
    "SumPool4d",
    "Unpool1d",
    "Unpool2d",
    "Unpool3d",
    "Unpool4d",
]

Sites = SparseTensor | Tensor | None


class _Window(nn.Module):
    """The windows of a pool.

    As in `Conv3d`, an axis with odd kernel size and stride 1 is always centred, whatever padding
    was passed.

    Args:
        kernel_size, stride, padding, dilation: One int or one per axis. The stride is the kernel
            size if it is None.
        config: Mapping that overrides the global configuration; only ``downsample_mode`` counts.

    Raises:
        ValueError, TypeError: Parameters outside their range.
    """

    ndim = 3

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        config: Any = None,
    ) -> None:
        super().__init__()
        stride = kernel_size if stride is None else stride
        self.kernel_size, self.stride, padding, self.dilation = check_parameters(
            self.ndim, kernel_size, stride, padding, dilation, False, False
        )
        self.padding = default_padding(self.kernel_size, self.stride, padding, self.dilation)
        self._config = config

    @property
    def _window(self) -> tuple[tuple[int, ...], ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation

    def extra_repr(self) -> str:
        parts = [f"kernel_size={self.kernel_size}, stride={self.stride}"]
        if any(self.padding):
            parts.append(f"padding={self.padding}")
        if max(self.dilation) > 1:
            parts.append(f"dilation={self.dilation}")
        return ", ".join(parts)


class _MaxPool(_Window):
    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        config: Any = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, config)
        self.return_indices = return_indices

    def forward(self, input: SparseTensor, coordinates: Sites = None) -> Any:
        """[N, C] features -> [M, C], on ``coordinates`` if they are given."""
        return pool_max(
            self.ndim,
            input,
            *self._window,
            return_indices=self.return_indices,
            coordinates=coordinates,
            config=self._config,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", return_indices=True" if self.return_indices else "")


class _SumPool(_Window):
    mean = False

    def forward(self, input: SparseTensor, coordinates: Sites = None) -> SparseTensor:
        """[N, C] features -> [M, C], on ``coordinates`` if they are given."""
        return pool(
            self.ndim,
            self.mean,
            input,
            *self._window,
            coordinates=coordinates,
            config=self._config,
        )


class _AvgPool(_SumPool):
    mean = True


class _Unpool(_Window):
    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        mode: str = "mean",
        config: Any = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, config)
        self.mode = one_of(mode, ("mean", "sum"), "mode")

    def forward(
        self, input: SparseTensor, coordinates: SparseTensor | Tensor | None = None
    ) -> SparseTensor:
        """[N, C] features on coarse sites -> [M, C] on the finer ones, or on ``coordinates``."""
        return unpool(
            self.ndim, input, *self._window, mode=self.mode, config=self._config,
            coordinates=coordinates,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


class _MaxUnpool(_Window):
    def forward(self, input: SparseTensor, indices: Tensor) -> SparseTensor:
        """[N, C] features and the indices of their maxima -> [M, C] on the finer sites."""
        return unpool_max(self.ndim, input, indices, *self._window, config=self._config)


# ------------------------------------------------------------------ three axes
class MaxPool3d(_MaxPool):
    """Maximum over the active sites of each window; see ``functional.max_pool3d``.

    Args:
        kernel_size, stride, padding, dilation: One int or three. The stride is the kernel size if
            it is None; the padding of an axis with odd kernel size and stride 1 is always
            d (k - 1) / 2, as in `Conv3d`.
        return_indices: Return a pair, with the rows that `MaxUnpool3d` needs.
        config: Mapping that overrides the global configuration; only ``downsample_mode`` counts.
    """


class AvgPool3d(_AvgPool):
    """Mean over the active sites of each window; see ``functional.avg_pool3d``.

    Args:
        kernel_size, stride, padding, dilation, config: As in `MaxPool3d`.
    """


class SumPool3d(_SumPool):
    """Sum over the active sites of each window; see ``functional.sum_pool3d``.

    Args:
        kernel_size, stride, padding, dilation, config: As in `MaxPool3d`.
    """


class Unpool3d(_Unpool):
    """Coarse features on the finer sites of their windows; see ``functional.unpool3d``.

    Args:
        kernel_size, stride, padding, dilation, config: Those of the layer to undo.
        mode: What a fine site in several windows gets: "mean" or "sum".
    """


class MaxUnpool3d(_MaxUnpool):
    """Values back where `MaxPool3d` found its maxima; see ``functional.max_unpool3d``.

    Args:
        kernel_size, stride, padding, dilation, config: Those of the `MaxPool3d` to undo.
    """


# ------------------------------------------------------------------ one, two and four axes
class MaxPool1d(_MaxPool):
    """`MaxPool3d` over one spatial axis: coordinates (b, x)."""

    ndim = 1


class MaxPool2d(_MaxPool):
    """`MaxPool3d` over two spatial axes: coordinates (b, x, y)."""

    ndim = 2


class MaxPool4d(_MaxPool):
    """`MaxPool3d` over four spatial axes: coordinates (b, x, y, z, t)."""

    ndim = 4


class AvgPool1d(_AvgPool):
    """`AvgPool3d` over one spatial axis: coordinates (b, x)."""

    ndim = 1


class AvgPool2d(_AvgPool):
    """`AvgPool3d` over two spatial axes: coordinates (b, x, y)."""

    ndim = 2


class AvgPool4d(_AvgPool):
    """`AvgPool3d` over four spatial axes: coordinates (b, x, y, z, t)."""

    ndim = 4


class SumPool1d(_SumPool):
    """`SumPool3d` over one spatial axis: coordinates (b, x)."""

    ndim = 1


class SumPool2d(_SumPool):
    """`SumPool3d` over two spatial axes: coordinates (b, x, y)."""

    ndim = 2


class SumPool4d(_SumPool):
    """`SumPool3d` over four spatial axes: coordinates (b, x, y, z, t)."""

    ndim = 4


class Unpool1d(_Unpool):
    """`Unpool3d` over one spatial axis: coordinates (b, x)."""

    ndim = 1


class Unpool2d(_Unpool):
    """`Unpool3d` over two spatial axes: coordinates (b, x, y)."""

    ndim = 2


class Unpool4d(_Unpool):
    """`Unpool3d` over four spatial axes: coordinates (b, x, y, z, t)."""

    ndim = 4


class MaxUnpool1d(_MaxUnpool):
    """`MaxUnpool3d` over one spatial axis: coordinates (b, x)."""

    ndim = 1


class MaxUnpool2d(_MaxUnpool):
    """`MaxUnpool3d` over two spatial axes: coordinates (b, x, y)."""

    ndim = 2


class MaxUnpool4d(_MaxUnpool):
    """`MaxUnpool3d` over four spatial axes: coordinates (b, x, y, z, t)."""

    ndim = 4
