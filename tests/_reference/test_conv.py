"""The chunked loops against the sum they stand for, with chunks small enough to have many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchsparse._recipe import Epilogue, Norm
from torchsparse._reference import conv, threads
from torchsparse._reference.conv import Layout, dense, finish, gather_gemm, make_plan, weight_grad

LAYOUTS = list(map(Layout, (1, 7, 64, 100000)))  # one pair a chunk to all in one chunk
HAS_GROUPED_MM = conv._has_grouped_mm()
# (taps, inputs, outputs): none of a thing, one, several; K = 1
SIZES = [(27, 0, 0), (27, 5, 0), (1, 1, 1), (8, 30, 17), (27, 40, 40), (3, 7, 50)]


def random_table(volume: int, inputs: int, outputs: int, density: float = 0.4) -> Tensor:
    """[K, M] int32, each tap a partial matching, as in every kernel map."""
    rng = np.random.default_rng(volume * 1000 + inputs + outputs)
    table = np.full((volume, outputs), -1, np.int32)
    for row in table:
        count = min(inputs, int(density * outputs + 0.5))
        row[rng.permutation(outputs)[:count]] = rng.permutation(inputs)[:count]
    return torch.from_numpy(table)


def expected(feats: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros(table.shape[1], weight.shape[2], dtype=torch.float64)
    for k, row in enumerate(table.tolist()):
        for m, i in enumerate(row):
            if i >= 0:
                out[m] += feats[i].double() @ weight[k].double()
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_gemm_is_the_sum_over_taps(size: tuple[int, int, int], layout: Layout) -> None:
    volume, inputs, _ = size
    table = random_table(*size)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(inputs, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(volume, 5, 3, generator=generator, dtype=torch.float64)
    plan = make_plan(table, None, layout)
    torch.testing.assert_close(
        gather_gemm(feats, weight, None, plan), expected(feats, weight, table)
    )
    reverse = plan._replace(reverse=True)
    torch.testing.assert_close(
        gather_gemm(feats, weight, None, reverse), expected(feats, weight.flip(0), table)
    )


def with_identity(generator: torch.Generator) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """Rows, table, features, weight and bias of a layer whose tap 13 ties each row to itself."""
    n = 33
    table = random_table(27, n, n)
    table[13] = torch.arange(n, dtype=torch.int32)
    shapes = ((n, 4), (27, 4, 6), (6,))
    draws = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return n, table, draws[0], draws[1], draws[2]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_identity_tap_changes_nothing(layout: Layout) -> None:
    """The centre taken out of the pairs: the same sums."""
    generator = torch.Generator().manual_seed(1)
    n, table, feats, weight, bias = with_identity(generator)
    plan = make_plan(table, 13, layout)
    assert sum(chunk.inputs.shape[0] for chunk in plan.chunks) == int((table >= 0).sum()) - n
    want = expected(feats, weight, table) + bias
    torch.testing.assert_close(gather_gemm(feats, weight, bias, plan), want)


def some_epilogue(rows: int, channels: int, generator: torch.Generator) -> Epilogue:
    mean, var, weight, bias = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    residual = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return Epilogue(Norm(mean, var.square(), weight, bias, 1e-3), residual, 0.1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_epilogue_meets_its_rows(layout: Layout) -> None:
    """In chunks of rows: what `finish` makes of the whole."""
    generator = torch.Generator().manual_seed(5)
    n, table, feats, weight, bias = with_identity(generator)
    plan = make_plan(table, 13, layout)
    epilogue = some_epilogue(n, 6, generator)
    want = finish(gather_gemm(feats, weight, bias, plan), epilogue)
    got = gather_gemm(feats, weight, bias, plan, epilogue=epilogue)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_a_dense_product_takes_the_norm_along(biased: bool, normed: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    feats = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64) if biased else None
    epilogue = some_epilogue(9, 6, generator)
    epilogue = epilogue if normed else epilogue._replace(norm=None)
    product = feats @ weight if bias is None else feats @ weight + bias
    got = dense(feats, weight, bias, epilogue)
    torch.testing.assert_close(got, finish(product, epilogue))


def test_autocast_leaves_a_dense_product_alone() -> None:
    generator = torch.Generator().manual_seed(7)
    feats, weight = (torch.randn(8, 8, generator=generator) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = dense(feats, weight, None, Epilogue())
    torch.testing.assert_close(got, feats @ weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_grad_is_the_sum_over_pairs(size: tuple[int, int, int], layout: Layout) -> None:
    volume, inputs, outputs = size
    table = random_table(*size)
    generator = torch.Generator().manual_seed(2)
    feats = torch.randn(inputs, 5, generator=generator, dtype=torch.float64)
    grad = torch.randn(outputs, 3, generator=generator, dtype=torch.float64)
    want = torch.zeros(volume, 5, 3, dtype=torch.float64)
    for k, row in enumerate(table.tolist()):
        for m, i in enumerate(row):
            if i >= 0:
                want[k] += torch.outer(feats[i], grad[m])
    plan = make_plan(table, None, layout)
    torch.testing.assert_close(weight_grad(feats, grad, plan), want)
    torch.testing.assert_close(weight_grad(feats, grad, plan._replace(reverse=True)), want.flip(0))


def test_ten_runs_give_the_same_bits() -> None:
    table = random_table(27, 3000, 3000)
    generator = torch.Generator().manual_seed(3)
    feats = torch.randn(3000, 32, generator=generator)
    weight = torch.randn(27, 32, 32, generator=generator)
    plan = make_plan(table, None, Layout(8192))
    first = gather_gemm(feats, weight, None, plan)
    gradient = weight_grad(feats, first, plan)
    for _ in range(9):
        assert torch.equal(gather_gemm(feats, weight, None, plan), first)
        assert torch.equal(weight_grad(feats, first, plan), gradient)


@pytest.mark.parametrize("grouped", [False, True])
def test_one_product_for_all_taps_or_one_each(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "_has_grouped_mm", lambda: grouped and HAS_GROUPED_MM)
    table = random_table(27, 70, 90)
    table[5] = -1
    generator = torch.Generator().manual_seed(4)
    feats = torch.randn(70, 8, generator=generator)
    weight = torch.randn(27, 12, 8, generator=generator).transpose(1, 2)
    for layout in LAYOUTS:
        plan = make_plan(table, None, layout)
        for at, taps in ((plan, weight), (plan._replace(reverse=True), weight.flip(0))):
            got = gather_gemm(feats, weight, None, at)
            want = expected(feats, taps, table)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_leftovers_in_the_buffers_never_show() -> None:
    """Buffers are reused uninitialised; a NaN left there by an earlier layer must not survive."""
    table = random_table(8, 50, 50)
    plan = make_plan(table, None, Layout(64))
    poison = torch.full((50, 16), float("nan"))
    gather_gemm(poison, torch.ones(8, 16, 16), None, plan)
    clean = gather_gemm(torch.ones(50, 16), torch.ones(8, 16, 16), None, plan)
    assert torch.equal(clean[:, 0], 16.0 * (table >= 0).sum(0))


def test_a_chunk_may_have_more_rows_than_16_bits_count() -> None:
    m = 3 << 15
    table = torch.full((2, m), -1, dtype=torch.int32)
    table[0] = torch.arange(m, dtype=torch.int32)
    plan = make_plan(table, None, Layout(10**9))
    assert max(chunk.end - chunk.begin for chunk in plan.chunks) > 1 << 15
    feats = torch.arange(m, dtype=torch.float64)[:, None]
    out = gather_gemm(feats, torch.ones(2, 1, 1, dtype=torch.float64), None, plan)
    assert torch.equal(out, feats)


def test_chunks_share_the_pairs_and_cover_the_rows() -> None:
    table = random_table(27, 900, 900)
    table[:, 300:600] = -1
    plan = make_plan(table, None, Layout(500))
    edges = [(chunk.begin, chunk.end) for chunk in plan.chunks]
    assert [begin for begin, _ in edges] == [0, *(end for _, end in edges[:-1])]
    assert edges[-1][1] == 900
    counts = [len(chunk.inputs) for chunk in plan.chunks]
    assert max(counts) < 1.2 * min(counts) and sum(counts) == int((table >= 0).sum())


@pytest.mark.parametrize("apart", [0, 1])
def test_chunks_on_threads_or_in_turn_agree(apart: int, monkeypatch) -> None:
    """In turn, no thread is started."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-1, 500, (27, 500), generator=generator, dtype=torch.int32)
    plan = make_plan(table, None, Layout(500, apart))
    assert len(plan.chunks) > 8 and plan.apart == bool(apart)
    x, weight = torch.randn(500, 8, generator=generator), torch.randn(27, 8, 8)
    started = []
    get = threads._threads.get
    monkeypatch.setattr(threads._threads, "get", lambda n: started.append(n) or get(n))
    got = conv.gather_gemm(x, weight, None, plan)
    assert bool(started) == bool(apart) or torch.get_num_threads() == 1
    alike = plan._replace(apart=not plan.apart)
    torch.testing.assert_close(got, conv.gather_gemm(x, weight, None, alike), rtol=1e-6, atol=1e-5)
