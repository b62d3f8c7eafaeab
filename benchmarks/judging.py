"""Whole networks beside this library in float64, site by site; that pass beside sums by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, tensor
from benchmarks.engines import Torchsparse
from benchmarks.oracle import WrongResult
from benchmarks.scenes import Scene
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

# Shares of the largest output: a rounding per layer, through forty layers.
AGREE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
Answer = tuple[Tensor, Tensor]  # sites [M, 4] int64 in order, features [M, C] float64
SAMPLES = 200  # sites of each layer that are summed by hand
EXACT = 1e-6  # float64 beside float64, of the largest entry
NOWHERE = -(2**40)  # a fine site between the coarse ones
Rows = dict[tuple[int, ...], int]  # site -> row


def calibrated(case: Case, scene: Scene, device: torch.device) -> nn.Module:
    """The network with the batch statistics of the scene, so that no layer's output is tiny.

    In float64, which is nobody's to compile.
    """
    torch.manual_seed(0)
    network = case.build().to(device).double()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(tensor(scene, case.in_channels, device, torch.float64))
    for norm in norms:
        norm.momentum = 0.1
    return network.float().eval()


def truth(case: Case, network: nn.Module, scene: Scene, device: torch.device) -> Answer:
    """What the whole network gives in float64; on the CPU, to take no part in peak memory."""
    ours = Torchsparse()
    exact = ours.adopt(network).double()
    with torch.no_grad(), sampling(exact):
        out = exact(tensor(scene, case.in_channels, device, torch.float64))
    return on_cpu(by_site(ours.sites(out), ours.features(out)))


@contextmanager
def sampling(network: nn.Module, count: int = SAMPLES) -> Iterator[None]:
    """Judge the convolutions of a float64 pass of this library, maps and all, by samples.

    What meets a site is looked up in a dict of all sites and summed, for ``count`` outputs of each
    layer and for the gradients of ``count`` inputs. The gradient of the kernel is judged as a
    whole: a layer is linear, so <kernel, its gradient> = <output, gradient of the output>.

    Raises:
        WrongResult: In the pass, where a layer or the sites of its output are wrong.
    """
    known: dict[int, tuple[Tensor, Rows]] = {}  # keeps the coordinates: ids stay theirs

    def rows_of(coords: Tensor) -> Rows:
        if id(coords) not in known:
            known[id(coords)] = coords, {tuple(s): n for n, s in enumerate(coords.tolist())}
        return known[id(coords)][1]

    def judge(conv: Any, inputs: tuple[Any, ...], output: SparseTensor) -> None:
        x = inputs[0]
        if len(x.coords) and len(output.coords):
            with torch.enable_grad():
                _judge_samples(conv, x, output, rows_of(x.coords), rows_of(output.coords), count)

    convs = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    hooks = [conv.register_forward_hook(judge) for conv in convs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _judge_samples(
    conv: Any, x: SparseTensor, output: SparseTensor, inputs: Rows, outputs: Rows, count: int
) -> None:
    feats = x.feats.detach().clone().requires_grad_()
    kernel = conv.kernel.detach().reshape(conv.kernel_volume, *conv.kernel.shape[-2:])
    kernel = kernel.clone().requires_grad_()
    own = SparseTensor(feats, x.coords, x.stride, x.spatial_range)
    own._caches = x._caches  # the maps of the pass
    again = F.conv3d(
        own, kernel, conv.kernel_size, None, conv.stride, conv.padding, conv.dilation,
        transposed=conv.transposed,
    ).feats  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(again.shape, generator=generator, dtype=again.dtype).to(again.device)
    to_feats, to_kernel = torch.autograd.grad(again, (feats, kernel), push)

    def sums(given: Tensor, taps: Tensor, rows: Tensor) -> Tensor:
        padded = torch.cat([given, given.new_zeros(1, given.shape[1])])  # row -1
        return torch.einsum("mkc,kcd->md", padded[rows.to(given.device)], taps)

    with torch.no_grad():
        some = torch.randperm(len(again), generator=generator)[:count]
        met, _ = _neighbours(conv, output.coords.cpu()[some], inputs, conv.transposed)
        found = output.feats[some.to(again.device)]
        found = found if conv.bias is None else found - conv.bias
        _same(conv, "output", found, sums(feats, kernel, met))
        few = torch.randperm(len(feats), generator=generator)[:count]
        back, sites = _neighbours(conv, x.coords.cpu()[few], outputs, not conv.transposed)
        want = sums(push, kernel.transpose(1, 2), back)
        _same(conv, "input gradient", to_feats[few.to(feats.device)], want)
        scale = again.norm() * push.norm()
        pair = (kernel * to_kernel).sum() / scale, (again * push).sum() / scale
        if not (pair[0] - pair[1]).abs() <= EXACT:
            raise WrongResult(f"{conv}: the kernel gradient is not that of the output")
    if math.prod(conv.stride) == 1:
        missing = not torch.equal(x.coords, output.coords)
    else:  # a site that a dense convolution has, and one that it has not
        zipped = zip(x.coords.amax(0)[1:].tolist(), *_sizes(conv))
        limit = [(n + 2 * o - d * (k - 1)) // s for n, k, s, d, o in zipped]
        due = ((sites >= 0) & (sites <= torch.tensor(limit))).all(2)
        missing = not conv.transposed and bool((due & (back < 0)).any())
        missing |= not conv.transposed and bool((met < 0).all(1).any())
    if missing:
        raise WrongResult(f"{conv}: its output has other sites")


def _same(conv: Any, what: str, found: Tensor, want: Tensor) -> None:
    error, scale = (found - want).abs().max().item(), want.abs().max().item()
    if not error <= EXACT * max(scale, 1e-3):
        raise WrongResult(
            f"{conv}: {what} of the scene is off by {error:.2e} at {len(want)} of its sites, "
            f"largest entry {scale:.2e}"
        )


def _sizes(conv: Any) -> tuple[Any, ...]:
    """Kernel size, stride, dilation and offset: fine = coarse * stride - offset + dilation * tap."""
    size, stride, dilation, offset = conv.kernel_size, conv.stride, conv.dilation, conv.padding
    if math.prod(stride) == 1:  # submanifold: centred, or starting at the site if K is even
        odd = math.prod(size) % 2
        offset = [d * (k - 1) // 2 if odd else 0 for k, d in zip(size, dilation)]
    return size, stride, dilation, offset


def _neighbours(conv: Any, sites: Tensor, rows: Rows, to_coarse: bool) -> tuple[Tensor, Tensor]:
    """[M, K] rows that meet each tap at ``sites`` [M, 4], -1 where none does; [M, K, 3] where
    they are. ``to_coarse``: the sites are fine, the rows coarse."""
    size, stride, dilation, offset = (torch.tensor(tuple(s)) for s in _sizes(conv))
    ranges = [torch.arange(int(n)) for n in size]
    if math.prod(conv.kernel_size) % 2:  # x runs fastest for odd K, else z
        taps = torch.cartesian_prod(*ranges[::-1]).reshape(-1, 3).flip(1)
    else:
        taps = torch.cartesian_prod(*ranges).reshape(-1, 3)
    at = sites[:, None, 1:].long()
    if to_coarse:
        fine = at + offset - dilation * taps
        there = (fine % stride == 0).all(2, keepdim=True)
        met = torch.where(there, fine.div(stride, rounding_mode="floor"), NOWHERE)
    else:
        met = at * stride - offset + dilation * taps
    batch = sites[:, 0].tolist()
    found = [[rows.get((b, *m), -1) for m in each] for b, each in zip(batch, met.tolist())]
    return torch.tensor(found).reshape(len(sites), -1), met


def by_site(sites: Tensor, feats: Tensor) -> Answer:
    """Rows by site."""
    sites, feats = sites.long(), feats.detach().double()
    wide = int(sites.max()) + 1 if sites.numel() else 1
    keys = ((sites[:, 0] * wide + sites[:, 1]) * wide + sites[:, 2]) * wide + sites[:, 3]
    order = keys.argsort()
    return sites[order], feats[order]


def on_cpu(answer: Answer) -> Answer:
    return answer[0].cpu(), answer[1].cpu()


def distance(engine: Any, output: Any, want: Answer) -> float:
    """Largest difference to the truth, site by site, relative to its largest entry; infinite if
    the sites differ."""
    sites, feats = by_site(engine.sites(output), engine.features(output))
    if not torch.equal(sites, want[0].to(sites.device)):
        return float("inf")
    right = want[1].to(feats.device)
    return ((feats - right).abs().max() / right.abs().max()).item()


def apart(found: Tensor, want: Tensor) -> float:
    """The length of the difference, relative to that of what it should be."""
    found, want = found.double(), want.to(found.device).double()
    return ((found - want).norm() / want.norm()).item()
