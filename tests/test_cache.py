"""When a cached map is used, when it is not, and what the caches hold."""

from __future__ import annotations

import pytest
import torch

import torchsparse
from tests import clouds, oracles
from tests.cases import assert_close, assert_rows, convolve, sparse, weight
from tests.oracles import Layer
from torchsparse import SparseTensor
from torchsparse.nn import functional as F
from torchsparse.utils import tensor_cache
from torchsparse.utils.tensor_cache import (
    TensorCache,
    TensorCacheMode,
    clear_global_tensor_cache,
    get_global_tensor_cache,
    get_tensor_cache_mode,
    set_global_tensor_cache,
    set_tensor_cache_mode,
)

F64 = torch.float64
LAYERS = [Layer.of(3), Layer.of(2), Layer.of(2, 2), Layer.of(3, 2, 1)]


def judge(x: SparseTensor, layer: Layer, y: SparseTensor | None = None) -> SparseTensor:
    """The layer's output on x, checked against the search at x's present coordinates."""
    kernel = weight(x.feats.device, layer.volume, x.feats.shape[1], 3)
    y = convolve(layer, x, kernel) if y is None else y
    want = oracles.relate(x.coords.cpu().numpy(), layer, x.spatial_range)
    assert_rows(y.coords, want.coords)
    assert y.spatial_range == want.spatial_range
    out = oracles.convolve(x.feats.detach().cpu().numpy(), kernel.cpu().numpy(), want)
    assert_close(y.feats, out, F64)
    return y


def count(x: SparseTensor) -> int:
    return len(x._caches.kmaps)


# What is shared.


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_map_serves_every_layer_of_its_kind(layer: Layer, device: torch.device) -> None:
    """Not in the key: dataflow, conv mode, kmap mode, training, dtype, channels."""
    x = sparse(device)
    first = judge(x, layer)
    maps = dict(x._caches.kmaps)
    assert maps
    for mode in (1, 2, 0):
        F.set_conv_mode(mode)
        assert judge(x, layer).coords is first.coords
    for dataflow in (F.Dataflow.GatherScatter, F.Dataflow.FetchOnDemand):
        config = {"dataflow": dataflow, "kmap_mode": "hashmap"}
        kernel = weight(device, layer.volume, 3, 3)
        judge(x, layer, convolve(layer, x, kernel, config=config, training=True))
    half = SparseTensor(x.feats[:, :2].float(), x.coords)
    half._caches = x._caches
    wide = convolve(layer, half, weight(device, layer.volume, 2, 5, torch.float32))
    assert wide.coords is first.coords
    assert x._caches.kmaps.keys() == maps.keys()
    assert all(x._caches.kmaps[key] is kmap for key, kmap in maps.items())


def test_two_submanifold_layers_of_a_chain_share_one_map(device: torch.device) -> None:
    x = sparse(device)
    y = judge(x, Layer.of(3))
    maps = dict(x._caches.kmaps)
    z = judge(y, Layer.of(3))
    assert z._caches is y._caches is x._caches and z.coords is x.coords
    assert x._caches.kmaps == maps


def test_sharing_a_cache_object_shares_maps(device: torch.device) -> None:
    """x._caches = y._caches, the supported way."""
    x = sparse(device)
    judge(x, Layer.of(2, 2))
    other = SparseTensor(-x.feats, x.coords)
    assert other._caches is not x._caches
    other._caches = x._caches
    before = dict(x._caches.kmaps)
    judge(other, Layer.of(2, 2))
    assert x._caches.kmaps == before


def test_cleared_maps_are_built_again(device: torch.device) -> None:
    x = sparse(device)
    judge(x, Layer.of(2, 2))
    maps = count(x)
    x._caches.kmaps.clear()
    judge(x, Layer.of(2, 2))
    assert count(x) == maps > 0


# What is in the key.


