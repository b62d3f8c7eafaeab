"""Maps before they are asked for: a network asks for the same ones in every scan.

A cache notes which maps and plans the layers of a network ask for, beginning with the first
layer that finds none. When that layer meets the next scan, all of these are built at once: the
coordinates of all levels while the host waits one time for their sizes, then their tables and
plans in a dozen launches (`_ops.maps`). What is ready stands on a shelf until a layer asks for it
and it fits; nothing else knows of it, so a wrong guess costs time and changes no result.

Where sizes are planned beforehand (`_capacity.Growth`), nobody waits, and the notes are those of
the pass that showed the sizes.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsparse._asked import Asked, Made
from torchsparse._cache import Stamp
from torchsparse._capacity import Growth, Room, growing, growth, rounded
from torchsparse._flags import pending_word, raise_found
from torchsparse._geometry import Geometry
from torchsparse._kernel_map import KernelMap, KernelMapKey
from torchsparse._ops import maps as ops
from torchsparse._settings import settings
from torchsparse.nn.functional.conv.levels import Indexed, Range, index_of, strided_level
from torchsparse.tensor import SparseTensor

__all__ = ["Ahead", "look_ahead"]

MOST_MAPS = 16  # that are built together, and noted
MOST_NOTES = 64  # networks
SPARE = 1.15  # room in a level beyond the share of the input's sites that it had before
NARROW = torch.iinfo(torch.int32).max  # cells of a level with narrow keys
RULES = ("same", "spconv", "minkowski")  # of outputs that follow from the inputs
START = -1  # the level that a network begins on, in place of the map that created it


@dataclass
class Wish:
    """A map that a network asked for."""

    begins: int  # place of the map that created its fine level among the wishes
    stride: tuple[int, ...]
    geometry: Geometry
    sites: str  # as in `KernelMapKey`
    plans: list[Any] = field(default_factory=list)  # (recipe, backward) of its plans
    back: list[Any] = field(default_factory=list)  # of those of its transposed
    share: float = 1.0  # outputs per input
    wide: bool = False  # the keys of its outputs do not fit into 32 bits

    @property
    def creates(self) -> bool:
        """Whether its outputs are a level of their own."""
        return self.sites != "same"

    @property
    def name(self) -> Hashable:
        """The same from scan to scan."""
        return self.begins, self.stride, self.geometry, self.sites


_notes: dict[Hashable, list[Wish]] = {}  # of the last scan, by network: see `look_ahead`
_noting = threading.Lock()


@dataclass
class _Ready:
    """A map on the shelf."""

    kmap: KernelMap
    inputs: Stamp
    coarse: Indexed | None  # search structure of the level that it creates


class Ahead:
    """What one cache notes, and what stands ready for it."""

    def __init__(self, start: Tensor) -> None:
        self.wishes: list[Wish] = []
        self.shelf: dict[KernelMapKey, _Ready] = {}
        self.wide: set[Hashable] = set()  # names of wishes whose outputs have wide keys
        self._levels: list[tuple[int, Tensor]] = [(START, start)]
        self._open = True

    def take(self, key: KernelMapKey, coords: Tensor) -> tuple[KernelMap, Indexed | None] | None:
        """What is ready under a key for sites [N, 1 + D]: the map, and the search structure of
        the level that it creates."""
        ready = self.shelf.get(key)
        if ready is None or not ready.inputs.fits(coords):
            return None
        del self.shelf[key]
        return ready.kmap, ready.coarse

    def note(self, key: KernelMapKey, kmap: KernelMap) -> None:
        """A layer has got a map."""
        if not self._open or key.sites not in RULES:
            return
        begins = [place for place, coords in self._levels if coords is kmap.in_coords]
        if not begins or len(self.wishes) == MOST_MAPS:
            return
        wish = Wish(begins[0], key.stride, key.geometry, key.sites)
        if wish.creates:
            self._levels.append((len(self.wishes), kmap.out_coords))
            watch = growth()
            if watch is not None and len(watch.levels) != len(self._levels) - 1:
                # Others create levels, too, and these are planned by the order of creation.
                self._open = False
                return
            wish.share = kmap.num_outputs / max(kmap.num_inputs, 1)
            wish.wide = wish.name in self.wide
        self.wishes.append(wish)
        kmap.watched(wish.plans, wish.back)


def look_ahead(x: SparseTensor, coords: Tensor, network: Hashable) -> None:
    """Begin the notes of a cache, and build what the last scan's notes of a network say.

    Args:
        x: The first tensor of a network.
        coords: Its sites, [N, 1 + D] int32, on a device with kernels.
        network: Tells it from others: a parameter's identity, say.
    """
    ahead = x._caches.kmaps["ahead"] = Ahead(coords)
    watch = growth()
    if watch is None:
        key = (network, x.stride, coords.device, torch.is_grad_enabled())
        with _noting:
            wishes = _notes.pop(key, None)
            _notes[key] = ahead.wishes
            while len(_notes) > MOST_NOTES:
                del _notes[next(iter(_notes))]  # the oldest
    elif watch.padded:
        wishes, watch.wishes = watch.wishes, None
    else:
        wishes = None
        if watch.wishes is None:  # of the first cache that the network begins
            watch.wishes = ahead.wishes
    if wishes and len(wishes) > 1:  # one alone gains nothing
        _build(x, coords, wishes, ahead, watch)


class _Site(NamedTuple):
    """A level while maps are built."""

    index: Any
    coords: Tensor
    limits: Range


def _build(
    x: SparseTensor, coords: Tensor, wishes: list[Wish], ahead: Ahead, watch: Growth | None
) -> None:
    """Put maps on the shelf, as far as everything is as it was."""
    reach = tuple([max(axis) for axis in zip(*(wish.geometry.reach for wish in wishes))])
    index = index_of(x._caches, coords, x.stride, reach, x.spatial_range)
    levels = {START: _Site(index, coords, x.spatial_range)}
    plan = watch or Growth(_rooms(wishes, coords.shape[0]), rows=coords.shape[0])
    created: list[int] = []
    with growing(plan):
        for place, wish in enumerate(wishes):
            if wish.creates:
                if not _create(wish, place, levels):
                    break  # sizes are planned by the order of creation
                created.append(place)
    if watch is None and created:
        ahead.wide = {wish.name for wish in wishes if wish.wide}
        _settle(wishes, created, levels, plan, ahead)
    asked: list[Asked] = []
    served: list[tuple[Wish, _Site, _Site | None]] = []
    for place, wish in enumerate(wishes):
        fine, coarse = levels.get(wish.begins), levels.get(place)
        if fine is None or (wish.creates and coarse is None):
            continue
        layout = _layout(wish.plans, fine if coarse is None else coarse, wish.geometry)
        if layout is None or any(a > b for a, b in zip(wish.geometry.reach, fine.index.margin)):
            continue
        sites = None if coarse is None else coarse.coords
        back = _layout(wish.back, fine, wish.geometry)
        asked.append(Asked(fine.index, sites, wish.geometry, layout, back))
        served.append((wish, fine, coarse))
    if not asked:
        return
    made = ops.build_together(asked)
    for (wish, fine, coarse), wanted, found in zip(served, asked, made):
        ahead.shelf[_key(wish, fine.limits)] = _ready(fine, coarse, wanted, found)


def _rooms(wishes: list[Wish], rows: int) -> list[Room]:
    """What to plan for levels, from the shares that they had."""
    sites: dict[int, float] = {START: rows}
    rooms: list[Room] = []
    for place, wish in enumerate(wishes):
        if wish.creates:
            sites[place] = sites.get(wish.begins, rows) * wish.share
            rooms.append(Room(rounded(int(sites[place] * SPARE) + 1), not wish.wide))
    return rooms


def _key(wish: Wish, limits: Range) -> KernelMapKey:
    """The key under which a layer looks for the map today."""
    infer = settings.infer_spatial_range if wish.creates else True
    negative = settings.allow_negative_coordinates
    return KernelMapKey(wish.stride, wish.geometry, wish.sites, infer, limits, negative)


def _layout(plans: list[Any], rows: _Site, geometry: Geometry) -> Any | None:
    """The layout of the plan that was asked for first, if it can be made with others."""
    if not plans:
        return None
    recipe, backward = plans[0]
    return ops.layout_together(rows.coords, geometry, recipe, backward)


def _create(wish: Wish, place: int, levels: dict[int, _Site]) -> bool:
    """Create the level of a wish, if its map can be built."""
    fine = levels.get(wish.begins)
    if fine is None or _layout(wish.plans, fine, wish.geometry) is None:
        return False
    key = _key(wish, fine.limits)
    try:
        coords, index, limits = strided_level(fine.index, fine.coords, wish.geometry, key)
    except ValueError:  # a range that became empty: the layer will say so
        return False
    levels[place] = _Site(index, coords, limits)
    return True


def _settle(
    wishes: list[Wish], created: list[int], levels: dict[int, _Site], plan: Growth, ahead: Ahead
) -> None:
    """Cut levels to their sizes; wait for these. Those that had no room are taken away, and what
    is built on them."""
    device = levels[START].coords.device
    word = pending_word(device)
    *numbers, complaints = torch.cat([*plan.infos, word.view(1)]).tolist()  # the synchronisation
    if complaints:
        word.zero_()
        raise_found(complaints, device)
    for order, place in enumerate(created):
        count, lost, _, cells = numbers[4 * order : 4 * order + 4]
        wish = wishes[place]
        index, coords, limits = levels.pop(place)
        wide = cells > NARROW
        if wide:
            ahead.wide.add(wish.name)
        if wish.begins in levels and count <= coords.shape[0] and not lost and wide <= wish.wide:
            coords = coords[:count]
            levels[place] = _Site(index._replace(coords=coords), coords, limits)


def _ready(fine: _Site, coarse: _Site | None, asked: Asked, made: Made) -> _Ready:
    target = fine if coarse is None else coarse
    ends, limits = (fine.coords, target.coords), (fine.limits, target.limits)
    geometry, layout, back = asked[2:]
    kmap = KernelMap.prepared(made.neighbors, ends, geometry, limits, layout, made.plan)
    if back is not None:
        kmap.prepared_back(made.inverse, back, made.inverse_plan)
    inputs = Stamp(fine.coords)
    if coarse is None:
        return _Ready(kmap, inputs, None)
    return _Ready(kmap, inputs, Indexed.created(coarse.coords, coarse.index, coarse.limits))
