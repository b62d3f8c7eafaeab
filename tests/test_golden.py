"""Agreement with arrays recorded from TorchSparse 2.1.0 itself. See golden/README.md."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import torchsparse
from tests.conftest import reset_global_state
from tests.oracles import (
    Layer,
    Triple,
    convolve,
    module_padding,
    output_stride,
    relate,
    triple,
)
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones import SparseResNet21D, SparseResUNet42
from torchsparse.nn import functional as F
from torchsparse.nn.utils import get_kernel_offsets
from torchsparse.utils import to_dense

GOLDEN = Path(__file__).parent / "golden"
Array = NDArray[Any]
Case = dict[str, Any]

# float32 sums of up to 800 products in another order, then a chain of layers: 1e-3 of the
# largest entry (as the recorder's own comparison).
CHAIN = 1e-3
# Networks of forty layers, float32: 2e-3 of the largest entry, elementwise. In training, a row
# near a ReLU's zero may fall either way and BatchNorm spreads the difference: 2 % in norm (two
# correct float32 programs differ by up to 0.7 % here).
NETWORK, NETWORK_NORM = 2e-3, 2e-2

with np.load(GOLDEN / "golden.npz") as _file:
    CHAINS: list[Case] = json.loads(str(_file["specs"]))
with np.load(GOLDEN / "networks_street.npz") as _file:
    ENTRIES: list[str] = list(_file.files)


def assert_near(name: str, got: Array, want: Array, share: float) -> None:
    """Within ``share`` of each entry plus ``share`` of the largest one."""
    assert got.shape == want.shape, name
    largest = float(np.abs(want).max(initial=0.0))
    np.testing.assert_allclose(
        got.astype(np.float64), want, rtol=CHAIN, atol=share * largest, err_msg=name
    )


def by_coordinate(coords: Array) -> Array:
    """The row order that sorts by (b, x, y, z)."""
    return np.lexsort(coords.T[::-1])


# Chains of convolutions.


def chain_arrays(case: Case) -> tuple[Array, Array, list[Array], list[Array]]:
    """The recorded case's inputs, drawn in the recorder's order from the case's seed."""
    rng = np.random.default_rng(case["seed"])
    extent, samples = case["extent"], []
    lattice = np.array(list(itertools.product(range(extent), repeat=3)), np.int32)
    for b in range(case["batch"]):
        xyz = lattice[rng.permutation(len(lattice))[: case["n"]]]
        samples.append(np.insert(xyz, 0, b, axis=1))
    coords = np.concatenate(samples)
    if case["negative"]:
        coords[:, 1:] -= extent // 2
    feats = rng.standard_normal((len(coords), case["layers"][0]["i"])).astype(np.float32)
    kernels, biases = [], []
    for layer in case["layers"]:
        volume = int(np.prod(triple(layer["k"])))
        values = rng.standard_normal((volume, layer["i"], layer["o"]))
        kernels.append((values / np.sqrt(volume * layer["i"])).astype(np.float32))
        biases.append(rng.standard_normal(layer["o"]).astype(np.float32))
    return coords, feats, kernels, biases


def chain_modules(case: Case, kernels: list[Array], biases: list[Array]) -> torch.nn.Sequential:
    modules = []
    for layer, kernel, bias in zip(case["layers"], kernels, biases):
        size, stride, padding = (
            tuple(v) if isinstance(v, list) else v for v in (layer["k"], layer["s"], layer["p"])
        )
        module = spnn.Conv3d(
            layer["i"],
            layer["o"],
            size,
            stride,
            padding,
            1,
            layer["bias"],
            layer["transposed"],
            layer["generative"],
        )
        with torch.no_grad():
            module.kernel.copy_(torch.from_numpy(kernel).reshape(module.kernel.shape))
            if module.bias is not None:
                module.bias.copy_(torch.from_numpy(bias))
        modules.append(module)
    return torch.nn.Sequential(*modules).train()


def probe(coords: Tensor, channels: int) -> Tensor:
    """Weights of the loss: a wave over (b, x, y, z) and channels, whatever the row order."""
    wave = torch.tensor([0.3, 0.7, 1.1, 1.7], dtype=torch.float64, device=coords.device)
    phase = 0.9 * torch.arange(channels, dtype=torch.float64, device=coords.device)
    return torch.sin((coords.double() @ wave)[:, None] + phase).float()


