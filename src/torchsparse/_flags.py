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

__all__ = [
    "Complaint",
    "complain_if",
    "flag_word",
    "pending_word",
    "raise_found",
    "raise_pending",
]


class Complaint(enum.Enum):
    """What can be wrong with values, with the sentence that says so.

    Of several the first is raised: coordinates that do not fit are wrong in other ways, once cut.
    """

    OVERFLOW = "coordinates must fit into int32"
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
    DISAGREE = "tensors must have the same coordinates in the same row order"
    DENSE = "every coordinate must lie inside the dense tensor's `spatial_range`"
    BATCH_SIZE = "every batch index must be smaller than `batch_size`"
    INDEX = "every index must be smaller than the number of rows it refers to"
    BEV = "every row must lie inside the module's `shape`"
    BOX = (
        "the bounding box of the coordinates, widened by the kernel, must have fewer than 2^62 "
        "cells"
    )
    TABLE_FULL = "the hash table must have room for every distinct key"

    bit: int  # of the word that kernels set


for _place, _complaint in enumerate(Complaint):
    _complaint.bit = 1 << _place

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
    word = pending_word(bad.device)
    word |= bad * complaint.bit


def pending_word(device: torch.device) -> Tensor:
    """[] int64, the complaints of a device; kernels set `Complaint.bit` in it."""
    word = _words.get(device)
    if word is None:
        with torch.inference_mode(False):
            word = _words[device] = torch.zeros((), dtype=torch.int64, device=device)
    return word


def flag_word(device: torch.device) -> Tensor | None:
    """`pending_word` for operations that take note themselves; None on the CPU, where the caller
    asks and raises at once."""
    return None if device.type == "cpu" else pending_word(device)


def raise_pending(device: torch.device | None = None) -> None:
    """Raise what was noticed on ``device`` (on all devices if None). Waits for the device."""
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for where, word in list(_words.items()):
        if device is not None and where != device:
            continue
        found = int(word)
        word.zero_()
        raise_found(found, where)


def raise_found(found: int, device: torch.device) -> None:
    """Raise the first complaint in a word that was read from ``device`` and cleared there."""
    for complaint in Complaint if found else ():
        if found & complaint.bit:
            raise _error(complaint, f"noticed on {device} by an earlier operation")


def _error(complaint: Complaint, detail: str) -> Exception:
    kind = RuntimeError if complaint is Complaint.TABLE_FULL else ValueError
    return kind(complaint.value + (f" ({detail})" if detail else ""))