@pytest.mark.parametrize(
    "layers",
    [
        [Layer.of(3, 2, 0), Layer.of(3, 2, 1), Layer.of(3, 2, 2)],
        [Layer.of(2, 2, 0), Layer.of(2, 2, (0, 1, 0))],
        [Layer.of(3), Layer.of(3, 1, 0, 2), Layer.of(3, 1, 0, (1, 2, 1))],
        [Layer.of(3, 2, 1), Layer.of(3, 3, 1), Layer.of(3, (2, 1, 2), 1)],
        [Layer.of(3, 2), Layer.of(3, 2, minkowski=True)],
        [Layer.of(3, 2), Layer.of(3, 2, infer_range=False)],
        [Layer.of(2), Layer.of(3), Layer.of((3, 1, 2)), Layer.of((2, 1, 3)), Layer.of(4)],
        [Layer.of(3, 2), Layer.of(3, 2, transposed=True, generative=True), Layer.of(3)],
    ],
    ids=lambda layers: "/".join(str(layer) for layer in layers),
)
def test_layers_that_differ_do_not_share(layers: list[Layer], device: torch.device) -> None:
    """Each on the same tensor, twice, in both orders: always its own answer."""
    x = sparse(device, "batch_gap", stride=2)
    for layer in (*layers, *reversed(layers)):
        judge(x, layer)


def test_the_range_is_in_the_key(device: torch.device) -> None:
    x = sparse(device, "batch_gap")
    lengths = []
    for room in (None, (clouds.BATCH, *clouds.ROOM), (clouds.BATCH, 40, 40, 40)):
        x.spatial_range = room
        lengths.append(len(judge(x, Layer.of(2, 2)).coords))
    assert lengths[0] < lengths[1] == lengths[2]  # the inferred border cuts, the ranges do not


