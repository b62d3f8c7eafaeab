"""Work goes to the current stream of the device that the tensors are on."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.layers import KINDS, assert_right, assert_same_bits, run
from torchsparse import SparseTensor
from torchsparse.nn import functional as F

CPU = torch.device("cpu")
NAMES = ["pointwise", "submanifold-3", "strided-3", "transposed-2", "generative"]


@pytest.mark.parametrize("name", NAMES)
def test_a_side_stream_orders_the_work(name: str, gpu: torch.device) -> None:
    """Inputs arrive on a side stream behind a long wait; work elsewhere would not see them."""
    want = run(KINDS[name], (32, 64), "fp16", gpu)  # also compiles
    side = torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        got = run(KINDS[name], (32, 64), "fp16", gpu, before=lambda: torch.cuda._sleep(50_000_000))
    side.synchronize()
    assert_same_bits(got, want)


def test_the_default_stream_stays_free(gpu: torch.device) -> None:
    """Nothing of a forward pass on a kept map is put on another stream."""
    kind = KINDS["submanifold-3"]
    coords = run(kind, (32, 64), "fp16", gpu).coords
    x = SparseTensor(torch.ones(len(coords), 32, device=gpu), coords)
    weight = torch.ones(27, 32, 64, device=gpu)
    side = torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(side):
        for _ in range(2):
            F.conv3d(x, weight, 3)  # compiles, builds the map, gives the stream its memory
        torch.cuda.synchronize(gpu)
        torch.cuda._sleep(500_000_000)
        F.conv3d(x, weight, 3)
        assert torch.cuda.default_stream(gpu).query(), "work on the default stream"
        assert not side.query(), "somebody waited for the side stream"
    side.synchronize()


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_device_than_the_current_one(name: str, gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    second = torch.device("cuda", 1)
    want = run(KINDS[name], (32, 64), "fp16", CPU)
    with torch.cuda.device(0):
        got = run(KINDS[name], (32, 64), "fp16", second)
        assert torch.cuda.current_device() == 0
    assert got.out.device == second
    assert_right(got, want, "fp16")
    with torch.cuda.device(second):
        assert_right(run(KINDS[name], (32, 64), "fp16", gpu), want, "fp16")
