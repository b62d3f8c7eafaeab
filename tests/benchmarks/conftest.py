"""What the tests of the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scenes


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The tiny scene, simulated once."""
    path = tmp_path_factory.mktemp("scenes")
    scenes.main(["tiny", "--out", str(path)])
    return path


@pytest.fixture
def small(folder) -> scenes.Scene:
    return scenes.crop(scenes.load("tiny", folder))
