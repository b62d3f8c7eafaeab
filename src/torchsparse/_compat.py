"""Uses of versions 1.1 to 2.0 that v2.1 gave up: understood, with one note each.

The tensors and convolutions call what is here, so it lives below them; the public face is
`torchsparse.compat`.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

__all__ = [
    "ADVICE",
    "OldNames",
    "distance",
    "forget_notes",
    "moved",
    "note",
    "old_conv3d_arguments",
    "old_conv_arguments",
    "renamed",
]

# Old use: what to write instead.
ADVICE: dict[str, str] = {
    "torchsparse.sparse_tensor": "from torchsparse import SparseTensor",
    "torchsparse.point_tensor": "from torchsparse import PointTensor",
    "SparseTensor.cmaps": "x._caches.cmaps",
    "SparseTensor.kmaps": "x._caches.kmaps",
    "SparseTensor.coord_maps": "x._caches.cmaps",
    "SparseTensor.kernel_maps": "x._caches.kmaps",
    "Conv3d(in, out, kernel_size, stride, dilation, bias, transposed)": (
        "Conv3d(in, out, kernel_size, stride, dilation=..., bias=..., transposed=...)"
    ),
    "conv3d(input, weight, kernel_size, bias, stride, dilation, transposed)": (
        "conv3d(input, weight, kernel_size, bias, stride, dilation=..., transposed=...)"
    ),
    "a state dict with a kernel [C_in, C_out] of size 1 and a larger stride": (
        "kernel[None], as torchsparse.checkpoints.convert(state, source, strided=...) does"
    ),
    "calc_ti_weights(coords, idx_query [8, N], scale)": (
        "calc_ti_weights(coords, idx_query.t(), scale), which returns [N, 8]"
    ),
    "torchsparse.utils.sparse_collate": "from torchsparse.utils.collate import sparse_collate",
    "torchsparse.utils.sparse_collate_fn": (
        "from torchsparse.utils.collate import sparse_collate_fn"
    ),
    "torchsparse.utils.sparse_quantize": "from torchsparse.utils.quantize import sparse_quantize",
    "torchsparse.utils.helpers.make_tuple": "from torchsparse.utils import make_ntuple",
    "torchsparse.utils.helpers.ravel_hash_vec": (
        "from torchsparse.utils.quantize import ravel_hash"
    ),
    "torchsparse.utils.helpers.sparse_collate": (
        "from torchsparse.utils.collate import sparse_collate"
    ),
    "torchsparse.utils.helpers.sparse_collate_fn": (
        "from torchsparse.utils.collate import sparse_collate_fn"
    ),
    "torchsparse.utils.helpers.sparse_quantize": (
        "from torchsparse.utils.quantize import sparse_quantize"
    ),
    "torchsparse.utils.kernel_region.KernelRegion(...).get_kernel_offset()": (
        "torchsparse.nn.utils.get_kernel_offsets(...)"
    ),
}

_noted: set[str] = set()


def note(use: str) -> None:
    """Say once per process what to write instead of an old use, a key of `ADVICE`.

    A DeprecationWarning at the line outside this library and PyTorch from which the use came.
    """
    if use in _noted:
        return
    message = f"{use} is the form of versions before 2.1; write {ADVICE[use]}"
    warnings.warn(message, DeprecationWarning, stacklevel=distance())
    _noted.add(use)  # a warning that was made an error has not been heard


def distance() -> int:
    """How many frames above its caller the library is left, and PyTorch, which calls it."""
    inner = {__name__.partition(".")[0], "torch"}
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    return level


def forget_notes() -> None:
    """Let every note be given once more."""
    _noted.clear()


# ------------------------------------------------------------------ modules
def moved(old: str, home: ModuleType, name: str, names: list[str]) -> Any:
    """Attribute ``name`` of the former module ``old``, whose ``names`` live in ``home`` now.

    Raises:
        AttributeError: Another name.
    """
    if name not in names:
        raise AttributeError(f"module {old!r} has no attribute {name!r}")
    note(old)
    return getattr(home, name)


def renamed(module: str, name: str, now: dict[str, Any]) -> Any:
    """Attribute ``name`` of ``module``, where ``now`` holds what is elsewhere today.

    Raises:
        AttributeError: Another name.
    """
    if name not in now:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    note(f"{module}.{name}")
    return now[name]


# ------------------------------------------------------------------ attributes
class OldNames:
    """What lay on a sparse tensor before its cache had a name; read and assigned.

    Assigning a dictionary shares it, as ``y.kmaps = x.kmaps`` always did. For everything at once,
    write ``y._caches = x._caches``.
    """

    @property
    def cmaps(self: Any) -> dict[Any, Any]:
        """Coordinates by stride: ``_caches.cmaps``. A bare tensor as value has no range."""
        note("SparseTensor.cmaps")
        return self._caches.cmaps

    @cmaps.setter
    def cmaps(self: Any, value: dict[Any, Any]) -> None:
        note("SparseTensor.cmaps")
        self._caches.cmaps = value

    @property
    def kmaps(self: Any) -> dict[Any, Any]:
        """Kernel maps: ``_caches.kmaps``, with private keys."""
        note("SparseTensor.kmaps")
        return self._caches.kmaps

    @kmaps.setter
    def kmaps(self: Any, value: dict[Any, Any]) -> None:
        note("SparseTensor.kmaps")
        self._caches.kmaps = value

    @property
    def coord_maps(self: Any) -> dict[Any, Any]:
        """The name of ``cmaps`` in 1.1 and 1.2."""
        note("SparseTensor.coord_maps")
        return self._caches.cmaps

    @coord_maps.setter
    def coord_maps(self: Any, value: dict[Any, Any]) -> None:
        note("SparseTensor.coord_maps")
        self._caches.cmaps = value

    @property
    def kernel_maps(self: Any) -> dict[Any, Any]:
        """The name of ``kmaps`` in 1.1 and 1.2."""
        note("SparseTensor.kernel_maps")
        return self._caches.kmaps

    @kernel_maps.setter
    def kernel_maps(self: Any, value: dict[Any, Any]) -> None:
        note("SparseTensor.kernel_maps")
        self._caches.kmaps = value


# ------------------------------------------------------------------ argument orders
# Old and new stand one slot apart, since padding came in between:
#     Conv3d   old  in out k stride dilation  bias      transposed
#              new  in out k stride padding   dilation  bias        transposed
#     conv3d   old  x w k bias stride dilation  transposed
#              new  x w k bias stride padding   dilation  config  transposed
# A bool is no dilation, so there it tells the old order. Without one the two cannot be told apart.
def old_conv_arguments(
    padding: Any, dilation: Any, bias: bool, transposed: bool
) -> tuple[Any, Any, bool, bool]:
    """Arguments of ``Conv3d``, put right if they came in the order before 2.1.

    A bool in the slot of ``bias`` alone is what it says.

    Returns:
        padding, dilation, bias, transposed.
    """
    if not _is_old_order(padding, dilation):
        return padding, dilation, bias, transposed
    note("Conv3d(in, out, kernel_size, stride, dilation, bias, transposed)")
    return 0, padding, dilation, bool(bias or transposed)


def old_conv3d_arguments(padding: Any, dilation: Any, transposed: bool) -> tuple[Any, Any, bool]:
    """Arguments of ``conv3d``, put right if they came in the order before 2.1.

    Returns:
        padding, dilation, transposed.
    """
    if not _is_old_order(padding, dilation):
        return padding, dilation, transposed
    note("conv3d(input, weight, kernel_size, bias, stride, dilation, transposed)")
    return 0, padding, bool(dilation or transposed)


def _is_old_order(padding: Any, dilation: Any) -> bool:
    """Whether the second is a bool, and the first can be a dilation (it is never 0)."""
    if not isinstance(dilation, bool) or isinstance(padding, bool):
        return False
    return not (isinstance(padding, int) and padding == 0)
