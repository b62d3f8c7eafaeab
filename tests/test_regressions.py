"""Defects of TorchSparse v2.1 that this library answers, by the numbers of its defect list.

The tests of validation, caches, transposed and generative layers cover the same ground in
breadth; here each defect has the smallest example that shows it.
"""

from __future__ import annotations

import itertools
import operator
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import torchsparse
from tests import clouds, oracles
from tests.cases import (
    assert_close,
    assert_rows,
    convolve,
    raises_on_data,
    sparse,
    weight,
)
from tests.oracles import Layer
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones.modules import SparseResBlock
from torchsparse.nn import functional as F
from torchsparse.nn.utils import get_kernel_offsets

F64 = torch.float64


def voxels(device: torch.device, *rows: tuple[int, int, int, int], **kwargs: Any) -> SparseTensor:
    """One feature per row: 1, 2, 3, ..."""
    coords = torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 4)
    feats = torch.arange(1.0, len(rows) + 1, dtype=F64, device=device)[:, None]
    return SparseTensor(feats, coords, **kwargs)


def counting(device: torch.device, volume: int) -> torch.Tensor:
    """A 1 x 1 channel kernel whose weight of tap index t is 10^t (at most 15 taps)."""
    return (10.0 ** torch.arange(volume, dtype=F64, device=device))[:, None, None]


def judge(x: SparseTensor, layer: Layer, config: Any = None) -> SparseTensor:
    """A layer's output, checked against the search."""
    kernel = weight(x.feats.device, layer.volume, x.feats.shape[1], 2)
    y = convolve(layer, x, kernel, config=config)
    want = oracles.relate(x.coords.cpu().numpy(), layer, x.spatial_range)
    assert_rows(y.coords, want.coords)
    assert y.spatial_range == want.spatial_range
    out = oracles.convolve(x.feats.detach().cpu().numpy(), kernel.cpu().numpy(), want)
    assert_close(y.feats, out, F64)
    return y


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_01_import_does_not_touch_cuda() -> None:
    code = """
import torch
def refuse(*args, **kwargs):
    raise RuntimeError("CUDA was asked at import")
for name in ("get_device_capability", "get_device_properties", "current_device", "device_count",
             "is_available", "_lazy_init", "init"):
    setattr(torch.cuda, name, refuse)
import torchsparse, torchsparse.nn, torchsparse.backbones
print(torch.cuda.is_initialized())
"""
    assert python(code) == "False"


# Configuration.


def test_02_default_config_is_fresh_every_time() -> None:
    F.set_conv_mode(2)
    sorted_config = F.conv_config.get_default_conv_config()
    assert (sorted_config.ifsort, sorted_config.split_mask_num) == (True, 3)
    sorted_config.epsilon = 0.5
    sorted_config["mm_thresh"] = 7
    F.set_conv_mode(0)
    config = F.conv_config.get_default_conv_config()
    assert config is not sorted_config
    assert (config.ifsort, config.split_mask_num, config.epsilon, config.mm_thresh) == (
        False,
        1,
        0.0,
        0,
    )


@pytest.mark.parametrize(
    ("mode", "sort", "splits"), [(0, False, 1), (1, True, 1), (2, True, 3), (None, True, 1)]
)
def test_02_modes_to_configs(mode: int | None, sort: bool, splits: int) -> None:
    F.set_conv_mode(1)
    config = F.conv_config.get_default_conv_config(conv_mode=mode)
    assert (config["ifsort"], config["split_mask_num"]) == (sort, splits)
    assert config.dataflow == F.Dataflow.ImplicitGEMM and config.split_mask_num_bwd == 3
    assert config.FOD_fusion is True and config.kmap_mode == "hashmap_on_the_fly"
    assert type(config.copy()) is type(config) and config.copy() == config
    assert config.copy() is not config


