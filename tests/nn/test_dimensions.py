"""Convolutions and pools over one, two and four axes: dense PyTorch, and a search in Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import torchsparse
import torchsparse.nn as spnn
from tests.cases import assert_close
from tests.clouds import rng
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

CONVS = {1: spnn.Conv1d, 2: spnn.Conv2d, 4: spnn.Conv4d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 4: F.conv4d}
EXTENTS = {1: (31,), 2: (11, 9), 4: (6, 5, 6, 5)}


@dataclass(frozen=True)
class Sizes:
    """Kernel size, stride, padding, dilation of a layer, equal on all axes."""

    k: int
    s: int = 1
    p: int = 0
    d: int = 1


SIZES = [Sizes(3), Sizes(2, 2), Sizes(3, 2, 1), Sizes(3, 2, 0, 2), Sizes(2), Sizes(1, 2), Sizes(1)]


def cloud(ndim: int, device: torch.device, channels: int = 3, rows: int = 60) -> SparseTensor:
    """Random sites of two samples, with a range."""
    grid = np.array(list(itertools.product(range(2), *(range(n) for n in EXTENTS[ndim]))))
    picked = grid[rng(f"{ndim}d").permutation(len(grid))[:rows]].astype(np.int32)
    feats = rng(f"feats{ndim}").standard_normal((len(picked), channels))
    return SparseTensor(
        torch.from_numpy(feats).to(device),
        torch.from_numpy(picked).to(device),
        spatial_range=(2, *EXTENTS[ndim]),
    )


def taps(ndim: int, k: int) -> list[tuple[int, ...]]:
    """By weight index: the first axis fastest for an odd volume, the last for an even one."""
    every = itertools.product(range(k), repeat=ndim)
    return sorted(every, key=(lambda t: t[::-1]) if k % 2 else None)


def search(
    x: SparseTensor, size: Sizes
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, int]]]]:
    """Output sites in order, and for each its (tap, input row) pairs; "spconv" sites with a
    range."""
    ndim = x.coords.shape[1] - 1
    rows = {tuple(site): n for n, site in enumerate(x.coords.tolist())}
    extent = [(n + 2 * size.p - size.d * (size.k - 1) - 1) // size.s + 1 for n in EXTENTS[ndim]]
    offset = size.p
    if size.s == 1:
        sites, offset = list(rows), size.d * (size.k - 1) // 2 if size.k % 2 else 0
    else:
        found = set()
        for (b, *fine), tap in itertools.product(rows, taps(ndim, size.k)):
            shifted = [f + size.p - size.d * t for f, t in zip(fine, tap)]
            coarse = [c // size.s for c in shifted]
            if all(c % size.s == 0 for c in shifted):
                if all(0 <= c < n for c, n in zip(coarse, extent)):
                    found.add((b, *coarse))
        sites = sorted(found)
    pairs = []
    for b, *coarse in sites:
        met = []
        for t, tap in enumerate(taps(ndim, size.k)):
            fine = (b, *(c * size.s - offset + size.d * i for c, i in zip(coarse, tap)))
            if fine in rows:
                met.append((t, rows[fine]))
        pairs.append(met)
    return sites, pairs


def convolved(feats: np.ndarray, kernel: np.ndarray, pairs) -> np.ndarray:
    out = np.zeros((len(pairs), kernel.shape[2]))
    for m, met in enumerate(pairs):
        for t, n in met:
            out[m] += feats[n] @ kernel[t]
    return out


def kernel_of(layer: torch.nn.Module) -> np.ndarray:
    kernel = layer.get_parameter("kernel").detach().cpu().numpy()
    return kernel[None] if kernel.ndim == 2 else kernel


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ndim", CONVS)
def test_convolutions_equal_the_search(ndim, size, device):
    x = cloud(ndim, device)
    layer = CONVS[ndim](3, 2, size.k, size.s, size.p, size.d, bias=True).to(device).double()
    sites, pairs = search(x, size)
    got = layer(x)
    assert got.coords.tolist() == [list(site) for site in sites]
    want = convolved(x.feats.cpu().numpy(), kernel_of(layer), pairs)
    assert layer.bias is not None
    assert_close(got.feats, want + layer.bias.detach().cpu().numpy(), torch.float64)
    if max(size.k, size.s) > 1:
        assert got.stride == (size.s,) * ndim


def dense_kernel(kernel: Tensor, ndim: int, k: int) -> Tensor:
    """[K, C_in, C_out] -> [C_out, C_in, k, ...] as PyTorch has it."""
    kernel = kernel.reshape(*(k,) * ndim, *kernel.shape[-2:])
    if k % 2:  # the first axis runs fastest
        kernel = kernel.permute(*reversed(range(ndim)), ndim, ndim + 1)
    return kernel.permute(ndim + 1, ndim, *range(ndim))


@pytest.mark.parametrize("size", [Sizes(2, 2), Sizes(3, 2, 1), Sizes(3, 2, 0, 2)], ids=str)
@pytest.mark.parametrize("ndim", [1, 2])
def test_convolutions_equal_the_dense_ones(ndim, size, device):
    """Values at the sites, and nothing but zeros elsewhere."""
    x = cloud(ndim, device)
    kernel = torch.from_numpy(rng("kernel").standard_normal((size.k**ndim, 3, 2))).to(device)
    got = FUNCTIONS[ndim](x, kernel, size.k, None, size.s, size.p, size.d)
    conv = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[ndim]
    dense = conv(
        x.dense().movedim(-1, 1),
        dense_kernel(kernel, ndim, size.k),
        stride=size.s,
        padding=size.p,
        dilation=size.d,
    )
    assert got.spatial_range == (2, *dense.shape[2:])
    assert_close(got.dense().movedim(-1, 1), dense, torch.float64)


@pytest.mark.parametrize("ndim", CONVS)
def test_there_and_back(ndim, device):
    """A strided layer, its transposed and a generative one reach the sites that they should."""
    x = cloud(ndim, device)
    down = CONVS[ndim](3, 4, 2, 2).to(device).double()
    up = CONVS[ndim](4, 2, 2, 2, transposed=True).to(device).double()
    y = down(x)
    z = up(y)
    assert z.coords is x.coords and z.stride == (1,) * ndim
    sites, pairs = search(x, Sizes(2, 2))
    want = np.zeros((len(x.coords), 2))
    kernel = kernel_of(up)
    for m, met in enumerate(pairs):
        for t, n in met:
            want[n] += y.feats[m].detach().cpu().numpy() @ kernel[t]
    assert_close(z.feats, want, torch.float64)
    made = CONVS[ndim](4, 2, 2, 2, transposed=True, generative=True).to(device).double()(y)
    assert len(made.coords) == len(sites) * 2**ndim


@pytest.mark.parametrize("ndim", CONVS)
def test_gradcheck(ndim, device):
    x = cloud(ndim, device, channels=2, rows=12)
    kernel = torch.from_numpy(rng("k").standard_normal((3**ndim, 2, 2))).to(device)

    def run(feats, weight):
        y = FUNCTIONS[ndim](SparseTensor(feats, x.coords), weight, 3)
        return FUNCTIONS[ndim](y, weight, 3, None, 2, 1).feats

    assert torch.autograd.gradcheck(
        run, (x.feats.requires_grad_(), kernel.requires_grad_()), fast_mode=True
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ndim", CONVS)
def test_pools_equal_the_search(ndim, size, device):
    x = cloud(ndim, device)
    feats = x.feats.cpu().numpy()
    sites, pairs = search(x, size)
    sizes = (size.k, size.s, size.p, size.d)
    max_pool = getattr(spnn, f"MaxPool{ndim}d")(*sizes, return_indices=True)
    top, rows = max_pool(x)
    assert top.coords.tolist() == [list(site) for site in sites]
    met = [[n for _, n in pair] for pair in pairs]
    zero = np.zeros(3)
    assert_close(top.feats, np.array([feats[n].max(0) if n else zero for n in met]), x.F.dtype)
    for name, fn in (("Avg", np.mean), ("Sum", np.sum)):
        got = getattr(spnn, f"{name}Pool{ndim}d")(*sizes)(x)
        want = np.array([fn(feats[n], axis=0) if n else zero for n in met])
        assert_close(got.feats, want, torch.float64)
    back = getattr(spnn, f"Unpool{ndim}d")(*sizes, mode="sum")(top)
    want, there = np.zeros(feats.shape), np.zeros(feats.shape)
    values = top.feats.cpu().numpy()
    for m, c in itertools.product(range(len(sites)), range(3)):
        want[met[m], c] += values[m, c]
        if met[m]:
            there[int(rows[m, c]), c] += values[m, c]
    assert_close(back.feats, want, torch.float64)
    assert_close(getattr(spnn, f"MaxUnpool{ndim}d")(*sizes)(top, rows).feats, there, x.F.dtype)


def test_two_axes_given_one_stride(device):
    """Three columns may be (x, y, z) or (b, x, y): one int becomes three entries, of which a layer
    over two axes takes two."""
    coords = torch.tensor([[0, 4, 5], [0, 4, 6]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones((2, 1), device=device), coords, stride=2)
    assert spnn.AvgPool2d(2)(x).stride == (4, 4)
    x.stride = (2, 1, 2)
    with pytest.raises(ValueError, match=r"one entry per spatial axis, 2 for `coords` \[2, 3\]"):
        spnn.AvgPool2d(2)(x)


@pytest.mark.parametrize("ndim", CONVS)
def test_coordinates_of_another_dimension(ndim, device):
    x = cloud(ndim, device)
    other = {1: 2, 2: 4, 4: 1}[ndim]
    with pytest.raises(ValueError, match=rf"`coords` must have shape \[N, {1 + other}\]"):
        CONVS[other](3, 2, 3).to(device)(x)
    with pytest.raises(ValueError, match=rf"`coords` must have shape \[N, {1 + other}\]"):
        getattr(spnn, f"AvgPool{other}d")(2)(x)


@pytest.mark.parametrize("ndim", CONVS)
def test_no_rows_and_one_row(ndim, device):
    torchsparse.backends.infer_spatial_range = False
    for rows in (0, 1):
        coords = torch.ones((rows, 1 + ndim), dtype=torch.int32, device=device)
        x = SparseTensor(torch.ones((rows, 3), device=device), coords)
        for layer in (CONVS[ndim](3, 3, 2, 2).to(device), getattr(spnn, f"MaxPool{ndim}d")(2)):
            got = layer(x)
            assert got.coords.tolist() == [[1, *(0,) * ndim]] * rows
            assert got.feats.shape == (rows, 3)
    assert math.prod(CONVS[ndim](3, 3, 2, 2).kernel.shape[:1]) == 2**ndim
