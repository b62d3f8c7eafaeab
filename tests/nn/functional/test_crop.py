import numpy as np
import pytest
import torch

from tests import clouds
from torchsparse import SparseTensor
from torchsparse.nn import functional as F


def tensor(device, cloud=clouds.negative):
    coords = torch.from_numpy(cloud()).to(device)
    feats = torch.arange(len(coords), dtype=torch.float64, device=device)[:, None]
    return SparseTensor(feats, coords, stride=2, spatial_range=(3, 13, 14, 15))


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ((-1, 0, -3), (3, 5, 4)),
        (None, (0, 5, 9)),
        ((0, 0, -2), None),
        (None, None),
        ((50, 0, 0), None),
        (torch.tensor([-1, 0, -3]), [3, 5, 4]),
    ],
)
def test_keeps_what_lies_in_the_box_of_x_y_z(lower, upper, device):
    """Regression 30: cropped the columns (b, x, y) and dropped the range."""
    x = tensor(device)
    got = F.spcrop(x, lower, upper)
    keep = [
        row
        for row, (_, *site) in enumerate(x.coords.tolist())
        if (lower is None or all(c >= m for c, m in zip(site, list(lower))))
        and (upper is None or all(c < m for c, m in zip(site, list(upper))))
    ]
    assert got.feats.squeeze(1).tolist() == keep
    assert torch.equal(got.coords, x.coords[keep])
    assert got.stride == (2, 2, 2)
    assert got.spatial_range == (3, 13, 14, 15)
    assert got._caches is not x._caches


def test_gradient_and_empty(device):
    x = tensor(device)
    x.feats.requires_grad_()
    F.spcrop(x, (0, 0, 0)).feats.sum().backward()
    inside = (x.coords[:, 1:] >= 0).all(1)
    assert x.feats.grad is not None
    np.testing.assert_array_equal(x.feats.grad.squeeze(1).cpu() != 0, inside.cpu())
    assert len(F.spcrop(tensor(device, clouds.empty), (0, 0, 0), (9, 9, 9)).feats) == 0


def test_says_what_it_expected(device):
    with pytest.raises(ValueError, match=r"`coords_min` must be one int or .*, got \(1, 2\)"):
        F.spcrop(tensor(device), (1, 2))
    with pytest.raises(ValueError, match=r"\[N, 1 \+ D\].*got \[5\]"):
        F.spcrop(SparseTensor(torch.ones(5, 1), torch.zeros(5).int()), 1)
