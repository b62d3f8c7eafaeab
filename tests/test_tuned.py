"""What the machine measured: a table on disk that is whole, its own, or not there."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchsparse import SparseTensor, _tuned
from torchsparse import nn as spnn
from torchsparse._reference import conv as reference

CPU = torch.device("cpu")
KEY = _tuned.key("fwd", 70_000, 64, 96, 27, "float16", "ieee", "sm_90")
ENTRY, OTHER = (64, 128, 64, 3, 4, 1), (128, 128, 64, 3, 8, 1)
THIN, DENSE = (_tuned.filed(KEY, pairs, 27 * 70_000) for pairs in (240_000, 1_200_000))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path))
    _tuned.forget()
    yield tmp_path
    _tuned.forget()


def file() -> Path:
    path = _tuned.file_of(CPU)
    assert path is not None
    return path


def content(**changes: Any) -> str:
    good = {"format": 2, "machine": _tuned.machine(CPU), "entries": [[THIN, list(ENTRY)]]}
    return json.dumps(good | changes)


# ------------------------------------------------------------------ keys
def test_sizes_of_one_power_of_two_share_a_key() -> None:
    def name(rows: int) -> str:
        return _tuned.key("fwd", rows, 64, 96, 27, "float16", "ieee", "sm_90")

    assert name(65_536) == name(131_071) == KEY
    assert len({name(65_535), name(65_536), name(131_072), name(0)}) == 4


def test_every_part_of_a_key_counts() -> None:
    parts = ("fwd", 70_000, 64, 96, 27, "float16", "ieee", "sm_90")
    others = ("dgrad", 7, 32, 64, 8, "float32", "tf32", "sm_80")
    names = {_tuned.key(*parts)}  # pyright: ignore[reportArgumentType]
    for place, other in enumerate(others):
        changed = (*parts[:place], other, *parts[place + 1 :])
        names.add(_tuned.key(*changed))  # pyright: ignore[reportArgumentType]
    assert len(names) == 1 + len(parts)


def test_densities_of_one_power_of_two_share_a_name() -> None:
    assert (THIN, DENSE) == (f"{KEY}/d3", f"{KEY}/d1")
    found = {pairs: _tuned.filed("key", pairs, 1 << 20) for pairs in (1 << 20, 700_000, 99_000)}
    assert list(found.values()) == ["key/d0", "key/d1", "key/d3"]
    assert _tuned.filed("key", 27, 27 * 27) == "key/d5"  # nothing but the middle tap
    few = {_tuned.filed("key", pairs, 1 << 20) for pairs in (0, 1, 2048)}
    assert few == {"key/d9"} and _tuned.filed("key", 0, 0) == "key/d9"


# ------------------------------------------------------------------ densities
def test_two_densities_lie_side_by_side_and_the_last_tuned_serves() -> None:
    _tuned.record({THIN: ENTRY}, CPU)
    _tuned.record({DENSE: OTHER}, CPU)
    for _ in ("in memory", "from the file"):
        assert _tuned.recorded(CPU) == {THIN: ENTRY, DENSE: OTHER}
        assert (_tuned.measured(THIN, CPU), _tuned.measured(DENSE, CPU)) == (ENTRY, OTHER)
        assert _tuned.measured(f"{KEY}/d2", CPU) is None
        assert _tuned.lookup(KEY, CPU) == OTHER and _tuned.entries(CPU) == {KEY: OTHER}
        _tuned.forget()


def test_an_entry_that_is_recorded_again_goes_in_front() -> None:
    _tuned.record({THIN: ENTRY, DENSE: OTHER}, CPU)
    before = _tuned.generation()
    _tuned.record({THIN: ENTRY}, CPU)
    assert _tuned.lookup(KEY, CPU) == ENTRY and _tuned.generation() != before
    before = _tuned.generation()
    _tuned.record({THIN: ENTRY}, CPU)
    assert _tuned.generation() == before  # nothing has another answer
    _tuned.forget()
    assert _tuned.lookup(KEY, CPU) == ENTRY
    assert list(_tuned.recorded(CPU).items()) == [(DENSE, OTHER), (THIN, ENTRY)]


def test_what_is_put_in_front_without_writing_is_so_in_this_process_alone() -> None:
    _tuned.record({THIN: ENTRY, DENSE: OTHER}, CPU)
    _tuned.record({THIN: ENTRY}, CPU, write=False)
    assert _tuned.lookup(KEY, CPU) == ENTRY
    _tuned.forget()
    assert _tuned.lookup(KEY, CPU) == OTHER


def test_trying_nothing_hides_all_densities() -> None:
    _tuned.record({THIN: ENTRY, DENSE: OTHER}, CPU, write=False)
    with _tuned.trying({KEY: None}, CPU):
        assert _tuned.lookup(KEY, CPU) is _tuned.measured(THIN, CPU) is None
        assert _tuned.measured(DENSE, CPU) is None and _tuned.entries(CPU) == {}
    with _tuned.trying({KEY: (1, 2)}, CPU):
        assert _tuned.lookup(KEY, CPU) == (1, 2)
        assert _tuned.recorded(CPU) == {THIN: ENTRY, DENSE: OTHER}  # a trial is no measurement
    assert _tuned.lookup(KEY, CPU) == _tuned.measured(DENSE, CPU) == OTHER


# ------------------------------------------------------------------ to disk and back
def test_nothing_is_known_at_first_and_nothing_is_written() -> None:
    assert _tuned.lookup(KEY, CPU) is None
    assert not file().exists()


def test_what_is_recorded_is_there_in_the_next_process(folder: Path) -> None:
    _tuned.record({THIN: ENTRY}, CPU)
    _tuned.forget()
    assert _tuned.lookup(KEY, CPU) == ENTRY
    assert os.listdir(folder) == [file().name]  # no lock, no partial file


def test_what_is_not_to_be_written_is_not() -> None:
    _tuned.record({THIN: ENTRY}, CPU, write=False)
    assert _tuned.lookup(KEY, CPU) == ENTRY and not file().exists()
    _tuned.forget()
    assert _tuned.lookup(KEY, CPU) is None


def test_a_writer_keeps_what_another_process_wrote() -> None:
    assert _tuned.lookup(KEY, CPU) is None  # this process has read an empty table
    file().write_text(content(entries=[["other/d2", [1, 2]], [DENSE, list(OTHER)]]))
    _tuned.record({THIN: ENTRY}, CPU)
    _tuned.forget()
    assert _tuned.recorded(CPU) == {"other/d2": (1, 2), DENSE: OTHER, THIN: ENTRY}
    assert _tuned.entries(CPU) == {"other": (1, 2), KEY: ENTRY}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        (content()[:-40], "cannot be read"),
        ("\x80\x04\x95 a pickle", "cannot be read"),
        ("[1, 2]", "expected format 2"),
        ("[" * 100_000, "cannot be read"),
        (content(format=3), "expected format 2, got 3"),
        (content(format=1, entries={KEY: list(ENTRY)}), "expected format 2, got 1"),
        (content(entries=[[THIN, "64"]]), "damaged"),
        (content(entries=[[THIN, [64, -1]]]), "damaged"),
        (content(entries=[[THIN, [64, 1 << 40]]]), "damaged"),
        (content(entries=[[THIN, [True]]]), "damaged"),
        (content(entries=[[THIN]]), "damaged"),
        (content(entries=[[3, [64]]]), "damaged"),
        (content(entries=[THIN]), "damaged"),
        (content(entries={THIN: list(ENTRY)}), "damaged"),
        (content(machine={"device": "another"}), "another machine"),
        (content(machine=_tuned.machine(CPU) | {"torch": "0.1"}), "other versions"),
        (content(machine=_tuned.machine(CPU) | {"sources": "0"}), "other versions"),
    ],
    ids=range(18),
)
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(text: str, reason: str) -> None:
    file().write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert _tuned.lookup(KEY, CPU) is None
        assert _tuned.lookup(KEY, CPU) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tuned.record({THIN: ENTRY}, CPU)  # writes a new one
        _tuned.forget()
        assert _tuned.entries(CPU) == {KEY: ENTRY}


def test_a_folder_that_cannot_be_written_costs_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv(_tuned.VARIABLE, str(folder / "file" / "below"))
    with pytest.warns(UserWarning, match="cannot be written"):
        _tuned.record({THIN: ENTRY}, CPU)
    assert _tuned.lookup(KEY, CPU) == ENTRY


def test_the_variable_names_the_folder_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_tuned.VARIABLE, "")
    assert _tuned.file_of(CPU) is None
    _tuned.record({THIN: ENTRY}, CPU)
    assert _tuned.lookup(KEY, CPU) == ENTRY
    monkeypatch.delenv(_tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert file().parent == Path("/somewhere/torchsparse")


def test_another_version_has_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    here = file()
    monkeypatch.setattr(_tuned, "__version__", "9.9.9")
    assert file() != here and file().parent == here.parent


def test_a_thousand_entries_load_in_ten_milliseconds() -> None:
    names = [_tuned.key("fwd", 1 << 20, c, 64, 27, "float16", "ieee", "sm_90") for c in range(500)]
    found = [_tuned.filed(name, pairs, 8) for pairs in (1, 4) for name in names]
    _tuned.record(dict.fromkeys(found, ENTRY), CPU)
    best = 1.0
    for _ in range(5):
        _tuned.forget()
        start = time.perf_counter()
        assert _tuned.lookup(names[7], CPU) == ENTRY
        best = min(best, time.perf_counter() - start)
    assert (len(_tuned.recorded(CPU)), len(_tuned.entries(CPU))) == (1000, 500)
    assert best < 0.01, best


WRITER = """
import sys, torch
from torchsparse import _tuned
who, density = sys.argv[1:]
for number in range(25):
    found = {f"{who}/{number}/d3": (number,), f"both/d{density}": (number, int(density))}
    _tuned.record(found, torch.device("cpu"))
