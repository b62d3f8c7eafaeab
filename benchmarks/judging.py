"""Whole networks beside float64, site by site; their layers beside a dictionary of sites."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, tensor
from benchmarks.engines import Torchsparse
from benchmarks.oracle import TOLERANCE, WrongResult, dense_kernel
from benchmarks.scenes import Scene
from torchsparse import SparseTensor
from torchsparse import nn as spnn

# Shares of the largest output: a rounding per layer, through forty layers.
AGREE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
Answer = tuple[Tensor, Tensor]  # sites [M, 4] int64 in order, features [M, C] float64
SAMPLED = 200  # outputs of a layer


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
    with torch.no_grad():
        out = exact(tensor(scene, case.in_channels, device, torch.float64))
    return on_cpu(by_site(ours.sites(out), ours.features(out)))


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


# ------------------------------------------------------------------ layers on the whole scene
def check_sites(network: nn.Module, x: SparseTensor) -> int:
    """Run a network, and judge each of its convolutions at some of its outputs.

    The inputs of an output come out of a dictionary from sites to rows, so that maps of any size
    are judged, which the dense boxes of `oracle` are too small for. Whether all outputs are there
    is for these to say.

    Args:
        network: With float32 weights, not under TF32.
        x: The whole scene.

    Returns:
        How many layers were compared.

    Raises:
        WrongResult: One is off.
    """
    known: dict[int, tuple[Tensor, dict[tuple[int, ...], int]]] = {}  # levels; tensors keep ids
    count = 0

    def judge(conv: Any, inputs: tuple[Any, ...], output: SparseTensor) -> None:
        nonlocal count
        given = inputs[0]
        if id(given.coords) not in known:
            sites = map(tuple, given.coords.tolist())
            known[id(given.coords)] = given.coords, {site: row for row, site in enumerate(sites)}
        _check_outputs(conv, given, output, known[id(given.coords)][1])
        count += 1

    convs = [m for m in network.modules() if isinstance(m, spnn.Conv3d)]
    hooks = [conv.register_forward_hook(judge) for conv in convs]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(x)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return count


def _check_outputs(
    conv: Any, x: SparseTensor, y: SparseTensor, rows: dict[tuple[int, ...], int]
) -> None:
    size = conv.kernel_size
    kernel = conv.kernel.detach().reshape(conv.kernel_volume, *conv.kernel.shape[-2:])
    taps = dense_kernel(kernel.double().cpu(), size)
    number = len(y.coords)
    generator = torch.Generator().manual_seed(number)
    sampled = torch.randperm(number, generator=generator)[:SAMPLED]
    want = torch.zeros(len(sampled), taps.shape[1], dtype=torch.float64)
    places = list(itertools.product(*map(range, size)))
    sites = y.coords[sampled.to(y.coords.device)].tolist()
    feats = x.feats.detach().double().cpu()
    for tap in places:
        found = [rows.get(site, -1) for site in (_input_of(conv, site, tap) for site in sites)]
        index = torch.tensor(found)
        there = index >= 0
        want[there] += feats[index[there]] @ taps[(slice(None), slice(None), *tap)]
    if conv.bias is not None:
        want += conv.bias.detach().double().cpu()
    got = y.feats.detach()[sampled.to(y.feats.device)].double().cpu()
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    if not error <= TOLERANCE["fp32"] * max(scale, 1e-3):
        raise WrongResult(
            f"{conv}: output is off by {error:.2e} on the whole scene, largest entry {scale:.2e}"
        )


def _input_of(conv: Any, site: list[int], tap: tuple[int, ...]) -> tuple[int, ...] | None:
    """The site [4] of the input that an output meets under a tap; None: under no one."""
    batch, *axes = site
    odd = conv.kernel_volume % 2
    found = [batch]
    for p, t, k, s, d, pad in zip(
        axes, tap, conv.kernel_size, conv.stride, conv.dilation, conv.padding
    ):
        if conv.transposed:
            coarse, rest = divmod(p + pad - d * t, s)
            if rest:
                return None
            found.append(coarse)
        elif max(conv.stride) == 1:  # submanifold: centred, or beginning at the site
            found.append(p + d * t - (d * (k - 1) // 2 if odd else 0))
        else:
            found.append(p * s + d * t - pad)
    return tuple(found)
