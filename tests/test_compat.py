"""Programs written for versions 1.1 to 2.0: they run, and are told once what to write instead."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import torchsparse
from tests import clouds
from torchsparse import PointTensor, SparseTensor, compat
from torchsparse import nn as spnn
from torchsparse.nn import functional as F
from torchsparse.nn.utils import get_kernel_offsets
from torchsparse.utils import collate, helpers, make_ntuple, quantize
from torchsparse.utils.kernel_region import KernelRegion


@pytest.fixture(autouse=True)
def fresh_notes() -> Iterator[None]:
    compat.forget_notes()
    yield
    compat.forget_notes()


@contextmanager
def told(*uses: str) -> Iterator[None]:
    """Exactly these notes, in this order, each at a line of this file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert [str(w.message) for w in found] == [
        f"{use} is the form of versions before 2.1; write {compat.ADVICE[use]}" for use in uses
    ]
    assert all(w.category is DeprecationWarning and w.filename == __file__ for w in found)


def cloud(device: torch.device, channels: int = 4) -> SparseTensor:
    coords = torch.from_numpy(clouds.odd()).to(device)
    feats = torch.from_numpy(clouds.rng("feats").normal(size=(len(coords), channels)))
    return SparseTensor(feats.to(device), coords)


# ------------------------------------------------------------------ modules
@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("sparse_tensor", "SparseTensor", SparseTensor),
        ("point_tensor", "PointTensor", PointTensor),
    ],
)
def test_former_modules_hand_out_the_class(path: str, name: str, kind: type) -> None:
    with told():
        former = importlib.import_module(f"torchsparse.{path}")
    with told(f"torchsparse.{path}"):
        assert getattr(former, name) is kind
        assert getattr(former, name) is kind
    assert former.__all__ == [name] and name in dir(former) and former.__doc__
    with pytest.raises(AttributeError, match=rf"'torchsparse.{path}' has no attribute 'cat'"):
        _ = former.cat


def test_from_imports_note_the_line_that_imports() -> None:
    with told("torchsparse.point_tensor", "torchsparse.sparse_tensor"):
        from torchsparse.point_tensor import PointTensor as P
        from torchsparse.sparse_tensor import SparseTensor as S
    assert (S, P) == (SparseTensor, PointTensor)


def test_objects_pickled_by_the_old_path_load(device) -> None:
    path = pickle.dumps(SparseTensor, 0).replace(
        b"torchsparse.tensor", b"torchsparse.sparse_tensor"
    )
    with told("torchsparse.sparse_tensor"):
        assert pickle.loads(path) is SparseTensor


