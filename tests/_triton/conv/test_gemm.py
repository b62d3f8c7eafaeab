"""The implicit GEMM in all its forms against the sum it stands for, and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._triton.conv.problems import Problem, assert_near, geometry
from tests._triton.kit import HALVES, random_table
from torchsparse._frozen import Store, keeping
from torchsparse._recipe import Epilogue, Norm
from torchsparse._reference import conv as reference
from torchsparse._triton import launch
from torchsparse._triton.conv import dense, finish, gather_gemm, make_plan, product, table_of
from torchsparse._triton.conv.product import Plan
from torchsparse._triton.tiles import GemmTile, gemm_tile

# (taps, inputs, outputs): none of a thing, one, several words of taps
SIZES = [(27, 0, 0), (27, 5, 0), (27, 0, 5), (1, 1, 1), (8, 30, 17), (27, 40, 70), (33, 20, 30)]


def lay_out(problem: Problem, sort: bool = True, shares: int = 1) -> Plan:
    return make_plan(problem.table, None, geometry(problem.table.shape[0]), ("gemm", sort, shares))


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch):
    """Set fields of every tile: small maps would otherwise always be split."""

    def fix(**fields: int) -> None:
        def fixed(*args) -> GemmTile:
            return gemm_tile(*args)._replace(**fields)

        monkeypatch.setattr(product, "gemm_tile", fixed)
        monkeypatch.setattr(product, "_forms", {})  # choices made before

    return fix


@pytest.mark.parametrize("channels", [(16, 16), (19, 7)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_gemm_is_the_sum_over_taps(
    size: tuple[int, int, int], channels: tuple[int, int], device: torch.device
) -> None:
    problem = Problem.of(device, size, channels)
    got = gather_gemm(problem.feats, problem.weight, problem.bias, lay_out(problem))
    want = problem.product() + problem.bias.double().cpu()
    assert got.dtype == torch.float32
    assert_near(got, want)
    if 0 not in size:
        plan = reference.make_plan(problem.table.cpu(), None, reference.choose_layout(channels[1]))
        twin = reference.gather_gemm(
            problem.feats.cpu(), problem.weight.cpu(), problem.bias.cpu(), plan
        )
        assert_near(got, twin.double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("BM", [64, 128])
def test_tiles_and_splits_give_the_same_sum(
    BM: int, splits: int, bias: bool, device: torch.device, tile
) -> None:
    """Tall tiles unite masks, also of an odd number of short ones; splits are summed."""
    tile(BM=BM, splits=splits, BN=16, BK=16)
    problem = Problem.of(device, (27, 90, 150), (24, 12), density=0.03)
    given = problem.bias if bias else None
    got = gather_gemm(problem.feats, problem.weight, given, lay_out(problem))
    want = problem.product()
    assert_near(got, want + problem.bias.double().cpu() if bias else want)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("volume", [27, 40])
def test_reversed_taps(volume: int, sort: bool, device: torch.device) -> None:
    problem = Problem.of(device, (volume, 20, 30), (16, 16))
    plan = lay_out(problem, sort)._replace(reverse=True)
    got = gather_gemm(problem.feats, problem.weight, None, plan)
    assert_near(got, problem.product(reverse=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shares", "sort"), [(2, True), (3, True), (5, True), (3, False)])
def test_shares_of_the_taps(shares: int, sort: bool, reverse: bool, device: torch.device) -> None:
    """Each share has its own row order; 5 does not divide 27."""
    problem = Problem.of(device, (27, 30, 70), (16, 16))
    plan = lay_out(problem, sort, shares)
    assert plan.tiles is not None and plan.tiles.shares == shares
    got = gather_gemm(problem.feats, problem.weight, problem.bias, plan._replace(reverse=reverse))
    assert_near(got, problem.product(reverse) + problem.bias.double().cpu())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("volume", "splits"), [(27, 1), (27, 2), (33, 1)])
@pytest.mark.parametrize("lies", ["plain", "swapped", "unaligned"])
def test_weights_read_in_blocks(
    lies: str, volume: int, splits: int, dtype: torch.dtype, device: torch.device, tile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Blocks that reach beyond the last column, of a weight as it is or as a gradient sees it."""
    made: list[torch.Size] = []

    def blocks(base: Tensor, *how) -> Any:
        made.append(base.shape)
        return launch.Blocks(base, *how)

    monkeypatch.setattr(product, "Blocks", blocks)
    monkeypatch.setattr(product, "has_blocks", lambda device: True)
    tile(splits=splits)
    problem = Problem.of(device, (volume, 40, 70), (64, 192), dtype)
    weight = problem.weight
    if lies == "swapped":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    if lies == "unaligned":
        whole = torch.zeros(weight.numel() + 1, dtype=dtype, device=device)
        whole[1:] = weight.reshape(-1)
        weight = whole[1:].view(weight.shape)
    plan = lay_out(problem)._replace(reverse=lies == "swapped")
    got = gather_gemm(problem.feats, weight, problem.bias, plan)
    assert made == [weight.shape]
    assert_near(got, problem.product(plan.reverse) + problem.bias.double().cpu(), dtype)


