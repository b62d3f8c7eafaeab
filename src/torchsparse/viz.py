"""Pictures of labelled point clouds. The one file that needs matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsparse._optional import need
from torchsparse.datasets.objects import CLASSES

__all__ = ["birds_eye", "perspective", "require", "save_prediction"]

Image = NDArray[np.uint8]  # [height, width, 3]
_BACKGROUND = (18, 20, 26)
_ROW, _LEFT, _RIGHT, _HEADER, _LEGEND = 640, 640, 960, 60, 60  # pixels of save_prediction


def require() -> None:
    """Check that pictures can be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    need("matplotlib", extra="plots")


def birds_eye(points: NDArray[np.floating], colors: NDArray[np.uint8], size: int) -> Image:
    """Points from above, x to the right, y up; what lies higher hides what lies below.

    Args:
        points: [P, 3], metres.
        colors: [P, 3], red, green, blue.
        size: Width and height, pixels; they span nearly all points.

    Returns:
        [size, size, 3].
    """
    low, high = np.quantile(points, [0.02, 0.98], axis=0)
    center, reach = (low + high) / 2, max(float((high - low)[:2].max()) / 2 * 1.08, 1.0)
    at = (points - center)[:, :2] / reach * (size / 2)
    columns, rows = size / 2 + at[:, 0], size / 2 - at[:, 1]
    dots = np.full(len(points), round(_dot(len(points))))
    return _splat(columns, rows, points[:, 2], dots, colors, size, size)


def perspective(
    points: NDArray[np.floating], colors: NDArray[np.uint8], width: int, height: int
) -> Image:
    """Points as seen by a camera above and behind the place where most of them lie.

    Args:
        points: [P, 3], metres, z up.
        colors: [P, 3], red, green, blue.
        width, height: Of the picture, pixels.

    Returns:
        [height, width, 3]; near points are drawn larger and hide far ones.
    """
    center = np.median(points, axis=0)
    away = np.hypot(*(points - center)[:, :2].T)
    distance = max(2.0 * float(np.quantile(away, 0.65)), 1.0)
    eye = center + distance * np.array([-0.80, -0.45, 0.55])
    forward = (center - eye) / np.linalg.norm(center - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, forward), forward])
    x, y, depth = axes @ (points - eye).T
    ahead = depth > 0.1 * distance
    x, y, depth, colors = x[ahead], y[ahead], depth[ahead], colors[ahead]
    focal = 0.75 * width  # an opening angle of 67 degrees
    dots = np.clip(np.round(_dot(len(points)) * distance / depth), 1, 6).astype(np.int64)
    columns, rows = width / 2 + focal * x / depth, height / 2 - focal * y / depth
    return _splat(columns, rows, -depth, dots, colors, width, height)


def _dot(count: int) -> float:
    """Side of a point, pixels: sparse clouds are drawn with larger dots."""
    return float(np.clip(1.6 * (100_000 / count) ** 0.3, 1.0, 4.0))


def _splat(
    columns: NDArray[np.floating],
    rows: NDArray[np.floating],
    nearness: NDArray[np.floating],
    dots: NDArray[np.int64],
    colors: NDArray[np.uint8],
    width: int,
    height: int,
) -> Image:
    """Squares of ``dots`` pixels; where several meet, the one with the largest nearness stays."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = _BACKGROUND
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    order = np.flatnonzero(inside)[np.argsort(nearness[inside], kind="stable")]
    side = int(dots[order].max(initial=1))
    # NumPy keeps the last of equal targets: spread points over their pixels, far points first.
    shift = np.arange(side)
    column = columns[order, None, None].astype(np.int64) + shift
    row = rows[order, None, None].astype(np.int64) + shift[:, None]
    column, row = np.broadcast_arrays(column, row)
    drawn = (np.maximum(shift, shift[:, None]) < dots[order, None, None]) & (
        (column < width) & (row < height)
    )
    source = np.broadcast_to(colors[order, None, None], (*drawn.shape, 3))
    image[row[drawn], column[drawn]] = source[drawn]
    return image


def save_prediction(
    path: str | Path,
    points: NDArray[np.floating],
    predicted: NDArray[np.integer],
    truth: NDArray[np.integer] | None = None,
    *,
    title: str = "",
    classes: Sequence[tuple[str, Sequence[int]]] | None = None,
) -> None:
    """Save a PNG of points coloured by class, from above and in perspective.

    The picture is 1600 pixels wide and 760 high; with ``truth``, a row of the same views above
    the prediction makes it 1400 high. A legend names the classes that occur.

    Args:
        path: File to write; its folder is made if missing.
        points: [P, 3], metres, z up, P > 0.
        predicted, truth: [P] rows of ``classes``.
        title: A line at the top.
        classes: Name and colour (red, green, blue in 0..255) of each class; None = the classes
            of ``torchsparse.datasets``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No points.
    """
    if len(points) == 0:
        raise ValueError("a picture needs at least one point, got none")
    table = [(row.name, row.color) for row in CLASSES] if classes is None else list(classes)
    palette = np.array([color for _, color in table], np.uint8)
    shown = [("prediction", predicted)]
    if truth is not None:
        shown.insert(0, ("truth", truth))
    figure = _figure(_LEFT + _RIGHT, _ROW * len(shown) + _HEADER + _LEGEND)
    _say(figure, 0.5, 1 - 0.5 * _HEADER / _height(figure), title, size=13, ha="center")
    for number, (name, labels) in enumerate(shown):
        colors, bottom = palette[labels], _LEGEND + _ROW * (len(shown) - 1 - number)
        _place(figure, birds_eye(points, colors, _LEFT), 0, bottom)
        _place(figure, perspective(points, colors, _RIGHT, _ROW), _LEFT, bottom)
        top = (bottom + _ROW - 16) / _height(figure)
        _say(figure, 0.008, top, f"{name}, from above", size=11)
        _say(figure, 0.408, top, f"{name}, in perspective", size=11)
    occurring = np.unique(np.concatenate([labels for _, labels in shown]))
    _legend(figure, [table[label] for label in occurring])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=100, facecolor=_unit(_BACKGROUND))


def _figure(width: int, height: int) -> Any:
    """A figure of so many pixels on the Agg canvas: no window, no global state."""
    figure = need("matplotlib.figure", extra="plots").Figure((width / 100, height / 100), dpi=100)
    need("matplotlib.backends.backend_agg", extra="plots").FigureCanvasAgg(figure)
    return figure


def _height(figure: Any) -> float:
    return figure.get_figheight() * 100


def _place(figure: Any, image: Image, left: int, bottom: int) -> None:
    """Put an image at its own size, pixel for pixel."""
    figure.figimage(image, left, bottom, origin="upper")


def _say(figure: Any, x: float, y: float, text: str, *, size: int, ha: str = "left") -> None:
    figure.text(x, y, text, color="white", fontsize=size, ha=ha, va="center")


def _legend(figure: Any, entries: list[tuple[str, Sequence[int]]]) -> None:
    """Names in their colours, side by side at the bottom."""
    y = 0.5 * _LEGEND / _height(figure)
    for number, (name, color) in enumerate(entries):
        x = (number + 0.5) / len(entries)
        figure.text(
            x, y, name, color=_unit(color), fontsize=12, ha="center", va="center", weight="bold"
        )


def _unit(color: Sequence[int]) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in color)
