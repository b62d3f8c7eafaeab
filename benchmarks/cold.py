"""How long a fresh process takes to its first result.

    python benchmarks/networks.py minkunet --scene street --device cuda --cold

From after `import torch` to a network's output on the device: importing this library, building the
network, reading the scan, starting the device, compiling kernels. Once with an empty folder for
compiled kernels and once with what that left there; each with and without `inference.warmup`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

START = time.perf_counter()


def first_result(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds since `START` at some stations of a fresh process."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks import floors, scenes
    from benchmarks.cases import NETWORKS, features, tensor
    from benchmarks.timing import synchronize
    from torchsparse import backends
    from torchsparse.inference import warmup

    device = torch.device(options.device)
    backends.allow_tf32 = options.dtype == "tf32"
    floors.allow_tf32(options.dtype == "tf32")
    case, floating = NETWORKS[options.network], floors.DTYPES[options.dtype]
    model = case.build().eval().to(device, floating)
    scene = scenes.load(options.scene, Path(options.scenes))
    x = tensor(scene, case.in_channels, device, floating)
    synchronize(device)
    ready = time.perf_counter() - START
    compiled = warmup(model, x) if options.warmup else 0
    with torch.no_grad():
        features(model(tensor(scene, case.in_channels, device, floating)))
    synchronize(device)
    return {"ready_s": ready, "first_s": time.perf_counter() - START, "compiled": compiled}


def report(network: str, scene: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return four times, each of a process of its own."""
    dtype = options.dtypes[0]
    if not scene.endswith(".npz"):  # simulated once, by nobody who is timed
        from benchmarks import scenes

        scenes.load(scene, options.scenes)
    print(f"first result of {network} on {Path(scene).stem}, {dtype}, seconds after import torch "
          f"(of these, until the input was there)")  # fmt: skip
    print(f"{'':<18}{'no kernel compiled':>24}{'compiled before':>24}")
    table = []
    for warm in (False, True):
        texts = []
        with tempfile.TemporaryDirectory() as folder:
            for kept in (False, True):
                command = [
                    sys.executable, __file__, network, scene, "--scenes", str(options.scenes),
                    "--device", str(options.device), "--dtype", dtype,
                    *(["--warmup"] if warm else []),
                ]  # fmt: skip
                env = os.environ | {"TRITON_CACHE_DIR": folder}
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                if done.returncode:
                    print(f"failed: {done.stderr.strip()[-500:]}", flush=True)
                    texts.append("-")
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                table.append({"warmup": warm, "kept": kept} | found)
                texts.append(f"{found['first_s']:.2f} ({found['ready_s']:.2f})")
        note = f"  {table[-1]['compiled']} kernels compiled ahead" if warm and table else ""
        name = "after warmup()" if warm else "as it is"
        print(f"{name:<18}{texts[0]:>24}{texts[1]:>24}{note}", flush=True)
    return table


def main() -> None:
    """One process of `report`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("network")
    parser.add_argument("scene")
    parser.add_argument("--scenes", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--warmup", action="store_true")
    print(json.dumps(first_result(parser.parse_args())))


if __name__ == "__main__":
    main()