@pytest.mark.parametrize("channels", [(1, 1), (3, 20), (4, 70), (8, 16)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_few_input_channels(
    reverse: bool, channels: tuple[int, int], device: torch.device
) -> None:
    """Taps and channels are one axis of the product."""
    problem = Problem.of(device, (27, 30, 70), channels)
    assert product.narrow_tile(*channels, 27, torch.float16, "ieee") is not None
    plan = lay_out(problem)._replace(reverse=reverse)
    got = gather_gemm(problem.feats, problem.weight, problem.bias, plan)
    assert_near(got, problem.product(reverse) + problem.bias.double().cpu())


@pytest.mark.usefixtures("rows_alike")
def test_narrow_does_not_mind_the_order_of_rows(device: torch.device) -> None:
    """Bit for bit: every row is the sum of all taps, in the order of taps."""
    problem = Problem.of(device, (27, 30, 40), (3, 16))
    layouts = [lay_out(problem, sort) for sort in (False, True)]
    natural, ordered = (gather_gemm(problem.feats, problem.weight, None, x) for x in layouts)
    assert layouts[1].tiles is not None and layouts[1].tiles.order is not None
    assert torch.equal(natural, ordered)


@pytest.mark.parametrize("real", [None, 0, 25, 40])
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(("volume", "shares"), [(1, 1), (27, 1), (27, 4), (33, 1), (70, 3)])
def test_a_plan_holds_the_table(
    volume: int, shares: int, sort: bool, real: int | None, device: torch.device
) -> None:
    """Of any strides, and with padding, of which nothing was read."""
    table = random_table(device, volume, 30, 40)
    limit = None if real is None else torch.tensor([real], device=device)
    want = (
        table if real is None else torch.where(torch.arange(40, device=device) < real, table, -1)
    )
    wide = torch.full((40, 96), -7, dtype=torch.int32, device=device)
    wide[:, :volume] = want.t()
    view = wide[:, :volume].t()
    plan = make_plan(view, None, geometry(volume), ("gemm", sort, shares), limit)
    assert plan.tiles is not None
    if real is not None:  # products read it without asking how many rows are real
        assert (plan.tiles.table[:, real:] == -1).all()
    for known in (plan, plan._replace(reverse=True)):
        again = table_of(known)
        assert again is not None
        assert torch.equal(again(), want)


def test_pairs_do_not_hold_the_table(device: torch.device) -> None:
    table = random_table(device, 27, 30, 40)
    assert table_of(make_plan(table, None, geometry(27), ("fetch", False, 1))) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", [(5, 16), (16, 16), (21, 9)], ids=str)
def test_half_types_are_rounded_once(
    channels: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    problem = Problem.of(device, (27, 30, 40), channels, dtype)
    got = gather_gemm(problem.feats, problem.weight, problem.bias, lay_out(problem))
    assert got.dtype == dtype
    assert_near(got, problem.product() + problem.bias.double().cpu(), dtype)


@pytest.mark.parametrize("shares", [1, 3])
def test_half_partial_sums_are_float32(shares: int, device: torch.device, tile) -> None:
    """Two halves that cancel: in float16 their partial sums would be infinite."""
    tile(splits=2)
    table = torch.arange(4, dtype=torch.int32, device=device).repeat(2, 1)
    feats = torch.full((4, 16), 200.0, dtype=torch.float16, device=device)
    weight = torch.full((2, 16, 16), 200.0, dtype=torch.float16, device=device)
    weight[1] = -200.0
    plan = make_plan(table, None, geometry(2), ("gemm", True, min(shares, 2)))
    assert torch.equal(gather_gemm(feats, weight, None, plan), torch.zeros_like(feats))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("transposed", [False, True])
def test_precisions_and_weight_strides(
    transposed: bool, precision: str, device: torch.device
) -> None:
    """The input gradient reads the weight with its axes exchanged."""
    problem = Problem.of(device, (27, 30, 40), (32, 16))
    weight = problem.weight
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    got = gather_gemm(problem.feats, weight, None, lay_out(problem), precision)
    assert_near(got, problem.product(), precision)


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("splits", [1, 4])
def test_the_order_of_rows_changes_no_bit(splits: int, device: torch.device, tile) -> None:
    """A row sums its own taps in their order; the taps of its tile add zeros.

    Rows of equal keys come in any order, and equal keys may have unequal taps: the taps of a
    tile differ from run to run. What a split adds must not depend on them.
    """
    tile(splits=splits)
    problem = Problem.of(device, (27, 60, 130), (16, 16), density=0.15)
    sums = [
        gather_gemm(problem.feats, problem.weight, None, lay_out(problem, sort))
        for sort in (False, True)
    ]
    shuffled = torch.randperm(130, generator=torch.Generator().manual_seed(0)).to(device)
    moved = make_plan(problem.table[:, shuffled], None, geometry(27), ("gemm", True, 1))
    sums.append(torch.empty_like(sums[0]))
    sums[2][shuffled] = gather_gemm(problem.feats, problem.weight, None, moved)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_a_row_without_neighbours_is_its_bias(device: torch.device) -> None:
    problem = Problem.of(device, (27, 30, 70), (16, 16))
    problem.table[:, 5::2] = -1
    got = gather_gemm(problem.feats, problem.weight, problem.bias, lay_out(problem))
    assert torch.equal(got[5::2], problem.bias.expand_as(got[5::2]))


@pytest.mark.parametrize("channels", [(0, 4), (4, 0)], ids=str)
def test_no_channels(channels: tuple[int, int], device: torch.device) -> None:
    problem = Problem.of(device, (27, 30, 40), channels)
    got = gather_gemm(problem.feats, problem.weight, problem.bias, lay_out(problem))
    assert torch.equal(got, problem.bias.expand(40, -1))


def norm_of(problem: Problem, affine: bool) -> Norm:
    mean, var = problem.bias.flip(0), problem.bias.abs() + 0.5
    weight, bias = (problem.bias.roll(2), problem.bias.roll(5)) if affine else (None, None)
    return Norm(mean, var, weight, bias, 1e-3)


def apply(out: Tensor, epilogue: Epilogue) -> Tensor:
    """The formula of the record, in float64."""
    norm, residual, slope = epilogue
    if norm is not None:
        mean, var = norm.mean.double().cpu(), norm.var.double().cpu()
        out = (out - mean) / (var + norm.eps).sqrt()
        if norm.weight is not None and norm.bias is not None:
            out = out * norm.weight.double().cpu() + norm.bias.double().cpu()
    if residual is not None:
        out = out + residual.double().cpu()
    return out if slope is None else torch.where(out < 0, out * slope, out)


@pytest.mark.parametrize("kind", ["one tile", "splits", "shares", "narrow", "fetch", "nothing"])
@pytest.mark.parametrize(
    ("affine", "residual", "slope"),
    [(True, True, 0.25), (False, True, 0.0), (None, False, 0.1), (True, False, None)],
)
def test_epilogue(
    affine: bool | None, residual: bool, slope: float | None, kind: str, device: torch.device, tile
) -> None:
    """Normalisation, residual and activation, in whichever kernel comes last."""
    size = (8, 0 if kind == "nothing" else 30, 40)
    problem = Problem.of(device, size, (3 if kind == "narrow" else 16, 20))
    tile(splits={"splits": 2, "shares": 3}.get(kind, 1))
    plan = make_plan(
        problem.table, None, geometry(8),
        ("fetch" if kind == "fetch" else "gemm", True, 3 if kind == "shares" else 1),
    )  # fmt: skip
    epilogue = Epilogue(
        None if affine is None else norm_of(problem, affine),
        problem.grad if residual else None,
        slope,
    )
    got = gather_gemm(problem.feats, problem.weight, problem.bias, plan, "ieee", epilogue)
    assert_near(got, apply(problem.product() + problem.bias.double().cpu(), epilogue))


@pytest.mark.parametrize("shape", [(27, 40, 70), (1, 4, 5), (8, 32, 64), (2, 3, 0)], ids=str)
def test_turned_weights(shape: tuple[int, int, int], device: torch.device) -> None:
    weight = torch.randn(shape, device=device)
    for given in (weight, weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        turn = product._turn(given.shape, given.stride(), given.dtype)
        for _ in range(2):  # the second finds the kernel
            got = turn.of(given)
            assert got.is_contiguous()
            assert torch.equal(got, weight.transpose(1, 2))


@pytest.mark.parametrize(
    ("channels", "precision", "times"),
    [((16, 20), "tf32", 1), ((16, 20), "tf32x3", 1), ((18, 20), "tf32", 2), ((16, 20), "ieee", 0)],
    ids=str,
)
def test_frozen_weights_are_laid_out_once(
    channels: tuple[int, int], precision: str, times: int, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Turned, and before that padded where rows have no multiple of 16 bytes: the same bits."""
    problem, made = Problem.of(device, (27, 40, 70), channels), []
    plan, turned = lay_out(problem), product._turned
    monkeypatch.setattr(product, "_turned", lambda *args: made.append(args) or turned(*args))

    def multiply() -> Tensor:
        return gather_gemm(problem.feats, problem.weight, problem.bias, plan, precision)

    want, store = multiply(), Store([problem.weight])
    with keeping(store):
        for _ in range(3):
            assert torch.equal(multiply(), want)
        assert len(store) == times and len(made) == (times > 0)
        problem.weight.mul_(2)
        got = multiply()
    assert torch.equal(got, multiply()) and not torch.equal(got, want)
    assert len(made) == 2 * (times > 0)


def test_garbage_is_not_kept(device: torch.device) -> None:
    """While launches are only looked at, nothing is turned."""
    problem = Problem.of(device, (27, 40, 70), (16, 20))
    plan, store = lay_out(problem), Store([problem.weight])

    def multiply() -> Tensor:
        return gather_gemm(problem.feats, problem.weight, None, plan, "tf32")

    want = multiply()
    with keeping(store):
        launch.compile_ahead([multiply])
        assert len(store) == 0
        assert torch.equal(multiply(), want) and len(store) == 1


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("channels", [(8, 5), (96, 20), (40, 130)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_dense(rows: int, channels: tuple[int, int], turned: bool, device: torch.device) -> None:
    """One matrix for all rows, with everything that may follow."""
    problem = Problem.of(device, (1, rows, rows), channels, torch.float16)
    weight = problem.weight[0]
    if turned:
        weight = weight.t().contiguous().t()
    want = problem.feats.double().cpu() @ weight.double().cpu()
    got = dense(problem.feats, weight, None, Epilogue(None, None, 0.0))
    assert got.dtype == torch.float16
    assert_near(got, apply(want, Epilogue(None, None, 0.0)), torch.float16)
    epilogue = Epilogue(norm_of(problem, True), problem.grad, 0.25)
    got = dense(problem.feats, weight, problem.bias, epilogue)
    assert_near(got, apply(want + problem.bias.double().cpu(), epilogue), torch.float16)
    twin = reference.dense(problem.feats, weight, problem.bias, epilogue)
    assert_near(twin, apply(want + problem.bias.double().cpu(), epilogue), torch.float16)


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_finish(rows: int, device: torch.device) -> None:
    problem = Problem.of(device, (1, rows, rows), (20, 20))
    epilogue = Epilogue(norm_of(problem, True), problem.grad, 0.0)
    got = finish(problem.feats, epilogue)
    assert_near(got, apply(problem.feats.double().cpu(), epilogue))
    mean, var, weight, bias, eps = norm_of(problem, True)
    assert weight is not None and bias is not None
    norm = Norm(mean.cpu(), var.cpu(), weight.cpu(), bias.cpu(), eps)
    host = Epilogue(norm, problem.grad.cpu(), 0.0)
    assert_near(got, reference.finish(problem.feats.cpu(), host).double())


def test_relu_keeps_nan(device: torch.device) -> None:
    feats = torch.tensor([[torch.nan, -1.0, 2.0]], device=device)
    for slope, negative in ((0.0, 0.0), (0.5, -0.5)):
        got = finish(feats, Epilogue(None, None, slope))
        want = torch.tensor([[torch.nan, negative, 2.0]], device=device)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
