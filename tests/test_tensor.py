"""SparseTensor and PointTensor: containers that share, move, add and travel."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchsparse
from tests import clouds
from tests.cases import assert_close, convolve, raises_on_data, sparse, weight
from tests.oracles import Layer
from torchsparse import PointTensor, SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F
from torchsparse.nn.utils import fapply, get_kernel_offsets

F64 = torch.float64


def test_the_constructor_stores_its_arguments(device: torch.device) -> None:
    """No copy, no cast, no check; feats first."""
    feats = torch.arange(6, device=device)  # labels (N,)
    coords = torch.rand(6, 3, device=device)  # points before collation
    x = SparseTensor(feats, coords)
    assert x.feats is feats and x.coords is coords
    arrays = SparseTensor(np.zeros((2, 3)), np.zeros((2, 4)))  # pyright: ignore
    assert isinstance(arrays.feats, np.ndarray) and isinstance(arrays.coords, np.ndarray)
    assert (x.stride, x.spatial_range) == ((1, 1, 1), None)
    assert x._caches.cmaps == x._caches.kmaps == x._caches.hashmaps == {}


def test_aliases_read_and_write(device: torch.device) -> None:
    x, y = sparse(device, "odd"), sparse(device, "plane", stride=(1, 2, 4))
    assert x.F is x.feats and x.C is x.coords and x.s == x.stride == (1, 1, 1)
    x.F, x.C, x.s = y.feats, y.coords, y.stride
    assert x.feats is y.feats and x.coords is y.coords and x.stride == (1, 2, 4)
    x.feats, x.coords, x.stride = x.feats * 2, x.coords + 1, (3, 3, 3)
    assert x.F is x.feats and x.C is x.coords and x.s == (3, 3, 3)


@pytest.mark.parametrize("stride", [2, (2, 2, 2), [2, 2, 2], np.int64(2)])
def test_stride_is_a_triple(stride: Any, device: torch.device) -> None:
    x = sparse(device, stride=stride)
    assert x.stride == (2, 2, 2) and isinstance(x.stride, tuple)


@pytest.mark.parametrize(
    "given", [[2, 9, 9, 9], (2, 9, 9, 9), torch.tensor([2, 9, 9, 9]), np.array([2, 9, 9, 9])]
)
def test_spatial_range_in_every_form(given: Any, device: torch.device) -> None:
    coords = torch.tensor([[1, 3, 4, 5]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones(1, 2, device=device), coords, 1, given)
    assert x.spatial_range == (2, 9, 9, 9) and isinstance(x.spatial_range, tuple)
    assert all(type(v) is int for v in x.spatial_range)
    assert x.dense().shape == (2, 9, 9, 9, 2)


def test_extra_range_entries_are_kept(device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, *clouds.ROOM, 7))
    assert x.spatial_range == (1, *clouds.ROOM, 7)
    assert x.dense().shape == (1, *clouds.ROOM, 3)


CASTS: list[tuple[str, Callable[[Any], Any], torch.dtype]] = [
    ("half", lambda x: x.half(), torch.float16),
    ("float", lambda x: x.float(), torch.float32),
    ("bfloat16", lambda x: x.bfloat16(), torch.bfloat16),
    ("double", lambda x: x.double(), torch.float64),
    ("to(dtype)", lambda x: x.to(torch.float16), torch.float16),
    ("to(dtype=)", lambda x: x.to(dtype=torch.float32), torch.float32),
    ("to(device, dtype=)", lambda x: x.to("cpu", dtype=torch.float32), torch.float32),
]


@pytest.mark.parametrize(("name", "cast", "dtype"), CASTS, ids=[name for name, *_ in CASTS])
def test_casts_touch_floating_features_alone(name: str, cast: Any, dtype: torch.dtype) -> None:
    x = sparse(torch.device("cpu"))
    coords = x.coords
    assert cast(x) is x
    assert x.feats.dtype == dtype and x.coords is coords
    labels = SparseTensor(torch.arange(3), torch.rand(3, 3, dtype=F64))
    cast(labels)
    assert labels.feats.dtype == torch.int64 and labels.coords.dtype == F64


def test_moves_return_self(device: torch.device) -> None:
    x = sparse(device)
    assert x.to(device) is x and x.to(device, non_blocking=True) is x
    assert x.to() is x
    assert x.cpu() is x and x.feats.device.type == x.coords.device.type == "cpu"


def test_detach_in_place(device: torch.device) -> None:
    x = sparse(device)
    leaf = x.feats.requires_grad_()
    x.feats = leaf * 2
    assert x.detach() is x and not x.feats.requires_grad
    assert_close(x.feats, leaf.detach() * 2, F64)


@pytest.mark.parametrize("cloud", ["batch_gap", "empty", "single"])
def test_dense(cloud: str, device: torch.device) -> None:
    room = (clouds.BATCH, *clouds.ROOM)
    x = sparse(device, cloud, spatial_range=room)
    want = np.zeros((*room, 3))
    want[tuple(clouds.CLOUDS[cloud]().T)] = x.feats.cpu().numpy()
    dense = x.dense()
    assert dense.dtype == F64 and dense.device == x.feats.device
    assert_close(dense, want, F64)


def test_dense_needs_a_range(device: torch.device) -> None:
    with pytest.raises(ValueError, match="spatial_range"):
        sparse(device).dense()


def test_dense_refuses_rows_outside(device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, 20, 20, 3))
    with raises_on_data(ValueError, r"range|outside"):
        x.dense()


# Sharing.


def test_addition(device: torch.device) -> None:
    a = sparse(device, spatial_range=(1, *clouds.ROOM), stride=2)
    b = SparseTensor(a.feats * 3, a.coords.clone(), 4)
    total = a + b
    assert type(total) is SparseTensor
    assert_close(total.feats, a.feats * 4, F64)
    assert total.coords is a.coords and total._caches is a._caches
    assert (total.stride, total.spatial_range) == (a.stride, a.spatial_range)


def test_addition_of_other_types_is_not_ours(device: torch.device) -> None:
    x = sparse(device)
    for other in ("3", None, np.ones(3), PointTensor(x.feats, x.coords)):
        assert x.__add__(other) is NotImplemented
        with pytest.raises(TypeError):
            x + other
        with pytest.raises(TypeError):
            other + x  # pyright: ignore


def test_cat(device: torch.device) -> None:
    a = sparse(device, spatial_range=(1, *clouds.ROOM), stride=2)
    b = SparseTensor(a.feats[:, :1].float(), a.coords.clone())
    joined = torchsparse.cat([a, b, a])
    assert joined.feats.shape[1] == 7
    assert_close(joined.feats, torch.cat([a.feats, b.feats, a.feats], 1), torch.float32)
    assert joined.coords is a.coords and joined._caches is a._caches
    assert (joined.stride, joined.spatial_range) == (a.stride, a.spatial_range)


def test_fapply(device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, *clouds.ROOM), stride=2)
    y = fapply(x, torch.clamp, min=0.5)
    assert type(y) is SparseTensor and y is not x
    assert_close(y.feats, x.feats.clamp(min=0.5), F64)
    assert y.coords is x.coords and y._caches is x._caches
    assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)


def test_pointwise_and_submanifold_share_everything(device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, *clouds.ROOM), stride=(2, 1, 4))
    for kernel_size in (1, 2, 3):
        y = F.conv3d(x, weight(device, kernel_size**3), kernel_size)
        assert y.coords is x.coords and y._caches is x._caches
        assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)


class Labelled(SparseTensor):
    """A subclass whose constructor nobody else can call."""

    def __init__(self, name: str, feats: Tensor, coords: Tensor) -> None:
        super().__init__(feats, coords)
        self.name = name


def test_operations_on_a_subclass_return_the_base(device: torch.device) -> None:
    given = sparse(device)
    x = Labelled("scan", given.feats, given.coords)
    results = [
        F.conv3d(x, weight(device, 27), 3),
        F.conv3d(x, weight(device, 8), 2, None, 2),
        F.conv3d(x, weight(device, 1)[0], 1),
        F.conv3d(x, weight(device, 8), 2, None, 2, transposed=True, generative=True),
        x + given,
        torchsparse.cat([x, x]),
        fapply(x, torch.relu),
        torchsparse.generative_add(x, given),
    ]
    assert {type(result) for result in results} == {SparseTensor}
    assert x.to(device) is x and x.name == "scan"


# Union.


def test_generative_add(device: torch.device) -> None:
    """Sorted union, summed features, elementwise largest range, levels of a before those of b."""
    a, b = sparse(device, "plane", spatial_range=(1, 30, 14, 15)), sparse(device, "odd")
    b.spatial_range = (2, 13, 20, 15)
    for x in (a, b):
        convolve(Layer.of(2, 2), x, weight(device, 8))
    four = torch.zeros(1, 4, dtype=torch.int32, device=device)
    b._caches.cmaps[(4, 4, 4)] = (four, None)
    total = torchsparse.generative_add(a, b)
    sums: dict[tuple[int, ...], Any] = {}
    for x in (a, b):
        for row, feats in zip(x.coords.tolist(), x.feats.cpu()):
            sums[tuple(row)] = sums.get(tuple(row), 0) + feats
    assert len(sums) < len(a.coords) + len(b.coords)
    assert [tuple(row) for row in total.coords.tolist()] == sorted(sums)
    assert total.coords.dtype == torch.int32
    assert_close(total.feats, torch.stack([sums[row] for row in sorted(sums)]), F64)
    assert (total.stride, total.spatial_range) == (a.stride, (2, 30, 20, 15))
    cmaps = total._caches.cmaps
    assert total._caches is not a._caches and not total._caches.kmaps
    assert cmaps[(1, 1, 1)][0] is total.coords
    assert cmaps[(2, 2, 2)][0] is a._caches.cmaps[(2, 2, 2)][0]
    assert cmaps[(4, 4, 4)][0] is four
    assert a._caches.kmaps and a._caches.cmaps[(1, 1, 1)][0] is a.coords


@pytest.mark.parametrize("ranged", [(True, False), (False, True), (False, False)])
def test_generative_add_without_both_ranges(
    ranged: tuple[bool, bool], device: torch.device
) -> None:
    room = (1, *clouds.ROOM)
    a, b = (
        sparse(device, name, spatial_range=room if given else None)
        for name, given in zip(("plane", "empty"), ranged)
    )
    total = torchsparse.generative_add(a, b)
    assert total.spatial_range is None and len(total.coords) == len(a.coords)


def test_gradients_of_a_union(device: torch.device) -> None:
    a, b = sparse(device, "plane"), sparse(device, "odd")
    for x in (a, b):
        x.feats.requires_grad_()
    total = torchsparse.generative_add(a, b)
    scale = total.coords.sum(1, keepdim=True).double()
    (total.feats * scale).sum().backward()
    for x in (a, b):
        assert x.feats.grad is not None
        assert_close(x.feats.grad, x.coords.sum(1, keepdim=True).double().expand(-1, 3), F64)


# Travelling.


@pytest.mark.parametrize(
    "travel", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_tensors_travel(travel: Any, device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, *clouds.ROOM), stride=2)
    convolve(Layer.of(3), x, weight(device, 27))
    y = travel(x)
    assert type(y) is SparseTensor and y is not x
    assert torch.equal(y.feats, x.feats) and torch.equal(y.coords, x.coords)
    assert y.feats.data_ptr() != x.feats.data_ptr()
    assert (y.stride, y.spatial_range) == (x.stride, x.spatial_range)
    assert x._caches.kmaps
    got, want = (convolve(Layer.of(2, 2), t, weight(device, 8)) for t in (y, x))
    assert torch.equal(got.coords, want.coords)
    assert_close(got.feats, want.feats, F64)


def test_kernel_maps_are_not_pickled(device: torch.device) -> None:
    x = sparse(device)
    plain = len(pickle.dumps(x))
    convolve(Layer.of(5), x, weight(device, 125))
    assert x._caches.kmaps
    assert not pickle.loads(pickle.dumps(x))._caches.kmaps
    assert len(pickle.dumps(x)) < plain + 8000  # a table would be 61 x 125 x 4 bytes


@pytest.mark.parametrize(
    "travel", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_layers_travel(travel: Any, device: torch.device) -> None:
    layer = spnn.Conv3d(3, 2, 2, 2, bias=True, config={"kmap_mode": "hashmap"}).to(device)
    x = sparse(device, dtype=torch.float32)
    want = layer(x)
    again = travel(layer)
    assert again is not layer and again._config == layer._config
    assert torch.equal(again(x).feats, want.feats)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on threads
def test_data_loader_workers_can_send_tensors() -> None:
    """The worker's end of the queue: pickled in shared memory."""
    loader = torch.utils.data.DataLoader(
        [sparse(torch.device("cpu")) for _ in range(2)],  # pyright: ignore
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
    )
    for x in loader:
        assert torch.equal(x.coords, torch.from_numpy(clouds.odd()))


