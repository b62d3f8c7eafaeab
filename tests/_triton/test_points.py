"""Kernels that move rows between points, voxels and grids, against their twins in PyTorch."""

import pytest
import torch

from torchsparse._capacity import PAD, mark_rows
from torchsparse._reference import points as reference
from torchsparse._triton import points
from torchsparse._triton.launch import INTERPRETED

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Results are rounded to 11 and 8 bits; float32 sums differ in their last bits.
TOLERANCE = {
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def close(got, want):
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def randn(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def randint(low, high, shape, device, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(device, dtype)


# ------------------------------------------------------------------ cells
@pytest.mark.parametrize("rows", [0, 1, 301])
@pytest.mark.parametrize("columns", [1, 3, 4, 5])
def test_flat_index(columns, rows, device):
    coords = randint(-1, 6, (rows, columns), device, torch.int32)
    extents = (3, 5, 6, 5, 1)[:columns]
    assert torch.equal(points.flat_index(coords, extents), reference.flat_index(coords, extents))


def test_flat_index_of_columns_apart_and_of_cells_beyond_32_bits(device):
    coords = randint(0, 2**16, (4, 70), device, torch.int64).t()
    coords[:, 3] %= 8
    extents = (2**16, 2**15, 2**16, 7)
    got = points.flat_index(coords, extents)
    assert torch.equal(got, reference.flat_index(coords, extents))
    assert got.max() > 2**32 and got.min() == -1


@pytest.mark.parametrize(("value", "bit"), [(3, 0), (4, 64)])
def test_flat_index_notes_a_row_outside(value, bit, device):
    coords = torch.zeros((300, 2), dtype=torch.int32, device=device)
    coords[299, 1] = value
    word = torch.tensor(3, device=device)
    points.flat_index(coords, (1, 4), word, 64)
    assert word.item() == 3 + bit


# ------------------------------------------------------------------ moves
@pytest.mark.parametrize("num", [21, 20_000])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 33])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scatter_keeps_the_last_of_equal_cells(dtype, channels, num, device):
    """Wide cells are read through a table; narrow ones, and wide ones among many, are written
    twice."""
    feats = randn(150, channels, dtype=dtype, device=device)
    index = randint(-1, 20, (150,), device)
    got = points.scatter_rows(feats, index, num)
    want = torch.zeros((num, channels), dtype=dtype, device=device)
    for row, cell in zip(feats, index.tolist()):
        if cell >= 0:
            want[cell] = row
    assert torch.equal(got, want)
    assert got.is_contiguous()


@pytest.mark.parametrize(("rows", "num", "channels"), [(0, 5, 3), (1, 1, 3), (3, 0, 3), (3, 5, 0)])
def test_scatter_of_little(rows, num, channels, device):
    feats = randn(rows, channels, dtype=torch.float32, device=device)
    index = torch.zeros(rows, dtype=torch.int64, device=device) - int(num == 0)
    got = points.scatter_rows(feats, index, num)
    assert torch.equal(got, reference.scatter_rows(feats, index, num))


@pytest.mark.parametrize("channels", [4, 32])
def test_scatter_ignores_cells_behind_the_end(channels, device):
    feats = randn(5, channels, dtype=torch.float32, device=device)
    got = points.scatter_rows(feats, torch.tensor([7, 2, 2**40, -5, 3], device=device), 7)
    assert torch.equal(got[2], feats[1]) and torch.equal(got[3], feats[4])
    assert torch.count_nonzero(got) == 2 * channels


def test_scatter_of_nan_and_of_numbers_that_look_like_row_numbers(device):
    """Whoever asks a cell for its winner must not read features."""
    feats = torch.arange(1, 9, dtype=torch.int32, device=device).view(torch.float32)[:, None]
    feats[3] = torch.nan
    index = torch.tensor([0, 0, 1, 1, 2, 2, 0, 3], device=device)
    got = points.scatter_rows(feats, index, 4)
    assert torch.equal(got.view(torch.int32)[[0, 2, 3], 0].cpu(), torch.tensor([7, 6, 8]).int())
    assert got[1].isnan()


GARBAGE = {
    "zeros": lambda n: torch.zeros(n, dtype=torch.int32),
    "minus": lambda n: torch.full((n,), -1, dtype=torch.int32),
    "largest": lambda n: torch.full((n,), 2**31 - 1, dtype=torch.int32),
    "last row": lambda n: torch.full((n,), 149, dtype=torch.int32),
    "any row": lambda n: randint(0, 150, (n,), "cpu", torch.int32, seed=n),
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("num", [20, 21, 20_000])
def test_scatter_whatever_a_new_table_holds(num, channels, garbage, device, monkeypatch):
    """Tables are not cleared. Rows that stand in one by chance, or since an earlier call, count
    only in their own cell, and there only the last."""
    feats = randn(150, channels, dtype=torch.float32, device=device)
    index = randint(-1, 20, (150,), device)
    want = reference.scatter_rows(feats, index, num)
    empty = torch.empty

    def filled(*shape, dtype=None, device=None):
        if dtype == torch.int32:
            return GARBAGE[garbage](*shape).to(device)
        return empty(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", filled)
    assert torch.equal(points.scatter_rows(feats, index, num), want)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own order")
@pytest.mark.parametrize("channels", [1, 16])
def test_scatter_when_programs_run_backwards(channels, device, monkeypatch):
    """Later rows come first, and are put back by the earlier ones that take their place."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z)
    )
    feats = randn(700, channels, dtype=torch.float32, device=device)
    index = randint(-1, 60, (700,), device)
    got = points.scatter_rows(feats, index, 60)
    assert torch.equal(got, reference.scatter_rows(feats, index, 60))


@pytest.mark.parametrize("num", [16, 17, 31, 33, 48, 301])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_scatter_in_parts(channels, dtype, num, device, monkeypatch):
    """A table that is too large serves 16 cells after the other."""
    monkeypatch.setattr(points, "TABLE", 16)
    feats = randn(400, channels, dtype=dtype, device=device)
    index = randint(-1, num + 1, (400,), device)
    want = reference.scatter_rows(feats, index.masked_fill(index == num, -1), num)
    assert torch.equal(points.scatter_rows(feats, index, num), want)


@pytest.mark.parametrize("rows", [0, 1, 129, 301])
@pytest.mark.parametrize("columns", [1, 3, 4, 5])
@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.float16), (7, torch.float32),
                                                 (20, torch.float32)])  # fmt: skip
def test_place(channels, dtype, columns, rows, device):
    """Rows, their cells, and what is noted; coordinates and features in columns of others."""
    extents = (3, 5, 6, 5, 1)[:columns]
    coords = randint(-1, 6, (rows, columns + 1), device, torch.int32)[:, 1:]
    feats = randn(rows, channels + 1, dtype=dtype, device=device)[:, 1:]
    grid, index = points.place_rows(feats, coords, extents)
    want, cells = reference.place_rows(feats, coords, extents)
    assert torch.equal(index, cells)
    assert torch.equal(grid, want) and grid.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 64])
def test_scatter_of_misaligned_rows(channels, dtype, device):
    """Rows of 4 bytes that start between two words move as halves; a column of any stride."""
    feats = randn(41 * channels + 1, 1, dtype=dtype, device=device).view(-1)[1:].view(41, channels)
    index = randint(-1, 20, (41,), device)
    want = reference.scatter_rows(feats, index, 20)
    assert torch.equal(points.scatter_rows(feats, index, 20), want)
    one = randn(channels, 3, dtype=dtype, device=device).t()[:1, :1]
    assert points.scatter_rows(one, index[:1] * 0, 1).tolist() == one.tolist()


@pytest.mark.parametrize("channels", [0, 1, 64])
@pytest.mark.parametrize(("value", "bit"), [(3, 0), (4, 64)])
def test_place_notes_a_row_outside(value, bit, channels, device):
    coords = torch.zeros((300, 2), dtype=torch.int32, device=device)
    coords[299, 1] = value
    word = torch.tensor(3, device=device)
    points.place_rows(torch.ones((300, channels), device=device), coords, (1, 4), word, 64)
    assert word.item() == 3 + bit


def test_place_does_not_note_padding(device):
    coords = torch.full((300, 2), PAD, dtype=torch.int32, device=device)
    coords[:200] = 0
    mark_rows(coords, torch.tensor([200], device=device))
    word = torch.tensor(0, device=device)
    points.place_rows(torch.ones((300, 3), device=device), coords, (1, 4), word, 64)
    assert word.item() == 0
    coords[199] = PAD
    points.place_rows(torch.ones((300, 3), device=device), coords, (1, 4), word, 64)
    assert word.item() == 64


LAYOUTS = {
    "contiguous": lambda g: g,
    "channels first": lambda g: g.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1),
    "expanded": lambda g: g[..., :1, :1].expand(g.shape),
    "constant": lambda g: g[:1, :1, :1, :1, :1].expand(g.shape),
    "axes swapped": lambda g: g.transpose(1, 3).contiguous().transpose(1, 3),
    "misaligned": lambda g: torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_gather(dtype, channels, layout, device):
    grid = LAYOUTS[layout](randn(2, 3, 4, 5, channels, dtype=dtype, device=device))
    index = randint(-1, 2 * 60, (77,), device)
    assert torch.equal(points.gather_rows(grid, index), reference.gather_rows(grid, index))


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (1, 1, 3)])
@pytest.mark.parametrize("rows", [0, 4])
def test_gather_of_little(shape, rows, device):
    grid = randn(*shape, dtype=torch.float32, device=device)
    index = torch.full((rows,), -1, device=device)
    index[:2] = 0 if shape[0] else -1
    want = torch.zeros((rows, shape[-1]), device=device)
    if grid.numel():
        want[:2] = grid.reshape(-1, shape[-1])[0]
    assert torch.equal(points.gather_rows(grid, index), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_share(dtype, device):
    rows = randn(22, 5, dtype=dtype, device=device)
    rows[3] = torch.nan
    index = randint(-2, 25, (150,), device, torch.int32)
    counts = randint(0, 4, (22,), device, torch.int32)
    counts[3] = 0  # nothing is taken from there
    got = points.share_rows(rows, index, counts)
    close(got, reference.share_rows(rows, index, counts))
    assert not got.isnan().any()


# ------------------------------------------------------------------ interpolation
@pytest.mark.parametrize("width", [0, 1, 8, 9])
@pytest.mark.parametrize("channels", [0, 3, 8, 130])
def test_devoxelize(channels, width, device):
    feats = randn(22, channels, dtype=torch.float32, device=device)
    index = randint(-2, 25, (37, width), device, torch.int32)
    weights = randn(37, width, dtype=torch.float32, device=device, seed=1)
    close(points.devoxelize(feats, index, weights), reference.devoxelize(feats, index, weights))


@pytest.mark.parametrize("weights_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_devoxelize_types(dtype, weights_dtype, device):
    feats = randn(22, 6, dtype=dtype, device=device)
    index = randint(-1, 22, (37, 8), device)
    weights = randn(37, 8, dtype=weights_dtype, device=device, seed=1)
    close(points.devoxelize(feats, index, weights), reference.devoxelize(feats, index, weights))
    grad = randn(37, 6, dtype=dtype, device=device, seed=2)
    got = points.devoxelize_weight_grad(feats, index, grad)
    close(got, reference.devoxelize_weight_grad(feats, index, grad))


def test_devoxelize_of_absent_voxels(device):
    """Neither a NaN weight nor a NaN row reaches a point through a neighbour that is not there."""
    feats = torch.tensor([[torch.nan], [2.0]], device=device)
    index = torch.tensor([[-1, 1], [2, 1], [0, 1]], device=device)
    weights = torch.tensor([[torch.nan, 0.5], [torch.nan, 0.25], [0.0, 1.0]], device=device)
    got = points.devoxelize(feats, index, weights)
    assert got[:2].flatten().tolist() == [1.0, 0.5]
    assert got[2].isnan()
    assert points.devoxelize(feats[:0], index, weights).tolist() == [[0.0]] * 3


@pytest.mark.parametrize(("highest", "noted"), [(-1, 0), (21, 0), (22, 4), (2**31 - 1, 4)])
def test_devoxelize_notes_numbers_behind_the_end(highest, noted, device):
    feats = randn(22, 3, dtype=torch.float32, device=device)
    index = torch.zeros((700, 5), dtype=torch.int32, device=device)
    index[600, 4] = highest
    word = torch.zeros((), dtype=torch.int64, device=device)
    points.devoxelize(feats, index, torch.ones((700, 5), device=device), word, 4)
    assert word.item() == noted


@pytest.mark.parametrize("channels", [1, 3, 64, 130])
@pytest.mark.parametrize("width", [1, 8])
def test_weight_grad(width, channels, device):
    feats = randn(22, channels, dtype=torch.float32, device=device)
    index = randint(-1, 24, (67, width), device, torch.int32)
    grad = randn(67, channels, dtype=torch.float32, device=device, seed=1)
    got = points.devoxelize_weight_grad(feats, index, grad)
    want = reference.devoxelize_weight_grad(feats.double(), index, grad.double())
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)  # sums of 130 terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 0.3])
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_trilinear_weights(rows, scale, dtype, device):
    xyz = 10 * randn(rows, 4, dtype=dtype, device=device)[:, 1:]  # columns of a wider tensor
    got = points.trilinear_weights(xyz, scale)
    close(got, reference.trilinear_weights(xyz.cpu(), scale).to(device))


@pytest.mark.parametrize("scale", [0.1, 3.0, 0.7])
def test_points_on_a_border_belong_to_the_upper_cell(scale, device):
    """k * s / s must not fall below k: an inexact quotient would turn a share of 0 into 1."""
    xyz = (torch.arange(300, device=device) * torch.tensor(scale, device=device)).view(-1, 3)
    cells = (xyz.cpu() / scale).floor()
    upper = ((xyz.cpu() - cells * scale) / scale).to(device)
    shares = points.trilinear_weights(xyz, scale)
    torch.testing.assert_close(shares[:, 4:].sum(1), upper[:, 0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------ on a GPU
@on_gpu
@pytest.mark.parametrize("channels", [1, 4, 32, 64])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_scenes(dtype, channels, device):
    """100 000 rows, a third of them in cells that others claim too; the same bits ten times."""
    feats = randn(100_000, channels, dtype=dtype, device=device)
    index = randint(-1, 150_000, (100_000,), device)
    want = reference.scatter_rows(feats.cpu(), index.cpu(), 150_000).to(device)
    around = randint(-1, 100_000, (50_000, 8), device, torch.int32)
    weights = randn(50_000, 8, dtype=torch.float32, device=device)
    first = points.devoxelize(feats, around, weights)
    close(first, reference.devoxelize(feats, around, weights))
    for _ in range(10):
        assert torch.equal(points.scatter_rows(feats, index, 150_000), want)
        assert torch.equal(points.devoxelize(feats, around, weights), first)
    assert torch.equal(points.gather_rows(want, index), reference.gather_rows(want, index))


@on_gpu
@pytest.mark.parametrize("channels", [1, 16])
def test_grids_of_more_than_32_bits(channels, device):
    """Regression 29: 2^31 elements and more in a grid."""
    num = 2**31 // channels + 100
    if torch.cuda.mem_get_info()[0] < 3 * 4 * num * channels:
        pytest.skip("needs 24 GiB of free memory")
    feats = randn(1000, channels, dtype=torch.float32, device=device)
    index = num - 1 - 3 * torch.arange(1000, device=device)
    index[:3] = torch.tensor([0, 5, -1], device=device)
    grid = points.scatter_rows(feats, index, num)
    there = index >= 0
    assert torch.equal(grid[index[there]], feats[there])
    assert torch.count_nonzero(grid) == torch.count_nonzero(feats[there])
    assert torch.equal(points.gather_rows(grid, index), feats * there[:, None])
