"""``FetchOnDemandConvolutionFuntion.apply``, as TorchSparse 2.1 spells it."""

from functools import partial

from torchsparse._recipe import Dataflow
from torchsparse.nn.functional.conv.func import base

__all__ = ["FetchOnDemandConvolutionFuntion"]


class FetchOnDemandConvolutionFuntion:
    """Convolution along a given kernel map.

    ``apply(feats, weight, kmap, config=None, transposed=False)`` takes features [N, C_in] on the
    map's inputs (its outputs if ``transposed``), a weight [K, C_in, C_out] and a map of
    ``functional.build_kernel_map``; it returns [M, C_out], differentiable in features and weight.
    TypeError: Something else than such a map.
    """

    apply = staticmethod(partial(base.apply, Dataflow.FetchOnDemand))
