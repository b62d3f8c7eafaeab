"""Whole networks beside this library in float64, site by site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, tensor
from benchmarks.engines import Torchsparse
from benchmarks.scenes import Scene

# Shares of the largest output: a rounding per layer, through forty layers.
AGREE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
Answer = tuple[Tensor, Tensor]  # sites [M, 4] int64 in order, features [M, C] float64


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
