"""Every format there and back, and one clear line for every file that is not what it seems."""

import numpy as np
import pytest

from torchsparse.datasets import FORMATS, FormatError, read_points, readers

COUNT = 240


@pytest.fixture
def cloud():
    """Positions [N, 3] and intensity [N] in float32."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 10, (COUNT, 3)).astype("<f4"), rng.random(COUNT).astype("<f4")


@pytest.fixture
def rgb():
    return np.random.default_rng(1).integers(0, 256, (COUNT, 3)).astype(np.uint8)


def _kitti(path, points, intensity):
    np.column_stack([points, intensity]).astype("<f4").tofile(path)


def _ply(path, points, intensity, text=False, rgb=None):
    plyfile = pytest.importorskip("plyfile")

    columns = [("x", "f4"), ("y", "f4"), ("z", "f4"), ("intensity", "f4")]
    if rgb is not None:
        columns += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.zeros(len(points), columns)
    rows["x"], rows["y"], rows["z"], rows["intensity"] = *points.T, intensity
    if rgb is not None:
        rows["red"], rows["green"], rows["blue"] = rgb.T
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")], text=text).write(str(path))


def _pcd(path, points, intensity, encoding="binary"):
    pypcd4 = pytest.importorskip("pypcd4")

    table = np.column_stack([points, intensity])
    pypcd4.PointCloud.from_points(table, ("x", "y", "z", "intensity"), (np.float32,) * 4).save(
        path, encoding=pypcd4.Encoding(encoding)
    )


def _las(path, points, intensity, offset=(0.0, 0.0, 0.0), labels=None):
    laspy = pytest.importorskip("laspy")

    data = laspy.create(point_format=3, file_version="1.2")
    data.header.scales, data.header.offsets = [0.001] * 3, list(offset)
    data.x, data.y, data.z = (points.astype(np.float64) + offset).T
    data.intensity = (intensity * 65535).astype(np.uint16)
    if labels is not None:
        data.classification = labels
    data.write(str(path))


def _colored(read, rgb):
    assert read.colors is not None and read.colors.dtype == np.float32
    np.testing.assert_allclose(read.colors, rgb / 255, atol=1e-6)


def _same(read, points, intensity, atol=0.0):
    np.testing.assert_allclose(read.points, points, rtol=0, atol=atol)
    np.testing.assert_allclose(read.intensity, intensity, rtol=0, atol=max(atol, 1e-6))
    assert read.points.dtype == read.intensity.dtype == np.float32


def test_kitti(tmp_path, cloud):
    _kitti(tmp_path / "000001.bin", *cloud)
    read = read_points(tmp_path / "000001.bin")
    assert read.format == "kitti" and not read.origin.any()
    _same(read, *cloud)


def test_nuscenes(tmp_path, cloud):
    points, intensity = cloud
    whole = np.round(intensity * 255)
    rows = np.column_stack([points, whole, np.arange(COUNT) % 32]).astype("<f4")
    rows.tofile(tmp_path / "sweep.pcd.bin")
    read = read_points(tmp_path / "sweep.pcd.bin")
    assert read.format == "nuscenes"
    _same(read, points, whole / 255)


def test_colored_records(tmp_path, cloud, rgb):
    """Six columns in a plain .bin, of a size that four columns would divide as well."""
    rows = np.column_stack([cloud[0], rgb]).astype("<f4")
    rows.tofile(tmp_path / "room.bin")
    assert rows.nbytes % 16 == 0
    for read in (read_points(tmp_path / "room.bin"), read_points(tmp_path / "room.bin", "xyzrgb")):
        assert read.format == "xyzrgb" and read.intensity is None
        np.testing.assert_array_equal(read.points, cloud[0])
        _colored(read, rgb)


def test_bare_records(tmp_path, cloud):
    cloud[0].tofile(tmp_path / "bare.bin")
    read = read_points(tmp_path / "bare.bin", "xyz")
    np.testing.assert_array_equal(read.points, cloud[0])
    assert read.intensity is None and read.colors is None and read.labels is None


@pytest.mark.parametrize("name", ["points", "pc", "xyz", "coords", "data", "anything"])
def test_npz_by_name_or_by_being_the_only_one(tmp_path, cloud, name):
    points, intensity = cloud
    np.savez(tmp_path / "a.npz", **{name: points}, intensity=intensity, labels=np.arange(COUNT))
    read = read_points(tmp_path / "a.npz")
    _same(read, points, intensity)
    np.testing.assert_array_equal(read.labels, np.arange(COUNT))


def test_npy(tmp_path, cloud, rgb):
    points, intensity = cloud
    np.save(tmp_path / "a.npy", np.column_stack([points, intensity]))
    _same(read_points(tmp_path / "a.npy"), points, intensity)
    np.save(tmp_path / "b.npy", np.column_stack([points, rgb]))
    _colored(read_points(tmp_path / "b.npy"), rgb)


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_ply(tmp_path, cloud, rgb, text):
    _ply(tmp_path / "a.ply", *cloud, text=text, rgb=rgb)
    read = read_points(tmp_path / "a.ply")
    _same(read, *cloud, atol=1e-6)
    _colored(read, rgb)


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path, cloud, encoding):
    _pcd(tmp_path / "a.pcd", *cloud, encoding=encoding)
    _same(read_points(tmp_path / "a.pcd"), *cloud, atol=1e-6)


def test_pcd_with_packed_colors(tmp_path, cloud, rgb):
    pypcd4 = pytest.importorskip("pypcd4")

    table = np.column_stack([cloud[0], pypcd4.PointCloud.encode_rgb(rgb)])
    pypcd4.PointCloud.from_xyzrgb_points(table).save(tmp_path / "a.pcd")
    read = read_points(tmp_path / "a.pcd")
    np.testing.assert_array_equal(read.points, cloud[0])
    _colored(read, rgb)


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_las(tmp_path, cloud, suffix):
    labels = np.arange(COUNT, dtype=np.uint8) % 7
    _las(tmp_path / f"a.{suffix}", *cloud, labels=labels)
    read = read_points(tmp_path / f"a.{suffix}")
    _same(read, cloud[0], np.floor(cloud[1] * 65535) / 65535, atol=6e-4)
    np.testing.assert_array_equal(read.labels, labels)


def test_georeferenced_points_keep_their_millimetres(tmp_path, cloud):
    """Northings of millions of metres would lose decimetres in float32."""
    offset = (450_000.0, 5_400_000.0, 200.0)
    _las(tmp_path / "a.las", *cloud, offset=offset)
    read = read_points(tmp_path / "a.las")
    assert read.origin[1] > 5_000_000
    np.testing.assert_allclose(read.points + read.origin, cloud[0] + offset, atol=1e-3)


def test_suffixes_ignore_case(tmp_path, cloud):
    _kitti(tmp_path / "A.BIN", *cloud)
    assert read_points(str(tmp_path / "A.BIN")).format == "kitti"


def _error(path, format=None):
    """The message of the error, after checking that it is one line about the path."""
    with pytest.raises(FormatError) as caught:
        read_points(path, format)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message


def test_missing_file(tmp_path):
    assert "no such file" in _error(tmp_path / "a.bin")


def test_folder(tmp_path):
    assert "expected a file" in _error(tmp_path)


@pytest.mark.parametrize("suffix", [s for row in FORMATS.values() for s in row.suffixes])
def test_empty_file(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    assert "empty (0 bytes)" in _error(tmp_path / f"a{suffix}")


def test_no_points(tmp_path):
    np.save(tmp_path / "a.npy", np.empty((0, 3)))
    assert "holds no points" in _error(tmp_path / "a.npy")


def test_unknown_suffix_and_format(tmp_path, cloud):
    _kitti(tmp_path / "a.xyzi", *cloud)
    message = _error(tmp_path / "a.xyzi")
    assert ".xyzi" in message and "--format" in message and "kitti" in message
    assert "'kity'" in _error(tmp_path / "a.xyzi", "kity")
    assert read_points(tmp_path / "a.xyzi", "kitti").format == "kitti"


@pytest.mark.parametrize("name", ["kitti", "nuscenes", "xyzrgb", "xyz"])
def test_truncated_records(tmp_path, name):
    (tmp_path / "a.bin").write_bytes(bytes(121))
    message = _error(tmp_path / "a.bin", name)
    assert "121 bytes" in message and str(readers._RECORD[name]) in message
    assert "121 bytes" in _error(tmp_path / "a.bin")


WRITERS = {
    "a.ply": _ply,
    "b.ply": lambda *a: _ply(*a, text=True),
    "a.pcd": _pcd,
    "b.pcd": lambda *a: _pcd(*a, encoding="ascii"),
    "c.pcd": lambda *a: _pcd(*a, encoding="binary_compressed"),
    "a.las": _las,
    "a.laz": _las,
    "a.npy": lambda path, points, _: np.save(path, points),
    "a.npz": lambda path, points, _: np.savez(path, points=points),
}


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files(tmp_path, cloud, name, share):
    path = tmp_path / name
    WRITERS[name](path, *cloud)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    _error(path)


@pytest.mark.parametrize("name", ["a.pcd", "a.las", "a.ply"])
def test_files_cut_between_two_points(tmp_path, cloud, name):
    """Whole records, but fewer than the header promises."""
    path = tmp_path / name
    WRITERS[name](path, *cloud)
    record = {"a.pcd": 16, "a.las": 34, "a.ply": 16}[name]
    path.write_bytes(path.read_bytes()[: -3 * record])
    _error(path)


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_noise(tmp_path, name):
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(999))
    _error(tmp_path / name)


@pytest.mark.parametrize("name", ["000001.bin", *(w for w in WRITERS if ".la" not in w)])
def test_points_that_are_not_finite_are_counted(tmp_path, cloud, name):
    """LAS is left out: it stores integers, which are finite."""
    points, intensity = cloud[0].copy(), cloud[1]
    points[3, 0], points[7] = np.nan, np.inf
    WRITERS.get(name, _kitti)(tmp_path / name, points, intensity)
    assert f"2 of {COUNT} points are not finite" in _error(tmp_path / name)


def test_values_that_no_layout_explains(tmp_path, cloud):
    _kitti(tmp_path / "a.bin", cloud[0], cloud[1] * 1000)
    message = _error(tmp_path / "a.bin")
    assert "x, y, z, intensity" in message and "--format" in message
    scaled = read_points(tmp_path / "a.bin", "kitti").intensity
    assert scaled is not None and scaled.max() <= 1


def test_npz_that_could_mean_two_arrays(tmp_path, cloud):
    np.savez(tmp_path / "a.npz", left=cloud[0], right=cloud[0])
    message = _error(tmp_path / "a.npz")
    assert f"left float32[{COUNT}, 3]" in message and "right" in message


def test_arrays_of_another_shape(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 2)))
    assert "got float64 of shape [5, 2]" in _error(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", points=np.zeros(9))
    assert "[9]" in _error(tmp_path / "a.npz")


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object))
    assert "allow_pickle=False" in _error(tmp_path / "a.npy")


def test_ply_without_positions(tmp_path):
    plyfile = pytest.importorskip("plyfile")

    rows = np.zeros(3, [("u", "f4")])
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")]).write(str(tmp_path / "a.ply"))
    assert "expected fields x, y, z, got u" in _error(tmp_path / "a.ply")
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "face")]).write(str(tmp_path / "b.ply"))
    assert "`vertex`" in _error(tmp_path / "b.ply")


def test_a_missing_library_is_named_with_its_extra(tmp_path, cloud, monkeypatch):
    def absent(module, extra):
        raise ImportError(f"this needs {module}: pip install 'torchsparse[{extra}]'")

    monkeypatch.setattr(readers, "need", absent)
    for name, module in (("a.ply", "plyfile"), ("a.pcd", "pypcd4"), ("a.laz", "laspy")):
        WRITERS[name](tmp_path / name, *cloud)
        message = _error(tmp_path / name)
        assert module in message and "torchsparse[formats]" in message
