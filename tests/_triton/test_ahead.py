"""Maps that are built before they are asked for: the same as those built one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import clouds
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._capacity import Growth, growing, mark_rows, row_count
from torchsparse._geometry import Geometry
from torchsparse._kernel_map import KernelMap, KernelMapKey
from torchsparse._ops.conv import Planned, plan_key
from torchsparse._ops.maps import layout_together
from torchsparse._triton import maps
from torchsparse._triton.conv import plan
from torchsparse.nn.functional.conv import ahead
from torchsparse.nn.functional.conv.choices import resolve
from torchsparse.operators import cat

pytestmark = pytest.mark.usefixtures("kernels", "forgetful")


class Net(nn.Module):
    """Three levels down with overlap and without, and up again."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c = channels
        self.stem = spnn.Conv3d(4, c, 3)
        self.down = nn.ModuleList([spnn.Conv3d(c, c, 2, 2), spnn.Conv3d(c, c, 3, 2, padding=1)])
        self.mid = nn.ModuleList([spnn.Conv3d(c, c, 3), spnn.Conv3d(c, c, (3, 1, 1))])
        self.up = nn.ModuleList(
            [spnn.Conv3d(c, c, 3, 2, transposed=True), spnn.Conv3d(c, c, 2, 2, transposed=True)]
        )
        self.join = spnn.Conv3d(2 * c, c, 3)

    def forward(self, x: SparseTensor) -> SparseTensor:
        first = self.stem(x)
        second = self.mid[0](self.down[0](first))
        third = self.mid[1](self.down[1](second))
        back = self.up[1](self.up[0](third))
        return self.join(cat([back, first]))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many maps were asked for together, call by call."""
    calls: list[int] = []
    build = maps.build_together

    def counted(asked: Any) -> Any:
        calls.append(len(asked))
        return build(asked)

    monkeypatch.setattr(maps, "build_together", counted)
    return calls


def scan(device: torch.device, seed: int, rows: int = 14, size: int = 5) -> SparseTensor:
    rng = clouds.rng(f"ahead {seed}")
    coords = torch.from_numpy(rng.integers(0, size, (rows, 4))).int()
    coords[:, 0] %= 2
    coords = torch.unique(coords, dim=0)
    feats = torch.from_numpy(rng.standard_normal((len(coords), 4))).float()
    return SparseTensor(feats.to(device), coords.to(device))


def fresh(x: SparseTensor) -> SparseTensor:
    return SparseTensor(x.feats, x.coords, spatial_range=x.spatial_range)


def maps_of(y: SparseTensor) -> dict[KernelMapKey, KernelMap]:
    return {
        key: entries[0].kmap
        for key, entries in y._caches.kmaps.items()
        if isinstance(key, KernelMapKey)
    }


def rows_of(kmap: KernelMap) -> list[Tensor]:
    return [kmap.in_coords, kmap.out_coords, kmap.neighbors, kmap.transposed.neighbors]


def assert_same_maps(y: SparseTensor, want: SparseTensor) -> None:
    one, other = maps_of(y), maps_of(want)
    assert list(one) == list(other)
    assert len(one) == 5
    for key, kmap in one.items():
        for a, b in zip(rows_of(kmap), rows_of(other[key])):
            assert torch.equal(a, b), key


def lazily(net: nn.Module, x: SparseTensor) -> SparseTensor:
    """The output with maps built one by one."""
    ahead._notes.clear()
    y = net(fresh(x))
    y.feats  # noqa: B018 - computed now
    ahead._notes.clear()
    return y


@pytest.fixture(params=[False, True], ids=["unsorted", "shared"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Maps of a few rows as they are; or sorted, apart for each of four shares of 27 taps."""
    if request.param:
        monkeypatch.setattr(plan, "FEW_ROWS", 0)
    return {1, 4} if request.param else {1}


def shares_of(y: SparseTensor) -> set[int]:
    views = [view for kmap in maps_of(y).values() for view in kmap._views.values()]
    return {view.plan.tiles.shares for view in views if isinstance(view, Planned)}


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("grad", [False, True])
def test_the_second_scan_finds_all_maps_ready(device, built, grad, shares):
    net = Net().to(device)
    with torch.set_grad_enabled(grad):
        net(scan(device, 1)).feats  # noqa: B018
        assert built == []
        x = scan(device, 2)
        y = net(x)
        got = y.feats
        assert built == [5]
        shelf: Any = y._caches.kmaps["ahead"].shelf
        assert shelf == {}, "everything was taken"
        assert shares_of(y) == shares
        want = lazily(net, x)
        assert torch.equal(got, want.feats)
        assert_same_maps(y, want)