def test_importing_the_former_modules_says_nothing() -> None:
    """Also where warnings are errors: whoever walks over all modules is not meant."""
    code = """
import torchsparse, torchsparse.sparse_tensor, torchsparse.point_tensor
import torchsparse.utils.helpers, torchsparse.utils.kernel_region
from torchsparse.utils import *
torchsparse.utils.quantize.sparse_quantize, torchsparse.utils.collate.sparse_collate
"""
    command = [sys.executable, "-W", "error::DeprecationWarning:torchsparse", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "DeprecationWarning" not in found.stderr


# ------------------------------------------------------------------ utils
ON_UTILS = {
    "sparse_collate": collate.sparse_collate,
    "sparse_collate_fn": collate.sparse_collate_fn,
    "sparse_quantize": quantize.sparse_quantize,
}
IN_HELPERS = {**ON_UTILS, "make_tuple": make_ntuple, "ravel_hash_vec": quantize.ravel_hash}


@pytest.mark.parametrize(
    ("place", "name", "now"),
    [
        *((torchsparse.utils, name, now) for name, now in ON_UTILS.items()),
        *((helpers, name, now) for name, now in IN_HELPERS.items()),
    ],
)
def test_functions_are_found_where_they_were(place: Any, name: str, now: Any) -> None:
    with told(f"{place.__name__}.{name}"):
        assert getattr(place, name) is now
        assert getattr(place, name) is now
    with told():
        assert name in dir(place) and "collate" in dir(place)
        with pytest.raises(AttributeError, match=rf"'{place.__name__}' has no attribute 'x'"):
            _ = place.x


def test_imports_of_functions_note_the_line_that_imports() -> None:
    with told("torchsparse.utils.sparse_quantize", "torchsparse.utils.helpers.make_tuple"):
        from torchsparse.utils import sparse_quantize
        from torchsparse.utils.helpers import make_tuple
    assert (sparse_quantize, make_tuple) == (quantize.sparse_quantize, make_ntuple)
    with told(), pytest.raises(ImportError, match="nothing"):
        from torchsparse.utils import nothing  # pyright: ignore  # noqa: F401


def test_functions_that_lay_on_utils_come_out_of_pickles() -> None:
    with told("torchsparse.utils.sparse_collate"):
        assert pickle.loads(b"ctorchsparse.utils\nsparse_collate\n.") is collate.sparse_collate


def test_the_places_of_today_say_nothing() -> None:
    found: dict[str, Any] = {}
    with told():
        exec("from torchsparse.utils import *", found)
        from torchsparse.utils.collate import sparse_collate
        from torchsparse.utils.quantize import sparse_quantize

        assert pickle.loads(pickle.dumps(sparse_quantize)) is sparse_quantize
        assert torchsparse.utils.collate.sparse_collate is sparse_collate
        assert torchsparse.utils.quantize.sparse_quantize is sparse_quantize
        assert callable(torchsparse.utils.voxelize_points)
    assert not set(found) & set(ON_UTILS) and found["make_ntuple"] is make_ntuple


REGION = "torchsparse.utils.kernel_region.KernelRegion(...).get_kernel_offset()"


def test_kernel_regions_are_noted_where_they_are_made() -> None:
    with told(REGION):
        region = KernelRegion(3, 2)
        KernelRegion(2)
    assert torch.equal(region.get_kernel_offset(), get_kernel_offsets(3, 2))


# ------------------------------------------------------------------ attributes
ALIASES = {"cmaps": "cmaps", "coord_maps": "cmaps", "kmaps": "kmaps", "kernel_maps": "kmaps"}


@pytest.mark.parametrize("old", ALIASES)
def test_old_attributes_are_those_of_the_cache(old: str, device) -> None:
    x, y = cloud(device), cloud(device)
    with told(f"SparseTensor.{old}"):
        assert getattr(x, old) is getattr(x._caches, ALIASES[old])
        setattr(y, old, getattr(x, old))
        assert getattr(y._caches, ALIASES[old]) is getattr(x._caches, ALIASES[old])
    compat.forget_notes()
    with told(f"SparseTensor.{old}"):
        setattr(x, old, {})
    assert getattr(x._caches, ALIASES[old]) == {}


def test_sharing_maps_in_the_old_way_shares_them(device) -> None:
    """As `fapply` of version 1.4 did: a map is built once for both tensors."""
    x = cloud(device)
    y = SparseTensor(2 * x.feats, x.coords, x.stride)
    with told("SparseTensor.cmaps", "SparseTensor.kmaps"):
        y.cmaps = x.cmaps
        y.kmaps = x.kmaps
    conv = spnn.Conv3d(4, 4, 3).double().to(device)
    a = conv(x)
    before = len(x._caches.kmaps)
    torch.testing.assert_close(conv(y).feats, 2 * a.feats)
    assert before == len(x._caches.kmaps) > 0 and y._caches.kmaps is x._caches.kmaps


@pytest.mark.parametrize("name", ["cmaps", "coord_maps"])
def test_a_bare_coordinate_tensor_is_a_level(name: str, device) -> None:
    """A decoder that registers the fine level by hand, as point-voxel networks did."""
    x = cloud(device)
    low = spnn.Conv3d(4, 4, 2, 2).double().to(device)(x)
    alone = SparseTensor(low.feats, low.coords, low.stride)
    with told(f"SparseTensor.{name}"):
        getattr(alone, name)[(1, 1, 1)] = x.coords
    up = spnn.Conv3d(4, 4, 2, 2, transposed=True).double().to(device)
    torch.testing.assert_close(up(alone).feats, up(low).feats)


def test_old_attributes_leave_copies_and_pickles_alone(device) -> None:
    x = cloud(device)
    with told():
        y = pickle.loads(pickle.dumps(x))
        z = copy.deepcopy(x)
        assert repr(x) and dir(x)
    assert set(vars(x)) == set(vars(y)) == set(vars(z))
    assert not set(vars(x)) & set(ALIASES)


def test_a_subclass_may_define_the_old_names_itself(device) -> None:
    class Mine(SparseTensor):
        cmaps: Any = None

    with told():
        x = cloud(device)
        mine = Mine(x.feats, x.coords)
        mine.cmaps = 3
    assert mine.cmaps == 3


# ------------------------------------------------------------------ Conv3d
CONV = "Conv3d(in, out, kernel_size, stride, dilation, bias, transposed)"


def described(conv: Any) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.bias is not None, conv.transposed


@pytest.mark.parametrize(
    ("old", "more", "new"),
    [
        ((3, 1, 1, False), {}, {}),
        ((3, 1, 1, True), {}, {"bias": True}),
        ((3, 1, 2, True), {}, {"dilation": 2, "bias": True}),
        ((3, 1, (1, 2, 3), False), {}, {"dilation": (1, 2, 3)}),
        ((2, 2, 1, False), {}, {"stride": 2}),
        ((2, 2, 1, False, True), {}, {"stride": 2, "transposed": True}),
        ((2, 2, 1, True, True), {}, {"stride": 2, "bias": True, "transposed": True}),
        ((2, 2, 1, True, False), {}, {"stride": 2, "bias": True}),
        ((2, 2, 1, False), {"transposed": True}, {"stride": 2, "transposed": True}),
        ((2, 2, 1, True), {"config": {}}, {"stride": 2, "bias": True}),
    ],
)
def test_conv3d_in_the_old_order(old: Any, more: Any, new: Any) -> None:
    with told(CONV):
        conv = spnn.Conv3d(4, 8, *old, **more)
        spnn.Conv3d(4, 8, *old, **more)
    assert described(conv) == described(spnn.Conv3d(4, 8, old[0], **new))


def test_subclasses_of_conv3d_are_noted_where_they_call() -> None:
    class Mine(spnn.Conv3d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, 1, 2, True)

    with told(CONV):
        assert Mine(4).dilation == (2, 2, 2)


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        ((2, 2, 1, 1, True), {}, ((2, 2, 2), (1, 1, 1), (1, 1, 1), True, False)),
        ((2, 2, 0, 1, False, True), {}, ((2, 2, 2), (0, 0, 0), (1, 1, 1), False, True)),
        ((3, 2, 1), {"bias": True}, ((2, 2, 2), (1, 1, 1), (1, 1, 1), True, False)),
        ((2, 2), {"transposed": True}, ((2, 2, 2), (0, 0, 0), (1, 1, 1), False, True)),
    ],
)
def test_the_order_of_v21_means_what_it_says(args: Any, kwargs: Any, want: Any) -> None:
    """A bool in the slot of the bias is a bias; an int in that of the padding a padding."""
    with told():
        assert described(spnn.Conv3d(4, 8, *args, **kwargs)) == want


