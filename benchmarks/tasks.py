"""Networks on variants of a scan, in any library and way, and their judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import engines, floors, judging, oracle, scenes
from benchmarks.cases import Case, tensor
from benchmarks.oracle import WrongResult
from torchsparse import SparseTensor, training
from torchsparse.inference import graphed, warmup

VARIANTS = 3


class Inputs(NamedTuple):
    """What a step starts from, on the device."""

    feats: Tensor  # [N, C]
    coords: Tensor  # [N, 4] int32


class Task(NamedTuple):
    """A network on a scan, inferring or training."""

    case: Case
    scene: str
    mode: str
    network: nn.Module  # on the CPU, with batch statistics of the scan
    timed: list[scenes.Scene]  # the first is judged beside the truth
    truth: judging.Truth | None
    works: list[floors.Work]  # of the first that is timed


def start(case: Case, name: str, scan: scenes.Scene, mode: str) -> Task:
    """Inference on one scan, or training on two at a time; the truth is not known yet.

    All that runs has one size, so that graphs are of one size class.
    """
    timed = [scenes.variant(scan, seed) for seed in range(VARIANTS)]
    if mode == "train":
        timed = [scenes.together(*pair) for pair in zip(timed, timed[1:] + timed[:1])]
    return Task(case, name, mode, case.build(), timed, None, [])


def prepare(case: Case, name: str, scan: scenes.Scene, mode: str, device: torch.device) -> Task:
    """A task with its truth. The kernels of its maps should be compiled: `Subject.warm`."""
    torchsparse.backends.allow_tf32 = False
    floors.allow_tf32(False)
    task = start(case, name, scan, mode)
    network = judging.calibrated(case, scan, device)
    small = tensor(scenes.crop(scan), case.in_channels, device, torch.float32)
    warmup(network, small)
    oracle.check(network, small)
    truth, works = judging.truth(case, network, task.timed[0], mode, device)
    return task._replace(network=network.cpu(), truth=truth, works=works)


class Step(NamedTuple):
    """What a step gave."""

    output: Any
    gradient: list[Tensor] | None = None  # [N, C] of the input, scaled as the loss
    parameter: list[Tensor] | None = None  # of each, scaled, too; copies


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
        self.scale = judging.SCALE.get(dtype, 1.0) if mixed else 1.0
        self.call: Callable[[Any], Any] = self._called()

    def _called(self) -> Callable[[Any], Any]:
        if self.way == "eager":
            return self.network
        if not self.training:
            return graphed(self.network, wait=self.way != "nowait", frozen=self.way == "frozen")
        return training.graphed(self.network)

    def inputs(self, scene: scenes.Scene) -> Inputs:
        x = tensor(scene, self.task.case.in_channels, self.device, self.floating)
        return Inputs(x.feats, x.coords)

    def warm(self, x: Inputs) -> int:
        """Compile what a step of this library launches, and capture its graph; the number of
        kernels."""
        feats = x.feats.detach().requires_grad_(self.training)
        with self.cast:
            graph: Any = None if self.call is self.network else self.call
            return warmup(self.network, SparseTensor(feats, x.coords), graph=graph)

    def step(self, x: Inputs, call: Callable[[Any], Any] | None = None) -> Step:
        """What is timed; of training without a copy of the parameters' gradients.

        Args:
            call: What runs the network, if not the way.
        """
        call = call or self.call
        if self.training:
            output, gradient = engines.training_step(
                self.engine, self.network, *x, self.cast, scale=self.scale, call=call
            )
            return Step(output, [] if gradient is None else [gradient])
        return Step(self.infer(x, call))

    def infer(self, x: Inputs, call: Callable[[Any], Any]) -> Any:
        with torch.no_grad():
            output = call(self.engine.start(*x))
        self.engine.features(output)  # computed when asked for
        return output

    def full_step(self, x: Inputs, call: Callable[[Any], Any] | None = None) -> Step:
        """A step with copies of all gradients."""
        found = self.step(x, call)
        if found.gradient is None:
            return found
        copies = [part.clone() for part in found.gradient]
        return found._replace(gradient=copies, parameter=judging.gradients(self.network))

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
    """Beside float64 on the first variant, eager calls and a second round.

    Raises:
        WrongResult: Its times would mean nothing.
    """
    ours = subject.engine.name == "torchsparse"
    if subject.way != "eager":  # levels may need more room than the first scan did
        for x in timed * 2:
            subject.step(x)
    rounds = [[subject.full_step(x) for x in timed] for _ in range(2)]
    row = _beside_itself(subject, rounds, ours)
    row |= _beside_truth(subject, rounds[0][0], 0.0 if ours else row["to_itself"])
    if subject.way != "eager":
        eager = [subject.full_step(x, subject.network) for x in timed]
        row |= _beside_eager(subject, rounds[1], eager)
    return row


def _beside_itself(subject: Subject, rounds: list[list[Step]], ours: bool) -> dict[str, Any]:
    """Two rounds on the same variants."""
    away = 0.0
    for one, other in zip(*rounds):
        if not subject.same_bits(one.output, other.output):
            away = max(away, subject.distance(other.output, one.output))
            if ours:
                raise WrongResult(f"the same scan gave other bits, off by {away:.1e}")
        for name, whose in judging.GRADIENTS.items() if ours else ():
            a, b = getattr(one, name), getattr(other, name)
            if a is not None and not all(map(torch.equal, a, b)):
                raise WrongResult(
                    f"the same scan gave other bits in the gradient of the {whose}, off by "
                    f"{judging.farthest(b, a):.1e} of its length"
                )
    row: dict[str, Any] = {"to_itself": away}
    if not away <= (judging.AGREE if ours else judging.OTHERS_AGREE)[subject.dtype]:
        row["remarks"] = f"disagrees with itself by {away:.1e}"
    return row


def _beside_truth(subject: Subject, found: Step, room: float) -> dict[str, Any]:
    """The same scan in float64.

    Args:
        room: By how much another library differs from itself; so far it may be from the truth.
    """
    truth, engine, dtype = subject.task.truth, subject.engine, subject.dtype
    assert truth is not None
    row = {"error": judging.judge_output(engine, found.output, truth.answer, dtype, room)}
    if truth.gradient is None:
        return row
    parts = {name: getattr(found, name) or [] for name in judging.GRADIENTS}
    unscaled = {name: [g.double() / subject.scale for g in part] for name, part in parts.items()}
    errors = judging.judge_gradients(engine, unscaled, truth, dtype)
    return row | {f"{name}_error": away for name, away in errors.items()}


def _away(subject: Subject, found: Step, name: str) -> float | None:
    """The distance of a gradient from the truth, of the worst parameter, relative to its length;
    None if not known."""
    got, want = getattr(found, name), getattr(subject.task.truth, name)
    if got is None or want is None:
        return None
    if name == "parameter" and subject.engine.name != "torchsparse":
        return None  # another library may lay out its weights in another way
    return judging.farthest([part.double() / subject.scale for part in got], want)


def _beside_eager(subject: Subject, found: list[Step], eager: list[Step]) -> dict[str, Any]:
    """A graph beside eager calls on the same variants."""
    limit = judging.AGREE[subject.dtype]
    away = max(subject.distance(a.output, b.output) for a, b in zip(found, eager))
    if not away <= limit:
        raise WrongResult(f"off by {away:.1e} from eager calls")
    row = {"to_eager": away}
    for name, whose in judging.GRADIENTS.items():
        usual = _away(subject, eager[0], name)
        if usual is None:
            continue
        away = max(
            judging.farthest(getattr(a, name), getattr(b, name)) for a, b in zip(found, eager)
        )
        row[f"{name}_to_eager"] = away
        # Roundings put a graph as far from the truth as eager calls, in another direction.
        if not away <= 2 * usual + limit:
            raise WrongResult(
                f"the gradient of the {whose} is off by {away:.1e} of its length from eager calls,"
                f" which are off by {usual:.1e} themselves"
            )
    return row