def test_layouts_follow_the_rows_that_are_expected(device):
    """Of padded coordinates, four fifths; in a plan for itself and in one among others."""
    rows = 11_000
    coords = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    cube = Geometry.submanifold((3, 3, 3), (1, 1, 1))
    feats = torch.ones(1, 4, device=device, dtype=torch.half)
    recipe = resolve(None, feats, feats.new_ones(27, 4, 4), None)
    table = torch.full((27, 0), -1, dtype=torch.int32, device=device)
    for shares in (2, 3):
        layout, _ = plan_key(
            lambda: table, coords, None, cube, None, recipe, 4, False, row_count(coords)
        )
        assert layout == layout_together(coords, cube, recipe, False) == ("gemm", True, shares)
        mark_rows(coords, torch.tensor([rows], device=device))


@pytest.mark.usefixtures("shares", "rows_alike")
def test_gradients_are_those_of_maps_built_one_by_one(device, built):
    """And no table is kept: lists of pairs are made from plans, by what is let go again."""
    net = Net().to(device)
    x = scan(device, 3)

    def step() -> tuple[SparseTensor, list[Tensor]]:
        net.zero_grad()
        y = net(fresh(x))
        y.feats.square().sum().backward()
        return y, [p.grad.clone() for p in net.parameters() if p.grad is not None]

    _, want = step()
    y, got = step()
    assert built == [5]
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    entries = [e for key, e in y._caches.kmaps.items() if isinstance(key, KernelMapKey)]
    kmaps = [entry.kmap for found in entries for entry in found]
    assert len(kmaps) == 5
    for kmap in kmaps:
        assert any(isinstance(key, tuple) and key[0] == "pairs" for key in kmap._views)
        assert "neighbors" not in kmap.__dict__


def test_a_level_without_room_is_built_by_its_layer(device, built, monkeypatch):
    monkeypatch.setattr(ahead, "rounded", lambda rows: rows)
    net = Net().to(device)
    x = scan(device, 4)
    with torch.no_grad():
        want = net(fresh(x)).feats
        for wishes in ahead._notes.values():
            for wish in wishes:
                wish.share = min(wish.share, 0.1)
        y = net(fresh(x))
        assert torch.equal(y.feats, want)
        assert built == [1], "the stem's map alone has its level"
        # What was seen now serves the next one.
        assert torch.equal(net(fresh(x)).feats, want)
    assert built == [1, 5]


def test_wide_keys_are_found_out_and_remembered(device, built):
    net = Net().to(device)
    x = scan(device, 5)
    far = x.coords.clone()
    far[0, 1:] = torch.tensor([1 << 20, 1 << 18, 3], device=device, dtype=torch.int32)
    wide = SparseTensor(x.feats, far)
    with torch.no_grad():
        want = net(fresh(wide)).feats
        assert torch.equal(net(fresh(wide)).feats, want)
        assert built == [1]
        assert torch.equal(net(fresh(wide)).feats, want)
        assert built == [1, 5]
        assert torch.equal(net(fresh(x)).feats, lazily(net, x).feats)


def test_another_network_on_the_same_first_layer_gets_its_own_maps(device):
    class Half(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: SparseTensor) -> SparseTensor:
            return self.net.mid[1](self.net.down[1](self.net.stem(x)))

    net = Net().to(device)
    half = Half(net)
    x, z = scan(device, 6), scan(device, 7)
    with torch.no_grad():
        for model, cloud in ((net, x), (half, z), (half, x), (net, z)):
            got = model(fresh(cloud)).feats
            notes = dict(ahead._notes)
            want = lazily(model, cloud).feats
            ahead._notes.update(notes)
            assert torch.equal(got, want)


