"""What every test shares: the device, a clean global state, repeatable random examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# What this machine was tuned for plays no part, and is left alone.
os.environ["TORCHSPARSE_TUNED"] = ""
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which reads this once, when Triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

import torchsparse
from tests import interpreter
from torchsparse import _tuned
from torchsparse.nn import functional as F
from torchsparse.utils.tensor_cache import (
    TensorCacheMode,
    clear_global_tensor_cache,
    set_tensor_cache_mode,
)

# "cuda": only what runs on a device, and there alone; "cpu": leave a GPU in peace.
ASKED = os.environ.get("TORCHSPARSE_TEST_DEVICE", "")
SHARD = os.environ.get("TORCHSPARSE_TEST_SHARD", "1/1")  # "2/3": the second third of the tests
DEVICES = [ASKED] if ASKED else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ON_A_DEVICE = {"device", "gpu"}  # fixtures; a test with neither never leaves the CPU

if not torch.cuda.is_available():
    interpreter.prepare()

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
    _tuned.forget()


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Each test starts from the defaults and in full float32, and leaves no trace.

    A complaint about data that a GPU noted and nobody raised belongs to the test that caused it.
    """
    reset_global_state()
    torchsparse.backends.allow_tf32 = False
    yield
    reset_global_state()
    torchsparse.backends.check_errors()


def pytest_configure(config: pytest.Config) -> None:
    if ASKED == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("TORCHSPARSE_TEST_DEVICE=cuda, but there is no CUDA device")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files in which nothing asks for a device may also need libraries that are not there."""
    if ASKED != "cuda" or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text()
    return None if any(word in text for word in ON_A_DEVICE) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, SHARD.split("/"))
    chosen = [item for item in items if ASKED != "cuda" or _on_a_device(item)]
    kept = chosen[part - 1 :: parts]
    config.stash[LEFT_OUT] = (len(items) - len(chosen), len(chosen) - len(kept))
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept


LEFT_OUT = pytest.StashKey[tuple[int, int]]()


def _on_a_device(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    return not ON_A_DEVICE.isdisjoint(fixtures) or item.get_closest_marker("gpu") is not None


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    if ASKED != "cuda":
        return []
    never, elsewhere = config.stash[LEFT_OUT]
    files = [p for p in Path(__file__).parent.rglob("test_*.py") if pytest_ignore_collect(p)]
    return [
        f"on CUDA alone: {never} tests in these files and all tests in {len(files)} others never "
        f"touch a device, left to `make test`; {elsewhere} are in other shards than {SHARD}"
    ]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The first CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)
