"""The weight gradient, cut into chunks of pairs, against the sum over pairs."""

from __future__ import annotations

import pytest
import torch

from tests import clouds
from tests._triton.conv.problems import Problem, assert_near, geometry
from tests._triton.kit import HALVES, search
from torchsparse._geometry import Geometry
from torchsparse._triton.conv import make_pairs, product, weight_grad
from torchsparse._triton.conv.pairs import list_pairs
from torchsparse._triton.tiles import GradTile, grad_tile

SIZES = [(27, 0, 0), (27, 5, 0), (27, 0, 5), (1, 1, 1), (8, 30, 17), (27, 40, 40), (33, 20, 30)]


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch):
    def fix(**fields: int) -> None:
        def fixed(*args) -> GradTile:
            return grad_tile(*args)._replace(**fields)

        monkeypatch.setattr(product, "grad_tile", fixed)

    return fix


@pytest.mark.parametrize("channels", [(16, 16), (5, 19)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_grad_is_the_sum_over_pairs(
    size: tuple[int, int, int], channels: tuple[int, int], device: torch.device
) -> None:
    problem = Problem.of(device, size, channels)
    got = weight_grad(
        problem.feats, problem.grad, list_pairs(problem.table, False, problem.table.numel())
    )
    assert got.dtype == torch.float32
    assert_near(got, problem.weight_grad())


def test_no_chunk_is_longer_than_an_accumulator_bears(
    tile, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Also where a list gives two taps: every row of a point cloud meets itself under each tap."""
    relation = Geometry.submanifold((3,), (1,))
    tile(target=1)
    monkeypatch.setattr(product, "LONGEST", 256)
    m = 1000
    table = torch.arange(m, dtype=torch.int32, device=device).expand(3, m).contiguous()
    pairs = make_pairs(table, relation)
    ones = torch.ones(m, 16, device=device)
    assert torch.equal(
        weight_grad(ones, ones, pairs), torch.full((3, 16, 16), float(m)).to(device)
    )
    (known,) = pairs.memo.values()
    target = known.chunks - pairs.volume
    assert 3 * m / target <= 256


def test_swapped_pairs(device: torch.device) -> None:
    """A transposed layer: its inputs are the map's outputs."""
    problem = Problem.of(device, (8, 30, 17), (16, 20))
    pairs = make_pairs(problem.table, geometry(8))._replace(swap=True)
    got = weight_grad(problem.grad, problem.feats, pairs)
    assert_near(got, problem.weight_grad().transpose(1, 2))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("cloud", ["single", "odd"])
def test_symmetric_maps_read_half_the_lists_from_both_ends(
    cloud: str, swap: bool, device: torch.device
) -> None:
    relation = Geometry.submanifold((3, 1, 3), (1, 1, 1))
    coords = clouds.CLOUDS[cloud]()
    problem = Problem.of(device, (9, len(coords), len(coords)), (16, 16))
    problem.table.copy_(torch.from_numpy(search(coords, coords, relation)))
    pairs = make_pairs(problem.table, relation)
    assert pairs.lists == 5
    if swap:
        got = weight_grad(problem.grad, problem.feats, pairs._replace(swap=True))
        assert_near(got, problem.weight_grad().transpose(1, 2))
    else:
        assert_near(weight_grad(problem.feats, problem.grad, pairs), problem.weight_grad())


@pytest.mark.parametrize("target", [1, 3, 40])
def test_lists_of_many_chunks(target: int, device: torch.device, tile) -> None:
    """Long and short lists: 250 pairs of one tap, 3 of another, none of a third."""
    tile(target=target, BK=16, BM=16, BN=16)
    problem = Problem.of(device, (4, 250, 250), (20, 12), density=1.0)
    problem.table[1, 3:] = -1
    problem.table[2] = -1
    pairs = list_pairs(problem.table, False, problem.table.numel())
    assert_near(weight_grad(problem.feats, problem.grad, pairs), problem.weight_grad())


def test_buffers_longer_than_the_lists(device: torch.device) -> None:
    """What lies behind the last pair is never read as one."""
    problem = Problem.of(device, (8, 30, 40), (16, 16), density=0.1)
    pairs = list_pairs(problem.table, False, problem.table.numel())
    used = int(pairs.ends[-1, -1])
    assert used < pairs.inputs.numel()
    pairs.inputs[used:] = 1 << 30
    pairs.outputs[used:] = 1 << 30
    assert_near(weight_grad(problem.feats, problem.grad, pairs), problem.weight_grad())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_operands_give_float32(dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem.of(device, (8, 30, 40), (16, 16), dtype)
    got = weight_grad(problem.feats, problem.grad, make_pairs(problem.table, geometry(8)))
    assert got.dtype == torch.float32
    assert_near(got, problem.weight_grad())  # products are exact in float32: no half rounding


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions(precision: str, device: torch.device) -> None:
    problem = Problem.of(device, (8, 30, 40), (40, 16))
    pairs = make_pairs(problem.table, geometry(8))
    got = weight_grad(problem.feats, problem.grad, pairs, precision)
    assert_near(got, problem.weight_grad(), precision)


def test_runs_give_the_same_bits(device: torch.device, tile) -> None:
    tile(target=40, BK=16)
    problem = Problem.of(device, (4, 150, 150), (16, 16), density=0.8)
    pairs = list_pairs(problem.table, False, problem.table.numel())
    first = weight_grad(problem.feats, problem.grad, pairs)
    for _ in range(3 if device.type == "cuda" else 1):
        assert torch.equal(weight_grad(problem.feats, problem.grad, pairs), first)
