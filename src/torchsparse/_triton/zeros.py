"""Numbers that are 0 without a launch of their own: a kernel that runs anyway cleared them."""

import threading

import torch
from torch import Tensor

__all__ = ["Zeros"]

_taking = threading.Lock()  # threads may build maps on one cache


class Zeros:
    """Cleared numbers, each given out once.

    Replays of a CUDA graph repeat its launches alone. Numbers that were cleared outside it would
    be 0 in the first one only, so a capture gets none of these.

    Args:
        left: [n] int32, cleared in the current stream.
    """

    def __init__(self, left: Tensor) -> None:
        self.left = left
        self.taken = 0
        self.captured = _captured(left)

    def take(self, count: int) -> Tensor:
        """[count] int32 zeros that nobody else has; new ones if these do not suffice."""
        left = self.left
        with _taking:
            first = self.taken
            fits = first + count <= left.shape[0] and _captured(left) == self.captured
            self.taken = first + count * fits
        if not fits:
            return torch.zeros(count, dtype=torch.int32, device=left.device)
        return left[first : first + count]


def _captured(tensor: Tensor) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
