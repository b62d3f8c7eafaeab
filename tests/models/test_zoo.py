"""The model library: sizes by hand, checkpoint names, and what every network must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import clouds
from torchsparse import PointTensor, SparseTensor, cat
from torchsparse import nn as spnn
from torchsparse.checkpoints import convert
from torchsparse.models import (
    ENCODERS,
    MINKOWSKI_NAMES,
    MINKUNETS,
    RESNETS,
    SPVCNN,
    SPVNAS_NAMES,
    MinkResUNet,
    MinkUNet,
    ResNetClassifier,
    SparseEncoder,
    UNetDesign,
)
from torchsparse.nn import functional as F

ROOM = (3, 13, 14, 25)  # the fewest cells along z that an encoder takes


def cloud(name: str, channels: int = 3, seed: int = 0, ranged: bool = False) -> SparseTensor:
    coords = torch.from_numpy(clouds.CLOUDS[name]())
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(len(coords), channels, generator=generator)
    return SparseTensor(feats, coords, 1, ROOM if ranged else None)


def permuted(x: SparseTensor, order: Tensor) -> SparseTensor:
    return SparseTensor(x.feats[order], x.coords[order], x.stride, x.spatial_range)


SMALL = {
    "basic": UNetDesign("basic", (1, 1, 1, 2, 1, 1, 2, 1), (4, 6, 8, 6, 8, 4, 4, 6), stem=4),
    "bottleneck": UNetDesign("bottleneck", (1,) * 8, (2, 2, 3, 2, 3, 2, 2, 2), stem=4),
}
# Networks that are small enough for every test; each gives scores per voxel, or per sample.
BUILD: dict[str, Callable[[], nn.Module]] = {
    "unet-basic": lambda: MinkResUNet(3, 5, SMALL["basic"]),
    "unet-bottleneck": lambda: MinkResUNet(3, 5, SMALL["bottleneck"]),
    "spvcnn": lambda: SPVCNN(
        3, 5, voxel_size=1.5, stem=4, encoder=(6, 8), decoder=(8, 6), depth=1, dropout=0.0
    ),
    "spvcnn-1": lambda: SPVCNN(3, 5, stem=4, encoder=(6,), decoder=(6,), depth=1, dropout=0.0),
    "resnet": lambda: ResNetClassifier(3, 5, layers=(1, 2), stem=4, planes=(6, 8)),
    "resnet-max": lambda: ResNetClassifier(
        3, 5, block="bottleneck", layers=(1, 1), stem=4, planes=(2, 3), pool="max"
    ),
}
PER_SAMPLE = {"resnet", "resnet-max"}
each_model = pytest.mark.parametrize("name", BUILD)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILD[name]()


# What every network must do.


@each_model
@pytest.mark.parametrize("cloud_name", ["empty", "single", "origin", "odd", "batch_gap"])
def test_every_row_gets_its_scores(name: str, cloud_name: str) -> None:
    x = cloud(cloud_name)
    samples = int(x.coords[:, 0].max()) + 1 if len(x.coords) else 0
    scores = built(name).eval()(x)
    assert scores.shape == (samples if name in PER_SAMPLE else len(x.coords), 5)
    assert scores.isfinite().all()


@each_model
def test_rows_may_come_in_any_order(name: str) -> None:
    x, model = cloud("batch_gap"), built(name).eval()
    order = torch.randperm(len(x.coords), generator=torch.Generator().manual_seed(1))
    straight, mixed = model(x), model(permuted(x, order))
    want = straight if name in PER_SAMPLE else straight[order]
    torch.testing.assert_close(mixed, want)


@each_model
def test_samples_of_a_batch_do_not_see_each_other(name: str) -> None:
    """Also where one reaches further than the other: no voxel is lost at the border."""
    x, model = cloud("batch_gap"), built(name).eval()
    together = model(x)
    for sample in (0, 2):
        rows = x.coords[:, 0] == sample
        alone = model(permuted(x, rows.nonzero()[:, 0]))
        if name in PER_SAMPLE:
            torch.testing.assert_close(alone[sample], together[sample])
        elif not name.startswith("spvcnn"):  # its U-Net has TorchSparse's border rule
            torch.testing.assert_close(alone, together[rows])


@each_model
def test_every_weight_gets_a_gradient(name: str) -> None:
    model, x = built(name), cloud("batch_gap")
    x.feats.requires_grad_()
    scores = model(x)
    (scores * torch.arange(scores.numel()).view_as(scores)).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert x.feats.grad is not None and x.feats.grad.abs().sum(1).min() > 0


@each_model
def test_a_few_steps_of_training_help(name: str) -> None:
    x, model = cloud("batch_gap"), built(name)
    rows = 3 if name in PER_SAMPLE else len(x.coords)
    labels = torch.arange(rows) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@each_model
def test_weights_travel(name: str) -> None:
    model, x = built(name).eval(), cloud("odd")
    other = BUILD[name]().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


# Sizes.


def conv(taps: int, c_in: int, c_out: int) -> int:
    """A convolution and its batch norm."""
    return taps * c_in * c_out + 2 * c_out


def basic(c_in: int, c_out: int) -> int:
    shortcut = conv(1, c_in, c_out) if c_in != c_out else 0
    return conv(27, c_in, c_out) + conv(27, c_out, c_out) + shortcut


def bottleneck(c_in: int, c: int) -> int:
    shortcut = conv(1, c_in, 4 * c) if c_in != 4 * c else 0
    return conv(1, c_in, c) + conv(27, c, c) + conv(1, c, 4 * c) + shortcut


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_size_of_14a() -> None:
    """Stage by stage, from the drawing."""
    want = conv(125, 3, 32)
    want += conv(8, 32, 32) + basic(32, 32)
    want += conv(8, 32, 32) + basic(32, 64)
    want += conv(8, 64, 64) + basic(64, 128)
    want += conv(8, 128, 128) + basic(128, 256)
    want += conv(8, 256, 128) + basic(128 + 128, 128)
    want += conv(8, 128, 128) + basic(128 + 64, 128)
    want += conv(8, 128, 96) + basic(96 + 32, 96)
    want += conv(8, 96, 96) + basic(96 + 32, 96)
    want += 96 * 20 + 20
    assert size(MinkResUNet.named("14A", 3, 20)) == want == 8_024_500


def test_size_of_50() -> None:
    want = conv(125, 3, 32)
    want += conv(8, 32, 32) + bottleneck(32, 32) + bottleneck(128, 32)
    want += conv(8, 128, 128) + bottleneck(128, 64) + 2 * bottleneck(256, 64)
    want += conv(8, 256, 256) + bottleneck(256, 128) + 3 * bottleneck(512, 128)
    want += conv(8, 512, 512) + bottleneck(512, 256) + 5 * bottleneck(1024, 256)
    want += conv(8, 1024, 256) + bottleneck(256 + 512, 256) + bottleneck(1024, 256)
    want += conv(8, 1024, 128) + bottleneck(128 + 256, 128) + bottleneck(512, 128)
    want += conv(8, 512, 96) + bottleneck(96 + 128, 96) + bottleneck(384, 96)
    want += conv(8, 384, 96) + bottleneck(96 + 32, 96) + bottleneck(384, 96)
    want += 384 * 20 + 20
    assert size(MinkResUNet.named("50", 3, 20)) == want


def test_sizes_that_papers_print() -> None:
    """Millions, as printed: MinkUNet34C 37.9, MinkUNet42 21.7 and SPVCNN 21.8."""
    assert f"{size(MinkResUNet.named('34C', 3, 20)) / 1e6:.1f}" == "37.9"
    assert f"{size(MinkUNet(4, 19)) / 1e6:.1f}" == "21.7"
    assert f"{size(SPVCNN(4, 19)) / 1e6:.1f}" == "21.8"


def test_size_of_spvcnn() -> None:
    """The U-Net, and three linear layers with bias and norm."""
    links = (32 * 256 + 3 * 256) + (256 * 128 + 3 * 128) + (128 * 96 + 3 * 96)
    assert size(SPVCNN(4, 19)) == size(MinkUNet(4, 19)) + links


def test_sizes_of_the_encoders() -> None:
    second = conv(27, 5, 16) + conv(27, 16, 16)
    second += conv(27, 16, 32) + 2 * conv(27, 32, 32)
    second += conv(27, 32, 64) + 2 * conv(27, 64, 64)
    second += conv(27, 64, 64) + 2 * conv(27, 64, 64) + conv(3, 64, 128)
    assert size(SparseEncoder.named("second", 5)) == second
    centerpoint = conv(27, 5, 16) + 2 * basic(16, 16)
    centerpoint += conv(27, 16, 32) + 2 * basic(32, 32)
    centerpoint += conv(27, 32, 64) + 2 * basic(64, 64)
    centerpoint += conv(27, 64, 128) + 2 * basic(128, 128) + conv(3, 128, 128)
    assert size(SparseEncoder.named("centerpoint", 5)) == centerpoint


def test_sizes_of_the_classifiers() -> None:
    want = conv(27, 3, 64)
    want += conv(8, 64, 64) + 2 * basic(64, 64)
    want += conv(8, 64, 64) + basic(64, 128) + basic(128, 128)
    want += conv(8, 128, 128) + basic(128, 256) + basic(256, 256)
    want += conv(8, 256, 256) + basic(256, 512) + basic(512, 512)
    assert size(ResNetClassifier.named("18", 3, 40)) == want + 512 * 40 + 40


def test_depths_count_their_layers() -> None:
    """The number in a name: convolutions on the longest way, less shortcuts; U-Nets: of the
    encoder of a residual network (two per basic block, three per bottleneck, two more)."""
    for name, (block, layers) in RESNETS.items():
        per_block = {"basic": 2, "bottleneck": 3}[block]
        assert sum(layers) * per_block + 2 == {"14": 10}.get(name, int(name))
    for name, design in MINKUNETS.items():
        assert len(design.layers) == len(design.planes) == 8, name
        block, layers = design.block, design.layers
        assert (block, sum(layers)) == {
            "14": ("basic", 8), "18": ("basic", 16), "34": ("basic", 23),
            "50": ("bottleneck", 23), "101": ("bottleneck", 40),
        }[name.rstrip("ABCD")]  # fmt: skip


# Checkpoints of the originals.


def minkowski_state(name: str) -> dict[str, Tensor]:
    """Names and shapes as MinkowskiEngine's examples make them, random values."""
    design = MINKUNETS[name]
    e = {"basic": 1, "bottleneck": 4}[design.block]
    state: dict[str, Tensor] = {}

    def convolution(where: str, norm: str, taps: int, a: int, b: int) -> None:
        state[f"{where}.kernel"] = torch.rand((taps, a, b) if taps > 1 else (a, b))
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.bn.{part}"] = torch.rand(b)
        state[f"{norm}.bn.num_batches_tracked"] = torch.tensor(3)

    def stage(where: str, a: int, width: int, count: int) -> int:
        sizes = [27, 27] if e == 1 else [1, 27, 1]
        for i in range(count):
            ends = [a, *[width] * (len(sizes) - 1), width * e]
            for n, taps in enumerate(sizes):
                block = f"{where}.{i}"
                convolution(
                    f"{block}.conv{n + 1}", f"{block}.norm{n + 1}", taps, ends[n], ends[n + 1]
                )
            if a != width * e:
                convolution(
                    f"{where}.{i}.downsample.0", f"{where}.{i}.downsample.1", 1, a, width * e
                )
            a = width * e
        return a

    convolution("conv0p1s1", "bn0", 125, 3, 32)
    c, skips = 32, [32]
    for j in range(4):
        convolution(f"conv{j + 1}p{2**j}s2", f"bn{j + 1}", 8, c, c)
        c = stage(f"block{j + 1}", c, design.planes[j], design.layers[j])
        skips.append(c)
    skips.pop()
    for j in range(4, 8):
        width = design.planes[j]
        convolution(f"convtr{j}p{2 ** (8 - j)}s2", f"bntr{j}", 8, c, width)
        c = stage(f"block{j + 1}", width + skips.pop(), width, design.layers[j])
    state["final.kernel"], state["final.bias"] = torch.rand(c, 20), torch.rand(1, 20)
    return state


