"""The rules of the house: who may import whom, and what an import may cost.

The storeys are a table. A new file must be placed in it; code imports from lower storeys, or
sideways where no circle arises.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "torchsparse"
HOME = "torchsparse"

# Names below `torchsparse`; "x.*" is every module of package x that has no row of its own.
STOREYS: dict[int, tuple[str, ...]] = {
    0: ("version", "_asked", "_capacity", "_geometry", "_groups", "_keys", "_recipe", "_settings",
        "_flags", "_validate", "_optional", "_compat", "_compiling", "_confirm", "_timing",
        "_tuned", "_frozen"),
    1: ("_reference", "_reference.*", "_triton", "_triton.*"),
    2: ("_ops", "_ops.*"),
    3: ("_kernel_map", "_lazy", "_autograd", "_autograd.*"),
    4: ("_cache", "_forms", "_search", "backends", "backend", "tensor"),
    5: ("_graphs", "_warmup", "operators", "nn.utils", "nn.utils.*", "nn.functional",
        "nn.functional.*", "utils", "utils.*"),
    6: ("nn", "nn.modules", "nn.modules.*", "backbones", "backbones.*", "models", "models.*",
        "compat", "inference", "training", "sparse_tensor", "point_tensor",
        "checkpoints", "utils.tune", "(root)"),
    7: ("datasets", "datasets.*", "viz", "segmentation", "cli", "cli.*", "__main__"),
}  # fmt: skip

# Libraries that only some users have: the one place that may name each of them.
OPTIONAL = {
    "matplotlib": ("viz",),
    "typer": ("cli",),
    "plyfile": ("datasets.readers",),
    "laspy": ("datasets.readers",),
    "pypcd4": ("datasets.readers",),
    "triton": ("_triton",),
    "tqdm": ("segmentation", "cli", "utils.tune"),
}
ALWAYS_THERE = {"torch", "numpy", HOME}

# Packages whose `__init__` does more than re-export, and why.
ENTRY_POINTS = {"cli"}  # `torchsparse` the command is always installed and names what it lacks
# By importlib: a twin, an extra, what newer Tritons have.
LATE_IMPORTS = {"_ops.dispatch", "_optional", "_triton.launch"}


@dataclass(frozen=True, eq=False)
class Module:
    """A file of the library."""

    name: str  # without "torchsparse."; "(root)" for the package itself
    path: Path
    tree: ast.Module


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "(root)"


def _read(path: Path) -> Module:
    return Module(_name(path), path, ast.parse(path.read_text("utf-8"), str(path)))


MODULES = {m.name: m for m in map(_read, sorted(SOURCE.rglob("*.py")))}


def covers(row: str, name: str) -> bool:
    """Whether a row of the table speaks of a module."""
    return name == row or (row.endswith(".*") and name.startswith(row[:-1]))


@cache
def storey(name: str) -> int | None:
    """Where a module lives, by its own row or its package's; None if nobody placed it."""
    rows = [(row, level) for level, rows in STOREYS.items() for row in rows if covers(row, name)]
    return max(rows, key=lambda found: len(found[0].rstrip("*")))[1] if rows else None


def level(name: str) -> int:
    """The storey of a module that has one."""
    found = storey(name)
    assert found is not None, f"place {name} in STOREYS"
    return found


def inside(name: str, *packages: str) -> bool:
    """Whether a module is one of the named ones, or lives in it."""
    return any(name == p or name.startswith(p + ".") for p in packages)


