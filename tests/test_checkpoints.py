"""Weights of other libraries: the same numbers at the same taps, the same outputs.

Three judges. SpConv itself, on the CPU, computes what a converted network must compute; it runs
in a process of its own, with one thread (its scatter on several gives other sums from run to
run). A dense convolution stands in for the libraries that do not install here, its kernel written
out tap by tap. And for every kernel size up to four, each layout is written out by hand.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.checkpoints import LAYOUTS, convert, state_of

Triple = tuple[int, int, int]

CHANNELS = (5, 7, 6)  # in, between, out: all different, so that no transposition goes unseen
BATCH, RANGE = 2, (9, 10, 13)  # x, y, z


# ------------------------------------------------------------------ against SpConv
@dataclass(frozen=True)
class Case:
    """A network of one or two layers; sizes along SpConv's columns, which are z, y, x here."""

    kind: str  # "SubMConv3d", "SparseConv3d", "SparseConvTranspose3d", "SparseInverseConv3d"
    kernel_size: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    bias: bool = False
    columns: str = "zyx"

    def __str__(self) -> str:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        text = "-".join("".join(map(str, size)) for size in sizes)
        return f"{self.kind}-{text}-{self.columns}{'-bias' if self.bias else ''}"


CASES = (
    Case("SubMConv3d", (1, 1, 1)),
    Case("SubMConv3d", (3, 3, 3), bias=True),
    Case("SubMConv3d", (3, 3, 3), columns="xyz"),
    Case("SubMConv3d", (3, 3, 3), columns="yzx"),
    Case("SubMConv3d", (3, 1, 3)),
    Case("SubMConv3d", (1, 3, 3), bias=True),
    Case("SubMConv3d", (5, 3, 1)),
    Case("SubMConv3d", (5, 5, 5)),
    Case("SubMConv3d", (3, 3, 3), dilation=(1, 2, 3)),
    Case("SparseConv3d", (2, 2, 2), (2, 2, 2), bias=True),
    Case("SparseConv3d", (2, 2, 2), (2, 2, 2), columns="xyz"),
    Case("SparseConv3d", (3, 3, 3), (2, 2, 2)),
    Case("SparseConv3d", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    Case("SparseConv3d", (3, 3, 3), (2, 2, 2), (0, 1, 1), columns="yxz"),
    Case("SparseConv3d", (3, 1, 1), (2, 1, 1), bias=True),
    Case("SparseConv3d", (1, 1, 1), bias=True),
    Case("SparseConv3d", (1, 1, 1), (2, 2, 2)),
    Case("SparseConv3d", (1, 1, 1), (1, 2, 1)),
    Case("SparseConv3d", (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    Case("SparseConv3d", (3, 2, 2), (2, 2, 2), (1, 0, 0)),
    Case("SparseConv3d", (2, 3, 4), (3, 2, 1), (0, 1, 2)),
    Case("SparseConv3d", (5, 3, 1), (3, 2, 2), (2, 0, 0)),
    Case("SparseConv3d", (3, 3, 3), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    Case("SparseInverseConv3d", (2, 2, 2), (2, 2, 2), bias=True),
    Case("SparseInverseConv3d", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    Case("SparseInverseConv3d", (3, 1, 1), (2, 1, 1)),
    Case("SparseInverseConv3d", (2, 3, 2), (2, 2, 2), (0, 1, 0)),
    Case("SparseInverseConv3d", (2, 3, 2), (2, 2, 2), (0, 1, 0), columns="xyz"),
    Case("SparseConvTranspose3d", (2, 2, 2), (2, 2, 2), bias=True),
    Case("SparseConvTranspose3d", (1, 2, 3), (1, 2, 3)),
)


def cloud() -> tuple[Tensor, Tensor]:
    """Features [N, C_in] and distinct sites [N, (b, x, y, z)] int32, in no order."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(*map(torch.arange, (BATCH, *RANGE)))
    sites = grid[torch.randperm(len(grid), generator=generator)[:500]]
    return torch.randn(len(sites), CHANNELS[0], generator=generator), sites.int()


def judge_by_spconv(path: Path) -> None:
    """Run every case through SpConv; write weights, sites [M, (b, x, y, z)] and features."""
    torch.set_num_threads(1)
    spconv: Any = importlib.import_module("spconv.pytorch")
    feats, sites = cloud()
    found: dict[str, Any] = {}
    for case in CASES:
        torch.manual_seed(1)
        order = ["xyz".index(axis) for axis in case.columns]
        layer: dict[str, Any] = {
            "stride": case.stride, "padding": case.padding, "dilation": case.dilation
        }  # fmt: skip
        if case.kind == "SparseInverseConv3d":
            down = spconv.SparseConv3d(
                *CHANNELS[:2], case.kernel_size, bias=case.bias, indice_key="a", **layer
            )
            up = spconv.SparseInverseConv3d(
                *CHANNELS[1:], case.kernel_size, bias=case.bias, indice_key="a"
            )
            network = spconv.SparseSequential(down, up)
        else:
            kind = getattr(spconv, case.kind)
            network = spconv.SparseSequential(
                kind(*CHANNELS[::2], case.kernel_size, bias=case.bias, **layer)
            )
        shape = [RANGE[axis] for axis in order]
        columns = sites[:, [0, *(1 + axis for axis in order)]].contiguous()
        with torch.no_grad():
            out = network(spconv.SparseConvTensor(feats, columns, shape, BATCH))
        back = [0, *(1 + case.columns.index(axis) for axis in "xyz")]
        found[str(case)] = (network.state_dict(), out.indices[:, back], out.features)
    torch.save(found, path)


@pytest.fixture(scope="module")
def spconv_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> (state dict, sites, features). Without spconv, which extra dev brings, it fails."""
    path = tmp_path_factory.mktemp("spconv") / "judged.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"spconv==2.3.8 comes with extra dev\n{done.stderr}"
    return torch.load(path, weights_only=True)


def network_like(case: Case) -> nn.Module:
    """Our network; sizes along x, y, z."""
    along = [case.columns.index(axis) for axis in "xyz"]

    def turned(size: Triple) -> list[int]:
        return [size[axis] for axis in along]

    sizes = [turned(s) for s in (case.kernel_size, case.stride, case.padding, case.dilation)]
    kernel_size, stride = sizes[:2]
    if case.kind == "SparseInverseConv3d":
        return nn.Sequential(
            spnn.Conv3d(*CHANNELS[:2], *sizes, bias=case.bias),
            spnn.Conv3d(*CHANNELS[1:], kernel_size, stride, bias=case.bias, transposed=True),
        )
    generative = case.kind == "SparseConvTranspose3d"
    return nn.Sequential(
        spnn.Conv3d(
            *CHANNELS[::2], *sizes, bias=case.bias, transposed=generative, generative=generative
        )
    )


def by_site(sites: Tensor, feats: Tensor) -> tuple[Tensor, Tensor]:
    """Both sorted by (b, x, y, z)."""
    order = np.lexsort(sites.numpy().T[::-1])
    return sites[order].long(), feats[order]


@pytest.mark.parametrize("source", ["spconv2", "spconv2.1-native", "spconv1"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_converted_network_computes_what_spconv_computes(
    case: Case, source: str, spconv_says: dict[str, Any]
) -> None:
    state, sites, expected = spconv_says[str(case)]
    options: Any = {"axes": case.columns, "strided": ["0"] if max(case.stride) > 1 else []}
    older = convert(state, "spconv2", source, **options)
    assert list(older) == list(state)
    network = network_like(case)
    network.load_state_dict(convert(older, source, **options))
    feats, coords = cloud()
    with torch.no_grad():
        out = network(SparseTensor(feats, coords, spatial_range=(BATCH, *RANGE)))
    sites, expected = by_site(sites, expected)
    out_sites, out_feats = by_site(out.coords, out.feats)
    assert torch.equal(out_sites, sites) and len(sites) > 50
    assert expected.abs().max() > 0.1
    # float32: up to 125 taps of 5 channels, added in another order
    torch.testing.assert_close(out_feats, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_our_weights_become_spconvs_own_again(case: Case, spconv_says: dict[str, Any]) -> None:
    state = spconv_says[str(case)][0]
    ours = network_like(case)
    strided = ["0"] if max(case.stride) > 1 else []
    ours.load_state_dict(convert(state, "spconv2", axes=case.columns, strided=strided))
    along = [case.kernel_size[case.columns.index(axis)] for axis in "xyz"]
    sizes = {name: along for name, module in ours.named_modules() if hasattr(module, "kernel")}
    back = convert(
        ours.state_dict(), "torchsparse", "spconv2", axes=case.columns, kernel_sizes=sizes
    )
    assert list(back) == list(state)
    for name, value in state.items():
        assert torch.equal(back[name], value), name


# ------------------------------------------------------------------ every layout, written out
def written_out(dense: Tensor, layout: str, columns: str, strided: bool = False) -> Tensor:
    """A dense weight [C_out, C_in, kx, ky, kz] as a layout has it, by loops over taps."""
    c_out, c_in, *size = dense.shape
    taps = list(itertools.product(*map(range, size)))  # z runs fastest
    if layout.startswith("spconv"):
        along = ["xyz".index(axis) for axis in columns]
        kernel = [size[axis] for axis in along]
        shape = {
            "spconv1": (*kernel, c_in, c_out),
            "spconv2.1-native": (*kernel, c_out, c_in),
            "spconv2": (c_out, *kernel, c_in),
        }[layout]
        weight = torch.empty(shape)
        for tap in taps:
            at = tuple(tap[axis] for axis in along)
            matrix = dense[(slice(None), slice(None), *tap)]  # [C_out, C_in]
            if layout == "spconv1":
                weight[at] = matrix.T
            elif layout == "spconv2":
                weight[(slice(None), *at)] = matrix
            else:
                weight[at] = matrix
        if len(taps) == 1 and layout != "spconv1" and not strided:
            weight = dense[..., 0, 0, 0].T.reshape(shape)  # a matrix [C_in, C_out] in memory
        return weight
    x_fastest = sorted(taps, key=lambda tap: tap[::-1])
    if layout == "minkowski" or len(taps) % 2 == 1:
        taps = x_fastest
    kernel = torch.stack([dense[(slice(None), slice(None), *tap)].T for tap in taps])
    has_taps = strided and layout not in ("torchsparse1.4", "torchsparse2.0")
    return kernel[0] if len(taps) == 1 and not has_taps else kernel


SIZES = list(itertools.product((1, 2, 3, 4), repeat=3))


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_into_every_other_for_every_size_to_four(source: str, target: str) -> None:
    for number, size in enumerate(SIZES):
        columns = ("zyx", "xyz", "yzx")[number % 3]
        dense = torch.arange(3.0 * 2 * np.prod(size)).reshape(3, 2, *size)
        for strided in (False, True):
            given = {f"a.{LAYOUTS[source].weight}": written_out(dense, source, columns, strided)}
            found = convert(
                given,
                source,
                target,
                axes=columns,
                kernel_sizes={"a": size},
                strided=["a"] if strided else [],
            )
            (name,) = found
            assert name == f"a.{LAYOUTS[target].weight}"
            assert torch.equal(found[name], written_out(dense, target, columns, strided)), size
            assert found[name].is_contiguous()


# Stride 1 with odd sizes, and downsampling, where the libraries place their taps alike.
DENSE_CASES = [
    ((3, 3, 3), 1), ((1, 3, 5), 1), ((1, 1, 1), 1), ((2, 2, 2), 2), ((2, 3, 1), 2), ((1, 1, 1), 2),
    ((3, 3, 3), 2), ((4, 2, 2), 2),
]  # fmt: skip
TAP_LISTS = [name for name, layout in LAYOUTS.items() if layout.lists_taps]


@pytest.mark.parametrize("source", TAP_LISTS)
@pytest.mark.parametrize(("size", "stride"), DENSE_CASES, ids=str)
def test_a_converted_layer_computes_the_dense_convolution(
    source: str, size: Triple, stride: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(*CHANNELS[:0:-2], CHANNELS[0], *size, generator=generator)
    bias = torch.randn(len(dense), generator=generator)
    kernel = written_out(dense, source, "xyz", strided=stride > 1)
    state = {"kernel": kernel, "bias": bias[None] if source == "minkowski" else bias}
    layer = spnn.Conv3d(CHANNELS[0], CHANNELS[2], size, stride, bias=True)
    strided = [""] if stride > 1 else []
    layer.load_state_dict(convert(state, source, kernel_sizes={"": size}, strided=strided))

    feats, coords = cloud()
    out = layer(SparseTensor(feats, coords, spatial_range=(BATCH, *RANGE)))
    box = torch.zeros(BATCH, *RANGE, CHANNELS[0])
    box[coords.long().unbind(1)] = feats
    padding = [(k - 1) // 2 if stride == 1 else 0 for k in size]
    expected = nn.functional.conv3d(
        box.permute(0, 4, 1, 2, 3), dense, bias, stride=stride, padding=padding
    )
    at = (out.coords.long()[:, 0], slice(None), *out.coords.long()[:, 1:].unbind(1))
    torch.testing.assert_close(out.feats, expected[at], rtol=1e-4, atol=1e-5)
    elsewhere = expected.clone()
    elsewhere[at] = bias
    if stride > 1:
        torch.testing.assert_close(elsewhere, bias[:, None, None, None].expand_as(elsewhere))


@pytest.mark.parametrize(
    ("size", "stride"),
    [((2, 2, 2), 1), ((4, 2, 2), 1), ((3, 3, 3), 1), ((2, 2, 2), 2), ((3, 3, 3), 2),
     ((2, 3, 1), 2), ((5, 3, 2), 2)],
    ids=str,
)  # fmt: skip
def test_a_converted_layer_sums_the_neighbours_that_minkowski_engine_visits(
    size: Triple, stride: int
) -> None:
    """Its rule: x fastest; an odd size around the site, an even one from the site on."""
    kernel = torch.randn(int(np.prod(size)), *CHANNELS[::2])
    mode = {"downsample_mode": "minkowski"}
    layer = spnn.Conv3d(CHANNELS[0], CHANNELS[2], size, stride, config=mode)
    layer.load_state_dict(convert({"kernel": kernel}, "minkowski", kernel_sizes={"": size}))
    feats, coords = cloud()
    out = layer(SparseTensor(feats, coords))
    rows = {tuple(site): row for row, site in enumerate(coords.tolist())}
    shifts = [[t - k // 2 * (k % 2) for t in range(k)] for k in size]
    expected = torch.zeros_like(out.feats)
    for index, (z, y, x) in enumerate(itertools.product(*shifts[::-1])):
        for m, (b, *site) in enumerate(out.coords.tolist()):
            row = rows.get((b, *(c * stride + step for c, step in zip(site, (x, y, z)))))
            if row is not None:
                expected[m] += feats[row] @ kernel[index]
    torch.testing.assert_close(out.feats, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ names and other entries
def test_everything_else_passes_through_as_it_is() -> None:
    state = {
        "stem.0.weight": torch.randn(8, 3, 3, 3, 4, dtype=torch.float16),
        "stem.0.bias": torch.randn(8, dtype=torch.float16),
        "stem.1.weight": torch.randn(8),
        "stem.1.num_batches_tracked": torch.tensor(3),
        "bev.weight": torch.randn(16, 8, 3, 3),
        "points.weight": torch.randn(8, 8),
        "rows.weight": torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64),
        "extra": {"a": 1},
    }
    before = dict(state)
    found = convert(state, "spconv2")
    assert list(found) == ["stem.0.kernel", *list(state)[1:]]
    assert found["stem.0.kernel"].shape == (27, 4, 8)
    assert found["stem.0.kernel"].dtype == torch.float16
    assert all(found[name] is state[name] for name in list(state)[1:])
    assert state == before  # the same objects: nothing was put in or taken out


def test_biases_get_the_shape_of_their_library() -> None:
    state = {
        "a.kernel": torch.randn(27, 4, 8),
        "a.bias": torch.randn(1, 8),
        "b.bias": torch.ones(2),
    }
    ours = convert(state, "minkowski")
    assert torch.equal(ours["a.bias"], state["a.bias"][0]) and ours["b.bias"] is state["b.bias"]
    assert torch.equal(convert(ours, "torchsparse", "minkowski")["a.bias"], state["a.bias"])
    assert torch.equal(convert(ours, "torchsparse", "spconv2")["a.bias"], state["a.bias"][0])


def test_bev_modules_pass_unchanged_between_versions_of_torchsparse() -> None:
    state = spnn.Conv3d(4, 8, 2).state_dict() | {
        "bev.kernel": torch.randn(12, 8, 8),
        "bev.bias": torch.randn(1, 8),
    }
    found = convert(state, "torchsparse1.4")
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("source", "target", "given", "expected"),
    [
        ("torchsparse", "torchsparse1.4", (1, 4, 8), (4, 8)),
        ("torchsparse1.4", "torchsparse", (4, 8), (4, 8)),
        ("torchsparse2.0", "torchsparse2.1", (4, 8), (4, 8)),
        ("minkowski", "torchsparse", (1, 4, 8), (1, 4, 8)),
        ("torchsparse2.1", "minkowski", (1, 4, 8), (1, 4, 8)),
        ("minkowski", "torchsparse", (4, 8), (4, 8)),
        ("spconv1", "minkowski", (1, 1, 1, 4, 8), (4, 8)),
        ("torchsparse", "spconv2", (4, 8), (8, 1, 1, 1, 4)),
        ("torchsparse", "spconv2", (1, 4, 8), (8, 1, 1, 1, 4)),
        ("torchsparse", "spconv1", (1, 4, 8), (1, 1, 1, 4, 8)),
    ],
)
def test_one_tap_has_the_shape_of_its_library(
    source: str, target: str, given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    matrix = torch.randn(4, 8)
    weight = matrix.reshape(given)
    (found,) = convert({LAYOUTS[source].weight: weight}, source, target).values()
    assert found.shape == expected
    if target == "spconv2" and len(given) == 3:  # told by the source: strided
        matrix = matrix.T
    assert torch.equal(found.flatten(), matrix.flatten())


def test_spconv_reads_one_tap_at_stride_1_against_its_shape() -> None:
    """The shape of SpConv 2.x says [C_out, 1, 1, 1, C_in]; its memory is [C_in, C_out]."""
    state = {"a.weight": torch.arange(6.0).reshape(2, 1, 1, 1, 3)}  # 3 -> 2 channels
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    assert torch.equal(convert(state, "spconv2")["a.kernel"], expected)
    by_shape = convert(state, "spconv2", strided=["a"])["a.kernel"]
    assert torch.equal(by_shape, torch.tensor([[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]]))


def test_one_tap_that_a_network_multiplies_by_itself() -> None:
    """SoftGroup's Custom1x1Subm3d: features @ weight.view(C_out, C_in).T, at stride 1."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 1, 1, 1, 4, generator=generator)
    feats, coords = torch.randn(5, 4, generator=generator), torch.zeros(5, 4, dtype=torch.int32)
    coords[:, 3] = torch.arange(5)
    layer = spnn.Conv3d(4, 8, 1)
    converted = convert({"i_branch.0.weight": weight}, "spconv2", strided=["i_branch.0"])
    layer.load_state_dict({"kernel": converted["i_branch.0.kernel"]})
    out = layer(SparseTensor(feats, coords)).feats
    # The same sum of 4 products in another order.
    torch.testing.assert_close(out, feats @ weight.view(8, 4).T, rtol=1e-5, atol=1e-6)
    back = {"i_branch.0.kernel": layer.kernel}
    back = convert(back, "torchsparse", "spconv2", strided=["i_branch.0"])
    assert torch.equal(back["i_branch.0.weight"], weight)


def test_names_are_rewritten_in_order_and_skipped_weights_stay() -> None:
    state = {
        "module.a.kernel": torch.randn(27, 4, 8),
        "module.norm.bn.weight": torch.randn(8),
        "module.b.kernel": torch.randn(8, 4, 8),
    }
    names = {r"^module\.": "net.", r"\.bn\.": ".", "^net": "n"}
    found = convert(state, "minkowski", "spconv2", names=names, skip=[r"\.b\."])
    assert list(found) == ["n.a.weight", "n.norm.weight", "n.b.kernel"]
    assert found["n.b.kernel"] is state["module.b.kernel"]


def test_a_converted_parameter_is_detached() -> None:
    layer = spnn.Conv3d(4, 8, 3, bias=True)
    found = convert(dict(layer.named_parameters()), "torchsparse", "minkowski")
    assert not any(value.requires_grad for value in found.values())


# ------------------------------------------------------------------ what cannot be told
CUBE, FLAT = torch.zeros(27, 4, 8), torch.zeros(12, 4, 8)
SP1, SP2 = torch.zeros(3, 3, 3, 4, 32), torch.zeros(32, 3, 3, 3, 16)


@pytest.mark.parametrize(
    ("state", "source", "options", "words"),
    [
        ({"a.kernel": FLAT}, "torchsparse", {"target": "spconv2"}, ["'a.kernel'", "12 taps",
            "kernel_sizes={'a': (kx, ky, kz)}"]),
        ({"a.kernel": FLAT}, "minkowski", {}, ["12 taps", "no cube"]),
        ({"a.kernel": FLAT}, "minkowski", {"kernel_sizes": {"a": 3}}, ["12 taps", "(3, 3, 3)"]),
        ({"a.kernel": CUBE}, "minkowski", {"kernel_sizes": {"b": 3}}, ["'b'", "'a'"]),
        ({"a.kernel": CUBE}, "minkowski", {"strided": ["a.weight"]}, ["`strided`", "'a.weight'"]),
        ({"a.kernel": CUBE}, "minkowski", {"kernel_sizes": {"a": (3, 3)}}, ["kernel_sizes['a']"]),
        ({"a.weight": SP2}, "spconv2", {"kernel_sizes": {"a": (1, 3, 3)}}, ["(1, 3, 3)", "zyx"]),
        ({"a.weight": SP2}, "spconv1", {}, ["(3, 3, 32)", "source", "skip", "'a': (3, 3, 32)"]),
        ({"a.weight": SP1, "a.bias": torch.zeros(32)}, "spconv2", {}, ["32 entries", "3 output"]),
        ({"a.weight": torch.zeros(64, 32, 3, 3, 3)}, "spconv2", {}, ["(3, 3, 32)", "dense"]),
        ({"a.kernel": CUBE}, "spconv2", {}, ["[C_out, k0, k1, k2, C_in]", "minkowski"]),
        ({"a.weight": SP2}, "minkowski", {}, ["[K, C_in, C_out]", "spconv2 or"]),
        ({}, "spconv2", {}, ["no `weight`"]),
        ({"a.weight": SP2}, "spconv3", {}, ["`source`", "spconv1", "'spconv3'"]),
        ({"a.weight": SP2}, "spconv2", {"target": "mink"}, ["`target`", "minkowski", "'mink'"]),
        ({"a.weight": SP2}, "spconv2", {"axes": "bzyx"}, ["`axes`", "'bzyx'"]),
        ({"a.weight": SP2, "a.kernel": FLAT}, "spconv2", {}, ["'a.kernel'", "taken"]),
        ({"a.weight": SP2}, "spconv2", {"skip": ["^a"]}, ["no `weight`"]),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_an_error_that_says_what_to_pass(
    state: dict[str, Tensor], source: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        convert(state, source, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_told_size_settles_what_the_shape_leaves_open() -> None:
    dense = torch.randn(8, 4, 3, 2, 2)
    kernel = written_out(dense, "minkowski", "xyz")
    for name in ("a", "a.kernel"):
        found = convert({"a.kernel": kernel}, "minkowski", kernel_sizes={name: (3, 2, 2)})
        assert torch.equal(found["a.kernel"], written_out(dense, "torchsparse", "xyz"))
    wide = torch.randn(8, 17, 1, 1, 4)
    found = convert({"a.weight": wide}, "spconv2", kernel_sizes={"a": (1, 1, 17)})
    assert found["a.kernel"].shape == (17, 4, 8)


def test_no_size_is_needed_where_the_taps_stay_in_place() -> None:
    for source, target in itertools.permutations(TAP_LISTS, 2):
        odd, even = torch.randn(15, 4, 8), torch.randn(12, 4, 8)
        state = {"a.kernel": odd} if "minkowski" in (source, target) else {"b.kernel": even}
        (found,) = convert(state, source, target).values()
        assert torch.equal(found, *state.values())


def test_state_of_finds_the_usual_nests() -> None:
    state = {"a.kernel": CUBE}
    assert state_of(state) is state
    assert state_of({"epoch": 3, "state_dict": state}) is state
    assert state_of({"model_state": state, "optimizer_state": {"state": {}}}) is state
    assert state_of({"ema": state, "model": {}}, key="ema") is state
    both = {"model": state, "state_dict": state}
    assert state_of(both, "model") is state
    for checkpoint, words in [
        (both, "several state dicts found"),
        ({"ema": state}, "'ema'"),
        ({}, "nothing"),
        ([state], "got list"),
    ]:
        with pytest.raises(ValueError, match=words):
            state_of(checkpoint)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of spconv's imports
    judge_by_spconv(Path(sys.argv[1]))


def test_a_channelwise_convolution(tmp_path: Path) -> None:
    """MinkowskiEngine keeps [K, C]; our layer with a group per channel computes the same."""
    kernel = torch.randn(27, 8)
    state = {"a.kernel": kernel, "b.kernel": torch.randn(27, 8, 4)}
    found = convert(state, "minkowski", channelwise=["a"])
    assert torch.equal(found["a.kernel"], kernel[:, None]) and found["b.kernel"].dim() == 3
    spnn.Conv3d(8, 8, 3, groups=8).load_state_dict({"kernel": found["a.kernel"]})
    back = convert(found, "torchsparse", "minkowski", channelwise=["a.kernel"])
    assert all(torch.equal(back[name], state[name]) for name in state)
    even = torch.randn(8, 5)
    found = convert({"a.kernel": even}, "minkowski", channelwise=["a"])
    back = convert(found, "torchsparse", "minkowski", channelwise=["a"])
    assert torch.equal(back["a.kernel"], even)
    with pytest.raises(ValueError, match="`channelwise` names 'c'"):
        convert(state, "minkowski", channelwise=["c"])


def test_the_state_of_our_own_checkpoints_is_found() -> None:
    state = {"a.kernel": torch.zeros(27, 4, 4)}
    assert state_of({"format": "x", "recipe": {}, "state": state}) is state