@pytest.mark.parametrize("name", ["14A", "34C", "50"])
def test_weights_of_minkowski_engine_load(name: str) -> None:
    model = MinkResUNet.named(name, 3, 20)
    state = minkowski_state(name)
    model.load_state_dict(convert(state, "minkowski", names=MINKOWSKI_NAMES))
    ours = model.state_dict()
    assert len(ours) == len(state)
    places = {
        "conv0p1s1.kernel": "stem.0.kernel",
        "bn4.bn.running_var": "encoders.3.0.1.running_var",
        "block2.0.conv2.kernel": "encoders.1.1.0.main.3.kernel",
        "block2.0.downsample.1.bn.weight": "encoders.1.1.0.shortcut.1.weight",
        "bntr5.bn.bias": "upsamples.1.1.bias",
        "block8.0.norm2.bn.weight": "fuses.3.0.main.4.weight",
        "final.kernel": "classifier.kernel",
    }
    for theirs, mine in places.items():
        assert torch.equal(ours[mine], state[theirs]), theirs
    assert torch.equal(ours["classifier.bias"], state["final.bias"][0])
    # Even kernels list their taps the other way round.
    taps = state["convtr4p16s2.kernel"].unflatten(0, (2, 2, 2)).permute(2, 1, 0, 3, 4)
    assert torch.equal(ours["upsamples.0.0.kernel"], taps.flatten(0, 2))


