"""The hash table that some networks call directly, with the conventions of TorchSparse v2.1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchsparse._flags import Complaint, complain_if
from torchsparse._geometry import as_tuple
from torchsparse._ops import table
from torchsparse._validate import check_same_device

__all__ = ["GPUHashTable"]

PAD = 128  # answers have a multiple of 128 rows


class GPUHashTable:
    """A table from 64-bit keys, or from sites (x, y, z, b), to row numbers, on any device.

    The state is in the two tensors: a second table over them sees the entries. Numbers are
    1-based, 0 = absent.

    Args:
        keys: [capacity] int64 zeros; or the capacity, and the tensors are made on the device of
            the first keys inserted.
        vals: [capacity] int32 zeros.

    Raises:
        TypeError: Other dtypes, or values missing.
        ValueError: Other shapes, different lengths or devices, a capacity below 1.
    """

    def __init__(self, keys: Any, vals: Tensor | None = None) -> None:
        self._capacity = 0
        self.keys: Tensor | None = None
        self.vals: Tensor | None = None
        if not isinstance(keys, Tensor):
            self._capacity = as_tuple(keys, 1, "capacity")[0]
            if vals is not None:
                raise TypeError("GPUHashTable takes (keys, vals) or (capacity), got (int, vals)")
            if self._capacity < 1:
                raise ValueError(f"`capacity` must be at least 1, got {self._capacity}")
            return
        if not isinstance(vals, Tensor) or (keys.dtype, vals.dtype) != (torch.int64, torch.int32):
            got = vals.dtype if isinstance(vals, Tensor) else type(vals).__name__
            raise TypeError(
                f"`keys` and `vals` must be int64 and int32, got {keys.dtype} and {got}"
            )
        if keys.dim() != 1 or keys.shape != vals.shape:
            raise ValueError(
                f"`keys` and `vals` must be 1-D of equal length, "
                f"got {list(keys.shape)} and {list(vals.shape)}"
            )
        check_same_device(keys=keys, vals=vals)
        self.keys, self.vals = keys, vals

    def insert_vals(self, keys: Tensor) -> None:
        """Store row j as j + 1 under ``keys[j]`` (of equal keys, the lowest row).

        Args:
            keys: [n] int64.

        Raises:
            RuntimeError: More distinct keys than capacity (noticed later on a GPU).
        """
        self._insert(_check_keys(keys))

    def lookup_vals(self, keys: Tensor) -> Tensor:
        """What is stored under ``keys`` [n] int64.

        Returns:
            [n rounded up to a multiple of 128] int32, 0 = absent and behind the end.
        """
        return self._lookup(_check_keys(keys))

    def insert_coords(self, coords: Tensor) -> None:
        """Store row j as j + 1 under the site ``coords[j]``.

        Args:
            coords: [n, 4] int32, columns (x, y, z, b).

        Raises:
            RuntimeError: More distinct sites than capacity (noticed later on a GPU).
        """
        self._insert(table.site_keys(_check_sites(coords)))

    def lookup_coords(
        self, coords: Tensor, kernel_size: Any, stride: Any, kernel_volume: Any
    ) -> Tensor:
        """The stored rows around sites: at ``c_i * stride_i + t_i - (k_i - 1) // 2`` per tap t.

        Args:
            coords: [n, 4] int32, columns (x, y, z, b).
            kernel_size, stride: 3 ints.
            kernel_volume: K, the product of ``kernel_size``.

        Returns:
            [n rounded up to a multiple of 128, K] int32, 0 = absent and behind the end. Taps in
            the order of convolution weights.
        """
        size, step = as_tuple(kernel_size, 3, "kernel_size"), as_tuple(stride, 3, "stride")
        if as_tuple(kernel_volume, 1, "kernel_volume")[0] != math.prod(size):
            raise ValueError(
                f"`kernel_volume` must be the product of `kernel_size` {size}, got {kernel_volume}"
            )
        sites = _check_sites(coords)
        offsets = _offsets(size, sites.device)
        columns = [sites[:, :1].expand(-1, offsets.shape[1])]
        columns += [sites[:, 1 + i, None] * step[i] + offsets[i] for i in range(3)]
        return self._lookup(table.site_keys(torch.stack(columns, 2)))  # of [n, K, 4]

    def _insert(self, keys: Tensor) -> None:
        if self.keys is None or self.vals is None:
            self.keys = torch.zeros(self._capacity, dtype=torch.int64, device=keys.device)
            self.vals = torch.zeros(self._capacity, dtype=torch.int32, device=keys.device)
        check_same_device(table=self.keys, keys=keys)
        full = table.insert_(self.keys, self.vals, keys)
        capacity = self.keys.shape[0]
        complain_if(full, Complaint.TABLE_FULL, lambda: f"capacity {capacity}")

    def _lookup(self, keys: Tensor) -> Tensor:
        rows = -(-keys.shape[0] // PAD) * PAD
        out = torch.zeros((rows, *keys.shape[1:]), dtype=torch.int32, device=keys.device)
        if self.keys is not None and self.vals is not None:
            check_same_device(table=self.keys, keys=keys)
            out[: keys.shape[0]] = table.lookup(self.keys, self.vals, keys)
        return out


def _check_keys(keys: Tensor) -> Tensor:
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        raise TypeError(f"`keys` must be int64, got {getattr(keys, 'dtype', type(keys).__name__)}")
    if keys.dim() != 1:
        raise ValueError(f"`keys` must have shape [n], got {list(keys.shape)}")
    return keys


def _check_sites(coords: Tensor) -> Tensor:
    """[n, 4] int32 (x, y, z, b) as int64 (b, x, y, z)."""
    if not isinstance(coords, Tensor) or coords.dtype != torch.int32:
        got = getattr(coords, "dtype", type(coords).__name__)
        raise TypeError(f"`coords` must be int32, got {got}")
    if coords.dim() != 2 or coords.shape[1] != 4:
        raise ValueError(
            f"`coords` must have shape [n, 4] = (x, y, z, b), got {list(coords.shape)}"
        )
    return coords.roll(1, 1).to(torch.int64)


def _offsets(size: tuple[int, ...], device: torch.device) -> Tensor:
    """The taps of a kernel around its centre, in the order of `_geometry.tap_list`.

    Computed where they are needed: copying a list to a GPU would wait for it.

    Returns:
        [3, K] int64.
    """
    number = torch.arange(math.prod(size), device=device)
    offsets = [number] * 3
    for axis in (0, 1, 2) if math.prod(size) % 2 else (2, 1, 0):
        offsets[axis] = number % size[axis] - (size[axis] - 1) // 2
        number = number // size[axis]
    return torch.stack(offsets)
