import copy
from typing import Any

import numpy as np
import pytest
import torch

from torchsparse import SparseTensor
from torchsparse.utils.collate import sparse_collate, sparse_collate_fn

LENGTHS = (4, 0, 3)


def samples(dtype=torch.int32, numpy=False, ranges=(None,) * 3):
    rng = np.random.default_rng(0)
    out = []
    for n, extent in zip(LENGTHS, ranges):
        coords = torch.from_numpy(rng.integers(-9, 9, (n, 3))).to(dtype)
        feats = torch.from_numpy(rng.normal(size=(n, 2)))
        if numpy:
            coords, feats = coords.numpy(), feats.numpy()
        out.append(SparseTensor(feats, coords, stride=2, spatial_range=extent))
    return out


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_batch_index_in_front_and_int32(dtype, numpy):
    """Regression 35: int64 coordinates broke later layers."""
    inputs = samples(dtype, numpy)
    got = sparse_collate(inputs)
    assert got.coords.dtype == torch.int32
    want = [[j, *row] for j, x in enumerate(inputs) for row in x.coords.tolist()]
    assert got.coords.tolist() == want
    assert isinstance(got.feats, torch.Tensor)
    assert got.feats.tolist() == [row for x in inputs for row in x.feats.tolist()]
    assert got.stride == (2, 2, 2)
    assert got.spatial_range is None


def test_inputs_stay_as_they_are():
    """Regression 35: workers saw their samples modified."""
    inputs = samples(numpy=True)
    before = copy.deepcopy(inputs)
    sparse_collate(inputs)
    for x, old in zip(inputs, before):
        assert type(x.coords) is np.ndarray
        np.testing.assert_array_equal(x.coords, old.coords)
        np.testing.assert_array_equal(x.feats, old.feats)


def test_float_coordinates_stay_float():
    inputs = [SparseTensor(torch.ones(2, 1), torch.rand(2, 3)) for _ in range(3)]
    got = sparse_collate(inputs)
    assert got.coords.dtype == torch.float32
    assert torch.equal(got.coords[:, 1:], torch.cat([x.coords for x in inputs]))
    assert got.coords[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("ranges", "want"),
    [
        (((4, 9, 5), (6, 2, 5), (1, 1, 7)), (3, 6, 9, 7)),
        (((1, 4, 9, 5), (6, 2, 5), (8, 1, 1, 7, 99)), (3, 6, 9, 7)),
        (((4, 9, 5), None, (1, 1, 7)), None),
    ],
)
def test_range(ranges, want):
    """Regression 35: the range was dropped."""
    assert sparse_collate(samples(ranges=ranges)).spatial_range == want


def test_range_of_one_sample():
    x = SparseTensor(torch.ones(1, 1), torch.zeros(1, 3).int(), spatial_range=(4, 5, 6))
    assert sparse_collate([x]).spatial_range == (1, 4, 5, 6)


def test_labels():
    inputs = [SparseTensor(np.arange(n), np.zeros((n, 3), np.int32)) for n in LENGTHS]
    got = sparse_collate(inputs)
    assert got.feats.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert got.feats.dtype == torch.int64


def test_says_what_it_expected():
    with pytest.raises(ValueError, match=r"at least one sparse tensor, got none"):
        sparse_collate([])
    batched = SparseTensor(torch.ones(2, 1), torch.zeros(2, 4).int())
    with pytest.raises(
        ValueError, match=r"\[N, 3\].*without the batch index, got \[2, 4\] in sample 1"
    ):
        sparse_collate([*samples()[:1], SparseTensor(batched.feats, batched.coords, 2)])
    with pytest.raises(ValueError, match=r"same stride, got \[\(1, 1, 1\), \(2, 2, 2\)\]"):
        sparse_collate([*samples(), SparseTensor(torch.ones(2, 1), torch.zeros(2, 3).int())])
    far = SparseTensor(torch.ones(1, 1), torch.tensor([[2**31, 0, 0]]))
    with pytest.raises(ValueError, match=r"fit into .*\(sample 0\)"):
        sparse_collate([far])


def test_collate_fn_by_kind_of_value():
    batch = [
        {
            "input": x,
            "label": np.array([j, j]),
            "pose": torch.eye(4) * j,
            "name": f"frame {j}",
            "meta": {"time": torch.tensor(j), "id": j},
        }
        for j, x in enumerate(samples())
    ]
    got = sparse_collate_fn(batch)
    assert torch.equal(got["input"].coords, sparse_collate(samples()).coords)
    assert got["label"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert got["pose"].shape == (3, 4, 4)
    assert got["name"] == ["frame 0", "frame 1", "frame 2"]
    assert got["meta"]["time"].tolist() == [0, 1, 2]
    assert got["meta"]["id"] == [0, 1, 2]


def test_collate_fn_leaves_other_lists_alone():
    for value in ([], [1, 2], [torch.zeros(1)]):
        assert sparse_collate_fn(value) is value


def test_read_only_arrays():
    array = np.zeros((2, 3), np.int32)
    array.flags.writeable = False
    got = sparse_collate_fn([{"x": SparseTensor(np.ones((2, 1)), array), "y": array}])
    assert got["x"].coords.shape == (2, 4)
    assert got["y"].shape == (1, 2, 3)


def test_works_in_a_data_loader():
    data: Any = [{"input": x} for x in samples()]
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=sparse_collate_fn)
    (batch,) = loader
    assert batch["input"].coords[:, 0].tolist() == [0, 0, 0, 0, 2, 2, 2]