def spvnas_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    widths = [32, 32, 64, 128, 256, 256, 128, 96, 96]

    def norm(where: str, c: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{where}.{part}"] = torch.rand(c)
        state[f"{where}.num_batches_tracked"] = torch.tensor(3)

    def convolution(where: str, at: int, taps: int, a: int, b: int) -> None:
        state[f"{where}.{at}.kernel"] = torch.rand((taps, a, b) if taps > 1 else (a, b))
        norm(f"{where}.{at + 1}", b)

    def residual(where: str, a: int, b: int) -> None:
        convolution(f"{where}.net", 0, 27, a, b)
        convolution(f"{where}.net", 3, 27, b, b)
        if a != b:
            convolution(f"{where}.downsample", 0, 1, a, b)

    convolution("stem", 0, 27, 4, 32)
    convolution("stem", 3, 27, 32, 32)
    for j in range(1, 5):
        convolution(f"stage{j}.0.net", 0, 8, widths[j - 1], widths[j - 1])
        residual(f"stage{j}.1", widths[j - 1], widths[j])
        residual(f"stage{j}.2", widths[j], widths[j])
    for j in range(1, 5):
        convolution(f"up{j}.0.net", 0, 8, widths[j + 3], widths[j + 4])
        residual(f"up{j}.1.0", widths[j + 4] + widths[4 - j], widths[j + 4])
        residual(f"up{j}.1.1", widths[j + 4], widths[j + 4])
    for n, (a, b) in enumerate(((0, 4), (4, 6), (6, 8))):
        state[f"point_transforms.{n}.0.weight"] = torch.rand(widths[b], widths[a])
        state[f"point_transforms.{n}.0.bias"] = torch.rand(widths[b])
        norm(f"point_transforms.{n}.1", widths[b])
    state["classifier.0.weight"], state["classifier.0.bias"] = torch.rand(19, 96), torch.rand(19)
    return state


def test_weights_of_spvnas_load() -> None:
    model, state = SPVCNN(4, 19), spvnas_state()
    model.load_state_dict(convert(state, "torchsparse1.4", names=SPVNAS_NAMES))
    ours = model.state_dict()
    assert len(ours) == len(state)
    places = {
        "stem.3.kernel": "stem.1.0.kernel",
        "stage1.0.net.0.kernel": "encoders.0.0.0.kernel",
        "stage4.2.net.3.kernel": "encoders.3.1.1.main.3.kernel",
        "up1.1.0.downsample.0.kernel": "fuses.0.0.shortcut.0.kernel",
        "up4.0.net.1.bias": "upsamples.3.1.bias",
        "classifier.0.weight": "classifier.weight",
    }
    for theirs, mine in places.items():
        assert torch.equal(ours[mine], state[theirs]), theirs


def test_a_unet_starts_a_point_voxel_network() -> None:
    unet = MinkUNet(3, 5, stem=4, encoder=(6,), decoder=(6,), depth=1)
    both = built("spvcnn-1")
    own = [name for name in both.state_dict() if not name.startswith("point_transforms.")]
    assert own == list(unet.state_dict())


# Points and voxels.


def test_points_of_one_voxel_differ_by_where_they_lie() -> None:
    model = built("spvcnn").eval()
    feats = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 1.0, 1.0]])
    inside = [[1.6, 1.6, 1.6], [2.9, 2.9, 2.9], [1.6, 1.6, 1.6], [3.1, 3.1, 3.1]]
    positions = torch.nn.functional.pad(torch.tensor(inside), (1, 0))
    x = PointTensor(feats, positions)
    scores = model(x)
    assert scores.shape == (4, 5) and not torch.allclose(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])  # what they carry is shared
    assert x.F is feats and x.C is positions and x.idx_query == {}  # as it was


