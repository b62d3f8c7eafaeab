"""Building maps from coordinates."""

from torchsparse._triton.coords.index import (
    build_index,
    check_sites,
    find_taps,
    generative_sites,
    invert_taps,
    strided_sites,
)

__all__ = [
    "build_index",
    "check_sites",
    "find_taps",
    "generative_sites",
    "invert_taps",
    "strided_sites",
]
