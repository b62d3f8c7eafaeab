"""What `torchsparse.datasets` promises as a whole."""

import ast
from pathlib import Path

from torchsparse import datasets

FOLDER = Path(datasets.__file__).parent


def test_every_public_name_exists():
    assert len(set(datasets.__all__)) == len(datasets.__all__)
    for name in datasets.__all__:
        assert hasattr(datasets, name)


def test_modules_import_numpy_alone():
    """Any engine can be fed from here: neither torch nor an optional library at import."""
    allowed = {"numpy", "torchsparse.datasets", "torchsparse._optional"}
    standard = {"collections.abc", "dataclasses", "pathlib", "textwrap", "typing"}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                known = any(name == a or name.startswith(a + ".") for a in allowed)
                assert known or name in standard, f"{path.name} imports {name}"
