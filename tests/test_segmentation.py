from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from torchsparse.datasets import STREET_CLASSES, Scan, Sensor, scan, street
from torchsparse.segmentation import (
    CheckpointError,
    Evaluation,
    Recipe,
    Segmenter,
    evaluate,
    fit,
    load_checkpoint,
    lovasz_softmax,
    save_checkpoint,
)

SMALL = Recipe(voxel_size=0.5, stem=6, encoder=(8, 12), decoder=(12, 8))
COARSE = Sensor("coarse", tuple(np.linspace(-25, 3, 16).tolist()), 180, (1.7, 2.0))


@pytest.fixture(scope="module")
def scans() -> list[Scan]:
    return [scan(street(seed), COARSE, seed) for seed in (1, 2)]


def weights(segmenter: Segmenter) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in segmenter.network.parameters()])


# Training ---------------------------------------------------------------------------------------


def test_training_beats_the_most_frequent_class(scans: list[Scan]) -> None:
    segmenter = Segmenter.new(SMALL)
    losses = fit(segmenter, scans, steps=60, batch=2, rate=2e-2)
    assert len(losses) == segmenter.steps == segmenter.planned == 60
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    result = evaluate(segmenter, scans)
    assert result.miou > 2 * result.majority_miou


def test_the_same_seed_gives_the_same_network(scans: list[Scan]) -> None:
    def trained(seed: int) -> torch.Tensor:
        segmenter = Segmenter.new(SMALL, seed)
        state = torch.random.get_rng_state()
        fit(segmenter, scans, steps=2, batch=1, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return weights(segmenter)

    first = trained(3)
    assert torch.equal(first, trained(3))
    assert not torch.equal(first, trained(4))


def test_training_without_scans_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one labelled scan"):
        fit(Segmenter.new(SMALL), [])


# Loss -------------------------------------------------------------------------------------------


def test_lovasz_of_hard_predictions_is_one_minus_iou() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1])
    predicted = torch.tensor([0, 0, 1, 1, 1])
    hard = torch.nn.functional.one_hot(predicted, 3).double()
    expected = 1 - (2 / 3 + 2 / 3) / 2  # class 2 does not occur
    torch.testing.assert_close(lovasz_softmax(hard, truth).item(), expected)


def test_lovasz_is_zero_for_the_truth_and_without_rows() -> None:
    truth = torch.tensor([0, 2, 1])
    assert lovasz_softmax(torch.eye(3)[truth], truth) == 0
    assert lovasz_softmax(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)) == 0


def test_lovasz_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(3, (12,), generator=generator)
    assert torch.autograd.gradcheck(lambda s: lovasz_softmax(s.softmax(1), labels), (scores,))


# Evaluation -------------------------------------------------------------------------------------


