"""Point clouds from files: raw float32 records, NumPy, PLY, PCD and LAS.

A format is a row of ``FORMATS``. Formats with a header are read by the libraries that define them
(extra ``formats``); raw records carry no header, so their values are checked against the layout.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchsparse._optional import need

_FAR = 10_000.0  # metres: beyond it float32 resolves 1 mm no longer
_XYZ_NAMES = ("points", "pc", "xyz", "coords", "data")
_INTENSITY_NAMES = ("intensity", "reflectance", "reflectivity", "remission", "scalar_Intensity")
_LABEL_NAMES = ("label", "labels", "semantic", "classification", "class")


class FormatError(ValueError):
    """A file that cannot be read as points; the message is one line that starts with its path."""


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Points of a file, in the axes of the file."""

    points: NDArray[np.float32]  # [N, 3] = positions - origin, metres
    intensity: NDArray[np.float32] | None  # [N] in 0..1
    colors: NDArray[np.float32] | None  # [N, 3] red, green, blue in 0..1
    labels: NDArray[np.int64] | None  # [N] as numbered in the file
    format: str  # key of FORMATS
    origin: NDArray[np.float64]  # [3] metres; 0 unless the file is georeferenced


class _Columns(NamedTuple):
    """What a reader found, before checks and scaling."""

    points: NDArray[Any]  # [N, 3]
    intensity: NDArray[Any] | None = None  # [N], any scale
    colors: NDArray[Any] | None = None  # [N, 3], any scale
    labels: NDArray[Any] | None = None  # [N]


class Format(NamedTuple):
    """How files of one kind are recognised and read."""

    suffixes: tuple[str, ...]
    layout: str  # for messages
    read: Callable[[Path], _Columns]


