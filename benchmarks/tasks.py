"""Networks on variants of a scan, in any library and way, and their judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import engines, floors, judging, scenes
from benchmarks.cases import Case, counting, tensor
from benchmarks.oracle import WrongResult
from torchsparse.inference import graphed

VARIANTS = 3
SCALE = {"fp16": 2.0**16}  # of the loss, as a gradient scaler has it: nothing vanishes
# Of the input's gradient, as the length of the difference: wrong, not rounded. Where a rounding
# turns a ReLU, the gradient jumps.
ASTRAY = 0.7


class Inputs(NamedTuple):
    """What a step starts from, on the device."""

    feats: Tensor  # [N, C]
    coords: Tensor  # [N, 4] int32


class Truth(NamedTuple):
    """What this library gives in float64."""

    answer: judging.Answer
    gradient: Tensor | None  # [N, C] of the input, in its order; when training


class Task(NamedTuple):
    """A network on a scan, inferring or training."""

    case: Case
    scene: str
    mode: str
    network: nn.Module  # on the CPU, with batch statistics of the scan
    judged: scenes.Scene
    timed: list[scenes.Scene]
    truth: Truth
    works: list[floors.Work]  # of the first that is timed


def prepare(case: Case, name: str, scan: scenes.Scene, mode: str, device: torch.device) -> Task:
    """Inference on one scan, or training on two at a time."""
    torchsparse.backends.allow_tf32 = False
    floors.allow_tf32(False)
    judged, timed = scan, [scenes.variant(scan, seed) for seed in range(VARIANTS)]
    if mode == "train":
        judged = scenes.together(scan, timed[0])
        timed = [scenes.together(*pair) for pair in zip(timed, timed[1:] + timed[:1])]
    network = judging.calibrated(case, scan, device)
    truth = _truth(case, network, judged, mode, device)
    with torch.no_grad(), counting(network) as works:
        network(tensor(timed[0], case.in_channels, device, torch.float32))
    return Task(case, name, mode, network.cpu(), judged, timed, truth, works)


def _truth(
    case: Case, network: nn.Module, scene: scenes.Scene, mode: str, device: torch.device
) -> Truth:
    if mode == "infer":
        return Truth(judging.truth(case, network, scene, device), None)
    ours = engines.Torchsparse()
    exact = ours.adopt(network).double().train()
    x = tensor(scene, case.in_channels, device, torch.float64)
    no_cast = torch.autocast(device.type, enabled=False)
    output, gradient = engines.training_step(ours, exact, x.feats, x.coords, no_cast)
    answer = judging.by_site(ours.sites(output), ours.features(output))
    return Truth(answer, None if gradient is None else gradient.cpu())


class Subject:
    """A task in one library, type and way.

    Inference has weights of the type; training has float32 weights under autocast.
    """

    def __init__(self, task: Task, library: str, way: str, dtype: str, device: torch.device):
        self.task, self.way, self.dtype, self.device = task, way, dtype, device
        self.engine = engines.ENGINES[library]()
        self.engine.allow_tf32(dtype == "tf32")
        floors.allow_tf32(dtype == "tf32")
        self.floating = floors.DTYPES[dtype]
        self.training = task.mode == "train"
        mixed = self.training and self.floating != torch.float32
        network = self.engine.adopt(task.network)
        network = network.to(device, torch.float32 if mixed else self.floating)
        self.network: nn.Module = network.train(self.training)
        self.cast = torch.autocast(device.type, self.floating if mixed else None, enabled=mixed)
        self.scale = SCALE.get(dtype, 1.0) if mixed else 1.0
        self.call: Callable[[Any], Any] = self.network
        if way != "eager":
            self.call = graphed(self.network, wait=way == "graphed")

    def inputs(self, scene: scenes.Scene) -> Inputs:
        x = tensor(scene, self.task.case.in_channels, self.device, self.floating)
        return Inputs(x.feats, x.coords)

    def step(self, x: Inputs) -> tuple[Any, Tensor | None]:
        """What is timed; returns the output, and the gradient of the input."""
        if self.training:
            return engines.training_step(
                self.engine, self.network, *x, self.cast, scale=self.scale
            )
        return self.infer(x, self.call), None

    def infer(self, x: Inputs, call: Callable[[Any], Any]) -> Any:
        with torch.no_grad():
            output = call(self.engine.start(*x))
        self.engine.features(output)  # computed when asked for
        return output

    def distance(self, output: Any, other: Any) -> float:
        """Of two outputs, relative to the largest entry of the other."""
        engine = self.engine
        answer = judging.by_site(engine.sites(other), engine.features(other))
        return judging.distance(engine, output, answer)

    def same_bits(self, output: Any, other: Any) -> bool:
        engine = self.engine
        return all(
            torch.equal(read(output), read(other)) for read in (engine.sites, engine.features)
        )


def judge(subject: Subject, timed: list[Inputs]) -> dict[str, Any]:
    """Beside float64 on the scan, eager calls and a second round on the variants.

    Raises:
        WrongResult: Its times would mean nothing.
    """
    task, limit = subject.task, judging.AGREE[subject.dtype]
    ours = subject.engine.name == "torchsparse"
    whole = subject.inputs(task.judged)
    if subject.way != "eager":  # a graph answers a new size with an eager call, then is captured
        for x in [whole, *timed] * 2:
            subject.step(x)
    (first, _), (output, gradient) = subject.step(whole), subject.step(whole)
    error = judging.distance(subject.engine, output, task.truth.answer)
    itself = subject.distance(output, first)
    rounds = [[subject.step(x)[0] for x in timed] for _ in range(2)]
    itself = max(itself, *(subject.distance(b, a) for a, b in zip(*rounds)))
    row: dict[str, Any] = {"error": error, "to_itself": itself}
    if ours and not all(subject.same_bits(a, b) for a, b in [(first, output), *zip(*rounds)]):
        raise WrongResult(f"the same scan gave other bits, off by {itself:.1e}")
    steady = itself <= limit
    if not steady:
        row["remarks"] = f"disagrees with itself by {itself:.1e}"
    if not error <= limit and (ours or steady):
        raise WrongResult(f"off by {error:.1e} of the largest entry")
    if gradient is not None and task.truth.gradient is not None:
        want = task.truth.gradient
        away = (gradient.double().cpu() / subject.scale - want).norm() / want.norm()
        row["gradient_error"] = away.item()
        if not away <= ASTRAY and (ours or steady):
            raise WrongResult(f"the gradient of the input is off by {away:.1e} of its length")
    if subject.way != "eager":
        eager = [subject.infer(x, subject.network) for x in timed]
        row["to_eager"] = max(subject.distance(b, a) for a, b in zip(eager, rounds[1]))
        if not row["to_eager"] <= limit:
            raise WrongResult(f"off by {row['to_eager']:.1e} from eager calls")
    return row
