"""The Triton twin of the depthwise operations: on a GPU, or interpreted on tiny inputs; and what
the compiler makes of it for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import clouds
from tests.cases import assert_close
from torchsparse import SparseTensor
from torchsparse._autograd.depthwise import _plain, grouped_conv
from torchsparse._kernel_map import KernelMap
from torchsparse._ops.dispatch import forced
from torchsparse.nn.functional.conv.choices import resolve
from torchsparse.nn.functional.conv.conv import find_map

ROOT = Path(__file__).resolve().parents[2]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What runs a kernel without a GPU; the variable counts when the kernels are first imported.
runs = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1",
)
# Outputs and gradients of a layer against float64; sums of at most 27 terms of size 1, or of 30
# pairs for the weight.
FORMATS = [
    ((5, 5), torch.float32),
    ((20, 20), torch.float16),
    ((3, 6), torch.float32),
    ((3, 6), torch.bfloat16),
]


def kernel_map(coords: clouds.Coords, kernel_size: int, stride: int) -> KernelMap:
    """A map of which nothing has been derived."""
    rows = torch.from_numpy(coords).to(HERE)
    x = SparseTensor(torch.zeros(len(rows), 1, device=HERE), rows)
    ones = (1,) * 3
    kmap, _ = find_map(3, x, (kernel_size,) * 3, (stride,) * 3, (0,) * 3, ones, "spconv")
    return replace(kmap, sort_keys=None, _views={})


def layer(
    kmap: KernelMap, transposed: bool, tensors: list[Tensor], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of features, weight and bias."""
    feats, weight, bias = (t.to(dtype).requires_grad_() for t in tensors)
    recipe = resolve(None, feats, weight, bias)
    out = grouped_conv(feats, weight, bias, kmap, transposed, recipe, feats.shape[1])
    return [out, *torch.autograd.grad(out, (feats, weight, bias), grad.to(dtype))]


@runs
@pytest.mark.parametrize(("channels", "dtype"), FORMATS, ids=str)
@pytest.mark.parametrize(
    ("cloud", "kernel_size", "stride", "transposed"),
    [
        ("single", 3, 1, False),
        ("odd", 3, 1, False),
        ("odd", 2, 1, False),
        ("odd", 2, 2, False),
        ("odd", 3, 2, True),
    ],
)
def test_depthwise_matches_float64(
    cloud: str,
    kernel_size: int,
    stride: int,
    transposed: bool,
    channels: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Rounded inputs: what remains is float32 sums and the one rounding at the end."""
    kmap = kernel_map(clouds.CLOUDS[cloud](), kernel_size, stride)
    sizes = kmap.num_inputs, kmap.num_outputs
    n, m = sizes[::-1] if transposed else sizes
    shapes = (n, channels[0]), (kernel_size**3, 1, channels[1]), (channels[1],), (m, channels[1])
    rng = clouds.rng("depthwise")
    *tensors, grad = (
        torch.from_numpy(rng.standard_normal(shape) / np.sqrt(len(shape) * 9)).to(HERE, dtype)
        for shape in shapes
    )
    want = layer(kmap, transposed, [t.double() for t in tensors], grad, torch.float64)
    with forced("_triton"):
        got = layer(kmap, transposed, tensors, grad, dtype)
    for one, other in zip(got, want):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


@runs
def test_many_taps_on_sorted_rows() -> None:
    """125 taps need four masks; ones count the neighbours of each row, where it belongs."""
    kmap = kernel_map(clouds.plane(), 5, 1)
    feats, weight = torch.ones(60, 1, device=HERE), torch.ones(125, 1, 1, device=HERE)
    recipe = resolve({"ifsort": True}, feats, weight, None)
    with forced("_triton"):
        out = grouped_conv(feats, weight, None, kmap, False, recipe, 1)
        tiles = kmap.plan(_plain(recipe), 1).plan.tiles
    assert tiles.order is not None and not torch.equal(tiles.order, tiles.order.sort().values)
    assert torch.equal(out[:, 0], (kmap.neighbors >= 0).sum(0).float())


COMPILE = """
import torch
from tests._triton.compiling import record
from tests._triton.test_depthwise import HERE, kernel_map, layer
from tests import clouds
from torchsparse._ops.dispatch import forced

kmap = kernel_map(clouds.block(), 3, 1)
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for channels in (64, 96, 128):
        n = kmap.num_inputs
        shapes = (n, channels), (27, 1, channels), (channels,), (n, channels)
        *tensors, grad = (torch.zeros(shape) for shape in shapes)
        with record() as found, forced("_triton"):
            layer(kmap, False, tensors, grad, dtype)
        kernels = [k for k in found if k.name.startswith("depthwise")]
        assert len(kernels) == 3, kernels  # forward, input gradient, weight gradient
        per_lane = 16 * (1 if dtype == torch.float32 else 2) // 4
        for kernel in kernels:
            tile = kernel.constants
            text = f"{kernel} {dtype} {channels}"
            assert kernel.stack == 0, text
            # Rows are gathered and written 16 bytes at a time.
            gathers = tile["BM"] * tile["BC"] // (per_lane * 128)
            both = 2 if kernel.name == "depthwise_grad_kernel" else 1
            assert kernel.count(r"LDG\\.E\\.128") >= both * gathers, text
            assert both == 2 or kernel.count(r"STG\\.E\\.128") == gathers, text
            # The loop needs no exchange between lanes.
            assert both == 2 or kernel.count(r"BAR\\.SYNC") == 0, text
            assert both == 2 or kernel.kernel.metadata.shared == 0, text
print("compiled")
"""


@pytest.mark.slow
def test_kernels_load_16_bytes_and_spill_nothing() -> None:
    """For an H100, in a process that does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == "compiled"