@pytest.mark.parametrize("where", ["config", "module", "global"])
@pytest.mark.parametrize("dataflow", [0, 1, 2])
def test_03_no_config_of_the_caller_is_modified(
    where: str, dataflow: int, device: torch.device
) -> None:
    config = {"dataflow": F.Dataflow(dataflow), "ifsort": True, "mine": [1]}
    kept = dict(config)
    x = sparse(device, dtype=torch.float32)
    x.feats.requires_grad_()
    if where == "global":
        F.set_global_conv_config(config)
    own = config if where != "global" else None
    layer = spnn.Conv3d(3, 2, 3, config=own if where == "module" else None).to(device)
    y = layer(x) if where != "config" else F.conv3d(x, layer.kernel, 3, config=own)
    F.conv3d(x, weight(device, 8, dtype=torch.float32), 2, None, 2, config=own)
    y.feats.sum().backward()
    assert config == kept
    if where == "global":
        stored = F.get_global_conv_config()
        assert stored is not None and stored is not config
        assert {key: stored[key] for key in kept} == kept


def test_04_setters_act_on_every_layer_without_a_config(device: torch.device) -> None:
    """Voxel 5 alone, kernel 3, stride 2: site 2 by floor; past the border U = 1 otherwise."""
    x = voxels(device, (0, 5, 5, 5))
    layer = spnn.Conv3d(1, 1, 3, 2).to(device).double()
    for mode, sites in (("spconv", []), ("minkowski", [[0, 2, 2, 2]]), ("spconv", [])):
        F.set_downsample_mode(mode)
        assert F.get_downsample_mode() == mode
        assert layer(x).coords.tolist() == sites
        assert F.conv3d(x, layer.kernel, 3, None, 2).coords.tolist() == sites


# Arguments.


@pytest.mark.parametrize("volume", [1, 3])
@pytest.mark.parametrize("dilation", [2, 3])
def test_05_dilation_is_honoured(volume: int, dilation: int, device: torch.device) -> None:
    """Voxels d apart are neighbours, voxels one apart are not; K = 1 does not mind."""
    x = voxels(device, (0, 5, 0, 0), (0, 6, 0, 0), (0, 5 + dilation, 0, 0))
    y = F.conv3d(x, counting(device, volume), (volume, 1, 1), None, 1, 0, dilation)
    middle = 10 ** (volume // 2)
    want = [1.0 * middle, 2.0 * middle, 3.0 * middle]
    if volume == 3:
        want = [1 * 10 + 3 * 100, 2 * 10, 3 * 10 + 1]
    assert y.feats[:, 0].tolist() == want
    F.conv3d(x, counting(device, 1), 1, None, 2, 0, dilation)


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))))
def test_06_two_paddings_in_one_cache(order: Any, device: torch.device) -> None:
    x = sparse(device)
    for padding in (*order, *order):
        judge(x, Layer.of(3, 2, padding))


@pytest.mark.parametrize("mode", ["hashmap", "hashmap_on_the_fly"])
def test_07_levels_do_not_mix_after_a_strided_layer(mode: str, device: torch.device) -> None:
    F.set_kmap_mode(mode)
    x = sparse(device)
    y = judge(x, Layer.of(2, 2))
    for size in (3, 5, (1, 3, 1)):
        judge(x, Layer.of(size))
        judge(y, Layer.of(size))
    z = judge(x, Layer.of(3, 2, 1))
    judge(z, Layer.of(3))
    judge(y, Layer.of(3))


def test_09_strided_first_layer_then_transposed(device: torch.device) -> None:
    x = sparse(device)
    y = F.conv3d(x, weight(device, 8), 2, None, 2)
    z = F.conv3d(y, weight(device, 8, 2, 3), 2, None, 2, transposed=True)
    assert z.coords is x.coords and z.feats.abs().max() > 0


def test_09_transposed_without_its_encoder_map(device: torch.device) -> None:
    x = sparse(device)
    y = F.conv3d(x, weight(device, 8), 2, None, 2)
    z = F.conv3d(y, weight(device, 27, 2, 3), 3, None, 2, 1, transposed=True)
    assert z.coords is x.coords and z.feats.abs().max() > 0


@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(3, 2, 1), Layer.of(2, 2)], ids=str)
def test_10_site_keys_beyond_32_bits(layer: Layer, device: torch.device) -> None:
    """B X Y Z > 2^31, with sites that agree in their low 32 bits."""
    far = 2**17
    rows = [(b, x, y, z) for b in (0, 1) for x in (0, far) for y in (0, far) for z in (0, 1, far)]
    judge(voxels(device, *rows), layer)
    judge(voxels(device, *rows, spatial_range=(2, far + 2, far + 2, far + 2)), layer)


