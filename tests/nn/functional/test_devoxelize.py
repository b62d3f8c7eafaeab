"""spdevoxelize and calc_ti_weights against loops in float64."""

import math

import numpy as np
import pytest
import torch

from torchsparse.nn import functional as F


def interpolate(feats, index, weights):
    out = np.zeros((len(index), feats.shape[1]))
    for n, (rows, shares) in enumerate(zip(index, weights)):
        for row, share in zip(rows, shares):
            if row >= 0:
                out[n] += float(share) * feats[row]
    return out


def example(points, channels, voxels=40, width=8, seed=0):
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, voxels, (points, width)).astype(np.int32)
    return rng.normal(size=(voxels, channels)), index, rng.uniform(size=(points, width))


# float16, bfloat16: the result is rounded to 11 and 8 bits; sums are in float32.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_dtype_of_feats_and_weights(dtype, weights_dtype, device):
    """Regression 28: weights had to have the dtype of the features."""
    feats, index, weights = example(100, 5)
    x = torch.from_numpy(feats).to(device, dtype)
    w = torch.from_numpy(weights).to(device, weights_dtype)
    got = F.spdevoxelize(x, torch.from_numpy(index).to(device), w)
    assert got.dtype == dtype
    want = interpolate(x.double().cpu().numpy(), index, w.double().cpu().numpy())
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(got.double().cpu().numpy(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [0, 1, 3, 8, 27])
def test_any_width(width, device):
    feats, index, weights = example(20, 4, width=width)
    got = F.spdevoxelize(*(torch.from_numpy(a).to(device) for a in (feats, index, weights)))
    np.testing.assert_allclose(got.cpu().numpy(), interpolate(feats, index, weights), atol=1e-12)


def test_more_than_1024_channels_and_no_rows(device):
    """Regression 27: both gave zeros without a word."""
    feats, index, weights = example(9, 1100)
    got = F.spdevoxelize(*(torch.from_numpy(a).to(device) for a in (feats, index, weights)))
    np.testing.assert_allclose(got.cpu().numpy(), interpolate(feats, index, weights), atol=1e-12)

    none = torch.zeros((0, 8), dtype=torch.int32, device=device)
    assert F.spdevoxelize(got, none, none.float()).shape == (0, 1100)
    nowhere = torch.full((3, 8), -1, dtype=torch.int32, device=device)
    x = torch.zeros((0, 5), device=device, requires_grad=True)
    w = torch.ones((3, 8), device=device, requires_grad=True)
    y = F.spdevoxelize(x, nowhere, w)
    assert y.tolist() == [[0.0] * 5] * 3
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 5)
    assert w.grad is not None and not w.grad.any()


@pytest.mark.parametrize("repeats", [1, 40])
def test_gradcheck_in_feats_and_weights(repeats, device):
    feats, index, weights = example(6, 3, voxels=5)
    index = np.tile(index, (repeats, 1))[:20]  # many points on few voxels
    weights = np.tile(weights, (repeats, 1))[:20]
    i = torch.from_numpy(index).to(device)
    x = torch.from_numpy(feats).to(device).requires_grad_()
    w = torch.from_numpy(weights).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: F.spdevoxelize(x, i, w), (x, w))


def test_gradients_have_the_dtypes_of_their_tensors(device):
    feats, index, weights = example(30, 4)
    x = torch.from_numpy(feats).to(device).half().requires_grad_()
    w = torch.from_numpy(weights).to(device).float().requires_grad_()
    F.spdevoxelize(x, torch.from_numpy(index).to(device), w).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float16
    assert w.grad is not None and w.grad.dtype == torch.float32


def test_nan_and_inf_reach_only_neighbours(device):
    """An absent neighbour reads nothing, not even 0 times the first row."""
    x = torch.tensor([[float("nan")], [float("inf")], [3.0]], device=device)
    index = torch.tensor([[-1, 2], [-1, -1], [1, -1], [0, 2]], device=device)
    got = F.spdevoxelize(x, index, torch.ones((4, 2), device=device)).squeeze(1)
    assert got[:3].tolist() == [3.0, 0.0, math.inf]
    assert got[3].isnan()


