"""Render the docstrings of the public modules as web pages: ``python docs/api.py FOLDER``."""

from __future__ import annotations

import html
import importlib
import re
import sys
import warnings
from pathlib import Path

from pdoc import pdoc
from pdoc.render import configure

from torchsparse.version import __version__

# What users import. Other paths lead to the same objects, or to helpers.
MODULES = (
    "torchsparse",
    "torchsparse.backbones",
    "torchsparse.backbones.modules",
    "torchsparse.backend",
    "torchsparse.backends",
    "torchsparse.checkpoints",
    "torchsparse.compat",
    "torchsparse.datasets",
    "torchsparse.inference",
    "torchsparse.models",
    "torchsparse.nn",
    "torchsparse.nn.functional",
    "torchsparse.nn.functional.bev",
    "torchsparse.nn.functional.conv.conv_config",
    "torchsparse.nn.functional.conv.func",
    "torchsparse.nn.functional.norm",
    "torchsparse.nn.utils",
    "torchsparse.operators",
    "torchsparse.segmentation",
    "torchsparse.tensor",
    "torchsparse.utils",
    "torchsparse.utils.collate",
    "torchsparse.utils.helpers",
    "torchsparse.utils.kernel_region",
    "torchsparse.utils.quantize",
    "torchsparse.utils.tune",
    "torchsparse.utils.voxelize",
    "torchsparse.viz",
)


def render(folder: Path) -> None:
    """Write a page for each of MODULES, a search over all of them, and an index."""
    configure(docformat="google", footer_text=f"torchsparse {__version__}")
    # A name stands for all that lies below it, which the pattern behind it takes away again.
    specs = [spec for name in MODULES for spec in (name, f"!{re.escape(name)}[.]")]
    with warnings.catch_warnings():
        # Annotations of named tuples and partial functions are shown as they are written, not as
        # links.
        warnings.filterwarnings("ignore", r"Error parsing type annotation ")
        pdoc(*specs, output_directory=folder)
    # Pages name those below them by `__all__` alone, and that of the package has not all modules.
    (folder / "index.html").write_text(_index(), "utf-8")


def _index() -> str:
    rows = []
    for name in MODULES:
        says = (importlib.import_module(name).__doc__ or "").partition("\n\n")[0]
        place = name.replace(".", "/") + ".html"
        says = re.sub("``(.+?)``", r"<code>\1</code>", html.escape(says))
        rows.append(f'<li><a href="{place}">{name}</a>: {says}</li>')
    title = f"torchsparse {__version__}: API"
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n<h1>{title}</h1>\n'
    return head + "<ul>\n" + "\n".join(rows) + "\n</ul>\n"


if __name__ == "__main__":
    render(Path(sys.argv[1]))
