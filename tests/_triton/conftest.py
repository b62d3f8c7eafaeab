"""Where kernels run: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchsparse._ops.dispatch import forced


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
def kernels() -> Iterator[None]:
    """Operations are served by kernels, whatever the device."""
    with forced("_triton"):
        yield
