"""Networks on variants of a scan, in any library and way, and their judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks import engines, floors, judging, oracle, scenes
from benchmarks.cases import Case, counting, tensor
from benchmarks.oracle import WrongResult
from torchsparse import SparseTensor, training
from torchsparse.inference import graphed, warmup

VARIANTS = 3
SCALE = {"fp16": 2.0**16}  # of the loss, as a gradient scaler has it: nothing vanishes
# Of the gradient of the input or of one parameter, as the length of the difference: wrong, not
# rounded. Where a rounding turns a ReLU, the gradient jumps: small scenes showed 0.01 in float32,
# 0.2 in float16 and 0.7 in bfloat16 for the worst of the parameters. One that is missing is off by
# 1; smaller faults of a layer are for `oracle.check` to find.
ASTRAY = {"fp32": 0.1, "tf32": 0.9, "fp16": 0.9, "bf16": 0.95}
FAINT = 1e-3  # of the length of all: parameters with less of a gradient are judged by this


GRADIENTS = {"gradient": "input", "parameter": "parameters"}  # of what, by their names below


class Inputs(NamedTuple):
    """What a step starts from, on the device."""

    feats: Tensor  # [N, C]
    coords: Tensor  # [N, 4] int32


class Truth(NamedTuple):
    """What this library gives in float64, on the CPU."""

    answer: judging.Answer
    gradient: Tensor | None  # [N, C] of the input, in its order; when training
    parameter: Tensor | None  # [n] gradients of all parameters; when training
    sizes: tuple[int, ...] = ()  # of these parameters


class Task(NamedTuple):
    """A network on a scan, inferring or training."""

    case: Case
    scene: str
    mode: str
    network: nn.Module  # on the CPU, with batch statistics of the scan
    timed: list[scenes.Scene]  # the first is judged beside the truth
    truth: Truth | None
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
    # The truth below comes from this library: first its layers, and then its maps of this size.
    crop = tensor(scenes.crop(scan), case.in_channels, device, torch.float32)
    oracle.check(network, crop)
    judging.check_sites(network, tensor(scan, case.in_channels, device, torch.float32))
    truth, works = _truth(case, network, task.timed[0], mode, device)
    return task._replace(network=network.cpu(), truth=truth, works=works)


def _truth(
    case: Case, network: nn.Module, scene: scenes.Scene, mode: str, device: torch.device
) -> tuple[Truth, list[floors.Work]]:
    """The truth, and the work of its forward pass."""
    ours = engines.Torchsparse()
    exact = ours.adopt(network).double().train(mode == "train")
    x = tensor(scene, case.in_channels, device, torch.float64)
    gradient = parameters = None
    sizes: tuple[int, ...] = ()
    with counting(exact) as works:
        if mode == "infer":
            with torch.no_grad():
                output = exact(x)
        else:
            no_cast = torch.autocast(device.type, enabled=False)
            output, gradient = engines.training_step(ours, exact, x.feats, x.coords, no_cast)
            gradient = None if gradient is None else gradient.cpu()
            parameters = gradients(exact).cpu()
            sizes = tuple(p.numel() for p in exact.parameters() if p.grad is not None)
    answer = judging.on_cpu(judging.by_site(ours.sites(output), ours.features(output)))
    return Truth(answer, gradient, parameters, sizes), works


def gradients(network: nn.Module) -> Tensor:
    """[n] of all parameters, in their order; a copy."""
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


class Step(NamedTuple):
    """What a step gave."""

    output: Any
    gradient: Tensor | None = None  # [N, C] of the input, scaled as the loss
    parameter: Tensor | None = None  # [n] gradients of all, scaled, too; a copy


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
            found = engines.training_step(
                self.engine, self.network, *x, self.cast, scale=self.scale, call=call
            )
            return Step(*found)
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
        return found._replace(gradient=found.gradient.clone(), parameter=gradients(self.network))

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
    must = ours or "remarks" not in row
    row |= _beside_truth(subject, rounds[0][0], must)
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
        for name, whose in GRADIENTS.items() if ours else ():
            a, b = getattr(one, name), getattr(other, name)
            if a is not None and not torch.equal(a, b):
                raise WrongResult(
                    f"the same scan gave other bits in the gradient of the {whose}, off by "
                    f"{judging.apart(b, a):.1e} of its length"
                )
    row: dict[str, Any] = {"to_itself": away}
    if not away <= judging.AGREE[subject.dtype]:
        row["remarks"] = f"disagrees with itself by {away:.1e}"
    return row


def _beside_truth(subject: Subject, found: Step, must: bool) -> dict[str, Any]:
    """The same scan in float64; ``must``: or it is wrong."""
    truth = subject.task.truth
    assert truth is not None
    error = judging.distance(subject.engine, found.output, truth.answer)
    if not error <= judging.AGREE[subject.dtype] and must:
        raise WrongResult(f"off by {error:.1e} of the largest entry")
    row = {"error": error}
    for name, whose in GRADIENTS.items():
        away = _away(subject, found, name)
        if away is None:
            continue
        row[f"{name}_error"] = away
        if not away <= ASTRAY[subject.dtype] and must:
            raise WrongResult(f"the gradient of the {whose} is off by {away:.1e} of its length")
    return row


def _away(subject: Subject, found: Step, name: str) -> float | None:
    """The distance of a gradient from the truth, relative to its length; None if not known."""
    got, want = getattr(found, name), getattr(subject.task.truth, name)
    if got is None or want is None:
        return None
    if name == "parameter" and subject.engine.name != "torchsparse":
        return None  # another library may lay out its weights in another way
    got = got.double().cpu() / subject.scale
    if name == "gradient":
        return judging.apart(got, want)
    truth = subject.task.truth
    assert truth is not None
    return worst(got, want, truth.sizes)


def worst(found: Tensor, want: Tensor, sizes: tuple[int, ...]) -> float:
    """The largest distance of one parameter's gradient from the truth, relative to its length.

    Args:
        found, want: [n] gradients of all parameters.
        sizes: Of the parameters.
    """
    if len(found) != len(want):
        return float("inf")  # some got none
    least = FAINT * want.norm()
    pairs = zip(found.split(sizes), want.split(sizes), strict=True)
    return max(((a - b).norm() / torch.maximum(b.norm(), least)).item() for a, b in pairs)


def _beside_eager(subject: Subject, found: list[Step], eager: list[Step]) -> dict[str, Any]:
    """A graph beside eager calls on the same variants."""
    limit = judging.AGREE[subject.dtype]
    away = max(subject.distance(a.output, b.output) for a, b in zip(found, eager))
    if not away <= limit:
        raise WrongResult(f"off by {away:.1e} from eager calls")
    row = {"to_eager": away}
    for name, whose in GRADIENTS.items():
        usual = _away(subject, eager[0], name)
        if usual is None:
            continue
        away = max(judging.apart(getattr(a, name), getattr(b, name)) for a, b in zip(found, eager))
        row[f"{name}_to_eager"] = away
        # Roundings put a graph as far from the truth as eager calls, in another direction.
        if not away <= 2 * usual + limit:
            raise WrongResult(
                f"the gradient of the {whose} is off by {away:.1e} of its length from eager calls,"
                f" which are off by {usual:.1e} themselves"
            )
    return row