# Flags, offsets, points.


def test_the_negative_flag() -> None:
    assert torchsparse.tensor.get_allow_negative_coordinates() is False
    torchsparse.tensor.set_allow_negative_coordinates(True)
    assert torchsparse.tensor.get_allow_negative_coordinates() is True


def test_the_negative_flag_is_read_at_call_time(device: torch.device) -> None:
    layer = spnn.Conv3d(3, 2, 3).to(device).double()
    x = sparse(device, "negative")
    torchsparse.tensor.set_allow_negative_coordinates(True)
    assert len(layer(x).coords) == len(x.coords)
    torchsparse.tensor.set_allow_negative_coordinates(False)
    fresh = SparseTensor(x.feats, x.coords)
    with raises_on_data(ValueError, "set_allow_negative_coordinates"):
        layer(fresh)


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "rows"),
    [
        ((1, 1, 2), 1, 1, [[0, 0, 0], [0, 0, 1]]),
        ((3, 1, 1), 2, 3, [[-6, 0, 0], [0, 0, 0], [6, 0, 0]]),
        ((1, 4, 1), (1, 2, 1), 1, [[0, -2, 0], [0, 0, 0], [0, 2, 0], [0, 4, 0]]),
        ((2, 1, 2), 1, 1, [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]),
        ((3, 3, 1), 1, 1, [[x, y, 0] for y in (-1, 0, 1) for x in (-1, 0, 1)]),
    ],
)
def test_get_kernel_offsets(
    size: Any, stride: Any, dilation: int, rows: list[list[int]], device: torch.device
) -> None:
    got = get_kernel_offsets(size, stride, dilation, device=str(device))
    assert got.dtype == torch.int32 and got.device.type == device.type
    assert got.tolist() == rows


