"""The two implementations of a family look the same from outside."""

import importlib
import inspect

import pytest

FAMILIES = ("batch_norm", "inputs", "norm", "points", "pool", "reduce", "table")


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


# What may differ between the twins of a family, and why. `_ops` alone calls these by name.
OWN_NAMES = {
    "conv": {
        # Chunks of pairs that fit into a cache, and buffers; tiles of rows that share their taps.
        "_reference": {
            "Chunk", "Layout", "Plan", "choose_layout", "make_plan", "scratch", "sum_bags"
        },
        # Weight gradients have a layout of their own; the reference uses its plan again, and has
        # nothing to compile. Its plans drop the order of rows that a table had.
        "_triton": {"choose_layout", "compile_ahead", "make_plan", "make_pairs", "table_of"},
    },
    "coords": {
        # The index is an opaque record to `_ops`; the rest serves other files.
        "_reference": {
            "CoordIndex", "bounds", "flat_nonzero", "sorted_values"
        },
        "_triton": set(),
    },
    "depthwise": {"_reference": set(), "_triton": set()},
    "maps": {"_reference": set(), "_triton": set()},
    "voxels": {"_reference": set(), "_triton": set()},
}  # fmt: skip
# The parameter that holds an implementation's own layout: (reference, kernels).
OWN_LAYOUT = {
    ("conv", "weight_grad"): ("plan", "pairs"),
    ("depthwise", "weight_grad"): ("plan", "pairs"),
}


def parameters(function):
    """Names and defaults; a layout's type is the implementation's."""
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("family", OWN_NAMES)
def test_twins_of_the_engine_differ_only_where_it_is_allowed(family):
    one, other = (
        importlib.import_module(f"torchsparse.{p}.{family}") for p in ("_reference", "_triton")
    )
    shared = set(one.__all__) - OWN_NAMES[family]["_reference"]
    assert shared == set(other.__all__) - OWN_NAMES[family]["_triton"]
    assert OWN_NAMES[family]["_reference"] <= set(one.__all__)
    assert OWN_NAMES[family]["_triton"] <= set(other.__all__)
    assert len(shared) >= 2
    for name in shared:
        want, got = parameters(getattr(one, name)), parameters(getattr(other, name))
        theirs, ours = OWN_LAYOUT.get((family, name), ("", ""))
        assert got == [(ours if p == theirs else p, *rest) for p, *rest in want], name


def test_an_index_has_what_the_maps_read():
    """`_ops.coords.build_index` promises a margin, and that keys tell the device."""
    for package in ("_reference", "_triton"):
        module = importlib.import_module(f"torchsparse.{package}.coords")
        index = inspect.signature(module.build_index).return_annotation
        name = index if isinstance(index, str) else index.__name__
        home = importlib.import_module(module.build_index.__module__)
        assert {"keys", "margin"} <= set(getattr(home, name)._fields)
