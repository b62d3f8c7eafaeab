"""``sphash``, where TorchSparse 2.1 keeps it."""

from torchsparse.nn.functional.hash import sphash

__all__ = ["sphash"]