def read_points(path: str | Path, format: str | None = None) -> PointCloud:
    """Read a point cloud.

    Args:
        path: The file.
        format: A key of ``FORMATS``; None = by suffix. A plain ``.bin`` is taken for KITTI if its
            values allow it, else for the one raw layout with intensity or colour that fits.

    Returns:
        Finite points in metres with what else the file tells about them.

    Raises:
        FormatError: The file is missing, empty, truncated or not of the format, holds non-finite
            positions, its format is unknown or ambiguous, or its library is not installed.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise FormatError(f"{path}: unknown format {format!r}, expected one of {_names()}")
    if not path.exists():
        raise FormatError(f"{path}: no such file")
    if not path.is_file():
        raise FormatError(f"{path}: expected a file, got a directory")
    if path.stat().st_size == 0:
        raise FormatError(f"{path}: the file is empty (0 bytes)")
    name = format or _recognise(path)
    try:
        return _checked(path, name, FORMATS[name].read(path))
    except FormatError:
        raise
    except PermissionError as error:
        raise FormatError(f"{path}: permission denied") from error
    except ImportError as error:
        raise FormatError(f"{path}: {error}") from error
    except Exception as error:  # the libraries raise a zoo of types for damaged files
        reason = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
        raise FormatError(f"{path}: cannot be read as {name} ({reason})") from error


def _names() -> str:
    return ", ".join(FORMATS)


def _recognise(path: Path) -> str:
    """The format that the suffix says; for a plain .bin, the layout that fits the values."""
    lower = path.name.lower()
    matches = [
        (len(suffix), name)
        for name, row in FORMATS.items()
        for suffix in row.suffixes
        if lower.endswith(suffix)
    ]
    if not matches:
        suffix = path.suffix or "no suffix"
        raise FormatError(f"{path}: unknown file type ({suffix}); say --format, one of {_names()}")
    name = max(matches)[1]
    if name != "kitti":
        return name
    size = path.stat().st_size
    fitting = [
        raw
        for raw in ("kitti", "nuscenes", "xyzrgb")
        if size % _RECORD[raw] == 0 and _fits(path, raw)
    ]
    if fitting[:1] == ["kitti"] or len(fitting) == 1:
        return fitting[0]
    if size % _RECORD["kitti"]:
        return "kitti"  # whose reader says what is wrong with the size
    if not np.isfinite(_raw(path, "kitti")).all():
        return "kitti"  # and _checked counts the non-finite points
    raise FormatError(
        f"{path}: values do not look like {FORMATS['kitti'].layout}; "
        f"say --format, one of {_names()}"
    )


# Raw records ------------------------------------------------------------------------------------

_RECORD = {"kitti": 16, "nuscenes": 20, "xyzrgb": 24, "xyz": 12}  # bytes


def _raw(path: Path, name: str) -> NDArray[np.float32]:
    """[N, columns] of a file of float32 records."""
    size, record = path.stat().st_size, _RECORD[name]
    if size % record:
        raise FormatError(
            f"{path}: truncated or another format: {size} bytes are not a multiple of {record} "
            f"({FORMATS[name].layout})"
        )
    return np.fromfile(path, "<f4").reshape(-1, record // 4)


def _fits(path: Path, name: str) -> bool:
    """Whether values can be of a raw layout: reach of a scanner, range and grain of the rest."""
    values = _raw(path, name)
    with np.errstate(invalid="ignore"):
        if not (np.isfinite(values).all() and np.abs(values[:, :3]).max() < 1000):
            return False
        rest = values[:, 3:]
        if rest.min() < 0 or rest.max() > 255:
            return False
        whole = (rest == np.round(rest)).all(0)
    if name == "kitti":
        return bool(rest.max() <= 1 or whole.all())
    if name == "nuscenes":
        return bool(whole.all() and rest[:, 1].max() < 128)
    return bool(whole.all())


def _read_kitti(path: Path) -> _Columns:
    values = _raw(path, "kitti")
    return _Columns(values[:, :3], values[:, 3])


def _read_nuscenes(path: Path) -> _Columns:
    values = _raw(path, "nuscenes")
    return _Columns(values[:, :3], values[:, 3] / 255)


def _read_xyzrgb(path: Path) -> _Columns:
    values = _raw(path, "xyzrgb")
    return _Columns(values[:, :3], colors=values[:, 3:])


def _read_xyz(path: Path) -> _Columns:
    return _Columns(_raw(path, "xyz"))


# NumPy ------------------------------------------------------------------------------------------


def _table(path: Path, values: NDArray[Any]) -> _Columns:
    """Columns x, y, z[, intensity[, ...]] or x, y, z, r, g, b[, ...] of a 2-D array."""
    if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
        raise FormatError(
            f"{path}: expected an array [N, 3 or more] of numbers, "
            f"got {values.dtype} of shape {list(values.shape)}"
        )
    if values.shape[1] in (4, 5):
        return _Columns(values[:, :3], values[:, 3])
    rest = values[:, 3:6]
    colored = rest.shape[1] == 3 and rest.size > 0 and rest.min() >= 0 and rest.max() <= 255
    return _Columns(values[:, :3], colors=rest if colored else None)


def _read_npy(path: Path) -> _Columns:
    with path.open("rb") as file:
        return _table(path, np.load(file, allow_pickle=False))


def _read_npz(path: Path) -> _Columns:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    tables = [
        n for n, a in arrays.items() if a.ndim == 2 and a.shape[1] >= 3 and a.dtype.kind == "f"
    ]
    named = [name for name in _XYZ_NAMES if name in arrays]
    if not named and len(tables) != 1:
        held = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in arrays.items()) or "nothing"
        raise FormatError(f"{path}: expected an array named {'/'.join(_XYZ_NAMES)}, got {held}")
    columns = _table(path, arrays[named[0] if named else tables[0]])
    extra = {
        field: arrays[name]
        for field, names in (("intensity", _INTENSITY_NAMES), ("labels", _LABEL_NAMES))
        for name in names
        if name in arrays and arrays[name].shape == columns.points.shape[:1]
    }
    return columns._replace(**extra)


# Files with a header ----------------------------------------------------------------------------


def _pick(fields: dict[str, Any], names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((np.asarray(fields[name]) for name in names if name in fields), None)


def _from_fields(path: Path, fields: dict[str, Any]) -> _Columns:
    """Columns from named fields, as PLY and PCD have them."""
    if not {"x", "y", "z"} <= fields.keys():
        raise FormatError(f"{path}: expected fields x, y, z, got {', '.join(fields) or 'none'}")
    points = np.stack([fields[axis] for axis in "xyz"], axis=1)
    rgb = ("red", "green", "blue")
    colors = np.stack([fields[c] for c in rgb], axis=1) if set(rgb) <= fields.keys() else None
    return _Columns(points, _pick(fields, _INTENSITY_NAMES), colors, _pick(fields, _LABEL_NAMES))


def _read_ply(path: Path) -> _Columns:
    plyfile = need("plyfile", extra="formats")
    data = plyfile.PlyData.read(str(path), mmap=False)
    if "vertex" not in data:
        raise FormatError(f"{path}: expected an element `vertex`, got none")
    vertex = data["vertex"].data
    return _from_fields(path, {name: vertex[name] for name in vertex.dtype.names})


def _read_pcd(path: Path) -> _Columns:
    pypcd4 = need("pypcd4", extra="formats")
    cloud = pypcd4.PointCloud.from_path(path)
    values = cloud.pc_data
    if len(values) != cloud.points:
        raise FormatError(f"{path}: truncated: expected {cloud.points} points, got {len(values)}")
    fields = {name: values[name] for name in cloud.fields}
    if "rgb" in fields:  # three bytes in the bits of one number
        packed = pypcd4.PointCloud.decode_rgb(np.ascontiguousarray(fields["rgb"]))
        fields |= dict(zip(("red", "green", "blue"), packed.T))
    return _from_fields(path, fields)


def _read_las(path: Path) -> _Columns:
    laspy = need("laspy", extra="formats")
    data = laspy.read(path)
    expected = data.header.point_count
    if len(data.points) != expected:
        raise FormatError(f"{path}: truncated: expected {expected} points, got {len(data.points)}")
    names = set(data.point_format.dimension_names)
    colors = None
    if {"red", "green", "blue"} <= names:
        colors = np.stack([data.red, data.green, data.blue], axis=1)
    labels = np.asarray(data.classification)
    return _Columns(
        np.asarray(data.xyz), np.asarray(data.intensity), colors, labels if labels.any() else None
    )


# Checks -----------------------------------------------------------------------------------------


def _unit(values: NDArray[Any] | None) -> NDArray[np.float32] | None:
    """Values in 0..1, from the scale that their maximum tells: 1, 8 bits or 16 bits."""
    if values is None:
        return None
    top = values.max(initial=0)
    scale = 1.0 if top <= 1 else 255.0 if top <= 255 else 65535.0
    return np.clip(values.astype(np.float64) / scale, 0.0, 1.0).astype(np.float32)


def _checked(path: Path, name: str, columns: _Columns) -> PointCloud:
    count = len(columns.points)
    if count == 0:
        raise FormatError(f"{path}: holds no points")
    points = np.asarray(columns.points, dtype=np.float64)
    finite = np.isfinite(points).all(1)
    if columns.intensity is not None:
        finite &= np.isfinite(columns.intensity)
    if not finite.all():
        raise FormatError(f"{path}: {count - int(finite.sum())} of {count} points are not finite")
    origin = np.zeros(3)
    if np.abs(points).max() > _FAR:
        origin = np.floor(points.min(0))
    labels = columns.labels
    return PointCloud(
        points=(points - origin).astype(np.float32),
        intensity=_unit(columns.intensity),
        colors=_unit(columns.colors),
        labels=None if labels is None else labels.astype(np.int64),
        format=name,
        origin=origin,
    )


FORMATS = {
    "kitti": Format((".bin",), "x, y, z, intensity as float32", _read_kitti),
    "nuscenes": Format((".pcd.bin",), "x, y, z, intensity, ring as float32", _read_nuscenes),
    "xyzrgb": Format((), "x, y, z, red, green, blue as float32", _read_xyzrgb),
    "xyz": Format((), "x, y, z as float32", _read_xyz),
    "npy": Format((".npy",), "one array [N, 3 or more]", _read_npy),
    "npz": Format((".npz",), "arrays, one of them [N, 3 or more]", _read_npz),
    "ply": Format((".ply",), "PLY", _read_ply),
    "pcd": Format((".pcd",), "PCD", _read_pcd),
    "las": Format((".las", ".laz"), "LAS or LAZ", _read_las),
}
"""The formats by name, with their suffixes."""
