"""Compile what convolutions launch, without a GPU, and print what the machine code holds.

    python tests/_triton/compile_layers.py 90

The public functions of the engine run on CPU tensors under `compiling.record`, so each kernel is
compiled for exactly the arguments that it gets. Prints one JSON list of reports for sm_80 or
sm_90; the sizes are those of the benchmarks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests._triton.compiling import Compiled, record
from torchsparse._asked import Asked
from torchsparse._geometry import Geometry
from torchsparse._recipe import Epilogue, Norm
from torchsparse._triton import coords, maps
from torchsparse._triton.conv import (
    dense,
    finish,
    gather_gemm,
    make_pairs,
    make_plan,
    product,
    weight_grad,
)
from torchsparse._triton.conv.order import new_sort_keys, untile
from torchsparse._triton.coords import create as levels

ONES = (1, 1, 1)
CUBE = Geometry.submanifold((3, 3, 3), ONES)
DOWN = Geometry.strided((2, 2, 2), (2, 2, 2), (0, 0, 0), ONES, "spconv")
WIDE = Geometry.submanifold((5, 5, 5), ONES)
ROWS = 94_444  # a SemanticKITTI scan
HALF, FULL = torch.float16, torch.float32
# (geometry, C_in, C_out, dtype, precision)
FORWARD = [
    *((CUBE, c, c, HALF, "ieee") for c in (32, 64, 128, 256)),
    *((CUBE, c, c, FULL, "tf32") for c in (64, 128, 256)),
    *((CUBE, c, c, FULL, "tf32x3") for c in (64, 128)),
    (CUBE, 64, 64, torch.bfloat16, "ieee"),
    (DOWN, 32, 64, HALF, "ieee"),
    (DOWN, 64, 32, HALF, "ieee"),
    (DOWN, 64, 128, FULL, "tf32"),
]
BACKWARD = [
    *((CUBE, c, c, HALF, "ieee") for c in (32, 64, 128, 256)),
    *((CUBE, c, c, FULL, "tf32") for c in (64, 128, 256)),
    *((CUBE, c, c, FULL, "tf32x3") for c in (32, 64, 128)),
]


SHARED = (
    (CUBE, 128, 128, HALF, "ieee"),
    (CUBE, 256, 256, HALF, "ieee"),
    (CUBE, 256, 256, FULL, "tf32"),
    (CUBE, 128, 128, FULL, "tf32x3"),
)


def operands(geometry: Geometry, c_in: int, c_out: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        torch.zeros((geometry.volume, ROWS), dtype=torch.int32),
        torch.zeros((ROWS, c_in), dtype=dtype),
        torch.zeros((geometry.volume, c_in, c_out), dtype=dtype),
        torch.zeros((ROWS, c_out), dtype=dtype),
    )


def forward(geometry: Geometry, c_in: int, c_out: int, dtype: torch.dtype, precision: str) -> None:
    table, feats, weight, _ = operands(geometry, c_in, c_out, dtype)
    keys = new_sort_keys(table, ROWS, geometry.volume)
    plan = make_plan(table, keys, geometry, ("gemm", True, 1))
    gather_gemm(feats, weight, None, plan, precision)


def shared(geometry: Geometry, c_in: int, c_out: int, dtype: torch.dtype, precision: str) -> None:
    table, feats, weight, _ = operands(geometry, c_in, c_out, dtype)
    plan = make_plan(table, None, geometry, ("gemm", True, 4))
    gather_gemm(feats, weight, None, plan, precision)


def backward(
    geometry: Geometry, c_in: int, c_out: int, dtype: torch.dtype, precision: str
) -> None:
    table, feats, _, grad = operands(geometry, c_in, c_out, dtype)
    weight_grad(feats, grad, make_pairs(table, geometry), precision)


fill = levels._fill


def some_sites(cells: int) -> Callable[..., Any]:
    """Nothing runs, so no site was counted."""

    def filled(*args: Any) -> Any:
        found = fill(*args)
        return found._replace(info=found.info + torch.tensor([5, 0, 0, cells]))

    return filled


def the_rest() -> None:
    """Every other kernel, and the unusual forms of these."""
    sites = torch.zeros((5000, 4), dtype=torch.int32)
    for geometry in (CUBE, WIDE):
        index = coords.build_index(sites, geometry.reach)
        table, _ = coords.find_taps(index, None, geometry)
        coords.invert_taps(table, 5000, geometry)
        make_pairs(table, geometry)
    # Few channels, many taps, plain float32, shares, half in float32 steps of fetch on demand.
    for geometry, layout, channels, dtype, precision in (
        (CUBE, ("gemm", False, 1), 4, HALF, "ieee"),
        (CUBE, ("gemm", False, 1), 4, FULL, "ieee"),
        (CUBE, ("gemm", False, 1), 4, FULL, "tf32x3"),
        (WIDE, ("gemm", True, 1), 64, HALF, "ieee"),
        (CUBE, ("gemm", True, 3), 20, HALF, "ieee"),
        (CUBE, ("gemm", True, 1), 96, HALF, "ieee"),
        (CUBE, ("gemm", True, 1), 128, HALF, "ieee"),
        (CUBE, ("gemm", True, 1), 64, FULL, "ieee"),
        (CUBE, ("gemm", True, 4), 128, FULL, "ieee"),
        (CUBE, ("fetch", False, 1), 20, FULL, "ieee"),
        (CUBE, ("fetch", False, 1), 128, FULL, "ieee"),
        (CUBE, ("fetch", False, 1), 64, HALF, "ieee"),
    ):
        table = torch.zeros((geometry.volume, 1000), dtype=torch.int32)
        feats = torch.zeros((1000, channels), dtype=dtype)
        weight = torch.zeros((geometry.volume, channels, max(channels, 64)), dtype=dtype)
        plan = make_plan(table, None, geometry, layout)._replace(reverse=True)
        gather_gemm(feats, weight, weight.new_zeros(weight.shape[2]), plan, precision)
    coords.check_sites(index, (1, 2, 3, 4), False)
    layout = ("gemm", True, 1)
    asked = [Asked(index, None, CUBE, layout), Asked(index, sites, DOWN, layout, layout)]
    maps.build_together(asked)
    for generative, cells in ((False, 5), (True, 5), (False, 1 << 40)):
        levels._fill = some_sites(cells)
        geometry = Geometry.strided(
            (3, 3, 3), (2, 2, 2), ONES, ONES, "spconv", "generative" if generative else "strided"
        )
        make = coords.generative_sites if generative else coords.strided_sites
        make(index, sites, geometry, (0, 0, 0), (9, 9, 9))
    table, feats, weight, residual = operands(CUBE, 64, 64, HALF)
    stats = torch.zeros(64)
    epilogue = Epilogue(Norm(stats, stats, stats, stats, 1e-5), residual, 0.0)
    plan = make_plan(table, None, CUBE, ("gemm", True, 1))
    assert plan.tiles is not None
    untile(plan.tiles)
    gather_gemm(feats, weight, stats.half(), plan, "ieee", epilogue)
    finish(feats, epilogue)
    for rows, c_in, c_out in ((ROWS, 64, 64), (ROWS, 128, 96), (9000, 384, 256)):
        stats = torch.zeros(c_out)
        norm = Norm(stats, stats, stats, stats, 1e-5)
        many = Epilogue(norm, torch.zeros((rows, c_out), dtype=HALF), 0.0)
        dense(torch.zeros(rows, c_in).half(), torch.zeros(c_in, c_out).half(), None, many)
    weight = torch.zeros((27, 64, 128))
    product._turn(weight.shape, weight.stride(), weight.dtype).of(weight)
    weight_grad(feats, residual, make_pairs(table, CUBE))


def report(name: str, kernel: Compiled) -> dict[str, Any]:
    return {
        "layer": name,
        "kernel": kernel.name,
        "in_flight": kernel.in_flight,
        "copies": kernel.count(r"\bLDGSTS"),
        "wide_copies": kernel.count(r"\bLDGSTS\S*\.128"),
        "blocks": kernel.count(r"\bUTMALDG"),
        "hgmma": kernel.count(r"\bHGMMA"),
        "hmma": kernel.count(r"\bHMMA"),
        "stack": kernel.stack,
        "shared": kernel.kernel.metadata.shared,
        "tile": [kernel.constants.get(size, 0) for size in ("BM", "BN", "BK")],
        "stages": kernel.kernel.metadata.num_stages,
        "float_atomics": kernel.count(r"(?:RED|ATOMG?)\.[A-Z.]*(?:F16|F32|F64|BF16)"),
    }


def main(arch: int) -> None:
    found: list[tuple[str, Compiled]] = []

    def run(name: str, wanted: str, call: Callable[..., None], *args: Any) -> None:
        with record(arch) as kernels:
            call(*args)
        found.extend((name, k) for k in kernels if wanted in ("", k.name))

    for kind, call, wanted, layers in (
        ("forward", forward, "gemm_kernel", FORWARD),
        ("shared", shared, "gemm_kernel", SHARED),
        ("backward", backward, "wgrad_kernel", BACKWARD),
    ):
        for layer in layers:
            geometry, c_in, c_out, dtype, precision = layer
            mode = str(dtype).removeprefix("torch.") if dtype != FULL else precision
            run(f"{kind} {geometry.volume} {c_in} {c_out} {mode}", wanted, call, *layer)
    if arch == 90:  # what is left depends little on the GPU
        run("rest", "", the_rest)
    with ThreadPoolExecutor() as pool:  # the disassembler is a process of its own
        print(json.dumps(list(pool.map(lambda one: report(*one), found))))


if __name__ == "__main__":
    main(int(sys.argv[1]))