def test_points_and_voxels_meet_where_the_drawing_says() -> None:
    """Two levels, written out."""
    net: Any = built("spvcnn").eval()
    x = cloud("batch_gap")
    z = PointTensor(x.feats, x.coords.float())
    v0 = net.stem(F.initial_voxelize(z, 1, 1.5))
    z0 = F.voxel_to_point(v0, z)
    v1 = net.encoders[0](F.point_to_voxel(v0, z0))
    v2 = net.encoders[1](v1)

    def meet(voxels: SparseTensor, points: PointTensor, station: int) -> PointTensor:
        found = F.voxel_to_point(voxels, points)
        return PointTensor(found.F + net.point_transforms[station](points.F), z.C)

    z1 = meet(v2, z0, 0)
    up = net.upsamples[0](F.point_to_voxel(v2, z1))
    u1 = net.fuses[0](cat([up, v1]))
    z2 = meet(u1, z1, 1)
    up = net.upsamples[1](F.point_to_voxel(u1, z2))
    z3 = meet(net.fuses[1](cat([up, v0])), z2, 2)
    torch.testing.assert_close(net(x), net.classifier(z3.F))


def test_dropout_is_where_points_hand_back() -> None:
    torch.manual_seed(0)
    net = SPVCNN(3, 5, stem=4, encoder=(6, 8), decoder=(8, 6), dropout=0.99)
    seen = []
    net.dropout.register_forward_hook(lambda m, i, o: seen.append((i[0].shape[1], o)))
    net(cloud("batch_gap"))
    assert [channels for channels, _ in seen] == [8, 8]
    assert all((out == 0).float().mean() > 0.9 for _, out in seen)


