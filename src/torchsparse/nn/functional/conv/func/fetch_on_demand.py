"""``FetchOnDemandConvolutionFuntion.apply``, as TorchSparse 2.1 spells it."""

from functools import partial

from torchsparse._recipe import Dataflow
from torchsparse.nn.functional.conv.func import base

__all__ = ["FetchOnDemandConvolutionFuntion"]


class FetchOnDemandConvolutionFuntion:
    """Convolution along a given kernel map; see `base.apply`."""

    apply = staticmethod(partial(base.apply, Dataflow.FetchOnDemand))
