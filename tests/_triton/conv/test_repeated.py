"""Products that are made again pass on what the first one passed. Kernels are fakes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from tests._triton.kit import random_table
from torchsparse._capacity import expected_rows
from torchsparse._geometry import Geometry
from torchsparse._recipe import Epilogue, Norm
from torchsparse._triton import launch as module
from torchsparse._triton import tiles
from torchsparse._triton.conv import product
from torchsparse._triton.conv.order import make_tiles
from torchsparse._triton.conv.plan import make_pairs
from torchsparse._triton.conv.product import Plan

pytestmark = pytest.mark.skipif(not module.INTERPRETED, reason="makes its maps on the CPU")
ROWS = 40


class Kernel:
    """Logs what the public way and the direct one were given, in the order of parameters."""

    def __init__(self, real: Any) -> None:
        self.arg_names = tuple(inspect.signature(real.fn).parameters)
        self.public: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.run = SimpleNamespace(
            launch=lambda *args: self.direct.append((args[:3], *args[13:])),
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
        )

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
        def start(*args: Any, **options: Any) -> Any:
            given = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
            rest = [options[name] for name in self.arg_names[len(args) :]]
            self.public.append(((*grid, 1), *given, *rest))
            return SimpleNamespace(run=self.run, function=5, packed_metadata=())

        return start

    def agrees(self, *changing: str) -> None:
        """All launches were given the same, but for some tensors."""
        free = {1 + self.arg_names.index(name) for name in changing}
        first, *others = [
            [value for place, value in enumerate(given) if place not in free]
            for given in (*self.public, *self.direct)
        ]
        assert all(other == first for other in others)
        assert len(others) >= 2


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The kernels of products, in a process that seems to have a GPU and nothing launched."""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_stream", lambda device: 77)
    monkeypatch.setattr(module, "_resolved", {})
    for memory in ("_steps", "_forms", "_grads"):
        monkeypatch.setattr(product, memory, {})
    names = ("gemm_kernel", "narrow_kernel", "sum_kernel", "wgrad_kernel", "sum_chunks_kernel")
    found = {name: Kernel(getattr(product, name)) for name in names}
    for name, kernel in found.items():
        monkeypatch.setattr(product, name, kernel)
    return SimpleNamespace(**found)


def some_table(volume: int) -> Tensor:
    return random_table(torch.device("cpu"), volume, ROWS, ROWS)


def plan(volume: int = 3) -> Plan:
    """Of a random table, by real kernels."""
    table = some_table(volume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "INTERPRETED", True)
        return Plan(ROWS, make_tiles(table, None), {})


def operands(c_in: int, c_out: int) -> tuple[Tensor, Tensor, Tensor, Epilogue]:
    torch.manual_seed(0)
    mean, var, gamma, beta = torch.rand(4, c_out)
    norm = Norm(mean, var, gamma, beta, 1e-3)
    x, w = torch.rand(ROWS, c_in), torch.rand(3, c_in, c_out)
    return x, w, torch.rand(c_out), Epilogue(norm, torch.rand(ROWS, c_out), 0.1)


def test_gemm(fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROCESSORS", 1)  # taps are not split
    tiles._gemm_tile.cache_clear()
    x, w, bias, epilogue = operands(16, 64)
    one, other = plan(), plan()
    for _ in range(4):
        product.gather_gemm(x, w, bias, one, "ieee", epilogue)
    tiles._gemm_tile.cache_clear()
    # Another map finds the kernel by name, and launches it directly the first time.
    product.gather_gemm(x, w, bias, other, "ieee", epilogue)
    tiles._gemm_tile.cache_clear()
    kernel = fakes.gemm_kernel
    assert (len(kernel.public), len(kernel.direct)) == (1, 4)
    kernel.agrees("out", "table", "order", "masks")
    assert one.tiles is not None and other.tiles is not None
    tables = one.tiles.table.data_ptr(), other.tiles.table.data_ptr()
    place = 1 + kernel.arg_names.index("table")
    used = [given[place] for given in kernel.direct]
    assert used == [tables[0]] * 3 + [tables[1]]
    # Other dtypes, epilogues and directions are other kernels.
    product.gather_gemm(x, w, None, one, "ieee", epilogue)
    product.gather_gemm(x.half(), w.half(), bias, one, "ieee", epilogue)
    product.gather_gemm(x, w, bias, one, "ieee", epilogue._replace(slope=0.0))
    product.gather_gemm(x, w, bias, one._replace(reverse=True), "ieee", epilogue)
    assert (len(kernel.public), len(kernel.direct)) == (5, 4)
    tiles._gemm_tile.cache_clear()


def test_split_taps(fakes: SimpleNamespace) -> None:
    x, w, bias, epilogue = operands(16, 64)
    w, one = w.repeat(9, 1, 1), plan(27)
    for _ in range(4):
        product.gather_gemm(x, w, bias, one, "ieee", epilogue)
    fakes.gemm_kernel.agrees("out")
    fakes.sum_kernel.agrees("partial", "out")
    assert len(fakes.sum_kernel.public) == 1


def test_few_channels_and_epilogues_alone(fakes: SimpleNamespace) -> None:
    x, w, bias, epilogue = operands(4, 64)
    one = plan()
    for _ in range(4):
        product.gather_gemm(x, w, bias, one, "ieee", epilogue)
    fakes.narrow_kernel.agrees("out")
    feats = torch.rand(ROWS, 64)
    for _ in range(4):
        product.finish(feats, epilogue)
    fakes.sum_kernel.agrees("out")
    assert (len(fakes.sum_kernel.public), len(fakes.sum_kernel.direct)) == (1, 3)


def test_weight_gradients(fakes: SimpleNamespace) -> None:
    x, g = torch.rand(ROWS, 16), torch.rand(ROWS, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "INTERPRETED", True)
        pairs = make_pairs(some_table(3), Geometry.submanifold((3,), (1,)))
    for _ in range(4):
        product.weight_grad(x, g, pairs)
    fakes.wgrad_kernel.agrees("partial")
    fakes.sum_chunks_kernel.agrees("partial", "out")
    product.weight_grad(x, g, pairs._replace(swap=True))
    assert len(fakes.wgrad_kernel.public) == 2


def test_tiles_are_those_of_the_rows_that_are_expected(
    fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a level with room to spare; all rows are launched, as any may be real."""
    chosen: list[int] = []
    choose = product.gemm_tile

    def spy(rows: int, *sizes: Any) -> tiles.GemmTile:
        chosen.append(rows)
        return choose(rows, *sizes)

    monkeypatch.setattr(product, "gemm_tile", spy)
    x, w, bias, epilogue = operands(16, 64)
    whole, padded = plan(), plan()
    assert padded.tiles is not None
    limit = torch.tensor([30])
    padded = padded._replace(tiles=padded.tiles._replace(limit=limit), limit=limit)
    for one in (whole, padded):
        product.gather_gemm(x, w, bias, one, "ieee", epilogue)
    assert chosen == [ROWS, expected_rows(ROWS, limit)]
    assert chosen[1] < ROWS
    kernel = fakes.gemm_kernel
    assert [given[0] for given in kernel.public] == [(1, 1, 1)] * 2
    assert [given[1 + kernel.arg_names.index("M")] for given in kernel.public] == [ROWS] * 2
