"""spvoxelize against a loop in float64."""

import numpy as np
import pytest
import torch

from torchsparse.nn import functional as F


def average(feats, index, counts):
    out = np.zeros((len(counts), feats.shape[1]))
    for row, voxel in zip(feats.astype(np.float64), index):
        if 0 <= voxel < len(counts) and counts[voxel]:
            out[voxel] += row / counts[voxel]
    return out


def example(rows, channels, voxels=50, seed=0):
    rng = np.random.default_rng(seed)
    index = rng.integers(-2, voxels + 2, rows).astype(np.int32)
    counts = rng.integers(0, 4, voxels).astype(np.int32)
    return rng.normal(size=(rows, channels)), index, counts


# float16, bfloat16: the result is rounded to 11 and 8 bits; sums are in float32.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_divides_by_the_given_count_and_skips(dtype, device):
    feats, index, counts = example(400, 9)
    feats = torch.from_numpy(feats).to(device, dtype)
    got = F.spvoxelize(
        feats, torch.from_numpy(index).to(device), torch.from_numpy(counts).to(device)
    )
    assert got.dtype == dtype
    want = average(feats.double().cpu().numpy(), index, counts)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(got.double().cpu().numpy(), want, rtol=tolerance, atol=tolerance)


def test_more_than_1024_channels_and_no_rows(device):
    """Regression 27: both gave zeros without a word."""
    feats, index, counts = example(60, 1500, voxels=7)
    got = F.spvoxelize(*(torch.from_numpy(a).to(device) for a in (feats, index, counts)))
    np.testing.assert_allclose(got.cpu().numpy(), average(feats, index, counts), atol=1e-12)
    empty = F.spvoxelize(
        torch.zeros((0, 5), device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.ones(3, dtype=torch.int32, device=device),
    )
    assert empty.shape == (3, 5)
    assert not empty.any()


def test_gradient_is_the_share_of_each_row(device):
    feats, index, counts = example(200, 4)
    x = torch.from_numpy(feats).to(device).requires_grad_()
    args = torch.from_numpy(index).to(device), torch.from_numpy(counts).to(device)
    g = torch.randn(50, 4, dtype=torch.float64, device=device)
    F.spvoxelize(x, *args).backward(g)
    assert x.grad is not None
    for row, voxel in enumerate(index):
        there = 0 <= voxel < 50 and counts[voxel] > 0
        want = g[voxel] / counts[voxel] if there else torch.zeros_like(g[0])
        torch.testing.assert_close(x.grad[row], want)


def test_gradcheck(device):
    feats, index, counts = example(17, 3, voxels=6)
    x = torch.from_numpy(feats).to(device).requires_grad_()
    args = torch.from_numpy(index).to(device), torch.from_numpy(counts).to(device)
    assert torch.autograd.gradcheck(lambda x: F.spvoxelize(x, *args), x)


def test_nan_stays_in_its_voxel(device):
    x = torch.tensor([[float("nan")], [float("inf")], [2.0]], device=device)
    index = torch.tensor([0, 2, 1], device=device)
    got = F.spvoxelize(x, index, torch.tensor([1, 1, 0], dtype=torch.int32, device=device))
    assert got[0].isnan()
    assert got[1:].tolist() == [[2.0], [0.0]]


def test_half_features_are_summed_in_float32_under_autocast(device):
    """5000 ones: a sum in float16 stops at 2048."""
    x = torch.ones((5000, 2), dtype=torch.float16, device=device)
    index = torch.zeros(5000, dtype=torch.int32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = F.spvoxelize(x, index, torch.tensor([5000], dtype=torch.int32, device=device))
        exact = F.spvoxelize(
            torch.full((2, 1), 4097.0, device=device),
            index[:2],
            torch.tensor([2], dtype=torch.int32, device=device),
        )
    assert got.dtype == torch.float16
    assert got.tolist() == [[1.0, 1.0]]
    assert exact.dtype == torch.float32
    assert exact.item() == 4097.0  # averaged coordinates stay exact


def test_long_voxels_are_summed_precisely(device):
    """100 000 rows of 0.1 in one voxel: adding one after the other in float32 loses 3 digits."""
    x = torch.full((100_000, 1), 0.1, device=device)
    index = torch.zeros(100_000, dtype=torch.int64, device=device)
    got = F.spvoxelize(x, index, torch.tensor([100_000], device=device))
    np.testing.assert_allclose(got.item(), np.float32(0.1), rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_for_any_row_order_of_voxels(threads, device):
    """Sums run in row order within a voxel, whatever the threads and the interleaving."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(3000, 8)).astype(np.float32)).to(device)
    index = torch.from_numpy(rng.integers(0, 200, 3000)).to(device)
    counts = torch.full((200,), 3, device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = F.spvoxelize(x, index, counts)
    finally:
        torch.set_num_threads(before)
    order = torch.sort(index, stable=True).indices
    again = F.spvoxelize(x[order], index[order], counts)
    assert torch.equal(got, again)


def test_second_derivative_is_refused(device):
    x = torch.ones((2, 1), device=device, requires_grad=True)
    index = torch.zeros(2, dtype=torch.int64, device=device)
    y = F.spvoxelize(x, index, torch.ones(1, dtype=torch.int64, device=device))
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        g.sum().backward()


def test_says_what_it_expected():
    x, index, counts = torch.ones((3, 2)), torch.zeros(3, dtype=torch.int32), torch.ones(2).int()
    with pytest.raises(TypeError, match=r"`feats` must be floating, got torch.int32"):
        F.spvoxelize(x.int(), index, counts)
    with pytest.raises(ValueError, match=r"`feats` must have shape \[N, C\], got \[3\]"):
        F.spvoxelize(x[:, 0], index, counts)
    with pytest.raises(ValueError, match=r"one voxel per row of `feats`, got 2 and 3"):
        F.spvoxelize(x, index[:2], counts)
    with pytest.raises(TypeError, match=r"`counts` must hold integers, got torch.float32"):
        F.spvoxelize(x, index, counts.float())
