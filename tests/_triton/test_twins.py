"""The two implementations of a family look the same from outside."""

import importlib
import inspect

import pytest

FAMILIES = ("norm", "points", "reduce", "table")


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_have_the_same_names_and_signatures(family):
    one, other = (
        importlib.import_module(f"torchsparse.{p}.{family}") for p in ("_reference", "_triton")
    )
    face = importlib.import_module(f"torchsparse._ops.{family}")
    assert set(one.__all__) == set(other.__all__) == set(face.__all__)
    functions = [name for name in face.__all__ if inspect.isfunction(getattr(face, name))]
    assert functions
    for name in functions:
        want = inspect.signature(getattr(face, name))
        assert inspect.signature(getattr(one, name)) == want, name
        assert inspect.signature(getattr(other, name)) == want, name
