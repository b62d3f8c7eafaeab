"""The API reference: names say what they are, tensors have shapes, and pages are made of it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import re
import runpy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "torchsparse"

MODULES = [
    f"torchsparse{name}"
    for name in (
        "", ".backbones", ".backbones.modules", ".backend", ".backends", ".checkpoints",
        ".datasets", ".inference", ".models", ".nn", ".nn.functional", ".nn.functional.bev",
        ".nn.functional.conv.conv_config", ".nn.functional.conv.func", ".nn.functional.norm",
        ".nn.utils", ".operators", ".segmentation", ".tensor", ".utils", ".utils.collate",
        ".utils.helpers", ".utils.kernel_region", ".utils.quantize", ".utils.tune",
        ".utils.voxelize", ".viz",
    )
]  # fmt: skip

# Take or return plain tensors whose shape their docstrings need not give, and why.
NO_SHAPE = {
    "as_tensor": "any shape",
    "make_tensor": "any shape",
    "sphashquery": "any shape",
}

# Modules whose layers and functions say what they do to the features of a sparse tensor.
WITH_LAYERS = [
    f"torchsparse{name}"
    for name in (
        ".backbones", ".backbones.modules", ".models", ".nn", ".nn.functional",
        ".nn.functional.bev", ".nn.functional.norm",
    )
]  # fmt: skip

OF_EVERY_MODULE = ("forward", "extra_repr")  # the class says what they do

# Names of earlier versions say what to write instead.
pytestmark = pytest.mark.filterwarnings("ignore:torchsparse.utils:DeprecationWarning")

each_module = pytest.mark.parametrize("name", MODULES)


def offered(name: str) -> Iterator[tuple[str, Any]]:
    """The names of a module that are no modules, and what they are."""
    module = importlib.import_module(name)
    for entry in module.__all__:
        thing = getattr(module, entry)
        if not isinstance(thing, ModuleType) and entry != "__version__":
            yield entry, thing


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Functions and properties that a class defines for everybody."""
    for name, member in vars(cls).items():
        call = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(call):
            yield name, call


def own_doc(thing: Any) -> str:
    """What was written for this very object, not inherited and not generated."""
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    generated = isinstance(thing, type) and (doc or "").startswith(f"{thing.__name__}(")
    return "" if doc is None or generated else doc


@lru_cache(maxsize=1)
def documented_values() -> set[str]:
    """Names assigned to in some module of the package, with a docstring below."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        body = ast.parse(path.read_text("utf-8")).body
        for line, below in itertools.pairwise(body):
            targets = line.targets if isinstance(line, ast.Assign) else []
            targets = [line.target] if isinstance(line, ast.AnnAssign) else targets
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if text and isinstance(below.value.value, str):  # pyright: ignore[reportAttributeAccessIssue]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@each_module
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__
    silent = []
    for entry, thing in offered(name):
        if isinstance(thing, type):
            silent += [
                f"{entry}.{method}" for method, _ in methods(thing)
                if method not in OF_EVERY_MODULE and not inspect.getdoc(getattr(thing, method))
            ]  # fmt: skip
        if isinstance(thing, type) or inspect.isroutine(thing):
            said = own_doc(thing)
        else:
            said = entry in documented_values()
        silent += [] if said else [entry]
    assert not silent


def has_shape(text: str) -> bool:
    """Whether something like [N, C] stands in it."""
    return re.search(r"\[\]|\[\w[^\]]*\]", text) is not None


def takes_tensors(function: Any) -> bool:
    """Whether annotations name plain tensors; sparse ones know what they are."""
    notes = getattr(function, "__annotations__", {}).values()
    return any(re.search(r"(?<!\w)Tensor\b", str(note)) for note in notes)


@each_module
def test_every_tensor_has_a_shape(name: str) -> None:
    shapeless = []

    def look(entry: str, function: Any, text: str) -> None:
        if takes_tensors(function) and not has_shape(text) and entry not in NO_SHAPE:
            shapeless.append(entry)

    for entry, thing in offered(name):
        if isinstance(thing, type):
            about = (thing.__doc__ or "") + (thing.__init__.__doc__ or "")
            for method, function in [("__init__", thing.__init__), *methods(thing)]:
                look(f"{entry}.{method}", function, about + (function.__doc__ or ""))
        elif inspect.isroutine(thing):
            look(entry, thing, own_doc(thing))
    assert not shapeless


def takes_sparse_tensors(function: Any) -> bool:
    """Whether annotations of parameters name sparse tensors."""
    notes = getattr(function, "__annotations__", {})
    return any("SparseTensor" in str(note) for name, note in notes.items() if name != "return")


def of_layer(cls: type) -> str:
    """What a layer says of itself, and what its ``forward`` says, if it was written here."""
    kinds = [kind for kind in cls.__mro__ if "forward" in vars(kind)]
    ours = kinds[0].__module__.startswith("torchsparse.")
    return own_doc(cls) + (vars(kinds[0])["forward"].__doc__ or "" if ours else "")


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_layers_and_functions_of_sparse_tensors_have_shapes(name: str) -> None:
    asked, shapeless = 0, []
    for entry, thing in offered(name):
        if isinstance(thing, type):
            text = of_layer(thing) if issubclass(thing, nn.Module) else None
        else:
            text = own_doc(thing) if takes_sparse_tensors(thing) else None
        if text is not None:
            asked += 1
            shapeless += [] if has_shape(text) else [entry]
    assert asked and not shapeless


def test_the_exceptions_are_needed() -> None:
    known = {entry for name in MODULES for entry, _ in offered(name)}
    assert set(NO_SHAPE) <= known


@pytest.mark.skipif(not importlib.util.find_spec("pdoc"), reason="pdoc is not installed")
def test_the_pages_are_made(tmp_path: Path) -> None:
    """All of them, without a warning, and what the docstrings say is on them."""
    api = runpy.run_path(str(ROOT / "docs" / "api.py"))
    assert set(MODULES) <= set(api["MODULES"])
    api["render"](tmp_path)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert pages == {f"{name.replace('.', '/')}.html" for name in api["MODULES"]} | {"index.html"}
    index = (tmp_path / "index.html").read_text("utf-8")
    assert set(re.findall(r'href="([^"]+)"', index)) == pages - {"index.html"}
    for name in MODULES:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text("utf-8")
        missing = [entry for entry, _ in offered(name) if f'id="{entry}"' not in page]
        assert not missing
    text = (tmp_path / "torchsparse" / "nn" / "functional.html").read_text("utf-8")
    assert "Interpolate voxel features at points." in text
    assert (tmp_path / "search.js").exists()
