"""``spdownsample``, where TorchSparse 2.1 keeps it."""

from torchsparse.nn.functional.conv.maps import spdownsample

__all__ = ["spdownsample"]
