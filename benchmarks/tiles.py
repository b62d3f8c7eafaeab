"""Which tile shapes of the implicit GEMM are fastest for which layers: what `tiles.py` ships.

    PYTHONPATH=src python benchmarks/tiles.py --scene street-fine scan.npz
    PYTHONPATH=src python benchmarks/tiles.py --scene street-fine --layers 3:384:256 --top 8

Submanifold 3x3x3 layers, given as halvings:C_in:C_out, on the levels that halvings of a scene
make. All candidates are compiled at once; each is compared with a float64 product before it is
timed, together with the sum of its shares if its taps are split. "own": each share has its own
order of the rows. Microseconds, of replays of a CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import floors, oracle, scenes, timing
from benchmarks.cases import tensor
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._geometry import Geometry
from torchsparse._ops.dispatch import forced
from torchsparse._reference import conv as reference
from torchsparse.nn.functional.conv.mapping import same_sites

CUBE = Geometry.submanifold((3, 3, 3), (1, 1, 1))
# The layers of a MinkUNet 1.0, without those that repeat.
LAYERS = (
    "0:32:32", "1:32:32", "2:64:64", "3:128:128", "4:128:256", "4:256:256", "3:384:256",
    "3:256:256", "2:192:128", "2:128:128", "1:128:96", "1:96:96", "0:128:96", "0:96:96",
)  # fmt: skip
# Rows, channels per turn, stages, warps; columns are the layer's up to 128, and all of 256.
HALF = (
    (64, 32, 3, 4), (64, 32, 4, 4), (64, 32, 6, 4), (64, 64, 3, 4), (64, 64, 4, 4),
    (64, 128, 2, 4), (64, 128, 3, 4), (128, 32, 4, 4), (128, 64, 3, 4), (128, 64, 3, 8),
    (128, 64, 4, 8),
)  # fmt: skip
FULL = (
    (64, 32, 3, 4), (64, 32, 4, 4), (64, 64, 2, 4), (64, 64, 3, 4), (128, 32, 3, 4),
    (128, 32, 3, 8),
)  # fmt: skip
# Shares of the largest entry. fp32 is what float32 means without TF32: three products of it.
AGREE = {"fp16": 2e-3, "bf16": 1e-2, "tf32": 4e-3, "fp32": 1e-5, "ieee": 1e-5}
PRECISION = {"tf32": "tf32", "fp32": "tf32x3"}
FLOATING = {**floors.DTYPES, "ieee": torch.float32}
Tile = tuple[int, ...]


class Layer(NamedTuple):
    """Channels on a level."""

    level: int
    c_in: int
    c_out: int

    @staticmethod
    def of(text: str) -> Layer:
        level, c_in, c_out = map(int, text.split(":"))
        return Layer(level, c_in, c_out)


def tables(scene: scenes.Scene, levels: int, device: torch.device) -> list[tuple[Tensor, Any]]:
    """The neighbour table and the sort keys of each level."""
    x = tensor(scene, 4, device, torch.float32)
    down = spnn.Conv3d(4, 4, 2, 2).to(device)
    found = []
    with torch.no_grad():
        for level in range(levels):
            x = down(x) if level else x
            here = SparseTensor(x.feats, x.coords)
            kmap = same_sites(here, here.coords, CUBE)
            found.append((kmap.neighbors, kmap.sort_keys))
    return found


def candidates(
    layer: Layer, dtype: str, splits: list[int], own: list[int]
) -> Iterator[tuple[Tile, bool]]:
    """Tiles with the numbers of shares of their taps, and whether these have their own orders."""
    from torchsparse._triton.launch import next_power

    half = FLOATING[dtype] != torch.float32
    columns = {min(max(next_power(layer.c_out), 16), 128)}
    if dtype in ("fp32", "ieee"):  # registers are what these run short of
        columns.add(64)
    elif layer.c_out == 256:
        columns.add(256)
    orders = [*zip(splits, itertools.repeat(False)), *zip(own, itertools.repeat(True))]
    for (bm, bk, stages, warps), bn, (shares, apart) in itertools.product(
        HALF if half else FULL, columns, orders
    ):
        if bk <= max(2 * next_power(layer.c_in), 16) and bm * bn <= 128 * 32 * warps:
            yield (bm, bn, bk, stages, warps, shares), apart


def sweep(
    layer: Layer, table: Tensor, keys: Any, dtype: str, splits: list[int], own: list[int],
    seconds: float,
) -> list[tuple[float, Tile, bool, bool]]:  # fmt: skip
    """Microseconds and tile of each candidate, fastest first; whether its shares have orders of
    their own, and whether it is the shipped one.

    Raises:
        oracle.WrongResult: The shipped one is wrong. Others that are, or do not compile, are left
            out.
    """
    from torchsparse._triton import conv, tiles
    from torchsparse._triton.conv import product
    from torchsparse._triton.conv.plan import own_layout

    device, floating = table.device, FLOATING[dtype]
    precision = PRECISION.get(dtype, "ieee")
    rows = table.shape[1]
    torch.manual_seed(0)
    feats = torch.randn(rows, layer.c_in, device=device).to(floating)
    weight = torch.randn(CUBE.volume, layer.c_in, layer.c_out, device=device).to(floating)
    if product._must_turn(floating, weight.stride(), precision):  # once, as layers do
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    exact = reference.gather_gemm(
        feats.double(), weight.double(), None,
        reference.make_plan(table, None, reference.choose_layout(layer.c_out)),
        "ieee",
    )  # fmt: skip
    _, _, ours = own_layout(rows, CUBE, floating, precision)
    plans = {
        shares: conv.make_plan(table, keys, CUBE, ("gemm", True, shares))
        for shares in {1, ours, *own}
    }
    blocks = product._form(weight, precision, True).blocks > 0 and tiles.has_blocks(device)
    shipped = tuple(
        tiles.shipped_gemm_tile(
            rows, layer.c_in, layer.c_out, CUBE.volume, floating, precision, blocks, ours
        )
    )
    first = shipped, ours > 1
    wanted = dict.fromkeys([first, *candidates(layer, dtype, splits, own)])

    def step_of(tile: Tile, apart: bool) -> Callable[[], Tensor]:
        plan = plans[tile[5] if apart else 1]

        def step() -> Tensor:
            return conv.gather_gemm(feats, weight, None, plan, precision)

        plan.memo.clear()
        product._forms.clear()  # and with them what was chosen
        return mock.patch.object(product, "gemm_tile", lambda *_, **__: tiles.GemmTile(*tile))(
            step
        )

    def rehearse(tile: Tile, apart: bool) -> Callable[[], Any]:
        return lambda: step_of(tile, apart)()

    conv.compile_ahead(itertools.starmap(rehearse, wanted))
    found = []
    for tile, apart in wanted:
        is_first = (tile, apart) == first
        try:
            step = step_of(tile, apart)
            error = ((step().double() - exact).abs().max() / exact.abs().max()).item()
            if not error <= AGREE[dtype]:
                raise oracle.WrongResult(f"{layer} {tile} {dtype}: off by {error:.1e}")
            if device.type == "cuda":
                step = timing.captured(step)
            time = 1e3 * timing.fastest(step, device, seconds)
            found.append((time, tile, apart, is_first))
        except Exception as error:
            if is_first:
                raise
            print(f"  {tile}: {type(error).__name__}: {str(error)[:80]}")
    return sorted(found)


@contextmanager
def reading(*, addresses: bool) -> Iterator[None]:
    """Let products read their weights by ``addresses``, or as they choose."""
    from torchsparse._triton.conv import product

    choose = product.has_blocks
    with mock.patch.multiple(
        product, _forms={}, has_blocks=lambda device: not addresses and choose(device)
    ):
        yield


def main(argv: list[str] | None = None) -> int:
    """Print a line for each layer, type and scene; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scene", nargs="+", default=["street-fine"])
    parser.add_argument("--scenes", type=Path, default=scenes.FOLDER, help="folder of the files")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="halvings:C_in:C_out")
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "tf32"], choices=list(AGREE))
    parser.add_argument("--splits", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument(
        "--own", nargs="*", type=int, default=[2, 4], help="shares with own orders"
    )
    parser.add_argument(
        "--addresses", action="store_true", help="read no weight in blocks: see product._blocks"
    )
    parser.add_argument("--top", type=int, default=5, help="so many of the fastest")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=0.1, help="for each, on a CPU")
    options = parser.parse_args(argv)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu uses Triton's interpreter")
    layers = list(map(Layer.of, options.layers))
    # Also in Triton's interpreter, to try this script.
    with forced("_triton"), reading(addresses=options.addresses):
        for name in options.scene:
            scene = scenes.load(name, options.scenes)
            found = tables(scene, 1 + max(layer.level for layer in layers), options.device)
            dtypes: list[str] = options.dtypes
            for layer, dtype in ((layer, dtype) for layer in layers for dtype in dtypes):
                table, keys = found[layer.level]
                rows = sweep(
                    layer, table, keys, dtype, options.splits, options.own, options.seconds
                )
                own = next(time for time, _, _, shipped in rows if shipped)
                print(
                    f"{Path(name).stem} {':'.join(map(str, layer))} {dtype}, "
                    f"{table.shape[1]} rows: shipped {own:.1f} us, "
                    f"{own / rows[0][0]:.2f} of the best;",
                    *(
                        f"{time:.1f} {tile}{' own' if apart else ''}"
                        for time, tile, apart, _ in rows[: options.top]
                    ),
                    flush=True,
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
