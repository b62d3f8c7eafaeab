"""sparse_quantize against numpy.unique."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchsparse.utils.quantize import ravel_hash, sparse_quantize


def oracle(points, voxel_size):
    cells = np.floor(np.asarray(points, np.float64) / np.asarray(voxel_size, np.float64))
    voxels, index, inverse = np.unique(
        cells.astype(np.int32), axis=0, return_index=True, return_inverse=True
    )
    return voxels, index, inverse.reshape(-1)


def check(points, voxel_size):
    got = sparse_quantize(points, voxel_size, return_index=True, return_inverse=True)
    assert isinstance(got, list)
    assert [a.dtype for a in got] == [np.int32, np.int64, np.int64]
    for ours, theirs in zip(got, oracle(points, voxel_size)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "voxel_size", [1, 0.3, (0.3, 2, 1.5), [0.1, 0.1, 0.2], np.array([1, 2, 3])]
)
def test_equals_numpy_with_first_occurrences(voxel_size):
    """Regression 50: lists were refused."""
    rng = np.random.default_rng(0)
    points = rng.normal(0, 3, (2000, 3)).astype(np.float32)
    check(points, voxel_size)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float16, np.float64])
def test_any_number_type(dtype):
    points = np.random.default_rng(1).integers(0, 9, (300, 3)).astype(dtype)
    check(points, 2)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-50, 50)),
    st.sampled_from([1, 0.1, 7.3]),
)
def test_equals_numpy_everywhere(points, voxel_size):
    check(points, voxel_size)


def test_cells_spread_over_all_of_int32():
    """The box has 2^96 cells, too many for one key."""
    rng = np.random.default_rng(2)
    points = rng.choice([-(2**31), -5, 0, 3, 2**31 - 1], (200, 3)).astype(np.float64)
    check(points, 1)


def test_float64_division():
    """The float32 number 0.7 lies below 7/10; divided by 0.1 in float32 it would give 7."""
    points = np.array([[0.7, 0, 0]], np.float32)
    assert points[0, 0] / np.float32(0.1) == 7
    assert sparse_quantize(points, 0.1).tolist() == [[6, 0, 0]]


def test_tensors_come_back_as_tensors(device):
    """Regression 50: NumPy alone."""
    points = torch.rand((500, 3), device=device) * 20
    got = sparse_quantize(points, 0.7, return_index=True, return_inverse=True)
    for ours, theirs in zip(got, oracle(points.cpu().numpy(), 0.7)):
        assert ours.device == points.device
        np.testing.assert_array_equal(ours.cpu().numpy(), theirs)
    assert torch.equal(sparse_quantize(points.requires_grad_(), 0.7), got[0])


def test_one_result_alone_several_as_a_list():
    points = np.random.default_rng(3).uniform(0, 4, (50, 3))
    voxels = sparse_quantize(points)
    assert isinstance(voxels, np.ndarray)
    assert len(sparse_quantize(points, return_index=True)) == 2
    alone, inverse = sparse_quantize(points, return_inverse=True)
    np.testing.assert_array_equal(alone[inverse], np.floor(points))
    np.testing.assert_array_equal(voxels, alone)


def test_no_points():
    """Regression 50: empty input failed."""
    got = sparse_quantize(np.zeros((0, 3)), 0.1, return_index=True, return_inverse=True)
    assert [a.shape for a in got] == [(0, 3), (0,), (0,)]
    assert [a.dtype for a in got] == [np.int32, np.int64, np.int64]


def test_awkward_arrays():
    points = np.random.default_rng(4).uniform(0, 9, (3, 40)).T[::-1]  # strides in every direction
    want = sparse_quantize(np.ascontiguousarray(points))
    frozen = points.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(sparse_quantize(points), want)
    np.testing.assert_array_equal(sparse_quantize(frozen), want)
    np.testing.assert_array_equal(sparse_quantize(points.tolist()), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**31, -(2.0**31) - 1])
def test_cells_that_are_no_int32(bad):
    """Regression 50: overflow and NaN went unchecked."""
    points = np.zeros((4, 3))
    points[2, 1] = bad
    with pytest.raises(ValueError, match=r"finite and fit into 32-bit integers, got cells from"):
        sparse_quantize(points)


@pytest.mark.parametrize(
    "bad", [0, -1, (1, 2), (1, 0, 1), float("nan"), float("inf"), [[1, 1, 1]]]
)
def test_voxel_size_is_one_or_three_positive_numbers(bad):
    with pytest.raises(
        ValueError, match=r"`voxel_size` must be one positive number or three, got"
    ):
        sparse_quantize(np.zeros((4, 3)), bad)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 2), (1, 4, 3)])
def test_shape(shape):
    with pytest.raises(ValueError, match=r"`coords` must have shape \[N, 3\], got"):
        sparse_quantize(np.zeros(shape))


def test_ravel_hash_is_the_row_major_number():
    x = np.random.default_rng(5).integers(-30, 40, (200, 3))
    got = ravel_hash(x)
    assert got.dtype == np.uint64
    shifted = x - x.min(0)
    want = np.ravel_multi_index(tuple(shifted.T), tuple(shifted.max(0) + 1))
    np.testing.assert_array_equal(got, want)
    assert ravel_hash(np.zeros((0, 3), np.int64)).shape == (0,)
    with pytest.raises(ValueError, match=r"\[N, D\], got \[3\]"):
        ravel_hash(np.arange(3))


def test_ravel_hash_of_negative_int32():
    x = np.array([[-(2**31), 0], [2**31 - 1, 1]], np.int32)
    assert ravel_hash(x).tolist() == [0, (2**32 - 1) * 2 + 1]