def configure(case: Case, by_setters: bool) -> None:
    """The case's modes, by the setters alone or also by a global configuration."""
    F.set_conv_mode(case["conv_mode"])
    F.set_kmap_mode(case["kmap_mode"])
    F.set_downsample_mode(case["downsample"])
    torchsparse.tensor.set_allow_negative_coordinates(case["negative"])
    if not by_setters:
        config = F.conv_config.get_default_conv_config(conv_mode=F.get_conv_mode())
        sort, splits = {0: (False, 1), 1: (True, 1), 2: (True, 3)}[case["conv_mode"]]
        config["ifsort"], config["split_mask_num"] = sort, splits
        config["kmap_mode"], config["downsample_mode"] = case["kmap_mode"], case["downsample"]
        F.set_global_conv_config(config)


@pytest.mark.parametrize("by_setters", [False, True], ids=["global-config", "setters"])
@pytest.mark.parametrize("index", range(len(CHAINS)), ids=lambda i: CHAINS[i]["name"])
def test_chain(index: int, by_setters: bool, device: torch.device) -> None:
    case = CHAINS[index]
    configure(case, by_setters)
    coords, feats, kernels, biases = chain_arrays(case)
    model = chain_modules(case, kernels, biases).to(device)
    leaf = torch.from_numpy(feats).to(device).requires_grad_()
    room = (case["batch"], *(case["extent"],) * 3) if case["ranged"] else None
    y = model(SparseTensor(leaf, torch.from_numpy(coords).to(device), 1, room))
    (y.feats * probe(y.coords, y.feats.shape[1])).sum().backward()

    got = {"coords": y.coords, "feats": y.feats, "grad_input": leaf.grad}
    got |= {f"grad_kernel_{j}": module.kernel.grad for j, module in enumerate(model)}
    arrays = {name: value.detach().cpu().numpy() for name, value in got.items()}
    order = by_coordinate(arrays["coords"])
    arrays["coords"], arrays["feats"] = arrays["coords"][order], arrays["feats"][order]
    arrays["stride"] = np.array(y.stride)
    with np.load(GOLDEN / "golden.npz") as recorded:
        want = {
            name.partition("/")[2]: recorded[name]
            for name in recorded.files
            if name.startswith(f"{index}/")
        }
    assert set(want) == set(arrays)
    np.testing.assert_array_equal(arrays["coords"], want["coords"])
    np.testing.assert_array_equal(arrays["stride"], want["stride"])
    for name in set(want) - {"coords", "stride"}:
        assert_near(name, arrays[name], want[name], CHAIN)


@pytest.mark.parametrize("index", range(len(CHAINS)), ids=lambda i: CHAINS[i]["name"])
def test_the_search_reproduces_the_recording(index: int) -> None:
    """The oracle of the other tests is itself judged by v2.1."""
    case = CHAINS[index]
    coords, feats, kernels, biases = chain_arrays(case)
    room = (case["batch"], *(case["extent"],) * 3) if case["ranged"] else None
    stride: Triple = (1, 1, 1)
    levels: dict[Triple, Array] = {stride: coords}
    for spec, kernel, bias in zip(case["layers"], kernels, biases):
        k, s, p = (triple(spec[name]) for name in "ksp")
        layer = Layer.of(
            k,
            s,
            module_padding(k, s, p, (1, 1, 1)),
            transposed=spec["transposed"],
            minkowski=case["downsample"] == "minkowski",
            allow_negative=case["negative"],
        )
        stride = output_stride(stride, layer)
        relation = relate(coords, layer, room, fine=levels.get(stride))
        feats = convolve(feats, kernel, relation, bias if spec["bias"] else None)
        coords, room = relation.coords, relation.spatial_range
        levels.setdefault(stride, coords)
    order = by_coordinate(coords)
    with np.load(GOLDEN / "golden.npz") as recorded:
        np.testing.assert_array_equal(coords[order], recorded[f"{index}/coords"])
        np.testing.assert_array_equal(stride, recorded[f"{index}/stride"])
        assert_near("feats", feats[order], recorded[f"{index}/feats"], CHAIN)


# The functional API on fixed inputs.


