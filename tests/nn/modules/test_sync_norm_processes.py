"""SyncBatchNorm between processes: what they find is what one process with all rows finds.

Processes are slow to start, so three of them play every case once, and tests read what they left.
Cases for two run in a group of the first two.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

import torchsparse.nn as spnn
from tests.cases import TOLERANCES
from torchsparse import SparseTensor
from torchsparse._ops.dispatch import forced

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PROCESSES = 3

Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Steps of one layer; step s gives shares[s][r] rows to process r."""

    name: str
    shares: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = F64
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    frozen: tuple[str, ...] = ()  # of weight, bias, feats
    params: torch.dtype | None = None  # None: float64 for float64, else float32
    shift: float = 0.0  # added to all features
    autocast: bool = False
    kernels: bool = False  # Triton's, in its interpreter without a GPU
    tolerance: float | None = None

    def __str__(self) -> str:
        return self.name

    def feats(self, step: int) -> tuple[Tensor, Tensor]:
        """Features and gradients of the result, [N, 4]; each row has a mean of its own."""
        n = sum(self.shares[step])
        draw = torch.Generator().manual_seed(step)
        feats, own, grad = (torch.randn(n, 4, generator=draw, dtype=F64) for _ in range(3))
        feats = (feats + own[:, :1]) * torch.tensor([1.0, 3.0, 0.2, 10.0]) + self.shift
        return feats.to(self.dtype), grad.to(self.dtype)

    def norm(self, kind: type[nn.Module], dtype: torch.dtype, **more: Any) -> Any:
        norm: Any = kind(4, momentum=self.momentum, affine=self.affine,
                         track_running_stats=self.track, **more)  # fmt: skip
        if self.affine:
            with torch.no_grad():
                norm.weight.copy_(torch.tensor([1.5, -0.5, 1.0, 0.25]))
                norm.bias.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
            for name in ("weight", "bias"):
                getattr(norm, name).requires_grad_(name not in self.frozen)
        return norm.to(dtype)


SHARES = ((40, 21), (5, 30), (17, 17))
FEW = ((2, 0), (0, 2), (1, 1), (1, 7), (0, 5))
CASES = [
    Case("plain", SHARES),
    Case("none", ((33, 0), (0, 9), (8, 8))),
    Case("few", FEW),
    Case("three", ((20, 0, 1), (3, 4, 5), (0, 0, 2))),
    Case("float32", SHARES + FEW, F32),
    Case("float16", SHARES + FEW, F16),
    Case("bfloat16", SHARES, BF16),
    Case("half", SHARES, F16, params=F16),
    Case("average", SHARES + FEW, momentum=None),
    Case("forgets", SHARES, momentum=1.0),
    Case("bare", SHARES, affine=False),
    Case("untracked", SHARES, track=False),
    Case("fixed", SHARES, frozen=("weight", "bias")),
    Case("fixed weight", ((9, 0), (4, 1)), frozen=("weight",)),
    Case("fixed bias", SHARES, frozen=("bias",)),
    Case("fixed input", ((9, 0), (4, 1)), frozen=("feats",)),
    Case("nothing learns", SHARES, frozen=("weight", "bias", "feats")),
    # Features are 2^-12 apart: E[x^2] - E[x]^2 would be off by 8 times the variance of channel 0.
    Case("far", SHARES, F32, shift=4096.0, tolerance=2e-3),
    Case("autocast", SHARES, F32, autocast=True),
    Case("autocast to bfloat16", SHARES, BF16, autocast=True),
    Case("kernels", ((40, 21), (1, 30), (17, 0)), F32, kernels=True),
    Case("kernels, float16", ((40, 21), (1, 30), (17, 0)), F16, kernels=True),
]  # fmt: skip


def on_sites(feats: Tensor) -> SparseTensor:
    coords = torch.zeros(feats.shape[0], 4, dtype=torch.int32)
    coords[:, 1] = torch.arange(feats.shape[0])
    return SparseTensor(feats, coords.to(feats.device))


def play(case: Case, norm: Any, rank: int | None, device: torch.device, dtype: Any) -> Found:
    """All steps with the rows of one process, or of all; what came out, on the CPU."""
    found: Found = {}
    for step, shares in enumerate(case.shares):
        start = 0 if rank is None else sum(shares[:rank])
        stop = sum(shares) if rank is None else start + shares[rank]
        feats, grad = (t[start:stop].to(device, dtype) for t in case.feats(step))
        feats.requires_grad_("feats" not in case.frozen)
        with torch.autocast(device.type, BF16, enabled=case.autocast):
            out = norm(on_sites(feats)).feats
        assert out.dtype == dtype and out.shape == feats.shape
        if out.requires_grad:
            out.backward(grad)
        found[f"feats {step}"], found[f"grad {step}"] = out.detach(), feats.grad
    found |= {f"grad {name}": p.grad for name, p in norm.named_parameters()}
    found |= dict(norm.state_dict())
    return {name: None if t is None else t.cpu() for name, t in found.items()}


