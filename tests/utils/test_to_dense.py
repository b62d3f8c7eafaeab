"""to_dense against a loop."""

import numpy as np
import pytest
import torch

from tests import clouds
from tests.cases import raises_on_data
from torchsparse.utils.to_dense import to_dense

RANGE = (3, 13, 14, 15)


def example(device, cloud, dtype=torch.float64):
    coords = cloud()
    feats = np.random.default_rng(0).normal(size=(len(coords), 5))
    return torch.from_numpy(feats).to(device, dtype), torch.from_numpy(coords).to(device)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("cloud", [clouds.empty, clouds.origin, clouds.batch_gap])
def test_rows_stand_at_their_cells(cloud, dtype, device):
    """Regression 29: worked on CUDA alone."""
    feats, coords = example(device, cloud, dtype)
    got = to_dense(feats, coords, RANGE)
    want = torch.zeros((*RANGE, 5), dtype=dtype, device=device)
    for row, (b, x, y, z) in zip(feats, coords.tolist()):
        want[b, x, y, z] = row
    assert got.is_contiguous()
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "spatial_range",
    [list(RANGE), torch.tensor(RANGE), np.array(RANGE), (*RANGE, 99)],
    ids=lambda r: type(r).__name__,
)
def test_range_in_every_form(spatial_range, device):
    feats, coords = example(device, clouds.odd)
    assert torch.equal(to_dense(feats, coords, spatial_range), to_dense(feats, coords, RANGE))


def test_gradcheck(device):
    feats, coords = example(device, clouds.single)
    assert torch.autograd.gradcheck(
        lambda f: to_dense(f, coords, (1, 5, 8, 6)), feats.requires_grad_()
    )


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "expanded"])
def test_gradient_is_a_gather(layout, device):
    feats, coords = example(device, clouds.batch_gap)
    feats.requires_grad_()
    grad = torch.randn((*RANGE, 5), dtype=torch.float64, device=device)
    if layout == "permuted":  # what a dense convolution, channels first, sends back
        grad = grad.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    if layout == "expanded":
        grad = grad[..., :1, :1].expand(*RANGE, 5)
    to_dense(feats, coords, RANGE).backward(grad)
    assert feats.grad is not None
    for row, (b, x, y, z) in zip(feats.grad, coords.tolist()):
        assert torch.equal(row, grad[b, x, y, z])


def test_of_equal_coordinates_one_row_is_kept(device):
    coords = torch.zeros((4, 4), dtype=torch.int32, device=device)
    feats = torch.arange(4.0, device=device)[:, None].expand(4, 300)
    cell = to_dense(feats, coords, (1, 1, 1, 1)).view(-1)
    assert cell[0] in (0, 1, 2, 3)
    assert (cell == cell[0]).all()


def test_the_result_may_be_changed_in_place(device):
    feats, coords = example(device, clouds.odd)
    to_dense(feats.requires_grad_(), coords, RANGE).mul_(2).sum().backward()
    assert feats.grad is not None
    assert (feats.grad == 2).all()


@pytest.mark.parametrize(("column", "value"), [(0, 3), (0, -1), (1, 13), (2, -2), (3, 2**31 - 1)])
def test_rows_outside_the_range_are_an_error(column, value, device):
    """Regression 29: no bounds check."""
    feats, coords = example(device, clouds.odd)
    coords[5, column] = value
    detail = "spatial_range" if device.type == "cpu" else "noticed"
    said = rf"inside the dense tensor's `spatial_range` \({detail}"
    with raises_on_data(ValueError, said):
        to_dense(feats, coords, RANGE)


def test_cells_beyond_32_bits(device):
    """Regression 29: a 32-bit index. One column of 2^32 cells, of which nothing is stored."""
    feats = torch.zeros((1, 0), device=device)
    site = torch.tensor([[0, 2**16 - 1, 0, 2**16 - 1]], device=device)
    got = to_dense(feats, site, (1, 2**16, 1, 2**16))
    assert got.shape == (1, 2**16, 1, 2**16, 0)


def test_says_what_it_expected():
    feats, coords = example(torch.device("cpu"), clouds.odd)
    with pytest.raises(ValueError, match=r"4 extents, batch size first, got \(13, 14, 15\)"):
        to_dense(feats, coords, (13, 14, 15))
    with pytest.raises(ValueError, match=r"same number of rows, got 60 and 61"):
        to_dense(feats[1:], coords, RANGE)
    with pytest.raises(TypeError, match=r"integers"):
        to_dense(feats, coords.float(), RANGE)
