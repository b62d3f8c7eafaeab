"""The kernels run where they can: on a GPU, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The one device of these tests. The interpreter and a GPU exclude each other."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