@pytest.mark.parametrize("size", [2, 4, (3, 1, 2)])
def test_11_even_submanifold_keeps_its_range(size: Any, device: torch.device) -> None:
    x = sparse(device, "batch_gap", spatial_range=(clouds.BATCH, *clouds.ROOM))
    y = judge(x, Layer.of(size))
    assert y.spatial_range == (clouds.BATCH, *clouds.ROOM) and y.coords is x.coords


def test_11_even_submanifold_at_the_border(device: torch.device) -> None:
    """The keys of (0, 0, Z-1) and (0, 1, 0) are adjacent; they are no neighbours."""
    x = voxels(device, (0, 0, 0, 3), (0, 0, 1, 0), spatial_range=(1, 2, 2, 4))
    y = F.conv3d(x, counting(device, 2), (1, 1, 2))
    assert y.feats[:, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("size", [4, (3, 1, 2), (2, 3, 1), (4, 1, 3)])
def test_12_even_and_mixed_kernels_in_both_modes(size: Any, device: torch.device) -> None:
    """No axis of an even volume is centred, odd ones included."""
    for mode in ("hashmap", "hashmap_on_the_fly"):
        F.set_kmap_mode(mode)
        judge(sparse(device), Layer.of(size))
        line = voxels(device, (0, 4, 4, 4), (0, 5, 4, 4), (0, 6, 4, 4))
        y = F.conv3d(line, counting(device, 6), (3, 1, 2))
        # tap (tx, 0, 0) has index 2 tx: right neighbours at 10^2 and 10^4
        assert y.feats[:, 0].tolist() == [1 + 200 + 30000, 2 + 300, 3]


@pytest.mark.parametrize("mode", ["hashmap", "hashmap_on_the_fly"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_13_padding_shifts_the_taps_in_both_modes(
    padding: int, mode: str, device: torch.device
) -> None:
    """fine = 2 c - p + t along x, voxels 4 and 5."""
    F.set_kmap_mode(mode)
    x = voxels(device, (0, 4, 0, 0), (0, 5, 0, 0), (0, 20, 0, 0))
    y = F.conv3d(x, counting(device, 3), (3, 1, 1), None, (2, 1, 1), (padding, 0, 0))
    got = {row[1]: value for row, value in zip(y.coords.tolist(), y.feats[:, 0].tolist())}
    want = {
        0: {1: 100, 2: 21, 9: 300},
        1: {2: 210, 3: 2, 10: 30},
        2: {2: 100, 3: 21, 10: 300, 11: 3},
    }
    assert got == {k: float(v) for k, v in want[padding].items()}


def test_14_border_sites_by_default_depend_on_the_batch(device: torch.device) -> None:
    """Voxel 10 is dropped alone (U = 4), and kept beside a voxel 11."""
    alone = voxels(device, (0, 10, 0, 0))
    pair = voxels(device, (0, 10, 0, 0), (1, 11, 0, 0))
    size = (2, 1, 1)

    def sites(x: SparseTensor) -> list[list[int]]:
        return F.conv3d(x, counting(device, 2), size, None, size).coords.tolist()

    assert torchsparse.backends.infer_spatial_range is True
    assert sites(alone) == []
    assert sites(pair) == [[0, 5, 0, 0], [1, 5, 0, 0]]
    torchsparse.backends.infer_spatial_range = False
    assert sites(alone) == [[0, 5, 0, 0]]
    assert sites(pair) == [[0, 5, 0, 0], [1, 5, 0, 0]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_15_no_site_is_lost_below_zero(size: int, device: torch.device) -> None:
    """Sites c with 2 c - 1 + t = -7 for some t, by floor division."""
    x = voxels(device, (0, -7, -7, -7), (0, 8, 8, 8))
    y = judge(x, Layer.of(size, 2, 1, allow_negative=True))
    lowest = {2: -3, 3: -4, 4: -4}[size]
    assert y.coords[:, 1].min().item() == lowest


def test_16_generative_range_taps_and_stride(device: torch.device) -> None:
    x = voxels(device, (0, 1, 1, 1), spatial_range=(1, 2, 2, 2))
    y = F.conv3d(x, counting(device, 8), 2, None, 2, transposed=True, generative=True)
    assert y.spatial_range == (1, 4, 4, 4) and y.stride == (1, 1, 1)
    assert y.coords[:, 1:].tolist() == [list(t) for t in itertools.product((2, 3), repeat=3)]
    assert y.feats[:, 0].tolist() == [10.0**t for t in range(8)]
    wide = F.conv3d(
        x, counting(device, 3), (3, 1, 1), None, (2, 1, 1), transposed=True, generative=True
    )
    assert wide.coords.tolist() == [[0, 2, 1, 1], [0, 3, 1, 1]]  # 4 is dropped, not clamped
    assert wide.feats[:, 0].tolist() == [1.0, 10.0]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("size", [5, 7])
def test_17_more_than_32_taps_in_every_mode(size: int, mode: int, device: torch.device) -> None:
    F.set_conv_mode(mode)
    judge(sparse(device, "block"), Layer.of(size))
    judge(sparse(device, "odd"), Layer.of(size, 2, size // 2))


def test_18_a_map_built_in_evaluation_serves_training(device: torch.device) -> None:
    layer = spnn.Conv3d(3, 2, 3).to(device).double().eval()
    x = sparse(device)
    with torch.no_grad():
        layer(x)
    x.feats.requires_grad_()
    layer.train()(x).feats.sum().backward()
    want = oracles.relate(clouds.odd(), Layer.of(3))
    kernel = layer.kernel.detach().cpu().numpy()
    to_feats, to_kernel, _ = oracles.gradients(
        x.feats.detach().cpu().numpy(), kernel, want, np.ones((61, 2))
    )
    assert x.feats.grad is not None and layer.kernel.grad is not None
    assert_close(x.feats.grad, to_feats, F64)
    assert_close(layer.kernel.grad, to_kernel, F64)


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))))
@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(3, 2, 1)], ids=str)
def test_19_one_map_for_all_dataflows(layer: Layer, order: Any, device: torch.device) -> None:
    x = sparse(device)
    for dataflow in order:
        judge(x, layer, config={"dataflow": F.Dataflow(dataflow)})


