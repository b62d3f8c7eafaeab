"""What `torchsparse.tune` times: the products of a network's layers, on the maps they met.

A sample gives *sites*, the calls of layers. Sites that share a kernel map form a *group*, which
has one configuration, as plans are shared along a map; its cost is that of its products and of
the plans that they need. Then each launch may choose tiles: the functions that run say which
choices they make and what else could be tried (`_tuned.choose`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse import _tuned
from torchsparse._confirm import paying
from torchsparse._kernel_map import KernelMap
from torchsparse._ops.conv import compile_ahead, gather_gemm, weight_grad
from torchsparse._recipe import ConvRecipe, Dataflow
from torchsparse._timing import measure

__all__ = ["Change", "Choice", "Group", "Search", "Site", "choices_of"]

MARGIN = 0.97  # what is there stays, unless something takes less than this share of its time
PER_CALL = {"cpu": 0.05, "cuda": 0.01}  # seconds for the timing of one candidate on one map
PRUNED = 1.3  # with `prune`, choices that are so many times slower than the best are given up
SETTLED = 3  # samples in a row that confirm every choice end the search
BATCH = 8  # questions whose candidates are compiled at once
SMALL = 0.005  # of the time of all products: launches below it are left alone
WRONG = 0.02  # of the largest output: a candidate that differs by more computes something else


class Choice(NamedTuple):
    """The fields of a recipe that a search decides."""

    dataflow: Dataflow
    sort: bool
    splits: int
    splits_bwd: int
    literal: bool

    @staticmethod
    def of(recipe: ConvRecipe) -> Choice:
        """Those of a recipe."""
        return Choice(
            recipe.dataflow, recipe.sort, recipe.splits, recipe.splits_bwd, recipe.literal
        )

    def applied(self, recipe: ConvRecipe) -> ConvRecipe:
        """The recipe with these fields."""
        return replace(recipe, **self._asdict())

    def __str__(self) -> str:
        if self.dataflow is not Dataflow.ImplicitGEMM:
            return self.dataflow.name
        if not self.literal:
            return "automatic"
        rows = "sorted" if self.sort else "unsorted"
        return f"{rows}, {self.splits}/{self.splits_bwd} splits"


def choices_of(dataflows: Iterable[Dataflow], backward: bool) -> list[Choice]:
    """What a group may be set to, the simplest of each dataflow first."""
    found = []
    for dataflow in dataflows:
        found.append(Choice(dataflow, False, 1, 3, False))
        if dataflow is Dataflow.ImplicitGEMM:
            found.append(Choice(dataflow, False, 1, 1, True))
            counts = (1, 3)
            found += [
                Choice(dataflow, True, splits, splits_bwd, True)
                for splits in counts
                for splits_bwd in (counts if backward else (splits,))
            ]
    return found


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a layer."""

    name: str
    kmap: KernelMap
    transposed: bool
    c_in: int
    c_out: int
    recipe: ConvRecipe  # as found

    @property
    def rows(self) -> tuple[int, int]:
        """Input and output rows."""
        fine, coarse = self.kmap.num_inputs, self.kmap.num_outputs
        return (coarse, fine) if self.transposed else (fine, coarse)

    @property
    def work(self) -> int:
        """Proportional to its products, about."""
        pairs = self.kmap.geometry.volume * self.kmap.num_outputs  # at most
        return pairs * self.c_in * self.c_out


