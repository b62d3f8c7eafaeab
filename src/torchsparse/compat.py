"""Programs written for versions 1.1 to 2.0.

What they use and v2.1 gave up is understood here; the first use of each form gives a
`DeprecationWarning` that says what to write instead. `ADVICE` lists them all:

    for old, new in torchsparse.compat.ADVICE.items():
        print(f"{old}  ->  {new}")

Three habits cannot be recognised and keep their v2.1 meaning: batch indices in the last column,
coordinates on the scale of the input, and an int dilation in the fifth place of ``Conv3d`` without
a bool behind it, which is read as a padding.
"""

from torchsparse._compat import ADVICE, forget_notes

__all__ = ["ADVICE", "forget_notes"]
