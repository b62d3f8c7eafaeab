"""Complaints about data: raised at once on the CPU, at the next synchronisation on a GPU.

A check that looks at values would stall a GPU. There, its outcome is or-ed into one word per
device, and whoever synchronises next (the size of a strided output, a pool, `check_errors`)
raises it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Complaint", "complain_if", "flag_word", "raise_pending"]


class Complaint(enum.Enum):
    """What can be wrong with values, with the sentence that says so."""

    NEGATIVE = (
        "coordinates must not be negative, unless "
        "torchsparse.tensor.set_allow_negative_coordinates(True) was called"
    )
    BATCH = "the batch index, the first of the columns (b, x, y, z), must not be negative"
    RANGE = "coordinates (b, x, y, z) must lie inside `spatial_range` = (B, X, Y, Z)"
    DUPLICATE = (
        "coordinates must be unique rows (b, x, y, z); "
        "torchsparse.utils.quantize.sparse_quantize merges points of one voxel"
    )
    OVERFLOW = "coordinates must fit into int32"
    DISAGREE = "tensors must have the same coordinates in the same row order"
    DENSE = "every coordinate must lie inside the dense tensor's `spatial_range`"
    BATCH_SIZE = "every batch index must be smaller than `batch_size`"
    INDEX = "every index must be smaller than the number of rows it refers to"
    BEV = "every row must lie inside the module's `shape`"
    TABLE_FULL = "the hash table must have room for every distinct key"

    @property
    def bit(self) -> int:
        return 1 << list(Complaint).index(self)


_words: dict[torch.device, Tensor] = {}


def complain_if(
    bad: Tensor, complaint: Complaint, detail: Callable[[], str] | None = None
) -> None:
    """Raise ValueError if ``bad`` (a boolean scalar tensor) holds: now on the CPU, later on a GPU.

    Args:
        bad: [] bool.
        complaint: What to say.
        detail: Says what came; asked on the CPU, where reading values costs no waiting.
    """
    if bad.device.type == "cpu":
        if bool(bad):
            raise _error(complaint, detail() if detail else "")
        return
    word = flag_word(bad.device)
    if word is not None:
        word |= bad * complaint.bit


def flag_word(device: torch.device) -> Tensor | None:
    """The [] int64 into which kernels `or` the bits of what they notice; None on the CPU."""
    if device.type == "cpu":
        return None
    if device not in _words:
        _words[device] = torch.zeros((), dtype=torch.int64, device=device)
    return _words[device]


def raise_pending(device: torch.device | None = None) -> None:
    """Raise what was noticed on ``device`` (on all devices if None). Waits for the device."""
    for where, word in list(_words.items()):
        if device is not None and where != device:
            continue
        found = int(word)
        word.zero_()
        for complaint in Complaint:
            if found & complaint.bit:
                raise _error(complaint, f"noticed on {where} by an earlier operation")


def _error(complaint: Complaint, detail: str) -> Exception:
    kind = RuntimeError if complaint is Complaint.TABLE_FULL else ValueError
    return kind(complaint.value + (f" ({detail})" if detail else ""))