def imports(module: Module) -> list[tuple[str, ast.stmt]]:
    """(full dotted target, statement) of every import; `from a import b` is a.b if that is one
    of our modules."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: relative import"
            base = str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner if own_name(inner) in MODULES else base, node))
    return found


def own_name(target: str) -> str | None:
    """The name in our tables of an imported module; None for other libraries."""
    if target == HOME:
        return "(root)"
    return target.removeprefix(HOME + ".") if target.startswith(HOME + ".") else None


def uses(module: Module) -> set[str]:
    """Our modules that a module imports."""
    return {name for target, _ in imports(module) if (name := own_name(target))}


def others(module: Module) -> set[str]:
    """Other libraries that a module names: imported, or asked for by `need("library", ...)`."""
    found = {target.split(".")[0] for target, _ in imports(module)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "need" and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value).split(".")[0])
    return found - set(sys.stdlib_module_names) - ALWAYS_THERE


# ------------------------------------------------------------------ the table
def test_the_walk_sees_the_library() -> None:
    """The other tests would pass on an empty list."""
    assert len(MODULES) > 60
    assert uses(MODULES["operators"]) >= {"tensor", "_cache", "_autograd.reduce"}


def test_every_module_has_its_storey() -> None:
    homeless = [name for name in MODULES if storey(name) is None]
    assert not homeless, f"place them in STOREYS: {homeless}"


def test_every_row_of_the_table_speaks_of_a_module() -> None:
    for row in itertools.chain(*STOREYS.values()):
        exists = any(covers(row, name) for name in MODULES)
        # "x.*" is allowed to be empty while x itself is there.
        assert exists or row.removesuffix(".*") in MODULES, row


def test_imports_go_down_or_sideways() -> None:
    upward = [
        f"{name} ({storey(name)}) imports {target} ({storey(target)})"
        for name, module in MODULES.items()
        for target in uses(module)
        if level(target) > level(name)
    ]
    assert not upward, upward


def test_no_imports_in_a_circle() -> None:
    edges = {name: uses(module) & set(MODULES) - {name} for name, module in MODULES.items()}
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(edges[name]):
            visit(target)
        done.add(path.pop())

    for name in edges:
        visit(name)
    assert done == set(MODULES)


# ------------------------------------------------------------------ manner
def test_imports_stand_at_the_top_by_full_path() -> None:
    late = [
        f"{name}, line {node.lineno}: {target}"
        for name, module in MODULES.items()
        for target, node in imports(module)  # asserts that none is relative
        if node not in module.tree.body and not (inside(name, "cli") and node.col_offset > 0)
    ]
    assert not late, late


def test_few_modules_import_by_name_at_run_time() -> None:
    found = set()
    for name, module in MODULES.items():
        words = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(module.tree)}
        targets = {target for target, _ in imports(module)}
        if "importlib" in targets or words & {"import_module", "__import__"}:
            found.add(name)
    assert found == LATE_IMPORTS


def test_a_package_only_re_exports() -> None:
    more = []
    for name, module in MODULES.items():
        if module.path.name == "__init__.py" and name not in ENTRY_POINTS:
            more += [
                f"{name}, line {node.lineno}"
                for node in module.tree.body
                if not isinstance(node, (ast.Import, ast.ImportFrom))
                and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
                and not ast.unparse(node).startswith("__all__ =")
            ]
    assert not more, more


# ------------------------------------------------------------------ who is blind to whom
def test_the_twins_do_not_know_each_other() -> None:
    for one, other in (("_reference", "_triton"), ("_triton", "_reference")):
        for name in filter(lambda name: inside(name, one), MODULES):
            assert not any(inside(target, other) for target in uses(MODULES[name])), name


def test_utils_is_a_face() -> None:
    """What others need of it lives below it."""
    for name, module in MODULES.items():
        if level(name) <= 5 and not inside(name, "utils"):
            assert not any(inside(target, "utils") for target in uses(module)), name


def test_settings_are_read_from_the_values_upward() -> None:
    """Kernels and maps get their choices as arguments."""
    readers = {name for name, module in MODULES.items() if "_settings" in uses(module)}
    assert {"tensor", "backends"} <= readers
    assert min(map(level, readers)) == 4, readers


def test_optional_libraries_have_one_home() -> None:
    for name, module in MODULES.items():
        for library in others(module):
            assert library in OPTIONAL, f"{name} needs {library}, which is no dependency"
            assert inside(name, *OPTIONAL[library]), f"{name} needs {library}"


def test_datasets_need_no_network() -> None:
    """Scenes are numpy alone, so that benchmarks can write them for any library."""
    for name in filter(lambda name: inside(name, "datasets"), MODULES):
        assert all(inside(target, "datasets", "_optional") for target in uses(MODULES[name])), name
        assert not any(target.split(".")[0] == "torch" for target, _ in imports(MODULES[name]))


# ------------------------------------------------------------------ in a fresh interpreter
def run_fresh(code: str) -> Any:
    """Run Python code in a new process; what it prints last is JSON."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