@pytest.mark.parametrize("dataflow", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_20_more_taps_than_rows(rows: int, dataflow: int, device: torch.device) -> None:
    """Tap counts are K numbers, also where K > n_out."""
    x = voxels(device, *[(0, 4, 4, 4 + z) for z in range(rows)])
    x.feats.requires_grad_()
    y = judge(x, Layer.of(3), config={"dataflow": F.Dataflow(dataflow)})
    y.feats.sum().backward()
    kmap = F.build_kernel_map(x.coords, rows, kernel_size=5, stride=1)
    assert kmap["nbsizes"].shape == (125,) and kmap["nbsizes"].sum().item() == rows**2


@pytest.mark.parametrize("dataflow", [0, 1, 2])
def test_21_equal_row_counts_do_not_make_a_centre_tap(dataflow: int, device: torch.device) -> None:
    """A strided map with n_in = n_out = 2, whose middle tap is no identity."""
    x = voxels(device, (0, 2, 0, 0), (0, 5, 0, 0))
    torchsparse.backends.infer_spatial_range = False
    config = {"dataflow": F.Dataflow(dataflow)}
    y = F.conv3d(x, counting(device, 3), (3, 1, 1), None, (3, 1, 1), config=config)
    assert y.coords.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert y.feats[:, 0].tolist() == [100.0, 200.0]


@pytest.mark.parametrize("layer", [Layer.of(3), Layer.of(2, 2), Layer.of(3, 2, 1)], ids=str)
def test_22_fetch_on_demand_gradients_and_silence(
    layer: Layer, device: torch.device, capfd: pytest.CaptureFixture[str]
) -> None:
    x = sparse(device)
    x.feats.requires_grad_()
    kernel = weight(device, layer.volume).requires_grad_()
    y = convolve(layer, x, kernel, config={"dataflow": F.Dataflow.FetchOnDemand})
    grad = torch.sin(torch.arange(y.feats.numel(), device=device).double()).view_as(y.feats)
    y.feats.backward(grad)
    arrays = [t.detach().cpu().numpy() for t in (x.feats, kernel, grad)]
    want = oracles.relate(clouds.odd(), layer)
    to_feats, to_kernel, _ = oracles.gradients(arrays[0], arrays[1], want, arrays[2])
    assert x.feats.grad is not None and kernel.grad is not None
    assert_close(x.feats.grad, to_feats, F64)
    assert_close(kernel.grad, to_kernel, F64)
    assert capfd.readouterr() == ("", "")


def test_23_the_benchmark_switch_changes_nothing(device: torch.device) -> None:
    assert torchsparse.backends.benchmark is False
    torchsparse.backends.benchmark = True
    for dataflow in (0, 1, 2):
        judge(sparse(device), Layer.of(3), config={"dataflow": F.Dataflow(dataflow)})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_24_autocast_reaches_every_layer_and_its_backward(size: int, device: torch.device) -> None:
    layer = spnn.Conv3d(3, 2, size, bias=True).to(device)
    x = sparse(device, dtype=torch.float32)
    x.feats.requires_grad_()
    with torch.autocast(device.type, dtype=torch.float16):
        y = layer(x)
        z = layer(sparse(device, dtype=torch.float64))
    assert y.feats.dtype == torch.float16 and z.feats.dtype == F64
    y.feats.sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None
    for leaf in (x.feats, layer.kernel, layer.bias):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()
    assert_close(layer.bias.grad, torch.full((2,), 61.0), torch.float16)


def test_25_saved_tensors_belong_to_autograd(device: torch.device) -> None:
    """Saved-tensor hooks see the features and the weight."""
    x = sparse(device)
    x.feats.requires_grad_()
    kernel = weight(device, 27).requires_grad_()
    seen: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.conv3d(x, kernel, 3)
    assert x.feats.data_ptr() in seen and kernel.data_ptr() in seen


def test_32_dense_after_a_skip(device: torch.device) -> None:
    room = (clouds.BATCH, *clouds.ROOM)
    x = sparse(device, "batch_gap", spatial_range=room)
    y = F.conv3d(x, weight(device, 8), 2, None, 2)
    z = F.conv3d(y, weight(device, 8, 2, 3), 2, None, 2, transposed=True)
    assert torchsparse.cat([z, x]).dense().shape == (*room, 6)


def test_33_generative_add_starts_without_maps(device: torch.device) -> None:
    a, b = sparse(device, "plane"), sparse(device, "odd")
    for x in (a, b):
        F.conv3d(x, weight(device, 27), 3)
        F.conv3d(x, weight(device, 8), 2, None, 2)
    total = torchsparse.generative_add(a, b)
    for layer in (Layer.of(3), Layer.of(2, 2)):
        judge(total, layer)
    down = F.conv3d(total, weight(device, 8), 2, None, 2)
    up = F.conv3d(down, weight(device, 8, 2, 3), 2, None, 2, transposed=True)
    assert torch.equal(up.coords, total.coords)


def test_34_sums_of_different_coordinates_are_refused(device: torch.device) -> None:
    a = sparse(device)
    b = SparseTensor(a.feats, a.coords.flip(0))
    with raises_on_data(ValueError, "coord"):
        operator.add(a, b)
    with raises_on_data(ValueError, "coord"):
        torchsparse.cat([a, b])


def test_38_a_dtype_never_reaches_coordinates(device: torch.device) -> None:
    coords = torch.tensor([[0, 4097, 3, 70001]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones(1, 2, device=device), coords).to(torch.float16)
    assert x.feats.dtype == torch.float16
    assert x.coords.dtype == torch.int32 and x.coords.tolist() == [[0, 4097, 3, 70001]]


def test_40_duplicates_are_refused(device: torch.device) -> None:
    x = voxels(device, (0, 1, 2, 3), (0, 3, 2, 1), (0, 1, 2, 3))
    with raises_on_data(ValueError, "sparse_quantize"):
        F.conv3d(x, counting(device, 3), (3, 1, 1))


@pytest.mark.parametrize("cloud", ["origin", "block"])
def test_41_the_site_with_key_zero_is_a_site(cloud: str, device: torch.device) -> None:
    x = sparse(device, cloud)
    x.coords -= x.coords.amin(0)
    for layer in (Layer.of(3), Layer.of(2), Layer.of(2, 2, 1), Layer.of(3, 2, 1)):
        judge(x, layer)


def test_42_more_than_256_taps(device: torch.device) -> None:
    """K = 343 and 512, strided, where the original overflowed its stack."""
    for size in (7, 8):
        judge(sparse(device, "odd"), Layer.of(size, 2, size // 2))


@pytest.mark.parametrize("far", [2**24 + 1, 2**30 + 1, -(2**24) - 1])
def test_43_strides_divide_in_integers(far: int, device: torch.device) -> None:
    """float32 would round 2^24 + 1 to 2^24."""
    torchsparse.tensor.set_allow_negative_coordinates(True)
    coords = torch.tensor([[0, far, 0, 1], [0, far + 3, 0, 0]], dtype=torch.int32, device=device)
    want = np.unique(coords.cpu().numpy() // [1, 3, 3, 3], axis=0)
    assert_rows(F.spdownsample(coords, 3, 3), want)
    assert_rows(F.spdownsample(coords, 3, 5, downsample_mode="minkowski"), want)
    x = SparseTensor(torch.ones(2, 3, dtype=F64, device=device), coords)
    judge(x, Layer.of(3, 3, infer_range=False, allow_negative=True))
    judge(x, Layer.of(2, 2, infer_range=False, allow_negative=True))


def test_46_names_that_the_example_calls() -> None:
    config = F.get_default_conv_config()
    F.set_global_conv_config(config)
    assert F.get_global_conv_config() == config
    F.clear_global_conv_config()
    assert F.get_global_conv_config() is None


def test_47_offsets_are_nobody_elses(device: torch.device) -> None:
    first = get_kernel_offsets(3, device=str(device))
    first += 100
    assert get_kernel_offsets(3, device=str(device)).abs().max().item() == 1


@pytest.mark.parametrize("stride", [2, (1, 2, 1)])
def test_48_a_strided_residual_block(stride: Any, device: torch.device) -> None:
    """The shortcut is read at the main branch's sites: row c reads c s, 0 if absent."""
    block = SparseResBlock(3, 4, 3, stride).to(device).double().eval()
    x = sparse(device, spatial_range=(1, *clouds.ROOM))
    y = block(x)
    main = block.main(x)
    assert_rows(y.coords, main.coords.cpu().numpy())
    conv, norm = block.shortcut.children()
    assert isinstance(conv, spnn.Conv3d)
    s = np.array([1, *oracles.triple(stride)])
    row = {site: n for n, site in enumerate(oracles.as_sites(clouds.odd()))}
    feats = torch.zeros(len(y.coords), 3, dtype=F64, device=device)
    for m, site in enumerate(main.coords.cpu().numpy() * s):
        found = row.get(oracles.as_sites(site)[0])
        if found is not None:
            feats[m] = x.feats[found]
    assert feats.any()
    shortcut = norm(SparseTensor(feats @ conv.kernel.reshape(3, 4), y.coords))
    assert_close(y.feats, torch.relu(main.feats + shortcut.feats), F64)


@pytest.mark.parametrize("encoder", [0, 1])
@pytest.mark.parametrize("decoder", [0, 1])
def test_51_a_decoder_uses_its_encoders_offset(
    encoder: int, decoder: int, device: torch.device
) -> None:
    """fine = 2 c - p + t with the encoder's p, whatever the decoder passes."""
    x = voxels(device, (0, 4, 0, 0), (0, 5, 0, 0), (0, 20, 0, 0))
    size, stride = (3, 1, 1), (2, 1, 1)
    y = F.conv3d(x, counting(device, 3), size, None, stride, (encoder, 0, 0))
    ones = SparseTensor(torch.ones_like(y.feats), y.coords, y.stride)
    ones._caches = y._caches
    z = F.conv3d(ones, counting(device, 3), size, None, stride, (decoder, 0, 0), transposed=True)
    # p = 0, sites 1, 2, 9:   4 = 2*1 + 2 = 2*2 + 0,  5 = 2*2 + 1,  20 = 2*9 + 2
    # p = 1, sites 2, 3, 10:  4 = 2*2 - 1 + 1,  5 = 2*3 - 1 + 0 = 2*2 - 1 + 2,  20 = 2*10 - 1 + 1
    want = {0: [101.0, 10.0, 100.0], 1: [10.0, 101.0, 10.0]}
    assert z.feats[:, 0].tolist() == want[encoder]


def test_52_replaced_and_edited_coordinates(device: torch.device) -> None:
    x = sparse(device)
    for layer in (Layer.of(3), Layer.of(2, 2)):
        judge(x, layer)
        x.coords = torch.from_numpy(clouds.scatter("other", 61, (9, 9, 9))).to(device)
        judge(x, layer)
        x.coords[4] = torch.tensor([0, 20, 20, 20], dtype=torch.int32, device=device)
        judge(x, layer)
