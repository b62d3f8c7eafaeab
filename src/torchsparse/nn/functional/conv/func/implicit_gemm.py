"""``ImplicitGEMMConvolutionFuntion.apply``, as TorchSparse 2.1 spells it."""

from torchsparse.nn.functional.conv.func import base

__all__ = ["ImplicitGEMMConvolutionFuntion"]


class ImplicitGEMMConvolutionFuntion:
    """Convolution along a given kernel map; see `base.apply`."""

    apply = staticmethod(base.apply)