def points(device: torch.device) -> PointTensor:
    return PointTensor(torch.rand(5, 3, device=device), torch.rand(5, 4, device=device))


def test_point_tensor(device: torch.device) -> None:
    x = points(device)
    assert x.idx_query == {} and x.weights == {}
    assert x.additional_features == {"idx_query": {}, "counts": {}}
    assert points(device).idx_query is not x.idx_query
    feats = x.F.clone()
    y = PointTensor(x.F * 2, x.C, {"a": 1}, {"b": 2})
    assert y.idx_query == {"a": 1} and y.weights == {"b": 2}
    total = x + y
    assert isinstance(total, PointTensor)
    assert_close(total.F, feats * 3, torch.float32)
    assert total.C is x.C and total.idx_query is x.idx_query and total.weights is x.weights
    assert total.additional_features is x.additional_features


def test_point_tensor_moves_in_place(device: torch.device) -> None:
    x = points(device)
    x.F.requires_grad_()
    assert x.detach() is x and not x.F.requires_grad
    assert x.half() is x and x.F.dtype == torch.float16
    assert x.to(device) is x and x.F.device.type == x.C.device.type == device.type
    assert x.cpu() is x and x.F.device.type == x.C.device.type == "cpu"


def test_the_same_classes_under_every_name() -> None:
    assert torchsparse.tensor.SparseTensor is torchsparse.SparseTensor
    assert torchsparse.tensor.PointTensor is torchsparse.PointTensor