def test_scores_of_a_small_table() -> None:
    result = Evaluation(("a", "b", "c"), torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    torch.testing.assert_close(result.iou[:2], torch.tensor([3 / 4, 4 / 5]).double())
    assert torch.isnan(result.iou[2])
    assert result.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert result.accuracy == pytest.approx(7 / 8)
    assert result.majority_accuracy == pytest.approx(1 / 2)
    assert result.majority_miou == pytest.approx(1 / 4)
    assert result.as_dict()["iou"] == {"a": 0.75, "b": 0.8, "c": None}


def test_a_predicted_class_that_does_not_occur_costs_the_others_only() -> None:
    result = Evaluation(("a", "b"), torch.tensor([[3, 1], [0, 0]]))
    assert result.miou == pytest.approx(3 / 4)
    assert result.as_dict()["iou"]["b"] is None


def test_evaluation_counts_what_predict_says(scans: list[Scan]) -> None:
    segmenter = Segmenter.new(SMALL)
    fit(segmenter, scans, steps=3, batch=1)
    expected = np.zeros((len(STREET_CLASSES), len(STREET_CLASSES)), np.int64)
    for item in scans:
        np.add.at(expected, (item.labels, segmenter.predict(item.points, item.intensity)), 1)
    assert np.array_equal(evaluate(segmenter, scans).confusion.numpy(), expected)


# Prediction -------------------------------------------------------------------------------------


def test_every_point_gets_the_label_of_its_voxel(scans: list[Scan]) -> None:
    segmenter, points = Segmenter.new(SMALL), scans[0].points
    x, inverse = segmenter.prepare(points, scans[0].intensity)
    assert x.feats.shape == (x.coords.shape[0], len(SMALL.features))
    assert x.feats.dtype == torch.float32 and torch.isfinite(x.feats).all()
    labels = segmenter.predict(points, scans[0].intensity)
    assert labels.shape == (len(points),) and labels.dtype == np.int64
    for voxel in range(0, x.coords.shape[0], 97):
        assert len(np.unique(labels[inverse.numpy() == voxel])) == 1


def test_the_height_of_the_origin_does_not_matter(scans: list[Scan]) -> None:
    """Scans of some data sets start at the sensor, of others at the road."""
    segmenter = Segmenter.new(SMALL)
    points = np.round(scans[0].points.astype(np.float64), 2) + 1 / 256  # off the voxel faces
    low = segmenter.prepare(points)[0]
    high = segmenter.prepare(points + np.array([0.0, 0.0, 4 * SMALL.voxel_size]))[0]
    assert torch.equal(low.coords, high.coords)
    torch.testing.assert_close(low.feats, high.feats, rtol=1e-4, atol=1e-5)


def test_features_of_a_column() -> None:
    """Three voxels above each other at 5 m, of which one is 1 m lower than the highest."""
    recipe = Recipe()
    points = np.array([[3.1, 3.9, 0.1], [3.1, 3.9, 0.3], [3.1, 3.9, 1.1], [9.1, 3.9, 0.1]])
    x, inverse = Segmenter.new(recipe).prepare(points)
    feats = {name: x.feats[inverse, k].tolist() for k, name in enumerate(recipe.features)}
    away = np.hypot(3.1, 3.9)
    assert feats["above"] == pytest.approx([1.0 / 4, 0.8 / 4, 0, 0], abs=1e-6)
    assert feats["filled"] == pytest.approx([0.6 / 2] * 3 + [0.2 / 2], abs=1e-6)
    assert feats["near"][:3] == pytest.approx([np.exp(-away / 4)] * 3, rel=1e-5)
    assert feats["far"][:3] == pytest.approx([away / 50] * 3, rel=1e-5)
    assert feats["step"] == pytest.approx([0, 1 - np.exp(-0.2 / 0.3), 1 - np.exp(-1 / 0.3), 0])
    assert feats["one"] == [1, 1, 1, 1]


@pytest.mark.parametrize("looks", [False, True])
def test_the_recipe_says_whether_intensity_counts(scans: list[Scan], looks: bool) -> None:
    segmenter = Segmenter.new(replace(SMALL, intensity=looks))
    bright = segmenter.prepare(scans[0].points, np.ones(len(scans[0].points)))[0]
    blind = segmenter.prepare(scans[0].points)[0]
    assert torch.equal(bright.feats, blind.feats) != looks


def test_prediction_works_without_intensity_and_on_one_point() -> None:
    segmenter = Segmenter.new(SMALL)
    assert segmenter.predict(np.array([[3.0, 4.0, -1.7]])).shape == (1,)


@pytest.mark.parametrize(
    "points", [np.zeros((0, 3)), np.array([[0, 0, np.nan]]), np.zeros((2, 2))]
)
def test_unusable_points_are_refused(points) -> None:
    with pytest.raises(ValueError, match="`points` must"):
        Segmenter.new(SMALL).predict(points)


# Checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_brings_back_the_predictions(tmp_path, scans: list[Scan]) -> None:
    segmenter = Segmenter.new(SMALL)
    fit(segmenter, scans, steps=2, batch=1)
    path = tmp_path / "new" / "checkpoint.pt"
    save_checkpoint(segmenter, path)
    again = load_checkpoint(path)
    assert again.recipe == SMALL
    assert (again.steps, again.planned) == (2, 2)
    for item in scans:
        before = segmenter.predict(item.points, item.intensity)
        assert np.array_equal(again.predict(item.points, item.intensity), before)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(Segmenter.new(SMALL, seed=1), path)
    before = path.read_bytes()

    def broken(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(Segmenter.new(SMALL, seed=2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def corrupt(change) -> object:
    """Write a checkpoint whose content went through ``change``."""

    def write(path) -> None:
        save_checkpoint(Segmenter.new(SMALL), path)
        torch.save(change(torch.load(path, weights_only=True)), path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such checkpoint; `torchsparse demo`"),
        (lambda path: path.mkdir(), "no such checkpoint"),
        (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
        (lambda path: path.write_bytes(b"PK\3\4 and then nothing"), "not a readable checkpoint"),
        (corrupt(lambda c: c["state"]), "expected a checkpoint of format"),
        (corrupt(lambda c: [1]), "expected a checkpoint of format"),
        (corrupt(lambda c: c | {"format": "other/7"}), "got other/7"),
        (corrupt(lambda c: c | {"state": {}}), "incomplete"),
        (corrupt(lambda c: {k: v for k, v in c.items() if k != "recipe"}), "incomplete"),
        (corrupt(lambda c: c | {"recipe": c["recipe"] | {"features": ("x",)}}), "features x;"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, write, message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
