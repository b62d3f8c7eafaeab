from __future__ import annotations

import sys

import numpy as np
import pytest

from torchsparse import viz
from torchsparse.datasets import CLASSES


def colors(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def read(path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[..., :3] * 255).astype(np.uint8)


def painted(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (image == np.array(color, np.uint8)).all(-1)


def test_birds_eye_has_x_to_the_right_and_y_up() -> None:
    points = np.repeat([[-10.0, -10, 0], [10, -10, 0], [-10, 10, 0]], 20, axis=0)
    paint = np.repeat(colors((255, 0, 0), (0, 255, 0), (0, 0, 255)), 20, axis=0)
    image = viz.birds_eye(points, paint, 200)
    assert image.shape == (200, 200, 3) and image.dtype == np.uint8
    red, green, blue = (
        np.argwhere(painted(image, color)).mean(0)
        for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    )
    assert red[0] > 150 and red[1] < 50  # row, column
    assert green[0] > 150 and green[1] > 150
    assert blue[0] < 50 and blue[1] < 50


def test_higher_points_hide_lower_ones_whatever_their_order() -> None:
    points = np.array([[0.0, 0, 5], [0, 0, 1], [8, 8, 0], [-8, -8, 0]])
    paint = colors((255, 0, 0), (0, 255, 0), (9, 9, 9), (9, 9, 9))
    for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
        image = viz.birds_eye(points[order], paint[order], 100)
        assert painted(image, (255, 0, 0)).any()
        assert not painted(image, (0, 255, 0)).any()


def test_perspective_draws_near_points_larger() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-10, 10, (400, 3)) * [1, 1, 0.1], [[-7, -4, 5.0]]])
    paint = np.full((401, 3), 100, np.uint8)
    paint[-1] = (255, 0, 0)
    image = viz.perspective(points, paint, 300, 200)
    assert image.shape == (200, 300, 3)
    near = painted(image, (255, 0, 0)).sum()
    assert near > 2 * painted(image, (100, 100, 100)).sum() / 400


@pytest.mark.parametrize("count", [1, 2, 500])
def test_one_point_or_many_in_one_place_can_be_drawn(count: int) -> None:
    points = np.ones((count, 3), np.float32)
    paint = np.full((count, 3), 200, np.uint8)
    assert painted(viz.birds_eye(points, paint, 64), (200, 200, 200)).any()
    assert viz.perspective(points, paint, 64, 48).shape == (48, 64, 3)


@pytest.mark.parametrize("with_truth", [False, True])
def test_pictures_have_the_promised_size_and_the_colours_of_the_classes(
    tmp_path, with_truth: bool
) -> None:
    points = np.random.default_rng(0).uniform(-20, 20, (3000, 3)) * [1, 1, 0.1]
    predicted = np.where(points[:, 0] > 0, 0, 8)
    truth = np.full(3000, 3)
    path = tmp_path / "new" / "picture.png"
    viz.save_prediction(path, points, predicted, truth if with_truth else None, title="a title")
    image = read(path)
    assert image.shape == (1400 if with_truth else 760, 1600, 3)
    for label in (0, 8):
        assert painted(image, CLASSES[label].color).sum() > 1000
    assert (painted(image, CLASSES[3].color).sum() > 1000) == with_truth
    assert not painted(image, CLASSES[5].color).any()


def test_other_classes_bring_their_own_colours(tmp_path) -> None:
    points = np.random.default_rng(0).uniform(-20, 20, (3000, 3))
    classes = [("salt", (1, 200, 3)), ("pepper", (4, 5, 206))]
    viz.save_prediction(tmp_path / "a.png", points, np.ones(3000, np.int64), classes=classes)
    image = read(tmp_path / "a.png")
    assert painted(image, (4, 5, 206)).sum() > 1000
    assert not painted(image, (1, 200, 3)).any()


def test_no_points_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one point"):
        viz.save_prediction(tmp_path / "a.png", np.zeros((0, 3)), np.zeros(0, np.int64))


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'torchsparse\[plots\]'"):
        viz.require()
