"""`torchsparse warmup` where there is something to compile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.scans import again, scan
from torchsparse import _warmup
from torchsparse.backbones import SparseResUNet42
from torchsparse.segmentation import Recipe, Segmenter, save_checkpoint


@pytest.mark.parametrize("graph", [False, True])
def test_kernels_and_graphs_are_counted(graph: bool, gpu: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from torchsparse.cli.app import app

    recipe = Recipe(voxel_size=0.5, stem=8, encoder=(8, 8), decoder=(8, 8))
    save_checkpoint(Segmenter.new(recipe), tmp_path / "checkpoint.pt")
    (tmp_path / "scans").mkdir()
    for seed, points in enumerate((900, 2000)):  # in size classes of their own
        draw = np.random.default_rng(seed)
        cloud = draw.uniform(0, [40, 40, 4, 1], (points, 4)).astype("<f4")
        cloud.tofile(tmp_path / "scans" / f"{seed}.bin")
    arguments = ["warmup", str(tmp_path / "checkpoint.pt"), str(tmp_path / "scans")]
    options = [f"--device={gpu}", *["--graph"] * graph]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    said, times = result.stdout.splitlines()
    ending = ", 2 graphs captured" if graph else ""
    found = re.fullmatch(r"(\d+) kernels ready after \d+\.\d s" + ending, said)
    assert found is not None and int(found[1]) > 5
    assert re.fullmatch(r"\d+ voxels: first result \d+\.\d\d ms, second \d+\.\d\d ms", times)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_to_compile(
    training: bool, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step under autocast finds all its kernels."""
    jit = pytest.importorskip("triton.runtime.jit")
    torch.manual_seed(0)
    model = SparseResUNet42(width_multiplier=0.25).to(gpu).train(training)
    x = scan(3000, 1, gpu, size=40)
    x.feats.requires_grad_(training)
    cast = torch.autocast("cuda", torch.float16)
    with cast, _warmup._left_alone(model, [x]):
        assert _warmup.compile_passes(model, [x], None) > 10
    missed: list[str] = []
    right = jit.JITFunction._do_compile

    def compiling(kernel: Any, *args: Any, **options: Any) -> Any:
        missed.append(kernel.fn.__name__)
        return right(kernel, *args, **options)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compiling)
    for _ in range(2):  # the second has its maps built together
        with torch.set_grad_enabled(training):
            with cast:
                loss = model(again(x))[-1].feats.float().square().mean()
            if training:
                loss.backward()
    torch.cuda.synchronize(gpu)
    assert missed == []