class Inputs:
    """The recorder's inputs: one generator, read in this order."""

    def __init__(self, device: torch.device) -> None:
        def on(array: Array) -> Tensor:
            return torch.from_numpy(array).to(device)

        rng = np.random.default_rng(3)
        rows = np.concatenate([rng.integers(0, 2, (500, 1)), rng.integers(0, 14, (500, 3))], 1)
        self.coords = on(np.unique(rows, axis=0).astype(np.int32))
        rows = np.concatenate([rng.integers(0, 2, (300, 1)), rng.integers(-1, 16, (300, 3))], 1)
        self.queries = on(rows.astype(np.int32))
        self.points = on(rng.uniform(0, 13.5, (400, 3)).astype(np.float32))
        n = len(self.coords)
        self.voxel_feats = on(rng.normal(0, 1, (n, 9)).astype(np.float32)).requires_grad_()
        self.index = on(rng.integers(0, 50, 400).astype(np.int32))
        self.point_feats = on(rng.normal(0, 1, (400, 9)).astype(np.float32)).requires_grad_()
        self.dense_feats = on(rng.normal(0, 1, (n, 5)).astype(np.float32)).requires_grad_()
        sample = torch.zeros(400, 1, dtype=torch.int32, device=device)
        self.corners = torch.cat([sample, self.points.floor().int()], 1)
        self.eight = get_kernel_offsets(2, 1, 1, device=str(device))


Entries = dict[str, Tensor | Array | None]


def offsets(device: torch.device) -> Entries:
    sizes: list[int | Triple] = [1, 2, 3, (3, 1, 2)]
    return {
        f"get_kernel_offsets/{k}": get_kernel_offsets(k, 1, 1, device=str(device)) for k in sizes
    }


def hashes(device: torch.device) -> Entries:
    given = Inputs(device)
    hashed = F.sphash(given.coords)
    return {
        "sphash": hashed,
        "sphash_offsets": F.sphash(given.coords, given.eight),
        "sphashquery": F.sphashquery(F.sphash(given.queries), hashed),
    }


def interpolation(device: torch.device) -> Entries:
    given = Inputs(device)
    found = F.sphashquery(F.sphash(given.corners, given.eight), F.sphash(given.coords))
    rows = found.t().contiguous()
    shares = F.calc_ti_weights(given.points, rows, scale=1)
    out = F.spdevoxelize(given.voxel_feats, rows.int(), shares)
    out.square().sum().backward()
    return {
        "devox_index": rows,
        "calc_ti_weights": shares,
        "spdevoxelize": out,
        "spdevoxelize_grad": given.voxel_feats.grad,
    }


def voxels(device: torch.device) -> Entries:
    given = Inputs(device)
    counts = F.spcount(given.index, 50)
    out = F.spvoxelize(given.point_feats, given.index, counts)
    out.square().sum().backward()
    return {"spcount": counts, "spvoxelize": out, "spvoxelize_grad": given.point_feats.grad}


def densified(device: torch.device) -> Entries:
    given = Inputs(device)
    out = to_dense(given.dense_feats, given.coords, (2, 14, 14, 14))
    out.square().sum().backward()
    return {"to_dense": out, "to_dense_grad": given.dense_feats.grad}


def table(device: torch.device) -> Entries:
    import torchsparse.backend

    coords = Inputs(device).coords[:, [1, 2, 3, 0]].contiguous()
    n = len(coords)
    keys = torch.zeros(2 * n, dtype=torch.int64, device=device)
    vals = torch.zeros(2 * n, dtype=torch.int32, device=device)
    hashed = torchsparse.backend.GPUHashTable(keys, vals)
    hashed.insert_coords(coords)
    out: Entries = {}
    for k in (1, 2, 3):
        size = torch.full((3,), k, dtype=torch.int32, device=device)
        stride = torch.ones(3, dtype=torch.int32, device=device)
        out[f"lookup_coords/{k}"] = hashed.lookup_coords(coords, size, stride, k**3)[:n]
    return out


# Networks on a synthetic street.


