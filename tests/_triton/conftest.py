"""Where kernels run: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchsparse._ops.dispatch import forced
from torchsparse.nn.functional.conv import ahead


class _WithoutTriton(pytest.Module):
    """A file whose imports would fail."""

    def collect(self):
        pytest.skip("the kernels need Triton, which is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if importlib.util.find_spec("triton") is None:
        return _WithoutTriton.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "_triton" in item.nodeid:
            # The interpreter turns arrays of one element into numbers, and wraps around silently.
            for message in ("ignore:Conversion of an array", "ignore:overflow encountered"):
                item.add_marker(pytest.mark.filterwarnings(message))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """No notes of what networks of other tests asked for: a weight may lie where theirs lay."""
    ahead._notes.clear()
    yield
    ahead._notes.clear()


@pytest.fixture
def rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the interpreter whose rows do not depend on where they lie, as on a GPU.

    Its own are NumPy's, and these a BLAS: on some processors the last bits of a row differ with
    its place in the block.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        total = np.zeros_like(d.data)
        for k in range(a.data.shape[-1]):
            total += a.data[..., :, k, None].astype(total.dtype) * b.data[..., None, k, :]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def kernels() -> Iterator[None]:
    """Operations are served by kernels, whatever the device."""
    with forced("_triton"):
        yield
