"""Transposed layers: where their sites come from, which offset they use, what they compute."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import torchsparse
from tests import clouds, oracles
from tests.cases import (
    KERNEL_SIZES,
    STRIDES,
    Case,
    assert_close,
    assert_rows,
    convolve,
    sparse,
    weight,
)
from tests.oracles import Layer, Range, Relation, Triple
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F

Coarse = tuple[SparseTensor, SparseTensor]


def encode(
    layer: Layer,
    device: torch.device,
    cloud: str = "batch_gap",
    spatial_range: Range | None = None,
) -> Coarse:
    """(x, y): a tensor and what a forward layer makes of it."""
    x = sparse(device, cloud, spatial_range=spatial_range)
    return x, convolve(layer, x, weight(device, layer.volume, 3, 4))


def up(layer: Layer, **changes: Any) -> Layer:
    """The transposed layer of the same arguments, apart from ``changes``."""
    same = {
        name: getattr(layer, name)
        for name in ("kernel_size", "stride", "padding", "dilation")
        if name not in changes
    }
    switches = {name: getattr(layer, name) for name in ("minkowski", "allow_negative")}
    return Layer.of(**same, **changes, transposed=True, **switches)


def check(
    y: SparseTensor, layer: Layer, z: SparseTensor, fine: Any, offset: Triple | None = None
) -> Relation:
    """z = transposed(y) at the rows of ``fine``, with this offset (or the layer's own)."""
    want = oracles.relate(y.coords.cpu().numpy(), layer, fine=fine, offset=offset)
    kernel = weight(y.feats.device, layer.volume, y.feats.shape[1], 5)
    out = oracles.convolve(y.feats.detach().cpu().numpy(), kernel.cpu().numpy(), want)
    assert_rows(z.coords, want.coords)
    assert_close(z.feats, out, torch.float64)
    return want


def decode(y: SparseTensor, layer: Layer) -> SparseTensor:
    return convolve(layer, y, weight(y.feats.device, layer.volume, y.feats.shape[1], 5))


STRIDED = [
    Layer.of(k, s, p, d)
    for k, s, p, d in itertools.product(KERNEL_SIZES, STRIDES[1:], (0, 1), (1, 2))
]


@pytest.mark.parametrize("cloud", ["batch_gap", "single", "empty"])
@pytest.mark.parametrize("layer", STRIDED, ids=str)
def test_decoder_inverts_its_encoder(layer: Layer, cloud: str, device: torch.device) -> None:
    """Same arguments: the fine level's own rows in their own order, its range and stride."""
    room = (clouds.BATCH, *clouds.ROOM)
    x, y = encode(layer, device, cloud, room)
    z = decode(y, up(layer))
    check(y, up(layer), z, clouds.CLOUDS[cloud]())
    assert z.coords is x.coords
    assert (z.stride, z.spatial_range) == ((1, 1, 1), room)
    assert z._caches is y._caches is x._caches


@pytest.mark.parametrize(
    "layer",
    [
        Layer.of(3, 2, 0, minkowski=True),
        Layer.of(2, 3, 1, 2, minkowski=True),
        Layer.of(3, 2, 1, allow_negative=True),
        Layer.of(2, 2, 0, allow_negative=True),
    ],
    ids=str,
)
def test_decoder_in_the_other_modes(layer: Layer, device: torch.device) -> None:
    cloud = "negative" if layer.allow_negative else "odd"
    _, y = encode(layer, device, cloud)
    assert len(y.coords) > 1
    check(y, up(layer), decode(y, up(layer)), clouds.CLOUDS[cloud]())


@pytest.mark.parametrize("layer", STRIDED[::3], ids=str)
def test_decoder_is_conv_transpose3d(layer: Layer, device: torch.device) -> None:
    _, y = encode(layer, device)
    z = decode(y, up(layer))
    want = oracles.dense_convolve(
        y.feats.cpu(),
        y.coords.cpu().numpy(),
        weight(torch.device("cpu"), layer.volume, 4, 5),
        up(layer),
        clouds.batch_gap(),
    )
    assert_close(z.feats, want, torch.float64)


@pytest.mark.parametrize("layer", STRIDED[::5], ids=str)
def test_gradients_of_a_decoder(layer: Layer, device: torch.device) -> None:
    _, y = encode(layer, device)
    feats = y.feats.detach().requires_grad_()
    y.feats = feats
    kernel = weight(device, layer.volume, 4, 5).requires_grad_()
    z = convolve(up(layer), y, kernel)
    grad = torch.cos(torch.arange(z.feats.numel(), device=device).double()).reshape(z.feats.shape)
    z.feats.backward(grad)
    want = oracles.relate(y.coords.cpu().numpy(), up(layer), fine=clouds.batch_gap())
    arrays = [t.detach().cpu().numpy() for t in (feats, kernel, grad)]
    to_feats, to_kernel, _ = oracles.gradients(arrays[0], arrays[1], want, arrays[2])
    assert feats.grad is not None and kernel.grad is not None
    assert_close(feats.grad, to_feats, torch.float64)
    assert_close(kernel.grad, to_kernel, torch.float64)


def test_rows_without_a_parent_are_the_bias(device: torch.device) -> None:
    """Kernel 1, stride 2 reaches even sites only."""
    _, y = encode(Layer.of(1, 2), device)
    bias = torch.tensor([3.0, -1.0], dtype=torch.float64, device=device)
    z = convolve(up(Layer.of(1, 2)), y, weight(device, 1, 4, 2), bias)
    odd_sites = torch.from_numpy(clouds.batch_gap()[:, 1:] % 2 == 1).any(1)
    assert odd_sites.any() and not odd_sites.all()
    rows = z.feats.cpu()[odd_sites]
    assert_close(rows, bias.cpu().expand_as(rows), torch.float64)


# The offset belongs to the encoder's map.


@pytest.mark.parametrize("own", [0, 1, (0, 2, 1)])
@pytest.mark.parametrize("encoder", [0, 1, (1, 0, 1)])
def test_own_padding_gives_way_to_the_encoders(
    encoder: Any, own: Any, device: torch.device
) -> None:
    layer = Layer.of(3, 2, encoder)
    _, y = encode(layer, device)
    z = decode(y, up(layer, padding=own))
    check(y, up(layer), z, clouds.batch_gap(), offset=layer.padding)


def test_each_decoder_finds_the_encoder_that_made_its_input(device: torch.device) -> None:
    """Two encoders with the same kernel and stride from one tensor, whose paddings differ."""
    x = sparse(device, "batch_gap")
    layers = [Layer.of(3, 2, 0), Layer.of(3, 2, 1)]
    outputs = [convolve(layer, x, weight(device, 27, 3, 4)) for layer in layers]
    assert len(outputs[0].coords) != len(outputs[1].coords)
    for layer, y in (*zip(layers, outputs), *zip(layers, outputs)):
        for own in (0, 1):
            z = decode(y, up(layer, padding=own))
            check(y, up(layer), z, clouds.batch_gap(), offset=layer.padding)


def test_another_kernel_than_the_encoders_uses_its_own_padding(device: torch.device) -> None:
    """No map of that kernel: coordinates of the parent, offset of the layer."""
    x, y = encode(Layer.of(2, 2), device)
    layer = Layer.of(4, 2, 1, transposed=True)
    z = decode(y, layer)
    check(y, layer, z, clouds.batch_gap(), offset=(1, 1, 1))
    assert z.coords is x.coords


def test_a_map_of_another_coarse_level_still_gives_the_offset(device: torch.device) -> None:
    """The only cached map with the decoder's kernel decides, though another made its input."""
    x, _ = encode(Layer.of(3, 2, 1), device)
    y = convolve(Layer.of(2, 2), x, weight(device, 8, 3, 4))
    layer = Layer.of(3, 2, 0, transposed=True)
    check(y, layer, decode(y, layer), clouds.batch_gap(), offset=(1, 1, 1))


def test_a_minkowski_encoder_keeps_its_offset_in_another_mode(device: torch.device) -> None:
    _, y = encode(Layer.of(3, 2, 0, minkowski=True), device)
    layer = Layer.of(3, 2, 0, transposed=True)
    check(y, layer, decode(y, layer), clouds.batch_gap(), offset=(1, 1, 1))


def test_without_a_map_minkowski_centres_the_taps(device: torch.device) -> None:
    _, y = encode(Layer.of(2, 2, minkowski=True), device)
    layer = Layer.of(3, 2, 0, transposed=True, minkowski=True)
    check(y, layer, decode(y, layer), clouds.batch_gap(), offset=(1, 1, 1))


# The fine level.


def test_first_layer_strided_then_transposed(device: torch.device) -> None:
    """The input level itself is found, with its range."""
    x, y = encode(Layer.of(2, 2), device, spatial_range=(clouds.BATCH, *clouds.ROOM))
    z = spnn.Conv3d(4, 5, 2, 2, transposed=True).to(device).double()(y)
    assert z.coords is x.coords
    assert z.spatial_range == (clouds.BATCH, *clouds.ROOM)


def test_two_levels_at_once(device: torch.device) -> None:
    """Stride 4 from stride 4: no map of such a layer, but the level at stride 1 is known."""
    x, y = encode(Layer.of(2, 2), device)
    deep = convolve(Layer.of(2, 2), y, weight(device, 8, 4, 3))
    assert deep.stride == (4, 4, 4)
    layer = Layer.of(4, 4, transposed=True)
    z = decode(deep, layer)
    check(deep, layer, z, clouds.batch_gap())
    assert z.coords is x.coords and z.stride == (1, 1, 1)


@pytest.mark.parametrize("bare", [True, False])
def test_a_fine_level_put_there_by_the_user(bare: bool, device: torch.device) -> None:
    fine = torch.from_numpy(clouds.odd()).to(device)
    coarse = oracles.as_rows(oracles.output_sites(clouds.odd(), Layer.of(2, 2)))
    y = SparseTensor(
        torch.randn(len(coarse), 4, dtype=torch.float64, device=device),
        torch.from_numpy(coarse).int().to(device),
        (4, 4, 2),
    )
    y._caches.cmaps[(2, 2, 1)] = fine if bare else (fine, (1, *clouds.ROOM))
    layer = Layer.of(2, 2, transposed=True)
    z = decode(y, layer)
    check(y, layer, z, clouds.odd())
    assert z.coords is fine and z.stride == (2, 2, 1)
    assert z.spatial_range == (None if bare else (1, *clouds.ROOM))


def test_an_unknown_fine_level_is_an_error_that_helps(device: torch.device) -> None:
    x = sparse(device, stride=4)
    with pytest.raises(ValueError) as caught:
        F.conv3d(x, weight(device, 8), 2, None, 2, transposed=True)
    text = str(caught.value)
    assert "(2, 2, 2)" in text  # the level that was looked for
    assert "generative=True" in text
    convolve(Layer.of(3), x, weight(device, 27))
    with pytest.raises(ValueError, match=r"\(4, 4, 4\)"):  # the level that is known
        F.conv3d(x, weight(device, 8), 2, None, 2, transposed=True)


def test_a_fine_level_that_was_written_to_is_an_error_that_says_so(device: torch.device) -> None:
    coords = torch.tensor([[0, 0, 0, 0], [0, 3, 2, 1]], dtype=torch.int32, device=device)
    down = spnn.Conv3d(2, 2, 2, 2).to(device)
    up = spnn.Conv3d(2, 2, 2, 2, transposed=True).to(device)
    x = SparseTensor(torch.ones(2, 2, device=device), coords)
    y = down(x)
    x.coords[:, 1] += 2
    with pytest.raises(ValueError, match=r"at stride \(1, 1, 1\); those of .* were written to"):
        up(y)


@pytest.mark.parametrize("stride", [2, (1, 2, 1), 3])
def test_tensor_stride_must_be_divisible(stride: Any, device: torch.device) -> None:
    x = sparse(device, stride=(2, 5, 2))
    with pytest.raises(ValueError, match=r"\(2, 5, 2\)"):
        F.conv3d(x, weight(device, 8), 2, None, stride, transposed=True)


def test_the_encoders_border_sites_come_back(device: torch.device) -> None:
    """Voxel 10 loses its parent under v2.1's bound (m = 10), yet the decoder has its row."""
    coords = torch.tensor([[0, 10, 0, 0], [0, 4, 0, 0]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones(2, 1, device=device), coords)
    size, kernel = (2, 1, 1), torch.ones(2, 1, 1, device=device)
    y = F.conv3d(x, kernel, size, None, size)
    assert y.coords.tolist() == [[0, 2, 0, 0]]
    z = F.conv3d(y, kernel, size, None, size, transposed=True)
    assert_rows(z.coords, coords.cpu().numpy())
    assert z.feats[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kernel_size", [2, 3, 4, (3, 1, 2)], ids=str)
def test_stride_one_is_the_adjoint_of_a_submanifold_layer(
    kernel_size: Any, device: torch.device
) -> None:
    """Output sites are the input's; tap t reaches from coarse to coarse - o + d t."""
    x = sparse(device, "block", spatial_range=(1, *clouds.ROOM))
    layer = Layer.of(kernel_size, 1, 3, 2, transposed=True)
    z = decode(x, layer)
    check(x, layer, z, None)
    assert z.coords is x.coords and z.stride == (1, 1, 1)
    assert z.spatial_range == (1, *clouds.ROOM)


def test_maps_built_in_evaluation_serve_training(device: torch.device) -> None:
    down = spnn.Conv3d(3, 4, 2, 2).to(device).double().eval()
    back = spnn.Conv3d(4, 3, 2, 2, transposed=True).to(device).double().eval()
    x = sparse(device)
    with torch.no_grad():
        back(down(x))
    x.feats.requires_grad_()
    for module in (down, back):
        module.train()
    back(down(x)).feats.square().sum().backward()
    got = x.feats.grad
    fresh = SparseTensor(x.feats.detach().requires_grad_(), x.coords)
    back(down(fresh)).feats.square().sum().backward()
    assert got is not None and fresh.feats.grad is not None
    assert got.abs().max() > 0
    assert_close(got, fresh.feats.grad, torch.float64)


def test_case_records_cover_transposed_kinds() -> None:
    """The two oracles agree on decoders too, fine sites the encoder never saw included."""
    for layer in STRIDED[::4]:
        problem = Case(layer, "odd", channels=(2, 3)).build()
        coarse = oracles.as_rows(oracles.output_sites(problem.coords, layer))
        feats = np.random.default_rng(1).standard_normal((len(coarse), 2))
        fine = clouds.plane()
        want = oracles.relate(coarse, up(layer), fine=fine)
        dense = oracles.dense_convolve(
            torch.from_numpy(feats), coarse, torch.from_numpy(problem.kernel), up(layer), fine
        )
        assert_close(dense, oracles.convolve(feats, problem.kernel, want), torch.float64)


@pytest.mark.parametrize("kmap_mode", ["hashmap", "hashmap_on_the_fly"])
@pytest.mark.parametrize("conv_mode", [0, 1, 2])
def test_modes_agree_on_decoders(kmap_mode: str, conv_mode: int, device: torch.device) -> None:
    F.set_kmap_mode(kmap_mode)
    F.set_conv_mode(conv_mode)
    for dataflow in (0, 1, 2):
        layer = Layer.of(3, 2, 1)
        _, y = encode(layer, device)
        kernel = weight(device, 27, 4, 5)
        z = convolve(up(layer), y, kernel, config={"dataflow": F.Dataflow(dataflow)})
        check(y, up(layer), z, clouds.batch_gap())
    assert torchsparse.backends.infer_spatial_range is True


def test_several_coordinate_sets_in_one_cache_come_home(device: torch.device) -> None:
    """Three tensors share a cache; each upsampling returns to its own sites, not to another's."""
    weight = torch.ones(8, 1, 1, device=device)
    cache = None
    inputs, coarse = [], []
    for shift in (0, 2, 6):
        coords = torch.tensor([[0, shift, 1, 1], [0, shift + 1, 3, 0]], dtype=torch.int32)
        x = SparseTensor(torch.ones(2, 1, device=device), coords.to(device))
        cache = cache or x._caches
        x._caches = cache
        inputs.append(x)
        coarse.append(F.conv3d(x, weight, 2, None, 2))
    for x, y in zip(inputs, coarse):
        assert F.conv3d(y, weight, 2, None, 2, transposed=True).coords is x.coords


# ------------------------------------------------------------------ onto given fine sites
def test_given_fine_sites_are_those_of_an_encoder(device: torch.device) -> None:
    """The same numbers as where an earlier layer has recorded them; gradients too."""
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1), ((3, 1, 2), (1, 2, 1), 0), (3, 1, 0)):
        x = sparse(device, "batch_gap", channels=4)
        down, up_ = (
            spnn.Conv3d(4, 4, kernel, stride, padding, transposed=t).double().to(device)
            for t in (False, True)
        )
        y = down(x) if stride != 1 else x
        want = up_(y)
        alone = SparseTensor(y.feats.detach().requires_grad_(), y.coords, y.stride)
        for sites in (SparseTensor(x.feats, x.coords), x.coords, x.coords.long()):
            got = up_(alone, coordinates=sites)
            assert torch.equal(got.coords, x.coords) and got.stride == x.stride
            assert_close(got.feats, want.feats, torch.float64)
        got.feats.sum().backward()
        assert alone.feats.grad is not None and alone.feats.grad.abs().sum() > 0


def test_unpooling_onto_given_sites(device: torch.device) -> None:
    x = sparse(device, "batch_gap", channels=4)
    y = spnn.MaxPool3d(2)(x)
    want = spnn.Unpool3d(2)(y)
    alone = SparseTensor(y.feats, y.coords, y.stride)
    assert torch.equal(spnn.Unpool3d(2)(alone, coordinates=x).feats, want.feats)


def test_given_sites_that_do_not_fit(device: torch.device) -> None:
    x = sparse(device, "batch_gap", channels=4)
    coarse = SparseTensor(x.feats, x.coords, 4)
    up_ = spnn.Conv3d(4, 4, 2, 2, transposed=True).double().to(device)
    with pytest.raises(ValueError, match=r"must have stride \(2, 2, 2\)"):
        up_(coarse, coordinates=x)
    create = spnn.Conv3d(4, 4, 2, 2, transposed=True, generative=True).double().to(device)
    with pytest.raises(ValueError, match="cannot be given to a generative"):
        create(coarse, coordinates=x)


def test_a_replaced_fine_level_is_followed(device: torch.device) -> None:
    def sites(*rows: list[int]) -> torch.Tensor:
        return torch.tensor([[0, *row] for row in rows], dtype=torch.int32, device=device)

    coarse = SparseTensor(torch.ones(2, 4, device=device), sites([0, 0, 0], [1, 1, 1]), 2)
    up_ = spnn.Conv3d(4, 4, 2, 2, transposed=True).to(device)
    for fine in (sites([0, 0, 0], [2, 2, 2]), sites([1, 1, 1], [2, 2, 3], [3, 3, 3])):
        coarse._caches.cmaps[(1, 1, 1)] = (fine, None)
        assert torch.equal(up_(coarse).coords, fine)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [3, (3, 1, 5), 2])
def test_own_sites_may_be_given(kernel: Any, transposed: bool, device: torch.device) -> None:
    """In any row order: those of the tensor itself, and equal ones."""
    x = sparse(device, "batch_gap", channels=4)
    order = torch.randperm(len(x.coords), generator=torch.Generator().manual_seed(0)).to(device)
    conv = spnn.Conv3d(4, 4, kernel, transposed=transposed).double().to(device)
    feats, coords = x.feats[order], x.coords[order]
    want = conv(SparseTensor(feats, coords)).feats
    for sites in (coords, coords.clone(), SparseTensor(feats, coords)):
        got = conv(SparseTensor(feats.requires_grad_(), coords), coordinates=sites)
        assert_close(got.feats, want, torch.float64)
        (grad,) = torch.autograd.grad(got.feats.square().sum(), feats)
        again = conv(SparseTensor(feats, coords)).feats
        assert_close(grad, torch.autograd.grad(again.square().sum(), feats)[0], torch.float64)