def test_bools_that_no_version_understood_are_errors() -> None:
    with pytest.raises(TypeError, match="padding"):
        spnn.Conv3d(4, 8, 3, 1, True)
    with pytest.raises(TypeError, match="padding"):
        spnn.Conv3d(4, 8, 3, 1, True, True)
    for old in (True, False):  # no dilation was ever 0
        with pytest.raises(ValueError, match="dilation"):
            spnn.Conv3d(4, 8, 3, dilation=old)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------ conv3d
FUNCTION = "conv3d(input, weight, kernel_size, bias, stride, dilation, transposed)"


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_function_in_the_old_order(dilation: int, device) -> None:
    x = cloud(device)
    weight = torch.from_numpy(clouds.rng("weight").normal(size=(27, 4, 3))).to(device)
    bias = torch.ones(3, dtype=torch.float64, device=device)
    want = F.conv3d(x, weight, 3, bias, 2, dilation=dilation)
    with told(FUNCTION):
        got = F.conv3d(cloud(device), weight, 3, bias, 2, dilation, False)
        up = F.conv3d(want, weight.mT, 3, None, 2, dilation, True)
    assert torch.equal(got.coords, want.coords) and torch.equal(got.feats, want.feats)
    assert up.coords is x.coords
    back = F.conv3d(want, weight.mT, 3, None, 2, dilation=dilation, transposed=True)
    assert torch.equal(up.feats, back.feats)