PARAMETERS = ("grad weight", "grad bias")


# ------------------------------------------------------------------ in the processes
class Process:
    """One of several: its rank, its device, the group of the first two."""

    def __init__(self, rank: int, device: torch.device, pair: Any) -> None:
        self.rank, self.device, self.pair = rank, device, pair

    def norm(self, channels: int = 2, **options: Any) -> Any:
        norm = spnn.SyncBatchNorm(channels, process_group=self.pair, **options)
        return norm.to(self.device, F64)

    def rows(self, *shares: int, channels: int = 2) -> Tensor:
        """This process's of the rows that all have."""
        draw = torch.Generator().manual_seed(7)
        every = torch.randn(sum(shares), channels, generator=draw, dtype=F64)
        return every.split(shares)[self.rank].to(self.device)


@contextmanager
def counted() -> Iterator[list[list[int]]]:
    """The shape of each tensor that was sent."""
    sent: list[list[int]] = []
    own = dist.all_reduce

    def spy(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(list(tensor.shape))
        return own(tensor, *args, **options)

    dist.all_reduce = spy
    try:
        yield sent
    finally:
        dist.all_reduce = own


def cases(process: Process) -> Found:
    found: Found = {}
    for case in CASES:
        wide = len(case.shares[0]) == 3
        if process.rank >= len(case.shares[0]) or (wide and dist.get_world_size() < 3):
            continue
        with ExitStack() as stack:
            if case.kernels:
                stack.enter_context(forced("_triton"))
            params = case.params or (F64 if case.dtype == F64 else F32)
            group = None if wide else process.pair  # None: all processes
            norm = case.norm(spnn.SyncBatchNorm, params, process_group=group).to(process.device)
            found[case.name] = play(case, norm, process.rank, process.device, case.dtype)
    return found


def messages(process: Process) -> Found:
    """What a step sends: with all gradients, with those of parameters, without any."""
    norm, found = process.norm(), {}
    for name, learns in (("all", True), ("parameters", False)):
        with counted() as sent:
            x = on_sites(process.rows(5, 3).requires_grad_(learns))
            norm(x).feats.sum().backward()
        found[name] = sent
    with counted() as sent, torch.no_grad():
        norm(x)
    found["none"] = sent
    with counted() as sent:
        norm.eval()(x)
        bare = process.norm(track_running_stats=False)
        bare.eval()(x)
    found["evaluation"] = sent
    return found


def too_few(process: Process) -> Found:
    """One row in all processes, then none, then enough again."""
    norm, found = process.norm(), {}
    try:
        norm(on_sites(process.rows(0, 1)))
    except ValueError as error:
        found["one"] = str(error)
    out = norm(on_sites(process.rows(0, 0).requires_grad_())).feats
    out.sum().backward()
    found["none"] = {name: t.cpu().clone() for name, t in norm.state_dict().items()}
    found["grad"] = norm.weight.grad.cpu()
    norm(on_sites(process.rows(2, 1)))
    found["batches"] = int(norm.num_batches_tracked)
    return found


def refusals(process: Process) -> Found:
    """Errors that come before anything is sent, and the one of a second derivative."""
    norm, found = process.norm(), {}
    wrong = [(process.norm(), process.rows(4, 4, channels=3)), (process.norm(0), None)]
    for name, (layer, feats) in zip(("channels", "no channels"), wrong):
        feats = torch.zeros(4, 0, dtype=F64, device=process.device) if feats is None else feats
        with counted() as sent, pytest.raises(ValueError) as caught:
            layer(on_sites(feats))
        found[name] = str(caught.value), sent
    feats = process.rows(4, 4).requires_grad_()
    out = norm(on_sites(feats)).feats
    (grad,) = torch.autograd.grad(out.square().sum(), feats, create_graph=True)
    with pytest.raises(RuntimeError) as caught:
        grad.sum().backward()
    found["twice"] = str(caught.value)
    return found


def differences(process: Process) -> Found:
    """Gradients of a loss over all rows, and what they are by differences."""
    shares, norm = (4, 1), process.norm()
    feats = process.rows(*shares)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.5]))

    def loss(x: Tensor) -> Tensor:
        return norm(on_sites(x)).feats.add(0.3).sin().mul(process.rank + 1).sum()

    def together(x: Tensor) -> float:
        with torch.no_grad():
            value = loss(x)
            dist.all_reduce(value, group=process.pair)
        return float(value)

    x = feats.clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    grads = {"weight": norm.weight.grad, "bias": norm.bias.grad}
    for grad in grads.values():  # as whoever trains would
        dist.all_reduce(grad, group=process.pair)
    places = [(feats, x.grad, r, i) for r in (0, 1) for i in range(shares[r] * 2)]
    places += [(getattr(norm, name).data, grads[name], -1, i) for name in grads for i in (0, 1)]
    got, want, step = [], [], 1e-5
    for tensor, grad, owner, i in places:
        mine = owner in (-1, process.rank)
        values: list[float] = []
        for sign in (1, -2, 1):
            if mine:
                tensor.view(-1)[i] += sign * step
            values.append(together(feats))
        if mine:
            got.append(float(grad.view(-1)[i]))
            want.append((values[0] - values[1]) / (2 * step))
    return {"got": got, "want": want}