class _Use(NamedTuple):
    """One product of a site: "fwd", "dgrad" or "wgrad"."""

    site: Site
    kind: str
    recipe: ConvRecipe

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal shapes on one map take equal time under equal plans."""
        site, recipe = self.site, self.recipe
        return (
            id(site.kmap), self.kind, site.transposed, site.c_in, site.c_out, recipe.compute,
            recipe.precision,
        )  # fmt: skip

    @property
    def pairs(self) -> int:
        """Of its map."""
        return int(self.site.kmap.counts.sum())

    @property
    def places(self) -> int:
        """Taps times output rows of the product; for a weight gradient, of the map."""
        (n, m), kmap = self.site.rows, self.site.kmap
        rows = {"fwd": m, "dgrad": n, "wgrad": kmap.num_outputs}
        return kmap.geometry.volume * rows[self.kind]

    def planner(self) -> tuple[Any, Callable[[], Any]]:
        """(key, make) of its plan."""
        site, recipe = self.site, self.recipe
        if self.kind == "fwd":
            return site.kmap.planner(recipe, site.c_out, site.transposed)
        if self.kind == "dgrad":
            return site.kmap.planner(recipe, site.c_in, not site.transposed, backward=True)
        return site.kmap.pairs_planner(recipe, site.c_out, site.transposed)

    def ready(self, operands: _Operands) -> Callable[[], Tensor]:
        """The call that runs in the network, its plan made."""
        site, recipe = self.site, self.recipe
        kmap, precision, dtype = site.kmap, recipe.precision, recipe.compute
        n, m = site.rows
        feats = partial(operands.take, "feats", (n, site.c_in), dtype)
        grad = partial(operands.take, "grad", (m, site.c_out), dtype)
        if self.kind == "wgrad":
            pairs = kmap.pairs(recipe, site.c_out, site.transposed)
            return partial(weight_grad, feats(), grad(), pairs, precision)
        taps = (kmap.geometry.volume, site.c_in, site.c_out)
        weight = operands.take("weight", taps, dtype)
        if self.kind == "fwd":
            plan = kmap.plan(recipe, site.c_out, site.transposed)
            return partial(gather_gemm, feats(), weight, None, plan, precision)
        plan = kmap.plan(recipe, site.c_in, not site.transposed, backward=True)
        return partial(gather_gemm, grad(), weight.transpose(1, 2), None, plan, precision)


class _Operands:
    """Random operands of any shape, from one buffer per role and dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Values in -0.5..0.5; the global generators are left alone."""
        size = 1
        for extent in shape:
            size *= extent
        buffer = self.buffers.get((role, dtype))
        if buffer is None or buffer.numel() < size:
            generator = torch.Generator(self.device).manual_seed(0)
            values = torch.rand(size, generator=generator, device=self.device)
            buffer = self.buffers[role, dtype] = values.sub_(0.5).to(dtype)
        return buffer[:size].view(shape)


@dataclass(eq=False)
class Group:
    """Layers that share a map, and what each choice costs them."""

    names: tuple[str, ...]
    found: dict[str, Choice]  # as found, by layer
    voxels: tuple[int, int]  # of the first sample: inputs and outputs of its map
    kernel: tuple[int, ...]
    samples: int = 0
    # Seconds, summed over samples; None: everything as found.
    costs: dict[Choice | None, float] = field(default_factory=dict)
    best: Choice | None = None

    @property
    def before(self) -> float:
        """Seconds per sample as found."""
        return self.costs.get(None, 0.0) / max(self.samples, 1)

    @property
    def after(self) -> float:
        """Seconds per sample with the best choice."""
        return self.costs.get(self.best, 0.0) / max(self.samples, 1)

    def may_stay(self, allowed: Sequence[Choice]) -> bool:
        """Whether what was found is allowed."""
        dataflows = {choice.dataflow for choice in allowed}
        return {choice.dataflow for choice in self.found.values()} <= dataflows

    def decide(self, allowed: Sequence[Choice]) -> None:
        """Choose the cheapest; what was found stays within the margin, if it is allowed."""
        ranked = [choice for choice in allowed if choice in self.costs]
        self.best = None if self.may_stay(allowed) else [*ranked, *allowed][0]
        if ranked:
            first = min(ranked, key=self.costs.__getitem__)
            if self.costs[first] < MARGIN * self.costs.get(self.best, 0.0):
                self.best = first

    def choice(self, name: str) -> Choice:
        """What a layer gets."""
        return self.best or self.found[name]


Change = Group | None  # the choice of a group; None: the tiles


class Search:
    """Times choices sample by sample, as long as there is time.

    Args:
        device: Of the network.
        allowed: From `choices_of`.
        backward: Time both gradients, too.
        seconds: About how long it may take; choices have half of it, tiles the rest.
        prune: Give up choices that were slow on the first sample.
        again: Ask questions that this machine has answered before, for maps of this density.
        tick: Called after each timing.
    """

    def __init__(
        self,
        device: torch.device,
        allowed: Sequence[Choice],
        backward: bool,
        seconds: float,
        prune: bool = False,
        again: bool = False,
        tick: Callable[[], Any] = lambda: None,
    ) -> None:
        self.device, self.allowed, self.prune = device, allowed, prune
        self.kinds = ("fwd", "dgrad", "wgrad") if backward else ("fwd",)
        self.groups: dict[tuple[str, ...], Group] = {}
        self.entries: dict[str, _tuned.Entry] = {}  # answers of this search, by key
        self.replaced: dict[str, _tuned.Entry] = {}  # what was answered before, where it differs
        self.known: dict[str, _tuned.Entry] = {}  # answers that this machine had
        self.filed: dict[str, str] = {}  # as what each of both is filed
        self.gained = 0.0  # seconds that they save per sample, of `launches`
        self.launches = 0.0
        self._again, self._tick = again, tick
        self._operands = _Operands(device)
        self._start = time.monotonic()
        self._seconds = seconds
        self._calm = 0

    # -------------------------------------------------------------- the search
    @property
    def done(self) -> bool:
        """Whether time is up or nothing has changed for some samples."""
        return self._calm >= SETTLED or self._left() <= 0

    @property
    def results(self) -> dict[str, _tuned.Entry]:
        """All answers for this network, as filed: of this search, else what was known."""
        return {self.filed[name]: entry for name, entry in (self.known | self.entries).items()}

    def _left(self, share: float = 1.0) -> float:
        return self._start + share * self._seconds - time.monotonic()

    def add(self, sites: Sequence[Site]) -> None:
        """Time one more sample."""
        before = {names: group.best for names, group in self.groups.items()}
        known = len(self.entries)
        groups = sorted(_grouped(sites), key=lambda sites: -sum(site.work for site in sites))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for members in groups:
                self._time_group(members)
            self._time_tiles(sites)
        after = {names: group.best for names, group in self.groups.items()}
        settled = before == after and known == len(self.entries)
        self._calm = self._calm + 1 if settled else 0

    def _time(self, fn: Callable[[], Any]) -> float:
        limit = PER_CALL.get(self.device.type, 0.05)
        found = measure(fn, self.device, seconds=limit, least=3)
        self._tick()
        return found.median

    def confirm(self, time: Callable[[Sequence[Change]], Sequence[float]], slack: float) -> None:
        """Take back what does not pay in the network as a whole.

        Args:
            time, slack: As for `paying`; of the changes in force.
        """
        changes: list[Change] = [
            group for group in self.groups.values() if group.best and group.may_stay(self.allowed)
        ]
        changes.sort(key=lambda group: group.after - group.before if group else 0.0)
        if self.replaced:
            changes.append(None)
        kept = paying(changes, time, slack)
        for change in changes:
            if change is not None and change not in kept:
                change.best = None
            elif change is None and None not in kept:
                self.entries |= self.replaced
                self.replaced, self.gained = {}, 0.0

    # -------------------------------------------------------------- choices
    def _time_group(self, sites: list[Site]) -> None:
        names = tuple(dict.fromkeys(site.name for site in sites))
        group = self.groups.get(names)
        if group is None:
            kmap = max(sites, key=lambda site: site.work).kmap
            group = self.groups[names] = Group(
                names,
                {site.name: Choice.of(site.recipe) for site in sites},
                (kmap.num_inputs, kmap.num_outputs),
                kmap.geometry.kernel_size,
            )
            group.decide(self.allowed)  # for want of time it may stay so
        if group.samples and self._left(0.5) <= 0:
            return
        tried = self._choices(group)
        plans = {choice: self._uses(sites, choice) for choice in tried}
        keys = {choice: tuple(use.planner()[0] for use in uses) for choice, uses in plans.items()}
        if len(set(keys.values())) == 1 and not group.samples:
            # All the same on this device: nothing to time, the first allowed one serves.
            group.costs = dict.fromkeys(tried, 0.0)
            group.decide(self.allowed)
            return
        if len(set(keys.values())) == 1 or (not group.samples and self._left(0.5) <= 0):
            return
        if not group.samples:
            self._compile([(use, {}) for uses in plans.values() for use in uses])
            if self.device.type == "cuda":
                self._cost(plans[None], {})  # wakes a GPU that slowed down meanwhile
        known: dict[Any, float] = {}  # seconds of products and plans
        seen: dict[Any, float] = {}  # and of whole choices: many come to the same
        costs: dict[Choice | None, float] = {}
        for choice in tried:
            if keys[choice] not in seen:
                try:
                    seen[keys[choice]] = self._cost(plans[choice], known)
                except Exception:  # too large for this device, in one of many ways
                    if choice is None:
                        raise
                    seen[keys[choice]] = float("inf")
            costs[choice] = seen[keys[choice]]
        old = group.costs if group.samples else dict.fromkeys(costs, 0.0)
        group.costs = {choice: old[choice] + cost for choice, cost in costs.items()}
        group.samples += 1
        group.decide(self.allowed)

    def _choices(self, group: Group) -> list[Choice | None]:
        """What to time; None = as found."""
        if not group.samples:
            return [None, *self.allowed]
        limit = min(group.costs.values()) * (PRUNED if self.prune else float("inf"))
        kept = [c for c, cost in group.costs.items() if cost <= limit]
        return kept if None in kept else [None, *kept]

    def _uses(self, sites: list[Site], choice: Choice | None) -> list[_Use]:
        return [
            _Use(site, kind, site.recipe if choice is None else choice.applied(site.recipe))
            for site in sites
            for kind in self.kinds
        ]

    def _cost(self, uses: list[_Use], known: dict[Any, float]) -> float:
        """Seconds of products, and of the plans that they need, each once."""
        total, planned = 0.0, set()
        for use in uses:
            key, make = use.planner()
            plan = (id(use.site.kmap), key)
            if plan not in known:
                known[plan] = self._time(make)
            product = (*use.shape, key)
            if product not in known:
                known[product] = self._time(use.ready(self._operands))
            total += known[product] + (0.0 if plan in planned else known[plan])
            planned.add(plan)
        return total

    # -------------------------------------------------------------- tiles
    def _time_tiles(self, sites: Sequence[Site]) -> None:
        """Answer the questions of the launches, those that take longest first."""
        chosen = {n: group.choice(n) for group in self.groups.values() for n in group.names}
        uses: dict[Any, list[_Use]] = {}
        for site in sites:
            recipe = chosen[site.name].applied(site.recipe)
            for kind in self.kinds:
                use = _Use(site, kind, recipe)
                uses.setdefault((use.shape, use.planner()[0]), []).append(use)
        asked: dict[str, _Asked] = {}
        total = 0.0
        self._compile([(same[0], {}) for same in uses.values()])
        for same in uses.values():
            with _tuned.listening() as heard:
                seconds = self._time(_fresh(same[0]).ready(self._operands))
            total += len(same) * seconds
            for name, question in heard.items():
                if name in self.entries or (name in self.known and not self._again):
                    continue
                entry = asked.setdefault(name, _Asked(question, [], 0.0))
                entry.uses.append((same[0], len(same)))
                asked[name] = entry._replace(seconds=entry.seconds + len(same) * seconds)
            if self._left() <= 0:
                break
        asked = self._unknown(asked)
        ranked = [entry for entry in asked.values() if entry.seconds > SMALL * total]
        ranked.sort(key=lambda entry: -entry.seconds)
        for first in range(0, len(ranked), BATCH):
            batch = ranked[first : first + BATCH]
            if self._left() <= 0:
                return
            self._compile(
                [
                    (entry.uses[0][0], {entry.question.name: candidate})
                    for entry in batch
                    for candidate in entry.question.others()
                ]
            )
            for entry in batch:
                if self._left() <= 0:
                    return
                rest = [u for e in asked.values() if e is not entry for u, _ in e.uses]
                self._answer(entry, rest)

    def _unknown(self, asked: dict[str, _Asked]) -> dict[str, _Asked]:
        """What this machine has not answered at this density; the answers that it has serve.

        With `again` all remain, and what is known is what others are compared with.
        """
        unknown = {}
        for name, entry in asked.items():
            filed, question = entry.filed, entry.question
            known = _tuned.measured(filed, self.device)
            if known is not None:
                self.known[name], self.filed[name] = known, filed
                _tuned.record({filed: known}, self.device, write=False)
                question = question._replace(answer=known)
            if known is None or self._again:
                unknown[name] = entry._replace(question=question)
        return unknown

    def _compile(self, launches: list[tuple[_Use, dict[str, _tuned.Entry]]]) -> None:
        """Compile what products launch under the given answers; on a GPU that takes seconds."""

        def call(product: Callable[[], Tensor], answers: dict[str, _tuned.Entry]) -> None:
            with _tuned.trying(answers, self.device):
                product()

        if self.device.type != "cuda" or not launches:
            return
        calls, met = [], set()
        for use, answers in launches:
            mark = (use.shape, use.planner()[0], *answers.items())
            if mark in met:
                continue
            met.add(mark)
            try:
                calls.append(partial(call, use.ready(self._operands), answers))
            except Exception:  # whatever it is, timing it will show
                continue
        compile_ahead(launches[0][0].site.kmap.out_coords, calls)

    def _answer(self, entry: _Asked, rest: list[_Use]) -> None:
        name, answer, others = entry.question
        before = self._launch_cost(entry, answer, rest)
        reference = self._output(entry, answer)
        best, least = answer, before
        for candidate in dict.fromkeys(others()):
            if candidate == answer:
                continue
            try:
                cost = self._tile_cost(entry, candidate, rest, reference)
            except Exception:  # too large for this device, in one of many ways
                continue
            if cost < MARGIN * before and cost < least:
                best, least = candidate, cost
        if best != answer:  # once more, side by side: clocks drift
            before = min(before, self._launch_cost(entry, answer, rest))
            least = self._launch_cost(entry, best, rest)
            if least >= MARGIN * before:
                best, least = answer, before
        self.entries[name], self.filed[name] = best, entry.filed
        if best != answer:
            self.replaced.setdefault(name, answer)
        _tuned.record({entry.filed: best}, self.device, write=False)
        self.gained += before - least
        self.launches += before

    def _output(self, entry: _Asked, candidate: _tuned.Entry) -> Tensor:
        with _tuned.trying({entry.question.name: candidate}, self.device):
            return _fresh(entry.uses[0][0]).ready(self._operands)().float()

    def _tile_cost(
        self, entry: _Asked, candidate: _tuned.Entry, rest: list[_Use], reference: Tensor
    ) -> float:
        """Seconds of a candidate; infinity if it computes something else."""
        error = (self._output(entry, candidate) - reference).abs().amax()
        if not bool(error <= WRONG * reference.abs().amax()):
            return float("inf")
        return self._launch_cost(entry, candidate, rest)

    def _launch_cost(self, entry: _Asked, candidate: _tuned.Entry, rest: list[_Use]) -> float:
        """Seconds of its launches, and of plans that no other launch needs."""
        with _tuned.trying({entry.question.name: candidate}, self.device):
            total, paid = 0.0, {(id(use.site.kmap), use.planner()[0]) for use in rest}
            for use, count in entry.uses:
                key, make = use.planner()
                total += count * self._time(_fresh(use).ready(self._operands))
                plan = (id(use.site.kmap), key)
                if self.device.type == "cpu" and plan not in paid:
                    total += self._time(make)  # on a GPU no plan depends on tiles
                paid.add(plan)
            return total


class _Asked(NamedTuple):
    """A question, and the products whose launches ask it."""

    question: _tuned.Question
    uses: list[tuple[_Use, int]]  # and how many layers are alike
    seconds: float  # of them all

    @property
    def filed(self) -> str:
        """Its name at the density of the maps; each counts as often as it is launched on."""
        pairs = sum(count * use.pairs for use, count in self.uses)
        places = sum(count * use.places for use, count in self.uses)
        return _tuned.filed(self.question.name, pairs, places)


def _fresh(use: _Use) -> _Use:
    """The product on a copy of its map without plans, where those depend on answers: on a CPU."""
    site = use.site
    if site.kmap.out_coords.is_cuda:
        return use
    return use._replace(site=replace(site, kmap=replace(site.kmap, _views={})))


def _grouped(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites by shared maps; a layer that meets several maps joins their groups."""
    group_of: dict[Any, int] = {}
    groups: dict[int, list[Site]] = {}
    for number, site in enumerate(sites):
        marks = (site.name, id(site.kmap))
        joined = sorted({group_of[mark] for mark in marks if mark in group_of})
        members = [member for old in joined for member in groups.pop(old)]
        groups[number] = [*members, site]
        for member in groups[number]:
            group_of[member.name] = group_of[id(member.kmap)] = number
    return list(groups.values())
