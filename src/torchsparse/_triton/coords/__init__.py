"""Building maps from coordinates."""

from torchsparse._triton.coords.create import generative_sites, strided_sites
from torchsparse._triton.coords.index import build_index, check_sites, find_taps, invert_taps

__all__ = [
    "build_index",
    "check_sites",
    "find_taps",
    "generative_sites",
    "invert_taps",
    "strided_sites",
]