class Other(nn.Module):
    """Given sites, a generative layer, a transposed one without a twin, a pool, two layers that
    lead to one stride."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        c = channels
        self.stem = spnn.Conv3d(4, c, 3)
        self.down = nn.ModuleList([spnn.Conv3d(c, c, 2, 2), spnn.Conv3d(c, c, 3, 2, padding=1)])
        self.onto = spnn.Conv3d(c, c, 3)
        self.grow = spnn.Conv3d(c, c, 2, 2, transposed=True, generative=True)
        self.up = spnn.Conv3d(c, c, 3, 2, transposed=True)
        self.deep = spnn.Conv3d(c, c, 3)

    def forward(self, x: SparseTensor) -> SparseTensor:
        first = self.stem(x)
        one = self.deep(self.down[0](first))
        two = self.deep(self.down[1](first))
        moved = self.onto(one, coordinates=two)
        grown = self.onto(self.grow(two))
        pooled = spnn.MaxPool3d(2)(one)
        back = self.up(one)
        back.feats = back.feats + first.feats + moved.feats.sum() + grown.feats.sum()
        back.feats = back.feats + pooled.feats.sum()
        return back


def test_networks_of_other_kinds(device, built):
    net = Other().to(device)
    for seed in (20, 21):
        x = scan(device, seed, 8, 4)
        got = net(fresh(x)).feats
        notes = dict(ahead._notes)
        want = lazily(net, x).feats
        ahead._notes.update(notes)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert built == [5]


class Grows(nn.Module):
    """A level that nobody can note comes between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = spnn.Conv3d(4, 4, 3)
        self.down = spnn.Conv3d(4, 4, 2, 2)
        self.grow = spnn.Conv3d(4, 4, 2, 2, transposed=True, generative=True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        first = self.stem(x)
        one = self.down(first)
        grown = self.grow(one)
        first.feats = first.feats + grown.feats.sum() + self.down(one).feats.sum()
        return first


def test_sizes_are_planned_up_to_where_others_create_levels(device, built):
    from torchsparse._capacity import Room
    from torchsparse._graphs import padded, placed

    net = Grows().to(device)
    x = scan(device, 23, 8, 4)
    with torch.no_grad():
        with growing(Growth()) as seen:
            want = net(fresh(x)).feats
        assert len(seen.levels) == 3 and len(seen.wishes) == 2
        coords, feats, count = placed(x, 128)
        rooms = [Room(128, True) for _ in seen.levels]
        output, _, report = padded(net, x, coords, feats, count, rooms, seen.wishes)
        assert built == [2]
        sites = report[:-1].view(-1, 4)[:, 0].tolist()
        assert sites == [level.sites for level in seen.levels]
        # The sums over all rows have other lengths, so roundings differ.
        torch.testing.assert_close(output.feats[: len(want)], want, rtol=1e-5, atol=1e-5)


def test_ranges_and_modes_are_those_of_the_scan(device, built):
    net = Net().to(device)
    x = scan(device, 8)
    ranged = SparseTensor(x.feats, x.coords, spatial_range=(2, 5, 5, 5))
    with torch.no_grad():
        net(fresh(x)).feats  # noqa: B018
        y = net(fresh(ranged))
        want = lazily(net, ranged)
        assert torch.equal(y.feats, want.feats)
        assert_same_maps(y, want)
        assert built == [5]
        assert all(key.spatial_range is not None for key in maps_of(y))


def test_coordinates_written_to_meanwhile_are_seen(device):
    net = Net().to(device)
    x = scan(device, 9)
    with torch.no_grad():
        net(fresh(x)).feats  # noqa: B018
        y = SparseTensor(x.feats, x.coords.clone())
        net.stem(y).feats  # noqa: B018 - builds all
        y.coords[:, 1] += 1
        moved = SparseTensor(x.feats, y.coords.clone())
        got = net(y)
        got.feats  # noqa: B018
        assert_same_maps(got, lazily(net, moved))


@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_voxels(device, rows):
    net = Net().to(device)
    x = scan(device, 10, rows)
    with torch.no_grad():
        want = net(fresh(x)).feats
        assert torch.equal(net(fresh(x)).feats, want)
        big = scan(device, 11)
        assert torch.equal(net(fresh(big)).feats, lazily(net, big).feats)
        net(fresh(big)).feats  # noqa: B018
        assert torch.equal(net(fresh(x)).feats, want)


def test_duplicates_are_still_complained_about(device):
    net = Net().to(device)
    x = scan(device, 12)
    with torch.no_grad():
        net(fresh(x)).feats  # noqa: B018
        double = SparseTensor(
            torch.cat([x.feats, x.feats[:1]]), torch.cat([x.coords, x.coords[:1]])
        )
        with pytest.raises(ValueError, match="unique rows"):
            net(double).feats  # noqa: B018


def test_planned_sizes_use_the_notes_of_the_pass_before(device, built):
    from torchsparse._capacity import Room
    from torchsparse._graphs import padded, placed

    net = Net().to(device)
    x = scan(device, 13)
    with torch.no_grad():
        with growing(Growth()) as seen:
            want = net(fresh(x)).feats
        coords, feats, count = placed(x, 128)
        rooms = [Room(128, True) for _ in range(len(seen.levels))]
        ends: list[Any] = []
        told: list[tuple[int, torch.Tensor]] = []
        hook = net.stem.register_forward_hook(lambda *ends_with: ends.append(ends_with))
        output, growth, report = padded(
            net, x, coords, feats, count, rooms, seen.wishes,
            lambda report: told.append((len(ends), report)),
        )  # fmt: skip
        hook.remove()
        assert built == [5]
        # All levels were there, and said so, before the first layer went on.
        assert len(told) == len(ends) == 1 and told[0][0] == 0 and told[0][1] is report
        assert torch.equal(output.feats[: len(want)], want)
        sites = report[:-1].view(-1, 4)[:, 0].tolist()
        assert sites == [level.sites for level in seen.levels]
        assert growth.wishes is None
