"""Case records, the table of tolerances, and the few lines that put a case to the library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import torchsparse
from tests import clouds
from tests.oracles import Layer, Range, Triple
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

# Relative and absolute: kernels are scaled so that outputs are of size 1.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-11, 1e-11),  # the same sum in another order, 53 bits
    torch.float32: (1e-5, 1e-5),  # the same sum in another order, 24 bits; TF32 is off
    torch.float16: (1e-3, 1e-3),  # one rounding to 11 bits at the end, sums in float32
    torch.bfloat16: (8e-3, 8e-3),  # one rounding to 8 bits at the end, sums in float32
}

KERNEL_SIZES = (1, 2, 3, 4, 5, (3, 1, 2))
STRIDES = (1, 2, 3, (1, 2, 1))
PADDINGS = (0, 1, (0, 2, 1))
DILATIONS = (1, 2)

LAYERS = [
    Layer.of(k, s, p, d)
    for k, s, p, d in itertools.product(KERNEL_SIZES, STRIDES, PADDINGS, DILATIONS)
]


@dataclass(frozen=True)
class Case:
    """A layer on a cloud, with or without a spatial range; arrays follow from the record."""

    layer: Layer
    cloud: str
    ranged: bool = False
    channels: tuple[int, int] = (3, 2)

    def __str__(self) -> str:
        return f"{self.layer}-{self.cloud}{'-ranged' if self.ranged else ''}"

    def build(self) -> Problem:
        c_in, c_out = self.channels
        rng = clouds.rng(str(self))
        coords = clouds.CLOUDS[self.cloud]()
        return Problem(
            coords,
            rng.standard_normal((len(coords), c_in)),
            rng.standard_normal((self.layer.volume, c_in, c_out))
            / np.sqrt(self.layer.volume * c_in),
            rng.standard_normal(c_out),
            (clouds.BATCH, *clouds.ROOM) if self.ranged else None,
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """The float64 arrays of a case."""

    coords: clouds.Coords  # [N, 4]
    feats: NDArray[np.float64]  # [N, C_in]
    kernel: NDArray[np.float64]  # [K, C_in, C_out]
    bias: NDArray[np.float64]  # [C_out]
    spatial_range: Range | None

    def tensor(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        stride: int | Triple = 1,
        requires_grad: bool = False,
    ) -> SparseTensor:
        feats = torch.from_numpy(self.feats).to(device, dtype).requires_grad_(requires_grad)
        coords = torch.from_numpy(self.coords).to(device)
        return SparseTensor(feats, coords, stride, self.spatial_range)

    def parameters(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        kernel = torch.from_numpy(self.kernel).to(device, dtype).requires_grad_(requires_grad)
        bias = torch.from_numpy(self.bias).to(device, dtype).requires_grad_(requires_grad)
        return kernel, bias


def convolve(
    layer: Layer,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    config: Any = None,
    training: bool = False,
) -> SparseTensor:
    """``F.conv3d`` under the switches of the layer."""
    F.set_downsample_mode("minkowski" if layer.minkowski else "spconv")
    torchsparse.tensor.set_allow_negative_coordinates(layer.allow_negative)
    torchsparse.backends.infer_spatial_range = layer.infer_range
    return F.conv3d(
        x,
        weight,
        layer.kernel_size,
        bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        config=config,
        transposed=layer.transposed,
        generative=layer.generative,
        training=training,
    )


def assert_close(got: Tensor, want: NDArray[np.generic] | Tensor, dtype: torch.dtype) -> None:
    """Equal up to the tolerance of the dtype in which ``got`` was computed."""
    rtol, atol = TOLERANCES[dtype]
    want = torch.as_tensor(want).detach().double().cpu()
    torch.testing.assert_close(got.detach().double().cpu(), want, rtol=rtol, atol=atol)


def assert_rows(got: Tensor, want: NDArray[np.generic]) -> None:
    """Equal coordinates in equal order, as int32 (N, 4)."""
    assert got.dtype == torch.int32
    assert tuple(got.shape) == (len(want), 4)
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@contextmanager
def raises_on_data(error: type[Exception], match: str) -> Iterator[None]:
    """The error of a check that looks at values: at once on a CPU, later on a GPU."""
    with pytest.raises(error, match=match):
        yield
        torchsparse.backends.check_errors()


def sparse(
    device: torch.device,
    cloud: str | Callable[[], clouds.Coords] = "odd",
    channels: int = 3,
    stride: int | Triple = 1,
    spatial_range: Range | None = None,
    dtype: torch.dtype = torch.float64,
) -> SparseTensor:
    """A tensor on a named cloud with fixed random features."""
    coords = clouds.CLOUDS[cloud]() if isinstance(cloud, str) else cloud()
    feats = clouds.rng(f"feats{channels}").standard_normal((len(coords), channels))
    return SparseTensor(
        torch.from_numpy(feats).to(device, dtype),
        torch.from_numpy(coords).to(device),
        stride,
        spatial_range,
    )


def weight(
    device: torch.device,
    volume: int,
    c_in: int = 3,
    c_out: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A fixed random kernel [K, C_in, C_out]."""
    values = clouds.rng(f"kernel{volume}").standard_normal((volume, c_in, c_out))
    return torch.from_numpy(values / np.sqrt(volume * c_in)).to(device, dtype)
