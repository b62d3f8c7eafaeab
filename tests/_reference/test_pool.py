"""Pooling on given tables: small examples by hand, and nothing that waits for a GPU."""

from __future__ import annotations

import pytest
import torch

from torchsparse._ops import pool

# 1-D, kernel 3, sites 4, 5, 9 at stride 1, and one output more without neighbours.
TABLE = torch.tensor([[-1, 0, -1, -1], [0, 1, 2, -1], [1, -1, -1, -1]], dtype=torch.int32)
BACK = torch.tensor([[1, -1, -1], [0, 1, 2], [-1, 0, -1]], dtype=torch.int32)


def test_by_hand():
    feats = torch.tensor([[1.0, -1.0], [2.0, -1.0], [4.0, -3.0]])
    assert pool.pool_sum(feats, TABLE).tolist() == [[3, -2], [3, -2], [4, -3], [0, 0]]
    assert pool.pool_sum(feats, TABLE, mean=True).tolist() == [
        [1.5, -1],
        [1.5, -1],
        [4, -3],
        [0, 0],
    ]
    shares = torch.tensor([1.0, 10.0, 100.0])
    assert pool.pool_sum(feats, TABLE, shares)[:, 0].tolist() == [21, 21, 400, 0]
    out, rows = pool.pool_max(feats, TABLE)
    assert out.tolist() == [[2, -1], [2, -1], [4, -3], [0, 0]]
    assert rows.tolist() == [[1, 0], [1, 0], [2, 2], [-1, -1]]
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    assert pool.unpool_max(values, rows, BACK).tolist() == [[0, 10], [5, 0], [16, 32]]
    assert pool.pick_rows(feats, rows).tolist() == out.tolist()


@pytest.mark.parametrize("channels", [0, 1, 5])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 0), (0, 3), (4, 0)])
def test_nothing_to_pool(inputs, outputs, channels):
    feats = torch.ones((inputs, channels))
    table = torch.full((8, outputs), -1, dtype=torch.int32)
    back = torch.full((8, inputs), -1, dtype=torch.int32)
    assert pool.pool_sum(feats, table, mean=True).tolist() == [[0.0] * channels] * outputs
    out, rows = pool.pool_max(feats, table)
    assert out.tolist() == [[0.0] * channels] * outputs
    assert rows.tolist() == [[-1] * channels] * outputs
    assert pool.unpool_max(out, rows, back).tolist() == [[0.0] * channels] * inputs
    assert pool.pick_rows(feats, rows).tolist() == out.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_operation_waits_for_a_gpu(dtype):
    """Meta tensors have no values to ask for: an operation that waits would fail."""
    meta = torch.device("meta")
    feats = torch.empty((30, 4), dtype=dtype, device=meta)
    table = torch.empty((8, 12), dtype=torch.int32, device=meta)
    back = torch.empty((8, 30), dtype=torch.int32, device=meta)
    for waits in (torch.Tensor.item, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(table[0, :1])
    total = pool.pool_sum(feats, table, torch.empty(30, device=meta), mean=True)
    out, rows = pool.pool_max(feats, table)
    again = pool.unpool_max(out, rows, back)
    picked = pool.pick_rows(feats, rows)
    for got, shape in ((total, (12, 4)), (out, (12, 4)), (again, (30, 4)), (picked, (12, 4))):
        assert got.shape == shape and got.dtype == dtype
    assert rows.shape == (12, 4) and rows.dtype == torch.int32
