"""Functions that a program puts in the place of the library's own.

TorchSparse 2.1 looked its functions up in `torchsparse.nn.functional` whenever it built a map, so
that programs could replace them there to choose sites. Here they are not called, and a program
that counts on them is told so when a map is built.
"""

from __future__ import annotations

import sys
import warnings

from torchsparse._compat import distance

__all__ = ["warn_if_replaced"]

# Both are looked up when a map is built: they are defined above the code that builds maps.
PUBLIC = "torchsparse.nn.functional"
HOME = "torchsparse.nn.functional.conv.maps"

_warned: set[str] = set()


def warn_if_replaced(*names: str) -> None:
    """Warn, once per process and name, of functions that are no longer the library's own."""
    public, home = sys.modules.get(PUBLIC), sys.modules.get(HOME)
    for name in names:
        if getattr(public, name, None) is not getattr(home, name, None) and name not in _warned:
            _warn(name)


def _warn(name: str) -> None:
    instead = (
        "to choose the sites of a layer, pass `coordinates=` to Conv3d.forward or F.conv3d"
        if name != "spupsample_generative"
        else "a generative layer creates all sites that its taps reach; remove some with "
        "torchsparse.operators.prune"
    )
    warnings.warn(
        f"{PUBLIC}.{name} was replaced, but layers do not call it, as those of TorchSparse 2.1 "
        f"did: the replacement has no effect; {instead}",
        UserWarning,
        stacklevel=distance(),
    )
    _warned.add(name)  # a warning that was made an error has not been heard