def test_autocast_does_not_cast_down(device):
    x = torch.full((1, 1), 4097.0, device=device)
    index = torch.zeros((1, 8), dtype=torch.int32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = F.spdevoxelize(x, index, torch.full((1, 8), 0.125, device=device))
    assert got.dtype == torch.float32
    assert got.item() == 4097.0


def test_spdevoxelize_says_what_it_expected():
    x, index, w = torch.ones((4, 2)), torch.zeros((3, 8), dtype=torch.int32), torch.ones((3, 8))
    with pytest.raises(ValueError, match=r"smaller than the number of rows.*\(4 rows\)"):
        F.spdevoxelize(x, index + 4, w)
    with pytest.raises(ValueError, match=r"same shape \[N, 8\], got \[3, 8\] and \[8, 3\]"):
        F.spdevoxelize(x, index, w.t())
    with pytest.raises(TypeError, match=r"`weights` must be floating, got torch.int32"):
        F.spdevoxelize(x, index, index)
    with pytest.raises(TypeError, match=r"`coords` must hold integers, got torch.float32"):
        F.spdevoxelize(x, w, w)


def shares(point, rows, scale):
    """The definition, for one point."""
    u = [(c - math.floor(c / scale) * scale) / scale for c in point]
    out = []
    for corner in range(8):
        j = (corner >> 2 & 1, corner >> 1 & 1, corner & 1)
        share = math.prod(u[i] if j[i] else 1 - u[i] for i in range(3))
        out.append(share if rows[corner] >= 0 else 0.0)
    return np.array(out) / (sum(out) + 1e-8)


@pytest.mark.filterwarnings("ignore:calc_ti_weights:DeprecationWarning")
@pytest.mark.parametrize("scale", [1, 2.0, 0.3])
@pytest.mark.parametrize("points", [0, 1, 8, 21])
def test_weights_equal_the_definition_in_both_layouts(points, scale, device):
    rng = np.random.default_rng(points)
    xyz = rng.uniform(-9, 9, (points, 4))  # a fourth column is ignored
    index = rng.integers(-1, 3, (points, 8)).astype(np.int32)
    want = np.array([shares(p[:3], rows, scale) for p, rows in zip(xyz, index)]).reshape(-1, 8)
    c, i = torch.from_numpy(xyz).to(device), torch.from_numpy(index).to(device)
    got = F.calc_ti_weights(c, i, scale)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.cpu().numpy(), want, atol=1e-12)
    if points != 8:  # eight points are read as rows
        old = F.calc_ti_weights(c, i.t(), scale)
        assert old.shape == (8, points)
        torch.testing.assert_close(old.transpose(0, 1), got)


def test_weights_have_at_least_float32_and_no_gradient(device):
    c = torch.rand((5, 3), device=device)
    i = torch.zeros((5, 8), dtype=torch.int64, device=device)
    assert F.calc_ti_weights(c.half(), i).dtype == torch.float32
    assert F.calc_ti_weights((c * 9).int(), i).dtype == torch.float32
    assert not F.calc_ti_weights(c.requires_grad_(), i).requires_grad


def test_calc_ti_weights_says_what_it_expected():
    c, i = torch.rand((5, 3)), torch.zeros((5, 8), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[5, 8\] or \[8, 5\], got \[4, 8\]"):
        F.calc_ti_weights(c, i[:4])
    with pytest.raises(ValueError, match=r"\[N, 3 or more\], got \[5, 2\]"):
        F.calc_ti_weights(c[:, :2], i)
    with pytest.raises(TypeError, match=r"`idx_query` must hold integers, got torch.float32"):
        F.calc_ti_weights(c, i.float())
