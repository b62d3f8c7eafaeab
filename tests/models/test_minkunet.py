from __future__ import annotations

import pytest
import torch

from torchsparse import SparseTensor
from torchsparse.backbones.modules.blocks import SparseResBlock
from torchsparse.models import MinkUNet


def cloud(rows: int, channels: int, samples: int = 2, seed: int = 0) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(samples * 12**3, generator=generator)[:rows]
    edge = torch.tensor([12**3, 144, 12, 1])
    coords = torch.div(cells[:, None], edge, rounding_mode="floor")
    coords[:, 1:] %= 12
    return SparseTensor(torch.randn(rows, channels, generator=generator), coords.int())


@pytest.mark.parametrize("rows", [1, 2, 301])
@pytest.mark.parametrize(
    "levels", [((8,), (6,)), ((8, 12), (10, 6)), ((8, 8, 8, 8, 8), (8, 8, 8, 8, 5))], ids=len
)
@pytest.mark.parametrize("depth", [1, 2])
def test_every_row_gets_its_scores(rows: int, levels, depth: int) -> None:
    encoder, decoder = levels
    model = MinkUNet(4, 7, stem=6, encoder=encoder, decoder=decoder, depth=depth).eval()
    assert model(cloud(rows, 4)).shape == (rows, 7)
    blocks = [m for m in model.modules() if isinstance(m, SparseResBlock)]
    assert len(blocks) == 2 * len(encoder) * depth


def test_no_points_give_no_scores() -> None:
    model = MinkUNet(4, 7, stem=6, encoder=(8, 8), decoder=(8, 6), depth=1).eval()
    empty = SparseTensor(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.int32))
    assert model(empty).shape == (0, 7)


def test_the_defaults_have_the_widths_of_the_benchmarks() -> None:
    model = MinkUNet(4, 19)
    assert model.classifier.weight.shape == (19, 96)
    convolutions = [m for m in model.modules() if hasattr(m, "kernel_size")]
    # 2 in the stem, 8 between levels, 2 in each of 16 blocks, 7 shortcuts of another width.
    assert len(convolutions) == 2 + 8 + 32 + 7


def test_rows_may_come_in_any_order() -> None:
    x = cloud(200, 3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    model = MinkUNet(3, 5, stem=4, encoder=(6, 8), decoder=(8, 6), depth=1).eval()
    with torch.no_grad():
        straight = model(x)
        shuffled = model(SparseTensor(x.feats[order], x.coords[order]))
    torch.testing.assert_close(shuffled, straight[order])


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    x = cloud(200, 3)
    first = x.coords[:, 0] == 0
    model = MinkUNet(3, 5, stem=4, encoder=(6, 8), decoder=(8, 6), depth=1).eval()
    with torch.no_grad():
        together = model(x)
        alone = model(SparseTensor(x.feats[first], x.coords[first]))
    torch.testing.assert_close(alone, together[first])


def test_every_weight_gets_a_gradient() -> None:
    model = MinkUNet(3, 5, stem=4, encoder=(6, 8), decoder=(8, 6), depth=2)
    model(cloud(300, 3)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder": (8, 8), "decoder": (8,)}, "same number of levels"),
        ({"encoder": (), "decoder": ()}, "at least one"),
        ({"depth": 0}, "`depth` must be 1 or more, got 0"),
    ],
)
def test_impossible_shapes_are_refused(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinkUNet(4, 7, **kwargs)
