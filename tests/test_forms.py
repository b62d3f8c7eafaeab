"""Arithmetic on sparse tensors, and their other forms: dense grids, COO tensors, samples."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchsparse.nn as spnn
from tests import clouds
from tests.cases import assert_close, raises_on_data, sparse
from torchsparse import SparseTensor
from torchsparse.utils.collate import sparse_collate

F64 = torch.float64
ROOM = (clouds.BATCH, *clouds.ROOM)
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]
each_operator = pytest.mark.parametrize("apply", OPERATORS, ids=lambda f: f.__name__)
each_cloud = pytest.mark.parametrize("cloud", ["empty", "single", "batch_gap", "odd"])


def same_sites(a: SparseTensor, b: SparseTensor) -> bool:
    same = a.coords is b.coords and a._caches is b._caches
    return same and (a.stride, a.spatial_range) == (b.stride, b.spatial_range)


# Arithmetic.


@each_operator
@each_cloud
def test_operators_act_on_features(apply: Any, cloud: str, device: torch.device) -> None:
    """On either side of a number, a tensor per channel, per row and per value."""
    x = sparse(device, cloud, spatial_range=ROOM, stride=2)
    own = x.feats.cpu().numpy()
    generator = np.random.default_rng(0)
    operands: list[Any] = [3, 0.25, np.float32(1.5), np.float64(0.5), np.int64(2)]
    for shape in ((), (3,), (1, 3), (len(own), 1), (len(own), 3)):
        operands.append(torch.from_numpy(np.array(generator.uniform(1, 2, shape))).to(device))
    for other in operands:
        plain = other.cpu().numpy() if isinstance(other, torch.Tensor) else other
        for got, want in (
            (apply(x, other), apply(own, plain)),
            (apply(other, x), apply(plain, own)),
        ):
            assert type(got) is SparseTensor and same_sites(got, x)
            assert got.feats.dtype == F64
            assert_close(got.feats, want, F64)


@each_operator
def test_operators_between_sparse_tensors(apply: Any, device: torch.device) -> None:
    a = sparse(device, spatial_range=ROOM, stride=2)
    b = SparseTensor(a.feats + 10, a.coords.clone(), 4)
    got = apply(a, b)
    assert same_sites(got, a)
    assert_close(got.feats, apply(a.feats.cpu().numpy(), b.feats.cpu().numpy()), F64)
    other = SparseTensor(a.feats, a.coords.flip(0))
    with raises_on_data(ValueError, "same coordinates in the same row order"):
        apply(a, other)
    with pytest.raises(ValueError, match=r"same coordinates, got \[61, 4\] and \[60, 4\]"):
        apply(a, SparseTensor(a.feats[1:], a.coords[1:]))


def test_a_sum_of_many_and_a_negation(device: torch.device) -> None:
    x = sparse(device)
    assert_close(sum([x, x, x]).feats, 3 * x.feats, F64)  # pyright: ignore
    assert_close((-x).feats, -x.feats, F64)
    assert same_sites(-x, x)


def test_operators_change_nothing_in_place(device: torch.device) -> None:
    x = sparse(device)
    before, kept = x.feats.clone(), x
    x += 1
    assert x is not kept and torch.equal(kept.feats, before)


@pytest.mark.parametrize("shape", [(2,), (61,), (60, 3), (60, 1), (2, 61, 3), (1, 61, 3)])
def test_operands_that_do_not_broadcast(shape: tuple[int, ...], device: torch.device) -> None:
    x = sparse(device)
    with pytest.raises(ValueError, match=r"broadcast over the features \[61, 3\].* got \["):
        x * torch.ones(shape, device=device)


def test_one_row_does_not_become_many(device: torch.device) -> None:
    x = sparse(device, "single")
    with pytest.raises(ValueError, match=r"features \[1, 3\].* got \[5, 3\]"):
        x + torch.ones(5, 3, device=device)


def test_gradients_through_arithmetic(device: torch.device) -> None:
    x = sparse(device, "single").feats.requires_grad_()
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    scale = torch.rand(3, dtype=F64, device=device, requires_grad=True)

    def compute(feats: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = SparseTensor(feats, coords)
        return ((1 - y) * scale / (y * y + 2) - y).feats

    assert torch.autograd.gradcheck(compute, (x, scale))


# Dense grids.


@each_cloud
def test_from_dense_is_the_inverse_of_dense(cloud: str, device: torch.device) -> None:
    x = sparse(device, cloud, spatial_range=ROOM)
    y = SparseTensor.from_dense(x.dense(), stride=2)
    order = np.lexsort(x.coords.cpu().numpy().T[::-1])
    np.testing.assert_array_equal(y.coords.cpu().numpy(), x.coords.cpu().numpy()[order])
    assert torch.equal(y.feats, x.feats[torch.from_numpy(order).to(device)])
    assert y.coords.dtype == torch.int32 and y.feats.dtype == F64
    assert (y.stride, y.spatial_range) == ((2, 2, 2), ROOM)


def test_from_dense_keeps_any_channel_and_nan(device: torch.device) -> None:
    dense = torch.zeros(1, 2, 2, 2, 2, device=device)
    dense[0, 1, 0, 1, 1], dense[0, 0, 1, 0, 0] = -1.0, torch.nan
    assert SparseTensor.from_dense(dense).coords.tolist() == [[0, 0, 1, 0], [0, 1, 0, 1]]


def test_from_dense_on_a_mask(device: torch.device) -> None:
    dense = torch.arange(2 * 3 * 4 * 2.0, device=device).view(1, 2, 3, 4, 2)
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool, device=device)
    mask[0, 0, 0, 0] = mask[0, 1, 2, 3] = True
    x = SparseTensor.from_dense(dense, mask)
    assert x.coords.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert x.feats.tolist() == [[0, 1], [46, 47]]
    with pytest.raises(ValueError, match=r"bool tensor of shape \[1, 2, 3, 4\], got torch.int64"):
        SparseTensor.from_dense(dense, mask.long())
    with pytest.raises(ValueError, match=r"got torch.bool \[1, 2, 3\]"):
        SparseTensor.from_dense(dense, mask[..., 0])


def test_from_dense_in_two_dimensions_and_of_strided_memory(device: torch.device) -> None:
    dense = torch.zeros(3, 4, 5, 2, device=device).permute(0, 2, 1, 3)  # [3, 5, 4, 2]
    dense[2, 4, 3] = torch.tensor([1.0, 2.0], device=device)
    x = SparseTensor.from_dense(dense, stride=(1, 2))
    assert (x.coords.tolist(), x.feats.tolist()) == ([[2, 4, 3]], [[1, 2]])
    assert (x.stride, x.spatial_range) == ((1, 2), (3, 5, 4))


def test_from_dense_of_labels(device: torch.device) -> None:
    labels = torch.tensor([0, 7, 0, 3], device=device).view(1, 1, 1, 4, 1)
    assert SparseTensor.from_dense(labels).feats.tolist() == [[7], [3]]


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (np.zeros((1, 2, 2, 2, 1)), TypeError, "must be a tensor, got ndarray"),
        (torch.zeros(2, 2), ValueError, r"channels last, got \[2, 2\]"),
    ],
)
def test_from_dense_refuses(bad: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SparseTensor.from_dense(bad)


def test_gradient_of_from_dense(device: torch.device) -> None:
    dense = torch.rand(1, 2, 2, 2, 2, dtype=F64, device=device).requires_grad_()
    mask = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = mask.to(device)
    assert 0 < mask.sum() < 8
    assert torch.autograd.gradcheck(lambda d: SparseTensor.from_dense(d, mask).feats, (dense,))


# COO tensors.


@each_cloud
@pytest.mark.parametrize("ranged", [True, False])
def test_sparse_coo_and_back(cloud: str, ranged: bool, device: torch.device) -> None:
    x = sparse(device, cloud, spatial_range=ROOM if ranged else None)
    coo = x.to_sparse_coo()
    want = np.zeros((*ROOM, 3))
    want[tuple(clouds.CLOUDS[cloud]().T)] = x.feats.cpu().numpy()
    tops = clouds.CLOUDS[cloud]().max(0, initial=-1) + 1
    size = ROOM if ranged else tuple(tops.tolist())
    assert tuple(coo.shape) == (*size, 3)
    assert_close(coo.to_dense(), want[tuple(slice(0, n) for n in size)], F64)
    y = SparseTensor.from_sparse_coo(coo, stride=2)
    order = np.lexsort(x.coords.cpu().numpy().T[::-1])
    np.testing.assert_array_equal(y.coords.cpu().numpy(), x.coords.cpu().numpy()[order])
    assert torch.equal(y.feats, x.feats[torch.from_numpy(order).to(device)])
    assert (y.coords.dtype, y.stride, y.spatial_range) == (torch.int32, (2, 2, 2), size)


def test_from_sparse_coo_adds_up_and_takes_scalars(device: torch.device) -> None:
    index = torch.tensor([[0, 0, 0], [1, 0, 1]], device=device)
    ones = torch.ones(3, device=device)
    coo = torch.sparse_coo_tensor(index, ones, check_invariants=True)
    x = SparseTensor.from_sparse_coo(coo)
    assert (x.coords.tolist(), x.feats.tolist()) == ([[0, 0], [0, 1]], [[1.0], [2.0]])


def test_sparse_coo_refuses(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo, got torch.strided"):
        SparseTensor.from_sparse_coo(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="got 1 sparse and 2 dense axes"):
        SparseTensor.from_sparse_coo(torch.zeros(1, 2, 2).to_sparse(1))
    with raises_on_data(ValueError, "inside the dense tensor's `spatial_range`"):
        sparse(device, spatial_range=(1, 20, 20, 3)).to_sparse_coo()
    with pytest.raises(TypeError, match="features come first"):
        SparseTensor(torch.ones(2, 1), torch.ones(2, 4)).to_sparse_coo()


def test_gradient_through_sparse_coo(device: torch.device) -> None:
    x = sparse(device)
    feats = x.feats.requires_grad_()
    weight = torch.rand(61, 3, dtype=F64, device=device)
    y = SparseTensor.from_sparse_coo(x.to_sparse_coo())
    (y.feats * weight).sum().backward()
    order = torch.from_numpy(np.lexsort(x.coords.cpu().numpy().T[::-1]).copy()).to(device)
    want = torch.empty_like(weight)
    want[order] = weight
    assert feats.grad is not None
    assert_close(feats.grad, want, F64)


# Samples.


def loop_over_samples(x: SparseTensor, num: int) -> list[tuple[list[Any], list[Any]]]:
    found: list[tuple[list[Any], list[Any]]] = [([], []) for _ in range(num)]
    for row, feats in zip(x.coords.tolist(), x.feats.tolist()):
        found[row[0]][0].append(row[1:])
        found[row[0]][1].append(feats)
    return found


@each_cloud
@pytest.mark.parametrize(
    ("ranged", "batch_size"), [(True, None), (False, None), (False, 5), (True, 4)]
)
def test_decompose(cloud: str, ranged: bool, batch_size: int | None, device: torch.device) -> None:
    x = sparse(device, cloud, spatial_range=ROOM if ranged else None)
    coords, feats = x.decompose(batch_size)
    highest = int(clouds.CLOUDS[cloud]()[:, 0].max(initial=-1)) + 1
    num = batch_size or (ROOM[0] if ranged else highest)
    want = loop_over_samples(x, num)
    assert len(coords) == len(feats) == num
    assert [(c.tolist(), f.tolist()) for c, f in zip(coords, feats)] == want
    assert all(c.shape[1] == 3 and c.dtype == torch.int32 for c in coords)
    assert all(f.shape[1] == 3 for f in feats)


def test_collation_is_undone_by_decompose(device: torch.device) -> None:
    x = sparse(device, "batch_gap", spatial_range=ROOM)
    again = sparse_collate([SparseTensor(f, c) for c, f in zip(*x.decompose())])
    order = torch.argsort(x.coords[:, 0], stable=True)
    assert torch.equal(again.coords, x.coords[order]) and torch.equal(again.feats, x.feats[order])


def test_decompose_refuses_rows_outside(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"batch_size = 2 and 38 rows outside"):
        sparse(device, "batch_gap").decompose(2)
    negative = SparseTensor(
        torch.ones(1, 1, device=device), -torch.ones(1, 4, device=device).int()
    )
    with pytest.raises(ValueError, match="1 rows outside"):
        negative.decompose(2)


@pytest.mark.parametrize(
    "which", [0, 2, 1, [2, 0], (1,), [], slice(0, 2), slice(1, None), slice(3)]
)
@pytest.mark.parametrize("ranged", [True, False])
def test_samples(which: Any, ranged: bool, device: torch.device) -> None:
    x = sparse(device, "batch_gap", spatial_range=ROOM if ranged else None, stride=2)
    y = x.samples(which)
    picked = [which] if isinstance(which, int) else which
    picked = list(range(3))[which] if isinstance(which, slice) else list(picked)
    want = loop_over_samples(x, 3)
    rows = [[j, *row] for j, b in enumerate(picked) for row in want[b][0]]
    assert y.coords.tolist() == rows and y.coords.dtype == torch.int32
    assert y.feats.tolist() == [feats for b in picked for feats in want[b][1]]
    assert y.stride == x.stride and y._caches is not x._caches
    assert y.spatial_range == ((len(picked), *clouds.ROOM) if ranged else None)


@pytest.mark.parametrize("bad", [[0, 0], [-1], -1])
def test_samples_are_distinct_and_not_negative(bad: Any, device: torch.device) -> None:
    with pytest.raises(ValueError, match="distinct batch indices from 0"):
        sparse(device, "batch_gap").samples(bad)


def test_samples_of_labels(device: torch.device) -> None:
    x = sparse(device, "batch_gap")
    labels = SparseTensor(torch.arange(83, device=device), x.coords)
    want = (x.coords[:, 0] == 2).nonzero()[:, 0]
    assert torch.equal(labels.samples(2).feats, want)
    assert torch.equal(labels.decompose()[1][2], want)


@pytest.mark.parametrize("take", [lambda x: x.samples(0), lambda x: x.decompose()])
def test_samples_of_what_is_no_batch(take: Callable[[SparseTensor], Any]) -> None:
    coords = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(TypeError, match="`feats` must be a tensor, got ndarray"):
        take(SparseTensor(np.zeros((2, 1)), coords))
    with pytest.raises(TypeError, match=r"must hold integers \(int32\), got torch.float32"):
        take(SparseTensor(torch.zeros(2, 1), coords.float()))
    with pytest.raises(ValueError, match="same number of rows, got 3 and 2"):
        take(SparseTensor(torch.zeros(3, 1), coords))


@pytest.mark.parametrize(
    "take",
    [lambda x: x.samples([2, 0]).feats, lambda x: torch.cat(x.decompose()[1][2:])],
    ids=["samples", "decompose"],
)
def test_gradient_of_samples(take: Callable[[SparseTensor], torch.Tensor], device) -> None:
    coords = (
        torch.tensor([[2, 0, 0, 0], [0, 1, 1, 1], [2, 1, 0, 0], [1, 0, 0, 0]]).int().to(device)
    )
    feats = torch.rand(4, 2, dtype=F64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: take(SparseTensor(f, coords)), (feats,))


# Copies and descriptions.


def test_clone_copies_features_alone(device: torch.device) -> None:
    x = sparse(device, spatial_range=ROOM)
    x.feats.requires_grad_()
    y = x.clone()
    assert same_sites(y, x) and torch.equal(y.feats, x.feats)
    assert y.feats.data_ptr() != x.feats.data_ptr() and y.feats.grad_fn is not None


def test_requires_grad(device: torch.device) -> None:
    x = sparse(device)
    assert x.requires_grad_() is x and x.feats.requires_grad
    assert not x.requires_grad_(False).feats.requires_grad


def test_the_description_names_what_matters() -> None:
    x = sparse(torch.device("cpu"), spatial_range=ROOM, stride=2).requires_grad_()
    assert repr(x) == (
        "SparseTensor(feats=[61, 3] float64 on cpu with grad, coords=[61, 4] int32 on cpu, "
        "stride=(2, 2, 2), spatial_range=(3, 13, 14, 15))"
    )
    y = spnn.Conv3d(3, 2, 2, 2).double()(x)
    assert repr(y).endswith("levels=[(2, 2, 2), (4, 4, 4)])")
    assert repr(SparseTensor([1], None)) == (
        "SparseTensor(feats=list, coords=NoneType, stride=(1, 1, 1))"
    )


def test_results_of_arithmetic_travel() -> None:
    x = sparse(torch.device("cpu")) * 2 + 1
    assert torch.equal(pickle.loads(pickle.dumps(x)).feats, x.feats)


def test_a_coo_site_beyond_int32() -> None:
    """2^32 + 1 looks like 1 in 32 bits."""
    for place in (2**31, 2**32 + 1):
        index = torch.tensor([[0, 0], [place, 1], [0, 0], [0, 0]])
        coo = torch.sparse_coo_tensor(index, torch.ones(2, 1), (1, 2**33, 1, 1, 1))
        with pytest.raises(ValueError, match="must fit into int32"):
            SparseTensor.from_sparse_coo(coo)
    wide = torch.sparse_coo_tensor(index[:, 1:], torch.ones(1, 1), (1, 2**33, 1, 1, 1))
    assert SparseTensor.from_sparse_coo(wide).coords.tolist() == [[0, 1, 0, 0]]


def test_samples_as_arrays_and_wrong_numbers_of_them(device: torch.device) -> None:
    x = sparse(device, "batch_gap")
    want = x.samples([2, 0])
    for which in (torch.tensor([2, 0]), np.array([2, 0])):
        assert torch.equal(x.samples(which).coords, want.coords)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        x.decompose(-1)
    with pytest.raises(TypeError):
        x.decompose(2.0)  # pyright: ignore[reportArgumentType]


def test_no_channels_in_samples_and_grids(device: torch.device) -> None:
    x = sparse(device, "batch_gap", channels=0)
    assert sum(len(f) for f in x.decompose()[1]) == len(x.coords)
    assert x.samples(0).feats.shape[1] == 0
    grid = torch.zeros(1, 2, 2, 2, 0, device=device)
    mask = torch.ones(1, 2, 2, 2, dtype=torch.bool, device=device)
    assert SparseTensor.from_dense(grid, mask).feats.shape == (8, 0)
