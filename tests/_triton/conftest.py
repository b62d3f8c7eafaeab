"""Where kernels run: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from torchsparse import _ops

FAMILIES = ("norm", "points", "reduce", "table")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "_triton" in item.nodeid:
            # The interpreter turns arrays of one element into numbers, and wraps around silently.
            for message in ("ignore:Conversion of an array", "ignore:overflow encountered"):
                item.add_marker(pytest.mark.filterwarnings(message))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations are served by kernels, whatever the device."""
    for family in FAMILIES:
        face = importlib.import_module(f"{_ops.__name__}.{family}")
        monkeypatch.setattr(
            face, "twin", lambda name, _: importlib.import_module(f"torchsparse._triton.{name}")
        )
    yield