def test_the_function_in_the_order_of_v21_is_silent(device) -> None:
    x = cloud(device)
    weight = torch.zeros(8, 4, 3, dtype=torch.float64, device=device)
    with told():
        F.conv3d(F.conv3d(x, weight, 2, None, 2, 0, 1, None, False), weight.new_zeros(1, 3, 1), 1)
    with pytest.raises(TypeError, match="padding"):
        F.conv3d(x, weight, 2, None, 2, True)
    with pytest.raises(ValueError, match="dilation"):
        F.conv3d(x, weight, 2, None, 2, 0, True)


# ------------------------------------------------------------------ shapes
CORNERS = "calc_ti_weights(coords, idx_query [8, N], scale)"
MATRIX = "a state dict with a kernel [C_in, C_out] of size 1 and a larger stride"


def test_weights_with_the_corners_first(device) -> None:
    """The note passes over PyTorch's `no_grad`, which wraps the function."""
    rng = clouds.rng("corners")
    points = torch.from_numpy(rng.uniform(0, 9, (21, 3))).to(device)
    rows = torch.from_numpy(rng.integers(-1, 3, (21, 8))).to(device)
    with told():
        want = F.calc_ti_weights(points, rows, 2)
        F.calc_ti_weights(points[:8], rows[:8].t())  # eight points are read as rows
    with told(CORNERS):
        old = F.calc_ti_weights(points, rows.t(), 2)
        F.calc_ti_weights(points, rows.t(), 2)
    assert torch.equal(old.transpose(0, 1), want)


def test_state_dicts_of_strided_pointwise_layers_load() -> None:
    """Versions before 2.1 kept them without their first axis."""
    conv = spnn.Conv3d(4, 8, 1, 2)
    net = torch.nn.Sequential(conv, spnn.Conv3d(8, 4, 1, 2))
    kernel = torch.arange(32.0).view(4, 8)
    with told(MATRIX):
        net.load_state_dict({"0.kernel": kernel, "1.kernel": kernel.view(8, 4)})
    assert conv.kernel.shape == (1, 4, 8) and torch.equal(conv.kernel[0], kernel)


def test_state_dicts_of_today_say_nothing() -> None:
    strided, plain = spnn.Conv3d(4, 8, 1, 2), spnn.Conv3d(4, 8, 1)
    with told():
        strided.load_state_dict(strided.state_dict())
        plain.load_state_dict(plain.state_dict())
        plain.load_state_dict(strided.state_dict())  # as MinkowskiEngine keeps them
    assert torch.equal(plain.kernel, strided.kernel[0])


# ------------------------------------------------------------------ notes
def test_a_note_made_an_error_is_given_again() -> None:
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            with pytest.raises(DeprecationWarning, match="dilation="):
                spnn.Conv3d(4, 8, 3, 1, 1, True)


def test_every_piece_of_advice_is_used_by_this_file() -> None:
    uses = {"torchsparse.sparse_tensor", "torchsparse.point_tensor", CONV, FUNCTION}
    uses |= {REGION, CORNERS, MATRIX} | {f"SparseTensor.{name}" for name in ALIASES}
    uses |= {f"torchsparse.utils.{name}" for name in ON_UTILS}
    uses |= {f"torchsparse.utils.helpers.{name}" for name in IN_HELPERS}
    assert set(compat.ADVICE) == uses


def test_root_offers_compat() -> None:
    assert torchsparse.compat is compat
