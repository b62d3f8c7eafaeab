"""``spupsample_generative``, where TorchSparse 2.1 keeps it."""

from torchsparse.nn.functional.conv.maps import spupsample_generative

__all__ = ["spupsample_generative"]
