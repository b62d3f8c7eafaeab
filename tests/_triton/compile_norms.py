"""Compile the kernels of batch normalisation, without a GPU, and print what they are made of.

    python tests/_triton/compile_norms.py 90

Prints one JSON list of reports for sm_80 or sm_90, as `compile_layers.py` does.
"""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests._triton.compiling import Compiled, record
from torchsparse._triton import batch_norm

ROWS = 94_444  # a SemanticKITTI scan
CASES = [(64, torch.float16), (96, torch.float16), (96, torch.bfloat16), (96, torch.float32)]
WIDTHS = {"LDG": r"\bLDG\.E(\S*)", "STG": r"\bSTG\.E(\S*)"}
BYTES = {"128": 16, "64": 8, "U16": 2, "U8": 1}


def run(channels: int, dtype: torch.dtype, slope: float | None, added: bool) -> None:
    """Both directions, with running statistics and parameters in float32."""
    feats = torch.zeros((ROWS, channels), dtype=dtype)
    own = torch.zeros(channels)
    count = torch.zeros((), dtype=torch.int64)
    moments = batch_norm.batch_moments_(feats, 1e-5, own, own, count, 0.1 if added else None)
    residual = feats if added else None
    out = batch_norm.normalise(feats, moments, own, own, residual, slope)
    args = feats, feats, moments, own, own, out if added else None, slope
    means, _, _ = batch_norm.grad_sums(*args)
    batch_norm.grad_rows(*args, means, added)


def widths(kernel: Compiled, op: str) -> int:
    """Bytes of the widest load or store of a thread."""
    found = re.findall(WIDTHS[op], kernel.code)
    return max((next((b for w, b in BYTES.items() if w in f), 4) for f in found), default=0)


def report(name: str, kernel: Compiled) -> dict[str, Any]:
    return {
        "case": name,
        "kernel": kernel.name,
        "load": widths(kernel, "LDG"),
        "store": widths(kernel, "STG"),
        "in_flight": kernel.in_flight,
        "copies": kernel.count(r"\bLDGSTS"),
        "wide_copies": kernel.count(r"\bLDGSTS\S*\.128"),
        "registers": int(re.findall(r"REG:(\d+)", kernel._tool("-res-usage"))[-1]),
        "stack": kernel.stack,
        "local": kernel.count(r"\b(?:LDL|STL)\b"),
        "float_atomics": kernel.count(r"(?:RED|ATOMG?)\.[A-Z.]*(?:F16|F32|F64|BF16)"),
    }


def main(arch: int) -> None:
    found: list[tuple[str, Compiled]] = []
    for channels, dtype in CASES:
        for slope, added in ((0.0, False), (0.1, True)):
            with record(arch) as kernels:
                run(channels, dtype, slope, added)
            name = f"{channels} {str(dtype).removeprefix('torch.')} {slope} {added}"
            found.extend((name, kernel) for kernel in kernels)
    with ThreadPoolExecutor() as pool:  # the disassembler is a process of its own
        print(json.dumps(list(pool.map(lambda one: report(*one), found))))


if __name__ == "__main__":
    main(int(sys.argv[1]))
