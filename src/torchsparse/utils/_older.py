"""What lay on the package ``torchsparse.utils`` before 2.1: found there, with a note.

The two functions are the package's; it imports them by these names.
"""

from __future__ import annotations

import sys
from typing import Any

from torchsparse import _compat
from torchsparse.utils import collate, quantize

__all__ = ["__dir__", "__getattr__"]

_PACKAGE = "torchsparse.utils"

_NOW = {
    "sparse_collate": collate.sparse_collate,
    "sparse_collate_fn": collate.sparse_collate_fn,
    "sparse_quantize": quantize.sparse_quantize,
}


def __getattr__(name: str) -> Any:
    return _compat.renamed(_PACKAGE, name, _NOW)


def __dir__() -> list[str]:
    return [*vars(sys.modules[_PACKAGE]), *_NOW]