def test_the_voxel_size_is_the_scale_of_positions() -> None:
    torch.manual_seed(0)
    coarse, fine = (
        SPVCNN(3, 5, voxel_size=v, stem=4, encoder=(6,), decoder=(6,)) for v in (2, 0.5)
    )
    fine.load_state_dict(coarse.state_dict())
    x = cloud("batch_gap")
    scale = torch.tensor([1, 0.25, 0.25, 0.25])
    given = coarse.eval()(PointTensor(x.feats, x.coords.float()))
    scaled = fine.eval()(PointTensor(x.feats, x.coords * scale))
    torch.testing.assert_close(scaled, given)


# Encoders.


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_ends_in_a_map(name: str) -> None:
    """41 cells along z become 2, as in the papers; channels are c Z' + z."""
    torch.manual_seed(0)
    model = SparseEncoder.named(name, 4).eval()
    rng = torch.Generator().manual_seed(0)
    extent = torch.tensor([2, 33, 24, 41])
    coords = torch.unique((torch.rand(300, 4, generator=rng) * extent).int(), dim=0)
    x = SparseTensor(torch.randn(len(coords), 4, generator=rng), coords, 1, (2, 33, 24, 41))
    levels = model.features(x)
    assert [level.spatial_range for level in levels] == [
        (2, 33, 24, 41), (2, 17, 12, 21), (2, 9, 6, 11), (2, 5, 3, 5), (2, 5, 3, 2),
    ]  # fmt: skip
    bev = model(x)
    assert bev.shape == (2, 256, 5, 3)
    out, seen = levels[-1], torch.zeros(2, 256, 5, 3)
    for (b, i, j, k), row in zip(out.coords.tolist(), out.feats):
        seen[b, k::2, i, j] = row
    torch.testing.assert_close(bev, seen)
    assert bev.count_nonzero() > 100


