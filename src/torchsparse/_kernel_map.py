"""Kernel maps: which input row meets which tap in which output row.

A map always runs from the fine sites (inputs) to the coarse ones (outputs); a transposed
convolution reads the same map from its other end. The record holds facts. Whatever an
implementation likes better is a view, made when asked for and remembered beside its source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchsparse._capacity import row_count
from torchsparse._geometry import Geometry
from torchsparse._ops import conv as conv_ops
from torchsparse._ops import coords as coords_ops
from torchsparse._recipe import ConvRecipe

__all__ = ["KernelMap", "KernelMapKey"]


class KernelMapKey(NamedTuple):
    """Everything that determines a map between two given levels, and its output sites."""

    stride: tuple[int, ...]  # tensor stride of the fine level (of the coarse one if generative)
    geometry: Geometry
    sites: str  # rule of the coarse sites: "same", "spconv", "minkowski", "given", "generative"
    infer_range: bool = True
    spatial_range: tuple[int, ...] | None = None  # of the layer's input
    allow_negative: bool = False


@dataclass(frozen=True, eq=False)
class KernelMap:
    """The input ``neighbors[k, m]`` meets tap k in the output m.

    1-D, kernel 3, coordinates [4, 5, 9]:  neighbors = [[-1, 0, -1], [0, 1, 2], [1, -1, -1]]
    (taps -1, 0, +1).

    Reading the map as TorchSparse 2.1's dictionary works too: ``kmap["out_in_map"]`` and the names
    listed by ``kmap.keys()``.

    Where no gradients are wanted, or maps are built together, ``neighbors`` is let go once a plan
    holds its contents in another order (`plan`), and made again if anybody asks.
    """

    neighbors: Tensor  # [K, M] int32, -1 = none; tap-major
    in_coords: Tensor  # [N, 1 + D] int32
    out_coords: Tensor  # [M, 1 + D] int32
    geometry: Geometry
    in_range: tuple[int, ...] | None = None  # spatial range of the inputs
    spatial_range: tuple[int, ...] | None = None  # of the outputs
    sort_keys: Any = None  # of the outputs, if they came with the table
    _views: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_inputs(self) -> int:
        return self.in_coords.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.out_coords.shape[0]

    @property
    def identity(self) -> int | None:
        """The tap that ties every row to itself, if there is one."""
        if self.geometry.is_symmetric and self.in_coords is self.out_coords:
            return self.geometry.volume // 2
        return None

    @classmethod
    def prepared(
        cls,
        neighbors: Tensor | None,
        ends: tuple[Tensor, Tensor],
        geometry: Geometry,
        ranges: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
        layout: Any,
        plan: conv_ops.Planned,
    ) -> KernelMap:
        """A map whose plan of a layout is there before anybody asked.

        Args:
            neighbors: Its table; None: the plan knows how to make it.
            ends: Coordinates of the inputs and outputs.
            geometry: Of the taps.
            ranges: Spatial ranges of both.
            layout: The key of the plan: see `planner`.
            plan: It.
        """
        # Let go below, if it is not there.
        table: Any = neighbors
        kmap = cls(table, *ends, geometry, *ranges)
        kmap._views["ready", layout] = plan
        if neighbors is None:
            kmap._views["neighbors"] = plan.table
            kmap.__dict__.pop("neighbors")
        return kmap

    def prepared_back(self, inverse: Tensor | None, layout: Any, plan: conv_ops.Planned) -> None:
        """The same for the map seen from its inputs: its table, and its plan of a layout."""
        ends = self.out_coords, self.in_coords
        ranges = self.spatial_range, self.in_range
        self._views["ready back"] = KernelMap.prepared(
            inverse, ends, self.geometry, ranges, layout, plan
        )

    def watched(self, plans: list[Any], back: list[Any]) -> None:
        """Note which plans are asked for, of the map and of its transposed: (recipe, backward)."""
        self._views["asked"], self._views["asked back"] = plans, back

    def _view(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, remembered under ``key``; not stored while a compiler traces."""
        view = self._views.get(key)
        if view is None:
            view = make()
            if not torch.compiler.is_compiling():
                self._views[key] = view
        return view

    # ------------------------------------------------------------------ the table, let go
    def _let_go(self, planned: conv_ops.Planned) -> None:
        """Keep the table in the plan's order alone."""
        table = planned.table
        if table is None or "neighbors" not in self.__dict__:
            return
        if not torch.compiler.is_compiling():
            self._views["neighbors"] = table
            self.__dict__.pop("neighbors", None)  # or another thread was faster

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there."""
        if name != "neighbors" or "_views" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        table = self._views["neighbors"]()
        if not torch.compiler.is_compiling():
            object.__setattr__(self, name, table)
        return table

    def _table(self) -> Tensor:
        """The table for what is made from it once: if it was let go, it is not kept again."""
        found = self.__dict__.get("neighbors")
        return self._views["neighbors"]() if found is None else found

    # ------------------------------------------------------------------ views
    @property
    def transposed(self) -> KernelMap:
        """The same pairs with inputs and outputs exchanged: result[k, neighbors[k, m]] = m."""
        return self._view("transposed", self._transpose)

    def _transpose(self) -> KernelMap:
        back = self._views.pop("ready back", None)
        if back is None:
            back = self._inverted()
        if "asked back" in self._views:
            back.watched(self._views["asked back"], [])
        return back

    def _inverted(self) -> KernelMap:
        if self.identity is not None:
            neighbors, keys = self._table().flip(0), None
        else:
            neighbors, keys = coords_ops.invert_taps(self._table(), self.num_inputs, self.geometry)
        return KernelMap(
            neighbors,
            self.out_coords,
            self.in_coords,
            self.geometry,
            self.spatial_range,
            self.in_range,
            keys,
        )

    def plan(
        self,
        recipe: ConvRecipe,
        out_channels: int,
        transposed: bool = False,
        backward: bool = False,
        keep: bool = True,
    ) -> conv_ops.Planned:
        """The layout that `_ops.conv.gather_gemm` wants for a layer of these channels.

        Without ``keep`` the table is let go if the layout holds as much: no gradients will come.
        """
        known = self._views.get((recipe, out_channels, transposed, backward))
        if known is None:
            known = self._plan(recipe, out_channels, transposed, backward, keep)
            if not torch.compiler.is_compiling():
                self._views[recipe, out_channels, transposed, backward] = known
        return known

    def _plan(
        self, recipe: ConvRecipe, out_channels: int, transposed: bool, backward: bool, keep: bool
    ) -> conv_ops.Planned:
        if transposed and self.identity is None:
            back = self.transposed
            plan = back.plan(recipe, out_channels, backward=backward, keep=keep)
            if not keep:  # both ends have been read
                back._let_go(plan)
                forth = self._views.get(("plan", recipe, backward))
                if forth is not None:
                    self._let_go(forth)
            return plan
        plan = self._views.get(("plan", recipe, backward))
        if plan is None:
            key, make = self.planner(recipe, out_channels, backward=backward)
            plan = self._view(("plan", key), partial(self._laid_out, recipe, backward, key, make))
            if plan.any_channels and not torch.compiler.is_compiling():
                self._views["plan", recipe, backward] = plan
        # Without overlap the map is small, and a decoder may still read it from its other end.
        if not keep and self.geometry.volume > math.prod(self.geometry.stride):
            self._let_go(plan)
        # Reversed taps of a symmetric table are its transposed, pair for pair.
        return plan.reversed() if transposed else plan

    def _laid_out(
        self, recipe: ConvRecipe, backward: bool, key: Any, make: Callable[[], conv_ops.Planned]
    ) -> conv_ops.Planned:
        """The plan that is ready for a key, or a new one."""
        asked = self._views.get("asked")
        if asked is not None:
            asked.append((recipe, backward))
        ready = self._views.pop(("ready", key), None)
        return make() if ready is None else ready

    def planner(
        self,
        recipe: ConvRecipe,
        out_channels: int,
        transposed: bool = False,
        backward: bool = False,
    ) -> tuple[Any, Callable[[], conv_ops.Planned]]:
        """(key, make) of the layout in `plan`: equal keys mean equal layouts."""
        if transposed and self.identity is None:
            key, make = self.transposed.planner(recipe, out_channels, backward=backward)
            return ("transposed", key), make
        return conv_ops.plan_key(
            self._table,
            self.out_coords,
            self.sort_keys,
            self.geometry,
            self.identity,
            recipe,
            out_channels,
            backward,
            row_count(self.out_coords),
        )

    def pairs(
        self, recipe: ConvRecipe, out_channels: int, transposed: bool = False
    ) -> conv_ops.Planned:
        """The layout that `_ops.conv.weight_grad` wants."""
        pairs = self._views.get(("pairs", recipe))
        if pairs is None:
            found = conv_ops.pairs_key(self._table, self.out_coords, self.geometry, recipe)
            if found is None:
                return self.plan(recipe, out_channels, transposed, backward=True)
            key, make = found
            pairs = self._view(("pairs", key), make)
            if not torch.compiler.is_compiling():
                self._views["pairs", recipe] = pairs
        return pairs.swapped() if transposed else pairs

    def pairs_planner(
        self, recipe: ConvRecipe, out_channels: int, transposed: bool = False
    ) -> tuple[Any, Callable[[], conv_ops.Planned]]:
        """(key, make) of the layout in `pairs`."""
        found = conv_ops.pairs_key(self._table, self.out_coords, self.geometry, recipe)
        return found or self.planner(recipe, out_channels, transposed, backward=True)

    @property
    def counts(self) -> Tensor:
        """[K] int32, pairs per tap."""
        return self._view("counts", lambda: (self.neighbors >= 0).sum(1, dtype=torch.int32))

    # ------------------------------------------------------------------ TorchSparse 2.1's mapping
    def _out_in_map(self, kmap: KernelMap) -> Tensor:
        rows = -(-kmap.num_outputs // 128) * 128
        table = kmap.neighbors.new_full((rows, kmap.geometry.volume), -1)
        table[: kmap.num_outputs] = kmap.neighbors.t()
        return table

    def _nbmaps(self) -> Tensor:
        present = self.neighbors >= 0
        outputs = torch.arange(self.num_outputs, dtype=torch.int32, device=present.device)
        return torch.stack([self.neighbors[present], outputs.expand_as(present)[present]], 1)

    _FACE: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "out_in_map": lambda self: self._out_in_map(self),
        "out_in_map_t": lambda self: self._out_in_map(self.transposed),
        "coords": lambda self: self.out_coords,
        "sizes": lambda self: (self.num_inputs, self.num_outputs),
        "spatial_range": lambda self: self.spatial_range,
        "nbmaps": _nbmaps,
        "nbsizes": lambda self: self.counts,
    }

    def __getitem__(self, name: str) -> Any:
        if name not in self._FACE:
            raise KeyError(f"a kernel map has {', '.join(self._FACE)}; got {name!r}")
        return self._view(("face", name), lambda: self._FACE[name](self))

    def get(self, name: str, default: Any = None) -> Any:
        """``self[name]``, or ``default`` for an unknown name."""
        return self[name] if name in self._FACE else default

    def keys(self) -> Iterator[str]:
        """Names that can be read as in a dictionary."""
        return iter(self._FACE)

    def __contains__(self, name: object) -> bool:
        return name in self._FACE

    def __iter__(self) -> Iterator[str]:
        return iter(self._FACE)
