"""Global pools against a loop over samples."""

import numpy as np
import pytest
import torch

from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

POOLS = {F.global_avg_pool: np.mean, F.global_max_pool: np.max, F.global_sum_pool: np.sum}


def loop(fn, feats, batch, size):
    rows = [feats[batch == b] for b in range(size)]
    return np.array([fn(r, axis=0) if len(r) else np.zeros(feats.shape[1]) for r in rows])


def tensor(device, cloud, channels=5, dtype=torch.float64):
    coords = torch.from_numpy(cloud()).to(device)
    feats = np.random.default_rng(0).normal(size=(len(coords), channels)) - 3
    return SparseTensor(torch.from_numpy(feats).to(device, dtype), coords)


@pytest.mark.parametrize("size", [None, 3, 6])
@pytest.mark.parametrize("pool", POOLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cloud", [clouds.single, clouds.odd, clouds.batch_gap])
def test_equals_the_loop_and_an_empty_sample_gives_zero(cloud, pool, size, device):
    """Regression 37: NaN or a crash for a gap in the middle; ``batch_size`` for one at the end."""
    x = tensor(device, cloud)
    got = pool(x, batch_size=size)
    batch = x.coords[:, 0].cpu().numpy()
    want = loop(POOLS[pool], x.feats.cpu().numpy(), batch, size or batch.max() + 1)
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("pool", POOLS, ids=lambda f: f.__name__)
def test_no_rows(pool, device):
    x = tensor(device, clouds.empty)
    assert pool(x).shape == (0, 5)
    x.feats.requires_grad_()
    got = pool(x, batch_size=2)
    assert got.tolist() == [[0.0] * 5] * 2
    got.sum().backward()


@pytest.mark.parametrize("pool", POOLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cloud", [clouds.batch_gap, clouds.odd])
def test_gradcheck(cloud, pool, device):
    x = tensor(device, cloud, channels=2)
    feats = x.feats.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: pool(SparseTensor(f, x.coords), batch_size=4), feats, fast_mode=True
    )


def test_maximum_sends_its_gradient_to_one_row(device):
    """After a ReLU, many rows share the maximum 0; NaN is a maximum too."""
    feats = torch.tensor([[0.0, 1.0], [0.0, float("nan")], [0.0, 2.0]], device=device)
    coords = torch.zeros((3, 4), dtype=torch.int32, device=device)
    x = SparseTensor(feats.requires_grad_(), coords)
    got = F.global_max_pool(x)
    assert got[0, 0] == 0
    assert got[0, 1].isnan()
    got.backward(torch.tensor([[3.0, 5.0]], device=device))
    assert feats.grad is not None
    assert feats.grad.tolist() == [[3.0, 0.0], [0.0, 5.0], [0.0, 0.0]]


def test_minus_infinity_is_a_maximum(device):
    x = tensor(device, clouds.single)
    x.feats.fill_(-torch.inf)
    assert F.global_max_pool(x).tolist() == [[-torch.inf] * 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_features_summed_in_float32(dtype, device):
    """5000 rows of 1: a sum in half precision stops at 2048 or 256; autocast changes nothing."""
    coords = torch.zeros((5000, 4), dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones((5000, 2), dtype=dtype, device=device), coords)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for pool in POOLS:
            got = pool(x)
            assert got.dtype == dtype
            # 5000 itself is rounded to 8 bits in bfloat16
            want = 4992.0 if dtype == torch.bfloat16 else 5000.0
            assert got.tolist() == [[want if pool is F.global_sum_pool else 1.0] * 2]


def test_long_samples_in_any_row_order(device):
    """Chunks of long samples: lengths around multiples of 256, rows sorted and shuffled."""
    rng = np.random.default_rng(2)
    for lengths in ([256, 0, 257, 1300], [5000], [1, 511, 512, 3000]):
        batch = np.repeat(np.arange(len(lengths)), lengths)
        feats = rng.normal(size=(len(batch), 3))
        for order in (np.arange(len(batch)), rng.permutation(len(batch))):
            coords = np.zeros((len(batch), 4), np.int32)
            coords[:, 0] = batch[order]
            x = SparseTensor(
                torch.from_numpy(feats[order]).to(device), torch.from_numpy(coords).to(device)
            )
            for pool, fn in POOLS.items():
                want = loop(fn, feats, batch, len(lengths))
                np.testing.assert_allclose(pool(x).cpu().numpy(), want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("pool", POOLS, ids=lambda f: f.__name__)
def test_says_what_it_expected(pool):
    x = tensor(torch.device("cpu"), clouds.batch_gap)
    with pytest.raises(ValueError, match=r"smaller than `batch_size` \(batch_size = 2\)"):
        pool(x, batch_size=2)
    x.coords[3, 0] = -1
    with pytest.raises(ValueError, match=r"batch index.*must not be negative \(got -1\)"):
        pool(x)
    with pytest.raises(ValueError, match=r"batch index"):
        pool(x, batch_size=3)