"""


def test_two_processes_write_at_once_and_nothing_is_lost() -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, who, density])
        for who, density in (("one", "1"), ("two", "2"))
    ]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        if file().exists():
            seen += 1
            assert json.loads(file().read_text())["format"] == 2  # whole at any moment
        time.sleep(0.002)
    assert [writer.returncode for writer in writers] == [0, 0] and seen
    names = {f"{who}/{number}" for who in ("one", "two") for number in range(25)}
    assert set(_tuned.entries(CPU)) == names | {"both"}
    assert [_tuned.measured(f"both/d{density}", CPU) for density in (1, 2)] == [(24, 1), (24, 2)]
    last, entry = list(_tuned.recorded(CPU).items())[-1]  # of whoever wrote last
    assert last in ("both/d1", "both/d2") and _tuned.lookup("both", CPU) == entry


def test_the_lock_of_a_dead_process_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = file().with_name(file().name + ".lock")
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    start = time.monotonic()
    _tuned.record({THIN: ENTRY}, CPU)
    assert time.monotonic() - start < 1 and not lock.exists()
    monkeypatch.setattr(_tuned, "PATIENCE", 0.05)
    lock.touch()  # somebody works, for longer than we wait: their lock stays
    _tuned.record({"more/d0": (1,)}, CPU)
    assert lock.exists()
    _tuned.forget()
    assert set(_tuned.entries(CPU)) == {KEY, "more"}


# ------------------------------------------------------------------ who asks
def test_choosing_prefers_the_measured_entry_of_the_right_length() -> None:
    def choose() -> _tuned.Entry:
        return _tuned.choose(KEY, CPU, (1, 2), list)

    assert choose() == (1, 2)
    with _tuned.trying({KEY: (3, 4)}, CPU):
        assert choose() == (3, 4)
    with _tuned.trying({KEY: (3, 4, 5)}, CPU):
        assert choose() == (1, 2)
    assert choose() == (1, 2)


def test_trying_puts_everything_back_after_an_exception() -> None:
    _tuned.record({THIN: ENTRY}, CPU, write=False)
    with pytest.raises(RuntimeError), _tuned.trying({KEY: None, "new": (1,)}, CPU):
        assert _tuned.entries(CPU) == {"new": (1,)}
        raise RuntimeError
    assert _tuned.entries(CPU) == {KEY: ENTRY}


def test_every_change_makes_a_new_generation() -> None:
    seen = [_tuned.generation()]
    _tuned.record({THIN: ENTRY}, CPU, write=False)
    seen.append(_tuned.generation())
    with _tuned.trying({KEY: None}, CPU):
        seen.append(_tuned.generation())
    seen.append(_tuned.generation())
    with _tuned.listening():
        seen.append(_tuned.generation())
    _tuned.forget()
    seen.append(_tuned.generation())
    assert len(set(seen)) == len(seen)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_mode_knows_nothing(deterministic: None) -> None:
    _tuned.record({THIN: ENTRY}, CPU, write=False)
    assert _tuned.lookup(KEY, CPU) is None and _tuned.generation() == -1


def test_a_layout_on_a_cpu_follows_the_table() -> None:
    shipped = reference.choose_layout(64)
    name = _tuned.key("layout", 0, 0, 64, 0, "any", "ieee", "cpu")
    with _tuned.listening() as heard:
        assert reference.choose_layout(64, CPU) == shipped
    assert list(heard) == [name] and tuple(shipped) in heard[name].others()
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [0, 9, 9, 9]], dtype=torch.int32)
    feats = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    conv = spnn.Conv3d(4, 64, 3)
    want = conv(SparseTensor(feats, coords)).feats
    for apart in (0, 1):
        with _tuned.trying({name: (2, apart)}, CPU):
            assert reference.choose_layout(64, CPU) == reference.Layout(2, apart)
            got = conv(SparseTensor(feats, coords)).feats
        # The same products, summed in another order.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ the tiles of kernels
tiles = pytest.importorskip("torchsparse._triton.tiles")
HALF, FULL = torch.float16, torch.float32
KINDS = ((HALF, "ieee"), (FULL, "tf32"), (FULL, "tf32x3"), (FULL, "ieee"))
H100 = tiles.Limits(132, 227 << 10)
SIZES = [
    (rows, c_in, c_out, volume)
    for rows in (1, 100, 94_444, 1_000_000)
    for c_in, c_out in ((8, 16), (32, 32), (64, 96), (384, 256))
    for volume in (8, 27, 125)
]


def test_a_measured_tile_goes_before_the_shipped_one() -> None:
    arguments = (70_000, 64, 96, 27, HALF, "ieee")
    shipped = tiles.gemm_tile(*arguments)
    assert tiles.gemm_tile(*arguments, False, CPU) == shipped
    other = shipped._replace(BM=128, warps=8)
    name = _tuned.key("fwd", 70_000, 64, 96, 27, "float16", "ieee", "cpu")
    with _tuned.trying({name: tuple(other)}, CPU):
        assert tiles.gemm_tile(*arguments, False, CPU) == other
        assert tiles.gemm_tile(*arguments, True, CPU) == shipped  # an input gradient
        assert tiles.gemm_tile(*arguments) == shipped
        torch.use_deterministic_algorithms(True)
        try:
            assert tiles.gemm_tile(*arguments, False, CPU) == shipped
        finally:
            torch.use_deterministic_algorithms(False)
    assert tiles.gemm_tile(*arguments, False, CPU) == shipped


def test_wide_tiles_of_weights_in_blocks_share_out_no_taps() -> None:
    """They are for maps that fill a GPU with them; others keep columns of 128."""
    wide = {}
    for rows in (9_467, 21_559, 34_000, 38_400, 38_401, 60_000, 94_444):
        tile = tiles.shipped_gemm_tile(rows, 256, 256, 27, HALF, "ieee", True)
        wide[rows] = tile.BN == 256
        assert tile.splits == 1 or not wide[rows]
        assert not tiles.shipped_gemm_tile(rows, 256, 256, 27, HALF, "ieee").BN == 256
        assert tiles.shipped_gemm_tile(rows, 256, 192, 27, HALF, "ieee", True).BN == 128
    assert [rows for rows in wide if wide[rows]] == [38_401, 60_000, 94_444]


def test_small_maps_share_out_their_taps() -> None:
    """Where shares have orders of their own, a tile has as many splits, whatever was measured."""
    for dtype, precision in KINDS:
        name = "half" if dtype is HALF else precision
        for blocks, shares in tiles.SHARED_BLOCKS[name]:
            assert tiles.shares_of(64 * blocks, 27, dtype, precision) == shares
            assert tiles.shares_of(64 * blocks + 1, 27, dtype, precision) < shares
            assert tiles.shares_of(64 * blocks, 9, dtype, precision) == 1
        assert tiles.shares_of(1, 27, dtype, precision) == 4
        assert tiles.shares_of(1 << 20, 27, dtype, precision) == 1
        for channels in ((32, 32), (96, 96), (384, 256)):
            arguments = (4490, *channels, 27, dtype, precision, False)
            assert tiles.gemm_tile(*arguments, shares=3).splits == 3
            name = _tuned.key(
                "fwd", 4490, *channels, 27, str(dtype).removeprefix("torch."), precision, "cpu"
            )
            other = tiles.gemm_tile(*arguments)._replace(BM=128, splits=8)
            with _tuned.trying({name: tuple(other)}, CPU):
                found = tiles.gemm_tile(*arguments, CPU, shares=3)
            assert found == other._replace(splits=3)


@pytest.mark.parametrize("shares", [1, 2, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_shipped_tiles_fit_into_shared_memory(shares: int, blocks: bool) -> None:
    for rows, c_in, c_out in itertools.product(
        (2_000, 9_000, 40_000), (8, 32, 64, 96, 128, 192, 384), (16, 96, 128, 192, 256, 512)
    ):
        for dtype, precision in KINDS:
            tile = tiles.shipped_gemm_tile(
                rows, c_in, c_out, 27, dtype, precision, blocks and dtype == HALF, shares
            )
            assert tiles.fitting(tile, dtype, H100) == tile, (rows, c_in, c_out, dtype)
            assert tile.splits == shares or shares == 1


def test_registers_are_spent_where_shared_memory_is_what_is_short() -> None:
    for tile, most in (
        ((64, 128, 128, 3, 4, 1), tiles.PLENTY),  # room for one program
        ((128, 128, 64, 3, 4, 1), tiles.PLENTY),  # for two
        ((64, 128, 128, 2, 4, 2), tiles.PLENTY),
        ((64, 128, 64, 3, 4, 1), None),  # for three
        ((64, 32, 32, 4, 4, 1), None),
        ((128, 128, 64, 3, 8, 1), None),  # for two, whose threads have 128 registers each
    ):
        assert tiles.registers(tiles.GemmTile(*tile), HALF, H100) == most, tile
        assert tiles.registers(tiles.GemmTile(*tile), torch.float32, H100) is None
    small = tiles.Limits(128, 99 << 10)
    assert tiles.registers(tiles.GemmTile(64, 128, 64, 3, 4, 1), HALF, small) == tiles.PLENTY


@pytest.mark.parametrize("kilobytes", [64, 99, 163])
def test_tiles_are_cut_to_smaller_gpus(kilobytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an H100 holds, a GeForce does not: it would refuse the launch."""
    limits = tiles.Limits(80, kilobytes << 10)
    monkeypatch.setattr(tiles.Limits, "of", staticmethod(lambda device: limits))
    for kept in ("_gemm_tile", "_grad_tile", "_dense_tile"):  # forget no answer of other tests
        monkeypatch.setattr(tiles, kept, getattr(tiles, kept).__wrapped__)
    for c_in, c_out in itertools.product((16, 64, 96, 128, 384), (16, 96, 256)):
        for dtype, precision in KINDS:
            for rows, shares in itertools.product((2_000, 40_000), (1, 3)):
                tile = tiles.gemm_tile(
                    rows, c_in, c_out, 27, dtype, precision, device=CPU, shares=shares
                )
                assert tiles._fits(*tile[:5], dtype.itemsize, limits), tile
            tile = tiles.grad_tile(1 << 20, c_in, c_out, dtype, precision, 27, CPU)
            assert tiles._fits(*tile[:5], dtype.itemsize, limits), tile
        assert tiles._fits(*tiles.dense_tile(40_000, c_in, c_out, CPU)[:5], 2, limits)