def fixed_weights(model: torch.nn.Module) -> None:
    """Weights by name in sorted order from one generator; kernels keep the signal alive."""
    rng = np.random.default_rng(11)
    state = model.state_dict()
    for name in sorted(state):
        shape = state[name].shape
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            values = rng.normal(0, 0.1, shape)
        elif name.endswith("kernel"):
            values = rng.normal(0, 1, shape) * np.sqrt(6.0 / int(np.prod(shape[:-1])))
        elif name.endswith("weight") and len(shape) == 2:
            values = rng.normal(0, 1, shape) / np.sqrt(shape[1])
        elif name.endswith("weight"):
            values = rng.uniform(0.8, 1.2, shape)
        else:
            values = rng.normal(0, 0.05, shape)
        state[name] = torch.from_numpy(np.asarray(values, np.float32)).to(state[name].device)
    model.load_state_dict(state)


def network(backbone: type[torch.nn.Module], training: bool, device: torch.device) -> Entries:
    with np.load(GOLDEN / "street.npz") as street:
        coords = torch.from_numpy(street["coords"]).int().to(device)
        feats = torch.from_numpy(street["feats"]).float().to(device)
    feats = ((feats - feats.mean(0)) / feats.std(0)).requires_grad_(training)
    model = backbone(in_channels=feats.shape[1], width_multiplier=0.5).to(device)
    fixed_weights(model)
    outputs = model.train(training)(SparseTensor(feats, coords))
    last = outputs[-1]
    if training:
        last.F.square().mean().backward()
    mix = np.random.default_rng(5).normal(0, 1, (last.F.shape[1], 3)).astype(np.float32)
    order = by_coordinate(last.C.cpu().numpy())
    key = f"{backbone.__name__}/{'train' if training else 'eval'}"
    return {
        f"{key}/coords": last.C.cpu().numpy()[order],
        f"{key}/feats": (last.F @ torch.from_numpy(mix).to(device)).detach().cpu().numpy()[order],
        f"{key}/levels": np.array([len(level.C) for level in outputs]),
        f"{key}/grad_input": feats.grad,
    }


def producer(entry: str) -> Callable[[torch.device], Entries]:
    """The function that computes an entry of the recording."""
    head, _, rest = entry.partition("/")
    backbones = {"SparseResUNet42": SparseResUNet42, "SparseResNet21D": SparseResNet21D}
    if head in backbones:
        training = rest.startswith("train")
        return lambda device: network(backbones[head], training, device)
    for part, names in (
        (offsets, ("get_kernel_offsets",)),
        (hashes, ("sphash", "sphash_offsets", "sphashquery")),
        (interpolation, ("devox_index", "calc_ti_weights", "spdevoxelize", "spdevoxelize_grad")),
        (voxels, ("spcount", "spvoxelize", "spvoxelize_grad")),
        (densified, ("to_dense", "to_dense_grad")),
        (table, ("lookup_coords",)),
    ):
        if head in names:
            return part
    raise KeyError(entry)


def group(entry: str) -> str:
    """Entries of one group come from one computation."""
    parts = entry.partition("@")[0].split("/")
    return "/".join(parts[:2]) if "Res" in parts[0] else producer(entry).__name__


@pytest.fixture(scope="module")
def compute(device: torch.device) -> Callable[[str], Entries]:
    """Each part is computed once, when the first of its entries asks for it."""

    @cache
    def once(name: str) -> Entries:
        reset_global_state()
        torchsparse.backends.allow_tf32 = False
        entry = next(e for e in ENTRIES if group(e) == name)
        return producer(entry)(device)

    return lambda entry: once(group(entry))


@pytest.mark.parametrize("entry", ENTRIES)
def test_recorded_entry(entry: str, compute: Callable[[str], Entries]) -> None:
    """NAME@8 in the recording holds every eighth row."""
    name, _, step = entry.partition("@")
    got = compute(entry)[name]
    got = got.detach().cpu().numpy() if torch.is_tensor(got) else got
    assert got is not None, "no gradient arrived"
    got = got[:: int(step or 1)]
    with np.load(GOLDEN / "networks_street.npz") as recorded:
        want = recorded[entry]
    assert got.shape == want.shape
    if want.dtype.kind in "iu":
        assert got.dtype.kind in "iu"
        np.testing.assert_array_equal(got, want)
        return
    difference = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)
    if "/train/" not in name or difference > NETWORK_NORM:
        assert_near(name, got, want, NETWORK)
