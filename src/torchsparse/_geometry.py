"""The integer geometry of kernels: taps, their order, offsets and output ranges.

One relation ties a fine and a coarse lattice (docs/conventions):

    fine = coarse * stride - offset + dilation * tap            per axis, equal batch index

Everything here is plain integers; tensors appear only where a list of taps is wanted as one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

__all__ = ["Geometry", "as_tuple", "conv_range", "default_padding", "tap_list"]

Kind = Literal["submanifold", "strided", "generative"]


def as_tuple(value: Any, ndim: int, name: str = "value", floats: bool = True) -> tuple[int, ...]:
    """``value`` as ``ndim`` ints: a number is repeated, a sequence, array or tensor is converted.

    With ``floats`` a float that is a whole number is one, too: bounds and strides come out of
    divisions. The parameters of a layer do not.

    Raises:
        ValueError: Another number of entries, or entries that are not whole numbers.
    """
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        value = value.tolist()
    entries = tuple(value) if isinstance(value, (list, tuple)) else (value,) * ndim
    if len(entries) != ndim:
        raise ValueError(f"`{name}` must be one int or {ndim} ints, got {value!r}")
    return tuple(_as_int(entry, name, floats) for entry in entries)


def _as_int(entry: Any, name: str, floats: bool) -> int:
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        if floats and isinstance(entry, float) and entry.is_integer():
            return int(entry)
        raise ValueError(f"`{name}` must be one int or one per axis, got {entry!r}")
    return int(entry)


def tap_list(kernel_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All taps in the order of the weight: for an odd volume the first axis runs fastest, for an
    even one the last, which is TorchSparse's convention (the parity is that of the volume)."""
    if math.prod(kernel_size) % 2:
        return [taps[::-1] for taps in itertools.product(*map(range, kernel_size[::-1]))]
    return list(itertools.product(*map(range, kernel_size)))


def default_padding(
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """The modules' padding rule: an odd kernel at stride 1 is always centred on that axis."""
    return tuple(
        d * (k - 1) // 2 if k % 2 and s == 1 else p
        for k, s, p, d in zip(kernel_size, stride, padding, dilation)
    )


def conv_range(
    spatial_range: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Extent of a strided convolution's output per axis: ``(r + 2p - d(k-1) - 1) // s + 1``."""
    return tuple(
        (r + 2 * p - d * (k - 1) - 1) // s + 1
        for r, k, s, p, d in zip(spatial_range, kernel_size, stride, padding, dilation)
    )


@dataclass(frozen=True)
class Geometry:
    """How a fine and a coarse lattice meet: ``fine = coarse * stride - offset + dilation * tap``.

    1-D, kernel 3, stride 2, offset 1:  coarse site 4 meets the fine sites 7, 8, 9.
    """

    kind: Kind
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    offset: tuple[int, ...]

    @staticmethod
    @lru_cache(maxsize=1024)  # one object, whose hash and volume are known
    def submanifold(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Geometry:
        """Stride 1 on unchanged sites; an odd volume is centred, an even one starts at the
        site."""
        odd = math.prod(kernel_size) % 2
        offset = tuple(d * (k - 1) // 2 if odd else 0 for k, d in zip(kernel_size, dilation))
        return Geometry("submanifold", kernel_size, (1,) * len(kernel_size), dilation, offset)

    @staticmethod
    @lru_cache(maxsize=1024)
    def strided(
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        downsample_mode: str,
        kind: Kind = "strided",
    ) -> Geometry:
        """Another lattice: offset = padding, or the centre tap in "minkowski" mode."""
        if downsample_mode == "minkowski":
            padding = tuple(d * ((k - 1) // 2) for k, d in zip(kernel_size, dilation))
        return Geometry(kind, kernel_size, stride, dilation, padding)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.kernel_size, self.stride, self.dilation, self.offset))

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    @cached_property
    def volume(self) -> int:
        """Number of taps K."""
        return math.prod(self.kernel_size)

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first to the last tap per axis: ``d (k - 1)``."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel_size, self.dilation))

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether tap k seen from the other end is tap K - 1 - k (submanifold, odd volume)."""
        return self.kind == "submanifold" and self.volume % 2 == 1
