"""Scans that several test files look at, cast once."""

import functools

import pytest

from torchsparse.datasets import HDL64, Scan, Sensor, scan, street


@functools.cache
def _look(seed: int, sensor: Sensor) -> Scan:
    return scan(street(seed), sensor, seed)


@pytest.fixture(scope="session")
def look():
    """look(seed, sensor=HDL64): the street of a seed as the sensor sees it."""
    return lambda seed, sensor=HDL64: _look(seed, sensor)
