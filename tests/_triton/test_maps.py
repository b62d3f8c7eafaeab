"""Tables and plans that are built together, against the reference."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests._triton.kit import NDIMS, cloud, geometries, to
from torchsparse._asked import Asked
from torchsparse._geometry import Geometry
from torchsparse._reference import coords as plain
from torchsparse._reference import maps as one_by_one
from torchsparse._triton import coords as kernels
from torchsparse._triton import maps
from torchsparse._triton.conv import table_of
from torchsparse._triton.conv.order import Tiles, key_bits, row_sort_keys
from torchsparse._triton.coords.index import searching

SORTED, AS_THEY_ARE, SHARED = ("gemm", True, 1), ("gemm", False, 1), ("gemm", True, 3)


def check_tiles(tiles: Tiles | None, rows: Tensor, geometry: Geometry, layout: Any) -> None:
    """Each of ``rows`` [M, K] once in every share of the taps, by falling sort keys if any, under
    masks of their taps."""
    _, sort, shares = layout
    assert tiles is not None and tiles.shares == shares
    assert (tiles.order is not None) == sort
    table, device = tiles.table.cpu(), tiles.table.device
    for share in range(shares):
        first, last = (geometry.volume * end // shares for end in (share, share + 1))
        order = torch.arange(len(rows))
        if tiles.order is not None:
            order = tiles.order[share, : len(rows)].long().cpu()
            bits = key_bits(geometry, device, shares)[share]
            keys, _ = row_sort_keys(rows.t().to(device), bits)
            assert (keys.cpu().long()[order].diff() <= 0).all()
            assert torch.equal(order.sort().values, torch.arange(len(rows)))
        assert torch.equal(table[first:last], rows[order].t()[first:last])
        for tile, mask in enumerate(tiles.masks[share, 0].tolist()):
            there = (table[:, 64 * tile : 64 * (tile + 1)] >= 0).any(1)
            want = [first <= tap < last and bool(there[tap]) for tap in range(geometry.volume)]
            assert [bool(mask >> tap & 1) for tap in range(geometry.volume)] == want


@pytest.mark.parametrize("most", [maps.MOST_FOUND, 1])
@pytest.mark.parametrize("ndim", NDIMS)
def test_tables_and_plans(
    ndim: int, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all geometries at once, or of each in a go of its own."""
    monkeypatch.setattr(maps, "MOST_FOUND", most)
    fine = to(device, cloud(ndim, "many", rows=60))
    wanted = [g for g in geometries(ndim) if maps.together(g, SORTED, len(fine))]
    assert len(wanted) >= 2
    reach = tuple(max(axis) for axis in zip(*(g.reach for g in wanted)))
    index, judge = kernels.build_index(fine, reach), plain.build_index(fine.cpu(), reach)
    none = (None,) * ndim
    asked, expected, shared = [], [], 0
    for place, geometry in enumerate(wanted):
        coarse = None
        if geometry.kind == "strided":
            coarse, _ = plain.strided_sites(judge, fine.cpu(), geometry, none, none)
        layout = SORTED if place % 2 else AS_THEY_ARE
        if geometry.is_symmetric and geometry.volume > 3:
            layout = SHARED
            shared += 1
        back = None if coarse is None else SORTED
        expected.append(Asked(judge, coarse, geometry, layout, back))
        there = None if coarse is None else coarse.to(device)
        asked.append(Asked(index, there, geometry, layout, back))
    goes: list[int] = []
    launch_all = maps._launch_all

    def noted(tables: Any, buffers: Any) -> None:
        goes.append(len(tables))
        launch_all(tables, buffers)

    monkeypatch.setattr(maps, "_launch_all", noted)
    assert shared or ndim in (1, 4)  # three taps, or more than a word holds
    made = maps.build_together(asked)
    assert len(goes) == (1 if most > 1 else len(asked))
    for one, got, want in zip(asked, made, one_by_one.build_together(expected)):
        assert got.neighbors is got.inverse is None  # plans hold what is in them
        pairs = ((want.neighbors, got.plan, one.layout),
                 (want.inverse, got.inverse_plan, one.back))  # fmt: skip
        for right, plan, layout in pairs:
            if right is None or plan is None:
                assert right is plan is None
                continue
            table = table_of(plan)
            assert table is not None and torch.equal(table().cpu(), right)
            check_tiles(plan.tiles, right.t(), one.geometry, layout)


@pytest.mark.parametrize(
    ("rows", "most", "want"),
    [
        ([0, 0], 1000, [2]),
        ([5], 1, [1]),
        ([100, 1, 1, 1], 1500, [1, 3]),
        ([1, 1, 1, 100], 1500, [4]),
        ([40, 40, 40, 40], 2240, [2, 2]),  # of 28 words a row
    ],
)
def test_shares_of_large_maps(rows: list[int], most: int, want: list[int], monkeypatch) -> None:
    """In their order, each once, of about equal size."""
    monkeypatch.setattr(maps, "MOST_FOUND", most)
    cube = Geometry.submanifold((3, 3, 3), (1, 1, 1))
    search, index = searching(cube, torch.device("cpu")), cast(Any, None)
    coords = [torch.zeros(n, 4, dtype=torch.int32) for n in rows]
    tables = [
        maps._Table(i, False, False, index, search, own, search.bits, True, 1)
        for i, own in enumerate(coords)
    ]
    goes = list(maps._goes([[table] for table in tables]))
    assert [len(part) for part in goes] == want
    assert [table.number for part in goes for table in part] == list(range(len(rows)))
