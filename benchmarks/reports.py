"""Rows of results: on a line, in a file, and the machine that they belong to."""

from __future__ import annotations

import csv
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = {
    "case", "network", "library", "way", "mode", "maps", "dtype", "scene", "clock", "remarks",
    "device", "torch", "triton", "version",
}  # fmt: skip
"""Columns that are no numbers."""


def number(row: dict[str, Any], name: str, form: str) -> str:
    """A value of a row in a format such as "9.3f"; "-" in its width if there is none."""
    value = row.get(name)
    width = form.split(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def write(path: Path, columns: Sequence[str], table: Sequence[dict[str, Any]]) -> None:
    """A CSV file; empty cells for what a row lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of such a file."""
    with path.open() as file:
        for row in csv.DictReader(file):
            yield {name: text if name in WORDS else _value(text) for name, text in row.items()}


def _value(text: str) -> Any:
    if text.isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text or None


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on besides the program."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    triton = sys.modules.get("triton")
    return {
        "threads": torch.get_num_threads(), "device": name, "torch": torch.__version__,
        "triton": getattr(triton, "__version__", ""),
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
