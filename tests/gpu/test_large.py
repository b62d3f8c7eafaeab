"""Tensors of more than 2^31 elements: an offset computed in 32 bits lands elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import torchsparse
from torchsparse import SparseTensor
from torchsparse.nn import functional as F
from torchsparse.utils import to_dense

SIDE, C = 260, 128  # 17.6 million sites, 2.25e9 entries
N = SIDE**3
HALF = torch.float16
# float16 sums of up to 27 x 128 products, rounded once: share of the largest entry.
SHARE = 2e-3


@pytest.fixture
def roomy(gpu: torch.device) -> Iterator[torch.device]:
    """A GPU with memory to spare, emptied afterwards."""
    assert N * C > 2**31
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(gpu)[0] / 2**30
    if free < 60:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free, these tests need 60")
    yield gpu
    torch.cuda.empty_cache()


def full_grid(device: torch.device) -> Tensor:
    """Every site of a cube, in the order of rows (x, y, z): row = (x * SIDE + y) * SIDE + z."""
    row = torch.arange(N, device=device)
    columns = [torch.zeros_like(row), row // SIDE**2, row // SIDE % SIDE, row % SIDE]
    return torch.stack([c.int() for c in columns], 1)


def picked() -> np.ndarray:
    """Rows whose answers are looked at: the first, the last, and around 2^31 / C."""
    edge = 2**31 // C
    near = [np.arange(3), np.arange(N - 3, N), np.arange(edge - 3, edge + 3)]
    return np.concatenate([*near, np.random.default_rng(0).integers(0, N, 200)])


def random_feats(device: torch.device, rows: int = N) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, C, device=device, dtype=HALF)


def around(row: int) -> list[tuple[int, int]]:
    """(tap, row) of the neighbours in a 3x3x3 kernel; x runs fastest through the taps."""
    x, y, z = row // SIDE**2, row // SIDE % SIDE, row % SIDE
    found = []
    for tap in range(27):
        a, b, c = x + tap % 3 - 1, y + tap // 3 % 3 - 1, z + tap // 9 - 1
        if 0 <= min(a, b, c) and max(a, b, c) < SIDE:
            found.append((tap, (a * SIDE + b) * SIDE + c))
    return found


def assert_near(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want).abs().max().item()
    assert error <= SHARE * want.abs().max().item()


def test_submanifold_forward_and_backward(roomy: torch.device) -> None:
    feats = random_feats(roomy)
    weight = torch.randn(27, C, C, device=roomy, dtype=HALF) / (27 * C) ** 0.5
    x = SparseTensor(feats.requires_grad_(), full_grid(roomy))
    out = F.conv3d(x, weight.requires_grad_(), 3).feats
    torchsparse.backends.check_errors()
    values, taps = feats.detach(), weight.detach().double()
    for row in picked():
        pairs = around(int(row))
        want = sum(values[i].double() @ taps[k] for k, i in pairs)
        assert_near(out[row], torch.as_tensor(want))
    push = out.detach().mul_(2**-8)  # no further 4.5 GB; sums of 17.6 million stay in float16
    to_feats, to_weight = torch.autograd.grad(out, (feats, weight), push)
    for row in picked():
        want = sum(push[i].double() @ taps[26 - k].t() for k, i in around(int(row)))
        assert_near(to_feats[row], torch.as_tensor(want))
    centre = torch.zeros(C, C, dtype=torch.float64, device=roomy)
    for part, grad in zip(values.split(2**20), push.split(2**20)):
        centre += part.double().t() @ grad.double()
    assert_near(to_weight[13], centre)


def test_pointwise(roomy: torch.device) -> None:
    feats = random_feats(roomy)
    weight = torch.randn(C, C, device=roomy, dtype=HALF) / C**0.5
    coords = torch.zeros(N, 4, dtype=torch.int32, device=roomy)
    out = F.conv3d(SparseTensor(feats, coords), weight, 1).feats
    rows = torch.from_numpy(picked()).to(roomy)
    assert_near(out[rows], feats[rows].double() @ weight.double())


def test_strided(roomy: torch.device) -> None:
    """Down to an eighth of the rows, and up again."""
    feats = random_feats(roomy)
    down = torch.randn(8, C, C, device=roomy, dtype=HALF) / (8 * C) ** 0.5
    up = torch.randn(8, C, C, device=roomy, dtype=HALF) / C**0.5
    x = SparseTensor(feats, full_grid(roomy))
    coarse = F.conv3d(x, down, 2, None, 2)
    fine = F.conv3d(coarse, up, 2, None, 2, transposed=True)
    assert fine.feats.shape == (N, C)
    half = SIDE // 2
    for row in picked():
        x0, y0, z0 = int(row) // SIDE**2, int(row) // SIDE % SIDE, int(row) % SIDE
        parent = ((x0 // 2) * half + y0 // 2) * half + z0 // 2
        tap = (x0 % 2) * 4 + (y0 % 2) * 2 + z0 % 2  # z runs fastest where K is even
        assert_near(fine.feats[row], coarse.feats[parent].double() @ up[tap].double())


def test_table_of_neighbours(roomy: torch.device) -> None:
    """125 x 17.6 million entries of a 5x5x5 kernel; every output counts its neighbours."""
    x = SparseTensor(torch.ones(N, 8, device=roomy, dtype=HALF), full_grid(roomy))
    weight = torch.full((125, 8, 8), 0.125, device=roomy, dtype=HALF)
    out = F.conv3d(x, weight, 5).feats
    axis = torch.tensor([3, 4, *[5] * (SIDE - 4), 4, 3], device=roomy, dtype=HALF)
    want = axis[:, None, None] * axis[:, None] * axis
    assert torch.equal(out[:, 0], want.view(-1)) and torch.equal(out[:, 7], want.view(-1))


def test_voxelize_and_back(roomy: torch.device) -> None:
    feats = random_feats(roomy)
    row = torch.arange(N, device=roomy)
    voxel = (row // 2).int()
    counts = F.spcount(voxel, N // 2)
    out = F.spvoxelize(feats, voxel, counts)
    rows = torch.from_numpy(picked()).to(roomy) // 2
    want = (feats[2 * rows].double() + feats[2 * rows + 1].double()) / 2
    assert_near(out[rows], want)
    index = (row[:, None] // 2).int().expand(-1, 8).contiguous()
    shares = torch.zeros(N, 8, device=roomy, dtype=HALF)
    shares[:, 3] = 1
    spread = F.spdevoxelize(out, index, shares)
    assert torch.equal(spread[2 * rows + 1], out[rows])


def test_pools(roomy: torch.device) -> None:
    feats = random_feats(roomy)
    coords = torch.zeros(N, 4, dtype=torch.int32, device=roomy)
    coords[N // 2 :, 0] = 1
    feats[-1] = 100.0
    x = SparseTensor(feats, coords)
    top = F.global_max_pool(x, 2)
    assert (top[1] == 100).all() and (top[0] < 10).all()
    mean = F.global_avg_pool(x, 2)
    assert mean.shape == (2, C) and mean.abs().max() < 0.01


def test_windows(roomy: torch.device) -> None:
    """Maxima of 3x3x3 sites, and the gradient: how many windows each entry won."""
    feats = random_feats(roomy).requires_grad_()
    x = SparseTensor(feats, full_grid(roomy))
    out, index = F.max_pool3d(x, 3, 1, return_indices=True)
    (grad,) = torch.autograd.grad(out.feats, feats, torch.ones_like(out.feats))
    total, feats = F.sum_pool3d(x, 3, 1).feats.detach(), feats.detach()
    for row in picked().tolist():
        near = [n for _, n in around(row)]
        assert torch.equal(out.feats[row], feats[near].amax(0))
        assert torch.equal(grad[row], (index[near] == row).sum(0).to(HALF))
        assert_near(total[row], feats[near].double().sum(0))


def test_dense(roomy: torch.device) -> None:
    feats = random_feats(roomy)
    out = to_dense(feats, full_grid(roomy), (1, SIDE, SIDE, SIDE))
    rows = torch.from_numpy(picked()).to(roomy)
    assert torch.equal(out.view(N, C)[rows], feats[rows])