def test_an_encoder_learns_and_has_its_norms() -> None:
    torch.manual_seed(0)
    model = SparseEncoder.named("centerpoint", 3, eps=0.01, momentum=0.2)
    norms = [m for m in model.modules() if isinstance(m, spnn.BatchNorm)]
    assert len(norms) == 1 + 3 + 16 + 1
    assert all((m.eps, m.momentum) == (0.01, 0.2) for m in norms)
    x = cloud("batch_gap", ranged=True)
    x.coords[:, 3] += 8
    bev = model(x)
    assert bev.shape == (3, 128, 2, 2)
    (bev * torch.arange(bev.numel()).view_as(bev)).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_an_encoder_of_no_voxels() -> None:
    assert SparseEncoder.named("second", 3).eval()(cloud("empty", ranged=True)).shape == (
        3,
        128,
        2,
        2,
    )


# Refusals.


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MinkResUNet.named("34D", 3, 5), "'34C', '50', '101', got '34D'"),
        (lambda: ResNetClassifier.named("19", 3, 5), "'14', '18', .* got '19'"),
        (lambda: SparseEncoder.named("voxelnet", 3), "'second', 'centerpoint', got 'voxelnet'"),
        (lambda: ResNetClassifier(3, 5, block="dense"), "'basic', 'bottleneck', got 'dense'"),
        (lambda: ResNetClassifier(3, 5, pool="sum"), "'avg', 'max', got 'sum'"),
        (lambda: ResNetClassifier(3, 5, layers=(1,)), r"got \[1\] and \[64, 128, 256, 512\]"),
        (lambda: ResNetClassifier(3, 5, layers=(), planes=()), "at least one, got"),
        (lambda: SPVCNN(3, 5, voxel_size=0), "`voxel_size` must be positive, got 0"),
        (lambda: SparseEncoder.named("second", 3)(cloud("odd")), "needs a tensor with a `spatial"),
    ],
)
def test_refusals(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_batch_size_of_a_classifier() -> None:
    model, x = built("resnet").eval(), cloud("batch_gap")
    scores = model(x, batch_size=4)
    torch.testing.assert_close(scores[:3], model(x))
    bias = model.head[1].bias  # pyright: ignore
    assert torch.equal(scores[1], bias) and torch.equal(scores[3], bias)