def test_strides_are_positive_whole_numbers() -> None:
    feats, coords = torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int32)
    for wrong in (0, -1, (2.5, 1, 1), (0, 1, 1), [1, -2, 1], (1, True, 1)):
        with pytest.raises(ValueError, match="`stride` must be"):
            SparseTensor(feats, coords, wrong)
    ints = SparseTensor(feats, coords, (torch.tensor(2), np.int64(2), 2.0)).stride
    assert ints == (2, 2, 2) and all(type(step) is int for step in ints)


def test_two_axes_take_a_stride_in_any_form() -> None:
    feats, coords = torch.ones(1, 4), torch.zeros(1, 3, dtype=torch.int32)
    for stride in ((2, 1), [2, 1], np.array([2, 1]), torch.tensor([2, 1])):
        x = SparseTensor(feats, coords, stride)
        x.s = x.s
        assert x.stride == (2, 1)
    assert SparseTensor(feats, coords, 2).stride == (2, 2, 2)


def test_a_device_and_a_dtype_by_position() -> None:
    coords = torch.zeros(1, 4, dtype=torch.int32)
    x = SparseTensor(torch.ones(1, 4), coords).to("cpu", torch.half)
    assert x.feats.dtype == torch.half and x.coords.dtype == torch.int32
    assert PointTensor(torch.ones(1, 4), coords).to("cpu", torch.half).F.dtype == torch.half
    assert "list" in repr(PointTensor([1], [2]))