def network() -> nn.Module:
    torch.manual_seed(0)
    net = spnn.Sequential(
        spnn.Conv3d(3, 4, 3), spnn.BatchNorm(4), spnn.ReLU(True),
        spnn.Conv3d(4, 6, 2, stride=2), spnn.BatchNorm(6, momentum=None), spnn.ReLU(True),
        spnn.Conv3d(6, 2, 1),
    )  # fmt: skip
    return net.to(F64)


SCENES = ((30, 50), (40, 0), (25, 25))  # rows of each sample; process r has sample r


def scene(step: int) -> list[SparseTensor]:
    """One tensor for each process."""
    draw = torch.Generator().manual_seed(step)
    found = []
    for sample, rows in enumerate(SCENES[step]):
        sites = torch.randperm(216, generator=draw)[:rows].sort().values
        axes = [torch.full_like(sites, sample), sites // 36, sites // 6 % 6, sites % 6]
        feats = torch.randn(rows, 3, generator=draw, dtype=F64)
        found.append(SparseTensor(feats, torch.stack(axes, 1).int()))
    return found


def train(net: Any, parts: list[list[SparseTensor]], device: torch.device, scale: int) -> Found:
    """Steps of gradient descent; DDP divides gradients by the number of processes: ``scale``."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in parts:
        optimizer.zero_grad()
        for x in step:
            (net(x.to(device)).feats.square().sum() * scale / 50).backward()
        optimizer.step()
    return {name: t.cpu() for name, t in net.state_dict().items()}


def wrapped(process: Process) -> Found:
    """DDP accepts no SyncBatchNorm on a CPU; conversion keeps the parameters that it watches."""
    net = network().to(process.device)
    if process.device.type == "cuda":
        spnn.convert_sync_batchnorm(net, process.pair)
    ddp = nn.parallel.DistributedDataParallel(net, process_group=process.pair)
    spnn.convert_sync_batchnorm(ddp, process.pair)
    train(ddp, [[scene(step)[process.rank]] for step in range(len(SCENES))], process.device, 2)
    return {name: t.cpu() for name, t in net.state_dict().items()}


def waiting(process: Process) -> Found:
    """Steps in which PyTorch would complain if the host waited for the GPU."""
    if process.device.type != "cuda" or dist.get_backend() != "nccl":
        return {}
    norm = process.norm()
    x = on_sites(process.rows(40, 30).requires_grad_())
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        norm(x).feats.sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    return {}


def outside(process: Process) -> Found:
    """A process that is no member of the group of its layers."""
    norm = process.norm()
    norm(on_sites(torch.ones(3, 2, dtype=F64, device=process.device)))
    return {"mean": norm.running_mean.cpu()}


PLAYS = [cases, messages, too_few, refusals, differences, wrapped, waiting]


def run(rank: int, backend: str, device: str, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = torch.device(device, rank if backend == "nccl" else 0) if device != "cpu" else "cpu"
    if device != "cpu":
        torch.cuda.set_device(place)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    process = Process(rank, torch.device(place), dist.new_group([0, 1]))
    found: Found = {}
    try:
        for part in [cases, outside] if rank > 1 else PLAYS:
            found[part.__name__] = part(process)
        torch.save(found, f"{folder}/rank{rank}")
        dist.barrier()
    except BaseException:  # the others would wait for long
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # PyTorch's own threads may still run, and then end the process with a signal


def start(_: int, *arguments: Any) -> None:
    """In a fresh process: what it has imported, those that it starts share."""
    multiprocessing.start_processes(run, arguments, arguments[2], start_method="fork")  # pyright: ignore


# ------------------------------------------------------------------ what they found
@pytest.fixture(scope="module")
def found(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """By process. Through NCCL where each has a GPU of its own, else through gloo."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    backend, world = ("nccl", min(gpus, PROCESSES)) if gpus > 1 else ("gloo", PROCESSES)
    folder: Path = tmp_path_factory.mktemp(backend)
    arguments = (backend, device.type, world, str(folder))
    multiprocessing.spawn(start, arguments)  # pyright: ignore
    return [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_find_what_one_finds(case: Case, found: list[Found]) -> None:
    """Judged by PyTorch in float64, on the same rounded features."""
    parts = [f["cases"][case.name] for f in found if case.name in f["cases"]]
    if len(parts) < len(case.shares[0]):
        pytest.skip("NCCL needs three GPUs for three processes")
    norm = case.norm(spnn.BatchNorm, F64)
    want = play(case, norm, None, torch.device("cpu"), F64)
    rtol, atol = TOLERANCES[case.dtype]
    rtol = atol = max(rtol, atol, case.tolerance or 0)
    assert all(part.keys() == want.keys() for part in parts)
    for name, value in want.items():
        values = [part[name] for part in parts]
        if value is None:
            assert values == [None] * len(values), name
            continue
        if name in PARAMETERS:  # whoever trains adds them up
            got = torch.stack(values).double().sum(0)
        elif name.startswith(("feats ", "grad ")):
            got = torch.cat(values)
        else:  # the state: the same bits in each process
            got = values[0]
            assert all(torch.equal(got, other) for other in values), name
        most = atol * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got.double(), value.double(), rtol=rtol, atol=most, msg=name)


def test_one_message_each_way(found: list[Found]) -> None:
    """A row [mean, squares, count] of each process, and the two sums of the gradient."""
    for process in found[:2]:
        sent = process["messages"]
        assert sent["all"] == [[2, 5], [2, 2]]
        assert sent["parameters"] == sent["none"] == [[2, 5]]
        assert sent["evaluation"] == []


def test_too_few_rows_in_all(found: list[Found]) -> None:
    """As `BatchNorm`: one row is an error, in each process; no rows change nothing."""
    with pytest.raises(ValueError) as one:
        spnn.BatchNorm(2)(on_sites(torch.ones(1, 2)))
    fresh = spnn.BatchNorm(2).to(F64).state_dict()
    for process in found[:2]:
        seen = process["too_few"]
        assert seen["one"] == str(one.value)
        assert seen["none"].keys() == fresh.keys()
        assert all(torch.equal(seen["none"][name], value) for name, value in fresh.items())
        assert seen["grad"].tolist() == [0, 0] and seen["batches"] == 1


def test_refusals(found: list[Found]) -> None:
    for process in found[:2]:
        seen = process["refusals"]
        assert seen["channels"] == ("`feats` must have shape [N, 2], got [4, 3]", [])
        assert seen["no channels"] == ("`feats` must have shape [N, 1], got [4, 0]", [])
        assert "once_differentiable" in seen["twice"]


def test_gradients_by_differences(found: list[Found]) -> None:
    for process in found[:2]:
        seen = process["differences"]
        assert seen["got"]
        assert seen["got"] == pytest.approx(seen["want"], rel=1e-7, abs=1e-8)


def test_a_network_learns_what_one_process_learns(found: list[Found]) -> None:
    """Under DistributedDataParallel, process 1 without any voxels in the second step."""
    net = network()
    parts = [scene(step) for step in range(len(SCENES))]
    every = [
        SparseTensor(torch.cat([x.feats for x in s]), torch.cat([x.coords for x in s]))
        for s in parts
    ]
    start = {name: t.clone() for name, t in net.state_dict().items()}
    want = train(net, [[x] for x in every], torch.device("cpu"), 1)
    assert not torch.allclose(want["0.kernel"], start["0.kernel"], atol=1e-3)
    for process in found[:2]:
        got = process["wrapped"]
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def test_who_is_no_member_is_alone(found: list[Found]) -> None:
    for process in found[2:]:
        torch.testing.assert_close(process["outside"]["mean"], torch.full((2,), 0.1, dtype=F64))
