import itertools

import pytest
import torch

from torchsparse.nn.utils import get_kernel_offsets


@pytest.mark.parametrize("size", [1, 2, 3, 4, (3, 1, 2), (3, 5, 1), (1, 3, 3)])
def test_offsets_in_the_order_of_the_weight(size, device):
    """The weight index of a tap, by the parity of the volume."""
    k = (size,) * 3 if isinstance(size, int) else size
    got = get_kernel_offsets(size, (1, 2, 3), (2, 1, 4), device=device)
    volume = k[0] * k[1] * k[2]
    assert got.shape == (volume, 3)
    assert got.dtype == torch.int32
    assert got.device.type == device.type
    for tx, ty, tz in itertools.product(*map(range, k)):
        row = tx + k[0] * (ty + k[1] * tz) if volume % 2 else (tx * k[1] + ty) * k[2] + tz
        centred = [t - (n - 1) // 2 for t, n in zip((tx, ty, tz), k)]
        assert got[row].tolist() == [centred[0] * 2, centred[1] * 2, centred[2] * 12]


def test_ranges_per_size():
    for size, values in ((2, {0, 1}), (3, {-1, 0, 1}), (4, {-1, 0, 1, 2})):
        assert set(get_kernel_offsets(size).flatten().tolist()) == values


def test_each_call_gives_a_new_tensor():
    """Regression 47: an edit of the result changed what the next caller got."""
    get_kernel_offsets(3).zero_()
    assert get_kernel_offsets(3).unique().tolist() == [-1, 0, 1]


def test_says_what_it_expected():
    with pytest.raises(ValueError, match=r"`size` must be one int or .*, got \(3, 3\)"):
        get_kernel_offsets((3, 3))
    with pytest.raises(
        ValueError, match=r"`dilation` must be at least 1 on every axis, got \(1, 0, 1\)"
    ):
        get_kernel_offsets(3, 1, (1, 0, 1))
    with pytest.raises(ValueError, match=r"`stride` must be one int or .*, got 1.5"):
        get_kernel_offsets(3, 1.5)
