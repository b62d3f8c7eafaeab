"""A judge that shares no code with the library: dense convolution in float64.

`check` walks through a network and puts each of its convolutions, forward and backward, beside
`torch.nn.functional.conv3d` on the dense box of a small crop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

# Of the largest entry. float32: sums of up to some ten thousand products in another order; TF32:
# factors of 10 bits; half: inputs are rounded alike, one rounding to 11 or 8 bits at the end.
TOLERANCE = {"fp32": 1e-4, "tf32": 3e-3, "fp16": 4e-3, "bf16": 1e-2}


class WrongResult(Exception):
    """A convolution disagrees with the dense one; times of it would mean nothing."""


def dense_kernel(kernel: Tensor, size: tuple[int, ...]) -> Tensor:
    """[K, C_in, C_out] -> [C_in, C_out, kx, ky, kz]: for odd K x runs fastest, for even z."""
    pair = kernel.shape[-2:]
    if math.prod(size) % 2:
        return kernel.reshape(*size[::-1], *pair).permute(3, 4, 2, 1, 0)
    return kernel.reshape(*size, *pair).permute(3, 4, 0, 1, 2)


def dense_conv(conv: Any, kernel: Tensor, feats: Tensor, rows: Tensor, sites: Tensor) -> Tensor:
    """What a layer gives at ``sites``.

    Args:
        conv: A `Conv3d`: its kernel size, stride, padding, dilation and ``transposed``.
        kernel: [K, C_in, C_out] float64.
        feats: [N, C_in] float64, at ``rows`` [N, 4] (0, x, y, z), not negative.
        sites: [M, 4].

    Returns:
        [M, C_out] float64.
    """
    size, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    # Empty layers behind the far border: room for every site that a tap ties to a row.
    extent = [int(n) + 1 + d * k for n, k, d in zip(rows.amax(0)[1:], size, dilation)]
    box = feats.new_zeros(feats.shape[1], *extent)
    box[:, rows[:, 1], rows[:, 2], rows[:, 3]] = feats.t()
    taps = dense_kernel(kernel, size)
    if conv.transposed:
        out = torch.nn.functional.conv_transpose3d(
            box[None], taps, None, stride, conv.padding, 0, 1, dilation
        )[0]
    else:
        before, after = list(conv.padding), list(conv.padding)
        if math.prod(stride) == 1:  # submanifold: centred, or starting at the site if K is even
            reach = [d * (k - 1) for k, d in zip(size, dilation)]
            before = [r // 2 if math.prod(size) % 2 else 0 for r in reach]
            after = [r - b for r, b in zip(reach, before)]
        pads = [p for pair in zip(before[::-1], after[::-1]) for p in pair]
        box = torch.nn.functional.pad(box, pads)
        out = torch.nn.functional.conv3d(
            box[None], taps.transpose(0, 1), None, stride, 0, dilation
        )
        out = out[0]
    # Sites beyond the dense result have no input at all.
    limit = torch.tensor(out.shape[1:])
    inside = (sites[:, 1:] < limit).all(1)
    x, y, z = torch.minimum(sites[:, 1:], limit - 1).unbind(1)
    return out[:, x, y, z].t() * inside[:, None]


def check_layer(conv: Any, x: SparseTensor, tolerance: float) -> bool:
    """Compare output, input gradient and kernel gradient of one layer.

    Returns:
        Whether there was something to compare.

    Raises:
        WrongResult: They differ.
    """
    kernel = conv.kernel.detach().reshape(conv.kernel_volume, *conv.kernel.shape[-2:])
    own = SparseTensor(x.feats.detach().clone().requires_grad_(), x.coords, x.stride)
    own._caches = x._caches
    weight = kernel.clone().requires_grad_()
    got = F.conv3d(
        own, weight, conv.kernel_size, None, conv.stride, conv.padding, conv.dilation,
        transposed=conv.transposed,
    )  # fmt: skip
    if not len(x.feats) or not len(got.feats):  # levels of a small crop can run empty
        if got.feats.any():
            raise WrongResult(f"{conv}: something comes from nothing")
        return False
    feats = x.feats.detach().double().cpu().requires_grad_()
    taps = kernel.double().cpu().requires_grad_()
    want = dense_conv(conv, taps, feats, x.coords.cpu().long(), got.coords.cpu().long())
    push = torch.randn(want.shape, generator=torch.Generator().manual_seed(0)).to(got.feats)
    got_grads = torch.autograd.grad(got.feats, [own.feats, weight], push, allow_unused=True)
    want_grads = torch.autograd.grad(want, [feats, taps], push.double().cpu())
    if len(got_grads) != len(want_grads) or any(grad is None for grad in got_grads):
        raise WrongResult(f"{conv}: a gradient is missing")
    for what, a, b in zip(
        ("output", "input gradient", "kernel gradient"), (got.feats, *got_grads),
        (want, *want_grads), strict=True,
    ):  # fmt: skip
        error = (a.detach().double().cpu() - b).abs().max().item()
        scale = b.abs().max().item()
        if not error <= tolerance * max(scale, 1e-3):
            raise WrongResult(f"{conv}: {what} is off by {error:.2e}, largest entry {scale:.2e}")
    return True


def check(network: nn.Module, x: SparseTensor, dtype: str = "fp32") -> int:
    """Run a network on a small tensor and judge each of its convolutions on the way.

    Args:
        dtype: A row of `TOLERANCE`.

    Returns:
        How many were compared.

    Raises:
        WrongResult: One disagrees, or none was compared.
    """
    count = 0

    def judge(conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal count
        count += check_layer(conv, inputs[0], TOLERANCE[dtype])

    convs = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    hooks = [conv.register_forward_pre_hook(judge) for conv in convs]
    training = network.training
    try:
        network.eval()(x)  # a level of the crop may have one row, too few for batch statistics
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise WrongResult("there was no convolution to judge")
    return count