def test_the_negative_flag_is_in_the_key(device: torch.device) -> None:
    """Padding 2 reaches the coarse site -1 of voxel 0 only where negatives are allowed."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 6, 6, 6]], dtype=torch.int32, device=device)
    x = SparseTensor(torch.ones(2, 1, dtype=F64, device=device), coords)
    layer = Layer.of(5, 2, 2)
    lengths = [len(judge(x, layer).coords)]
    lengths.append(len(judge(x, Layer.of(5, 2, 2, allow_negative=True)).coords))
    lengths.append(len(judge(x, layer).coords))
    assert lengths[0] == lengths[2] < lengths[1]


def test_both_ways_between_two_levels(device: torch.device) -> None:
    """A network that goes down by two paddings and up again, repeatedly."""
    x = sparse(device, "batch_gap")
    for _ in range(2):
        for padding in (0, 1):
            y = judge(x, Layer.of(3, 2, padding))
            judge(y, Layer.of(3))
            up = convolve(Layer.of(3, 2, transposed=True), y, weight(device, 27, 3, 2))
            assert up.coords is x.coords


# cmaps.


def test_convolutions_record_their_levels(device: torch.device) -> None:
    x = sparse(device, spatial_range=(1, *clouds.ROOM))
    assert not x._caches.cmaps
    y = judge(x, Layer.of(2, 2))
    coords, room = x._caches.cmaps[(1, 1, 1)]
    assert coords is x.coords and room == (1, *clouds.ROOM)
    coords, room = x._caches.cmaps[(2, 2, 2)]
    assert coords is y.coords and room == y.spatial_range


def test_recorded_levels_are_not_overwritten(device: torch.device) -> None:
    """setdefault: the first output at a stride stays."""
    x = sparse(device)
    first = judge(x, Layer.of(3, 2, 1))
    second = judge(x, Layer.of(2, 2))
    assert len(first.coords) != len(second.coords)
    assert x._caches.cmaps[(2, 2, 2)][0] is first.coords


@pytest.mark.parametrize("bare", [True, False])
def test_a_level_of_the_user_stays(bare: bool, device: torch.device) -> None:
    x = sparse(device)
    mine = x.coords if bare else (x.coords, None)
    x._caches.cmaps[(1, 1, 1)] = mine
    judge(x, Layer.of(2, 2))
    kept = x._caches.cmaps[(1, 1, 1)]
    assert (kept if torch.is_tensor(kept) else kept[0]) is x.coords


# Validity.


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("how", ["replaced", "edited", "edited through a view", "permuted"])
def test_changed_coordinates_get_a_new_map(layer: Layer, how: str, device: torch.device) -> None:
    x = sparse(device)
    judge(x, layer)
    if how == "replaced":
        x.coords = torch.from_numpy(clouds.scatter("new", 61, (9, 9, 9))).to(device)
    elif how == "edited":
        x.coords[:, 1:] += torch.arange(3, dtype=torch.int32, device=device) + 1
    elif how == "edited through a view":
        x.coords[7, 1:].fill_(30)
    else:
        x.coords = x.coords.flip(0)
    judge(x, layer)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_edited_coordinates_of_another_integer_type(layer: Layer, device: torch.device) -> None:
    """Also the conversion to int32 follows the tensor."""
    x = sparse(device)
    x.coords = x.coords.long()
    first = judge(x, layer)
    assert judge(x, layer).coords is first.coords
    x.coords[:, 1:] += torch.arange(3, device=device) + 1
    judge(x, layer)


def test_an_edit_that_keeps_the_sites_but_not_the_rows(device: torch.device) -> None:
    """Swapping two rows in place leaves every site in place and every map wrong."""
    x = sparse(device)
    judge(x, Layer.of(3))
    judge(x, Layer.of(2, 2))
    x.coords[[0, 9]] = x.coords[[9, 0]]
    judge(x, Layer.of(3))
    judge(x, Layer.of(2, 2))


def test_a_map_keeps_its_coordinates_alive(device: torch.device) -> None:
    """A new tensor at the address of a dead one is never mistaken for it."""
    cache = TensorCache()
    for seed in range(12):
        coords = clouds.scatter(f"seed {seed}", 64, (6, 6, 6))
        x = SparseTensor(
            torch.ones(64, 3, dtype=F64, device=device), torch.from_numpy(coords).to(device)
        )
        x._caches = cache
        judge(x, Layer.of(3))
        judge(x, Layer.of(2, 2))
        del x


def test_views_with_one_address_are_told_apart(device: torch.device) -> None:
    """Same data pointer, other shape or strides."""
    base = torch.from_numpy(clouds.odd()).to(device)
    cache = TensorCache()
    for coords in (base, base[:31], base[::2], base):
        feats = torch.ones(len(coords), 3, dtype=F64, device=device)
        x = SparseTensor(feats, coords)
        x._caches = cache
        judge(x, Layer.of(3))


def test_inference_tensors_have_no_version_and_still_work(device: torch.device) -> None:
    with torch.inference_mode():
        x = sparse(device)
        assert x.coords.is_inference()
        y = judge(x, Layer.of(2, 2))
        assert judge(x, Layer.of(2, 2)).coords is y.coords
        up = convolve(Layer.of(2, 2, transposed=True), y, weight(device, 8, 3, 2))
        assert up.coords is x.coords
    x.coords = torch.from_numpy(clouds.scatter("new", 61, (9, 9, 9))).to(device)
    judge(x, Layer.of(2, 2))


def test_a_level_edited_since_is_ignored(device: torch.device) -> None:
    """Its rows are no longer those that the coarse level came from: better no answer."""
    x = sparse(device)
    y = judge(x, Layer.of(2, 2))
    x.coords[:, 1:] += 2
    with pytest.raises(ValueError, match="generative=True"):
        convolve(Layer.of(2, 2, transposed=True), y, weight(device, 8, 3, 2))


def test_a_coarse_level_edited_since_does_not_use_the_map(device: torch.device) -> None:
    """The fine level is still known; the relation is searched for the new coarse sites."""
    x = sparse(device)
    y = judge(x, Layer.of(2, 2))
    y.coords[:, 1:] += 1
    layer = Layer.of(2, 2, transposed=True)
    kernel = weight(device, 8, 3, 2)
    z = convolve(layer, y, kernel)
    want = oracles.relate(y.coords.cpu().numpy(), layer, fine=clouds.odd())
    assert_rows(z.coords, want.coords)
    assert_close(z.feats, oracles.convolve(y.feats.cpu().numpy(), kernel.cpu().numpy(), want), F64)


def test_a_decoder_follows_replaced_fine_coordinates(device: torch.device) -> None:
    """New coordinates on x, a new pass: the decoder returns to them, not to the old ones."""
    x = sparse(device)
    for name in ("first", "second"):
        x.coords = torch.from_numpy(clouds.scatter(name, 61, (9, 9, 9))).to(device)
        y = judge(x, Layer.of(2, 2))
        z = convolve(Layer.of(2, 2, transposed=True), y, weight(device, 8, 3, 2))
        assert_rows(z.coords, x.coords.cpu().numpy())


# The global cache.


def test_modes_and_their_names() -> None:
    assert get_tensor_cache_mode() == TensorCacheMode.SEPARATE_TENSOR_CACHE
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    assert get_tensor_cache_mode() == TensorCacheMode.GLOBAL_TENSOR_CACHE
    for name in ("TensorCache", "TensorCacheMode", "set_tensor_cache_mode"):
        assert getattr(torchsparse.tensor, name) is getattr(tensor_cache, name)
    fresh = TensorCache()
    assert fresh.cmaps == fresh.kmaps == fresh.hashmaps == {}


def test_separate_tensors_have_separate_caches(device: torch.device) -> None:
    assert sparse(device)._caches is not sparse(device)._caches


def test_global_tensors_share_one_cache(device: torch.device) -> None:
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    x, y = sparse(device), sparse(device, "plane")
    assert x._caches is y._caches is get_global_tensor_cache()
    mine = TensorCache()
    set_global_tensor_cache(mine)
    assert sparse(device)._caches is mine


def test_clearing_the_global_cache_drops_the_maps(device: torch.device) -> None:
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    x = sparse(device)
    judge(x, Layer.of(2, 2))
    shared = get_global_tensor_cache()
    assert shared is not None and shared.kmaps
    clear_global_tensor_cache()
    fresh = sparse(device)
    assert not fresh._caches.kmaps and not fresh._caches.cmaps
    judge(fresh, Layer.of(2, 2))


def test_the_global_cache_never_confuses_tensors(device: torch.device) -> None:
    """Different clouds, interleaved; and the edit of one of them."""
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    tensors = [sparse(device, name) for name in ("odd", "plane", "block")]
    for layer in (Layer.of(3), Layer.of(2, 2), Layer.of(3)):
        for x in tensors:
            judge(x, layer)
    tensors[0].coords[:, 1:] += 3
    for x in tensors:
        judge(x, Layer.of(3))
        judge(x, Layer.of(2, 2))


def test_the_global_cache_and_decoders(device: torch.device) -> None:
    """The latest network's decoder finds its own fine level, not that of an earlier frame."""
    set_tensor_cache_mode(TensorCacheMode.GLOBAL_TENSOR_CACHE)
    for name in ("odd", "plane", "batch_gap"):
        x = sparse(device, name)
        y = judge(x, Layer.of(2, 2))
        z = convolve(Layer.of(2, 2, transposed=True), y, weight(device, 8, 3, 2))
        assert_rows(z.coords, clouds.CLOUDS[name]())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to move to")
def test_a_real_move_starts_a_new_cache() -> None:
    x = sparse(torch.device("cpu"))
    x._caches.extra = "kept"  # pyright: ignore[reportAttributeAccessIssue]
    judge(x, Layer.of(2, 2))
    old = x._caches
    x.to("cuda")
    assert x._caches is not old and not x._caches.kmaps
    assert vars(x._caches)["extra"] == "kept"
    judge(x, Layer.of(2, 2))
    x.coords, x.feats = x.coords.cpu(), x.feats.cpu()  # by hand: entries elsewhere are ignored
    judge(x, Layer.of(2, 2))


def test_a_move_to_the_same_device_keeps_the_cache(device: torch.device) -> None:
    x = sparse(device)
    judge(x, Layer.of(2, 2))
    old = x._caches
    assert x.to(device)._caches is old
    assert x.double()._caches is old
    maps = count(x)
    judge(x, Layer.of(2, 2))
    assert count(x) == maps
