"""Whole networks beside this library in float64, site by site; that pass beside sums by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, counting, tensor
from benchmarks.engines import Torchsparse, training_step
from benchmarks.floors import Work
from benchmarks.oracle import WrongResult
from benchmarks.scenes import Scene
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

# Shares of the largest output: a rounding per layer, through forty layers. Healthy networks were
# off by 3e-3 in float16, 1e-2 in TF32 and 2e-2 in bfloat16, SpConv by 9e-3 in float16.
AGREE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 1e-2, "bf16": 7e-2}
OTHERS_AGREE = {"fp32": 1e-3, "tf32": 3e-2, "fp16": 3e-2, "bf16": 1e-1}  # other libraries
# Of the whole output, along the truth: roundings turn it, but make it hardly longer or shorter.
# Healthy ones were off by 3e-4 in float16 and 1e-3 in bfloat16. Where TF32 drops bits and does not
# round, each of forty layers may lose 5e-4; how much they do has not been measured, only that
# whole scans pass.
LONGER = {"fp32": 1e-3, "tf32": 4e-2, "fp16": 6e-3, "bf16": 1e-2}
# The same of the gradients of all parameters together; 5e-4 and 2e-2 were seen.
STEEPER = {"fp32": 1e-2, "tf32": 0.1, "fp16": 0.1, "bf16": 0.2}
# Of each gradient, as the length of the difference: where a rounding turns a ReLU, it jumps. The
# worst healthy parameter of three networks on small scenes: 0.008 in float32, 0.18 in float16,
# 0.69 in bfloat16; on whole scans 0.17 in float16 and 0.15 in TF32. A missing one is off by 1.
ASTRAY = {"fp32": 0.1, "tf32": 0.9, "fp16": 0.9, "bf16": 0.95}
GRADIENTS = {"gradient": "input", "parameter": "worst parameter"}  # of what
SCALE = {"fp16": 2.0**16}  # of the loss, as a gradient scaler has it: nothing vanishes
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


class Truth(NamedTuple):
    """What this library gives in float64; on the CPU, to take no part in peak memory."""

    answer: Answer
    gradient: list[Tensor] | None  # [N, C] of the input, in its order; when training
    parameter: list[Tensor] | None  # of each parameter; when training


def truth(
    case: Case, network: nn.Module, scene: Scene, mode: str, device: torch.device
) -> tuple[Truth, list[Work]]:
    """The truth, and the work of its forward pass.

    Raises:
        WrongResult: `sampling` finds fault with it.
    """
    ours = Torchsparse()
    exact = ours.adopt(network).double().train(mode == "train")
    x = tensor(scene, case.in_channels, device, torch.float64)
    gradient = parameter = None
    with counting(exact) as works, sampling(exact):
        if mode == "infer":
            with torch.no_grad():
                output = exact(x)
        else:
            no_cast = torch.autocast(device.type, enabled=False)
            output, found = training_step(ours, exact, x.feats, x.coords, no_cast)
            gradient = [] if found is None else [found.cpu()]
            parameter = [p.cpu() for p in gradients(exact)]
    answer = on_cpu(by_site(ours.sites(output), ours.features(output)))
    return Truth(answer, gradient, parameter), works


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
    """Kernel size, stride, dilation, offset: fine = coarse * stride - offset + dilation * tap."""
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


def longer(found: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """By which share of its length something reaches beyond what it should be, or falls short."""
    a, b = (torch.cat([part.double().cpu().flatten() for part in one]) for one in (found, want))
    return abs((a @ b / (b @ b)).item() - 1)


def judge_output(engine: Any, output: Any, want: Answer, dtype: str, room: float = 0.0) -> float:
    """The distance of an output from the truth; other libraries are given more ``room``.

    Raises:
        WrongResult: It is too far.
    """
    ours = engine.name == "torchsparse"
    error = distance(engine, output, want)
    if not error <= (AGREE if ours else OTHERS_AGREE)[dtype] + room:
        raise WrongResult(f"{dtype} is off by {error:.1e} of the largest entry")
    if ours:
        away = longer([by_site(engine.sites(output), engine.features(output))[1]], [want[1]])
        if not away <= LONGER[dtype]:
            raise WrongResult(f"{dtype} is too long or too short by {away:.1e}")
    return error


def judge_gradients(
    engine: Any, found: dict[str, list[Tensor]], want: Truth, dtype: str,
    limits: dict[str, float] = ASTRAY,
) -> dict[str, float]:  # fmt: skip
    """The distances of gradients from the truth, of the worst parameter.

    Args:
        found: "gradient" (of the input) and "parameter"; not scaled.
        limits: By dtype.

    Raises:
        WrongResult: One is too far; of another library, which may lay out its weights in another
            way, a parameter has none.
    """
    assert want.gradient is not None and want.parameter is not None
    ours = engine.name == "torchsparse"
    errors = {"gradient": farthest(found["gradient"], want.gradient)}
    if ours:
        errors["parameter"] = farthest(found["parameter"], want.parameter)
    elif not all(part.isfinite().all() and part.any() for part in found["parameter"]):
        raise WrongResult(f"{dtype}: a parameter has no gradient")
    for name, away in errors.items():
        if not away <= limits[dtype]:
            whose = GRADIENTS[name]
            raise WrongResult(f"the gradient of the {whose} is off by {away:.1e} of its length")
    if ours:
        away = longer(found["parameter"], want.parameter)
        if not away <= STEEPER[dtype]:
            raise WrongResult(f"the gradients are too long or too short by {away:.1e}")
    return errors


def apart(found: Tensor, want: Tensor) -> float:
    """The length of the difference, relative to that of what it should be."""
    found, want = found.double(), want.to(found.device).double()
    return ((found - want).norm() / want.norm()).item()


def farthest(found: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest of these distances; infinite if there are more of one or something is NaN."""
    away = [apart(a, b) for a, b in zip(found, want)]
    good = len(found) == len(want) and not any(map(math.isnan, away))
    return max(away) if good else math.inf


def gradients(network: nn.Module) -> list[Tensor]:
    """Copies of those of all parameters, in their order; zeros where there is none."""
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for p in network.parameters()
    ]
