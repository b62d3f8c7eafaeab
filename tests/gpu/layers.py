"""One call of every kind of convolution, on either device, and the memory it starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import torchsparse
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

# Of the largest entry. Inputs are rounded alike for both sides: what differs is the order of the
# sums (float32), the 10 bits of each factor (TF32) or one rounding to 11 or 8 bits at the end.
SHARE = {"fp64": 1e-11, "fp32": 2e-5, "ieee": 2e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.5e-2}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,  # as three TF32 products
    "ieee": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class Kind(NamedTuple):
    """Sizes of a layer, and how its input comes about."""

    kernel_size: Any
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    transposed: bool = False
    generative: bool = False

    @property
    def volume(self) -> int:
        return int(np.prod(np.broadcast_to(self.kernel_size, 3)))


KINDS = {
    "pointwise": Kind(1),
    "submanifold-3": Kind(3),
    "submanifold-even": Kind(2),
    "submanifold-5": Kind(5),
    "submanifold-flat": Kind((3, 1, 2)),
    "submanifold-dilated": Kind(3, dilation=2),
    "strided-2": Kind(2, 2),
    "strided-3": Kind(3, 2, 1),
    "strided-one-axis": Kind((1, 1, 3), (1, 1, 2)),
    "transposed-2": Kind(2, 2, transposed=True),
    "transposed-3": Kind(3, 2, 1, transposed=True),
    "generative": Kind(2, 2, transposed=True, generative=True),
}
CHANNELS = ((5, 7), (32, 64))  # nothing divides; everything does


def surface(rows: int, seed: int = 0) -> np.ndarray:
    """[N, 4] int32: two samples of a bumpy ground and a wall, as sparse as a scan, shuffled."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 64, (2, 4 * rows))
    ground = np.stack([x, y, (4 + 3 * np.sin(x / 9) * np.cos(y / 7)).astype(int)], 1)
    ground[: len(ground) // 3, 2] = rng.integers(4, 24, len(ground) // 3)
    ground[: len(ground) // 3, 0] = 30
    sites = np.insert(ground, 0, rng.integers(0, 2, len(ground)), axis=1)
    sites = rng.permutation(np.unique(sites, axis=0))[:rows]
    return sites.astype(np.int32)


class Result(NamedTuple):
    """What one forward and backward pass gives."""

    coords: Tensor
    out: Tensor
    grad_feats: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


Change = Callable[[Tensor], Tensor]


def run(
    kind: Kind,
    channels: tuple[int, int],
    dtype: str,
    device: torch.device,
    *,
    rows: int = 1500,
    dataflow: int = 0,
    before: Callable[[], None] | None = None,
    laid_out: Change = lambda t: t,
) -> Result:
    """Forward and backward of one layer on fixed numbers.

    Args:
        dtype: Numbers are rounded to it; on a CPU they are then computed with in float64.
        before: Called once inputs exist, before the library does anything.
        laid_out: Puts equal numbers elsewhere in memory: features, weight, bias and gradient.
    """
    c_in, c_out = channels
    rng = np.random.default_rng(1)
    exact = device.type == "cpu"

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.from_numpy(rng.standard_normal(shape) * scale).to(DTYPES[dtype])
        values = values.double() if exact else values.to(device)
        return laid_out(values)

    coords = torch.from_numpy(surface(rows)).to(device)
    x = SparseTensor(coords.new_empty((len(coords), 0), dtype=torch.float32), coords)
    if kind.transposed:  # the coarse sites of a strided layer, and the cache that knows the fine
        feats = torch.ones(len(coords), 1, dtype=torch.float64, device=device)
        one = torch.ones(kind.volume, 1, 1, dtype=torch.float64, device=device)
        fine = SparseTensor(feats, coords)
        x = F.conv3d(fine, one, kind.kernel_size, None, kind.stride, kind.padding)
    torchsparse.backends.allow_tf32 = dtype == "tf32"
    torchsparse.backends.float32_precision = "ieee" if dtype == "ieee" else "tf32x3"
    feats = numbers(len(x.coords), c_in).requires_grad_()
    weight = numbers(kind.volume, c_in, c_out, scale=(kind.volume * c_in) ** -0.5)
    weight.requires_grad_()
    bias = numbers(c_out).requires_grad_()
    if before:
        before()
    given = SparseTensor(feats, x.coords, x.stride, x.spatial_range)
    given._caches = x._caches
    y = F.conv3d(
        given, weight, kind.kernel_size, bias, kind.stride, kind.padding, kind.dilation,
        config={"dataflow": F.Dataflow(dataflow)},
        transposed=kind.transposed, generative=kind.generative,
    )  # fmt: skip
    push = numbers(*y.feats.shape)
    grads = torch.autograd.grad(y.feats, (feats, weight, bias), push)
    return Result(y.coords, y.feats.detach(), *grads)


def assert_right(got: Result, want: Result, dtype: str) -> None:
    """Equal sites; numbers within the share of the largest that the dtype allows."""
    assert torch.equal(got.coords.cpu(), want.coords.cpu())
    for name, a, b in zip(Result._fields[1:], got[1:], want[1:]):
        a, b = a.double().cpu(), b.double().cpu()
        assert a.shape == b.shape, name
        if not b.numel():
            continue
        error = (a - b).abs().max().item()  # NaN is larger than everything below
        limit = SHARE[dtype] * b.abs().max().item()
        assert error <= limit, f"{name}: off by {error:.2e}, allowed {limit:.2e}"


def assert_same_bits(got: Result, want: Result) -> None:
    for name, a, b in zip(Result._fields, got, want):
        assert torch.equal(a, b), f"{name} differs in {int((a != b).sum())} of {a.numel()} entries"


def poison(device: torch.device, byte: int) -> None:
    """Fill the memory that the caching allocator will hand out next.

    0xFF is NaN in every floating format and -1 in integers; 0x7F is NaN in float16, 3e38 in
    float32, and a row that no cloud has.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    sizes = [2**19] * 64 + [2**21] * 16 + [2**25] * 8  # small and large pools
    held = [torch.full((size,), byte, dtype=torch.uint8, device=device) for size in sizes]
    torch.cuda.synchronize(device)
    del held