def test_a_measured_gradient_tile_goes_before_the_shipped_one() -> None:
    arguments = (1_300_000, 64, 96, FULL, "tf32", 27)
    shipped = tiles.grad_tile(*arguments)
    other = shipped._replace(target=7)
    name = _tuned.key("wgrad", 1_300_000, 64, 96, 27, "float32", "tf32", "cpu")
    with _tuned.trying({name: tuple(other)}, CPU):
        assert tiles.grad_tile(*arguments, CPU) == other
    assert tiles.grad_tile(*arguments, CPU) == shipped


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("channels", [(4, 16), (32, 64), (64, 96), (200, 300)])
def test_gradient_tiles_of_alike_clouds_are_exact(
    channels: tuple[int, int], dtype: torch.dtype
) -> None:
    """Numbers of pairs are rounded to find remembered answers, which changes none of them."""
    for pairs in (1, 63, 64, 65, 4096, 4097, 99_999, (1 << 18) - 1, 1 << 18, 300_001, 1 << 22):
        exact = tiles.shipped_grad_tile(pairs, *channels, dtype, "tf32")
        assert tiles.grad_tile(pairs, *channels, dtype, "tf32") == exact


@pytest.mark.parametrize(
    ("dtype", "precision"), [(HALF, "ieee"), (FULL, "tf32"), (FULL, "tf32x3")]
)
def test_candidates_fit_a_gpu_and_begin_with_the_shipped_tile(
    dtype: torch.dtype, precision: str
) -> None:
    for sizes in SIZES:
        shipped = tiles.shipped_gemm_tile(*sizes, dtype, precision)
        found = tiles.gemm_tiles(shipped, *sizes, dtype, precision, H100)
        assert found[0] == shipped and len(set(found)) == len(found) <= 8
        shared = tiles.gemm_tiles(
            shipped._replace(splits=3), *sizes, dtype, precision, H100, 3
        )  # fmt: skip
        assert all(tile.splits == 3 for tile in shared) and len(set(shared)) == len(shared)
        for tile in found[1:]:
            held = tile.stages * (tile.BM + tile.BN) * tile.BK * dtype.itemsize
            assert held <= H100.shared and tile.BM % 64 == 0 and tile.BN >= 16
            assert tile.BM * tile.BN / (32 * tile.warps) <= 128
            assert 1 <= tile.splits <= max(min(8, sizes[3] // 2), 1)
        pairs, c_in, c_out = sizes[0] * sizes[3], *sizes[1:3]
        grad = tiles.shipped_grad_tile(pairs, c_in, c_out, dtype, precision)
        found = tiles.grad_tiles(grad, pairs, c_in, c_out, dtype, H100)
        assert found[0] == grad and len(set(found)) == len(found) <= 8
        assert all(tile.target >= 1 and min(tile[:3]) >= 16 for tile in found)


def test_there_is_something_to_choose_from_where_it_matters() -> None:
    sizes = (94_444, 128, 128, 27)
    shipped = tiles.shipped_gemm_tile(*sizes, HALF, "ieee")
    found = tiles.gemm_tiles(shipped, *sizes, HALF, "ieee", H100)
    assert len({tile.BM for tile in found}) == 2 and len(found) >= 6
    small = tiles.Limits(20, 48 << 10)
    assert len(tiles.gemm_tiles(shipped, *sizes, HALF, "ieee", small)) < len(found)