PROBE = """
import inspect, json, sys, time
import numpy, torch

called = []
def forbid(name):
    def ask(*args, **kwargs):
        called.append(name)
        raise RuntimeError(f"torch.cuda.{name} was called while importing")
    return ask
before = dict(vars(torch.cuda))
for name, value in before.items():
    if inspect.isfunction(value):
        setattr(torch.cuda, name, forbid(name))
start = time.perf_counter()
import torchsparse
seconds = time.perf_counter() - start
for name, value in before.items():
    setattr(torch.cuda, name, value)
modules = [name for name in sys.modules if name.startswith("torchsparse.")]
print(json.dumps({
    "seconds": seconds,
    "modules": modules,
    "foreign": sorted({name.split(".")[0] for name in sys.modules}),
    "called": called,
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def probes() -> list[Any]:
    """What three fresh interpreters saw while importing the library."""
    return [run_fresh(PROBE) for _ in range(3)]


def test_importing_asks_no_gpu(probes) -> None:
    assert probes[0]["called"] == [] and probes[0]["cuda"] is False


def test_importing_loads_no_application_and_no_extra(probes) -> None:
    loaded = {own_name(name) for name in probes[0]["modules"]}
    assert "tensor" in loaded and "nn.modules.conv" in loaded
    for name in loaded:
        assert name is not None and storey(name) != 7, name
        assert not inside(name, "_triton"), name
    foreign = set(probes[0]["foreign"])
    assert foreign >= {"torch", "numpy"}
    assert not foreign & {"matplotlib", "typer", "plyfile", "laspy", "pypcd4"}


def test_importing_is_cheap(probes, capsys) -> None:
    """Aim: 0.3 s on top of torch; twice that leaves room for a loaded machine."""
    best = min(probe["seconds"] for probe in probes)
    with capsys.disabled():
        print(f" [import torchsparse: {best:.2f} s on top of torch] ", end="")
    assert best < 0.6


WITHOUT = """
import importlib, json, sys

class Absent:
    names = set({names})
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import torchsparse
from torchsparse import nn, SparseTensor
coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], dtype=torch.int32)
feats = nn.Conv3d(2, 4, 3)(SparseTensor(torch.ones(2, 2), coords)).feats
for name in {modules}:
    importlib.import_module(name)
blocked = []
for name in Absent.names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        blocked.append(name)
print(json.dumps({{"shape": list(feats.shape), "blocked": sorted(blocked)}}))
"""


def test_everything_but_the_commands_imports_without_extras() -> None:
    """Also each module that the root does not load, in no particular order."""
    absent = sorted({*OPTIONAL} - {"tqdm"})  # tqdm is a dependency
    modules = [f"{HOME}.{m}" for m in MODULES if m not in ("(root)", "__main__")]
    modules = [m for m in modules if not m.startswith((f"{HOME}.cli.", f"{HOME}._triton"))]
    seen = run_fresh(WITHOUT.format(names=absent, modules=modules))
    assert seen == {"shape": [2, 4], "blocked": absent}


ALONE = """
import importlib, json, sys
import torchsparse
loaded = set(sys.modules)
alone = {modules}
for name in alone:
    for extra in set(sys.modules) - loaded:
        if extra.startswith("torchsparse."):
            del sys.modules[extra]
    importlib.import_module(name)
print(json.dumps(len(alone)))
"""


def test_every_module_can_come_first(probes) -> None:
    """The root loads most modules in one order; each other one is imported right after it."""
    loaded = set(probes[0]["modules"])
    rest = [f"{HOME}.{m}" for m in MODULES if m not in ("(root)", "__main__")]
    rest = [m for m in rest if m not in loaded]
    if importlib.util.find_spec("triton") is None:
        rest = [m for m in rest if not m.startswith(f"{HOME}._triton")]
    assert run_fresh(ALONE.format(modules=rest)) == len(rest) > 5


def test_a_missing_extra_is_named() -> None:
    """The command without typer: one line on stderr, exit code 1."""
    code = "import sys; sys.modules['typer'] = None\nfrom torchsparse.cli import main\nmain()"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 1
    assert "torchsparse[cli]" in process.stderr and "Traceback" not in process.stderr
