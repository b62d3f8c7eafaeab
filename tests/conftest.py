"""What every test shares: the device, a clean global state, repeatable random examples."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import torchsparse
from torchsparse.nn import functional as F
from torchsparse.utils.tensor_cache import (
    TensorCacheMode,
    clear_global_tensor_cache,
    set_tensor_cache_mode,
)

# Without a GPU, kernels run under Triton's interpreter, which asks when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def reset_global_state() -> None:
    """Everything a user can set for the whole process, back to what an import gives."""
    F.set_conv_mode(0)
    F.set_kmap_mode("hashmap_on_the_fly")
    F.set_downsample_mode("spconv")
    F.conv_config.clear_global_conv_config()
    torchsparse.tensor.set_allow_negative_coordinates(False)
    set_tensor_cache_mode(TensorCacheMode.SEPARATE_TENSOR_CACHE)
    clear_global_tensor_cache()
    torchsparse.backends.init()


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Each test starts from the defaults and in full float32, and leaves no trace."""
    reset_global_state()
    torchsparse.backends.allow_tf32 = False
    yield
    reset_global_state()


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
