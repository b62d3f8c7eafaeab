"""Fetch on demand: one launch per tap over its pairs."""

from __future__ import annotations

import pytest
import torch

from tests import clouds
from tests._triton.conv.problems import Problem, assert_near, geometry
from tests._triton.kit import HALVES, search
from torchsparse._geometry import Geometry
from torchsparse._triton.conv import gather_gemm, make_plan

FETCH = ("fetch", False, 1)
SIZES = [(8, 0, 0), (8, 5, 0), (8, 0, 5), (1, 1, 1), (8, 90, 70), (33, 12, 9)]


@pytest.mark.parametrize("channels", [(3, 5), (16, 20)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fetch_is_the_sum_over_taps(
    size: tuple[int, int, int], channels: tuple[int, int], device: torch.device
) -> None:
    problem = Problem.of(device, size, channels)
    plan = make_plan(problem.table, None, geometry(size[0]), FETCH)
    got = gather_gemm(problem.feats, problem.weight, problem.bias, plan)
    assert_near(got, problem.product() + problem.bias.double().cpu())
    turned = gather_gemm(problem.feats, problem.weight, None, plan._replace(reverse=True))
    assert_near(turned, problem.product(reverse=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_symmetric_maps(reverse: bool, device: torch.device) -> None:
    relation = Geometry.submanifold((3, 1, 3), (1, 1, 1))
    coords = clouds.odd()
    problem = Problem.of(device, (9, len(coords), len(coords)), (16, 16))
    problem.table.copy_(torch.from_numpy(search(coords, coords, relation)))
    plan = make_plan(problem.table, None, relation, FETCH)._replace(reverse=reverse)
    got = gather_gemm(problem.feats, problem.weight, None, plan)
    assert_near(got, problem.product(reverse))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    """Sums live in float32 between the launches."""
    problem = Problem.of(device, (27, 30, 20), (16, 16), dtype)
    plan = make_plan(problem.table, None, geometry(27), FETCH)
    got = gather_gemm(problem.feats, problem.weight, problem.bias, plan)
    assert got.dtype == dtype
    assert_near(got, problem.product() + problem.bias.double().cpu(), dtype)
