"""TorchSparse 2.1's convolution classes, by their original names."""

from torchsparse.nn.functional.conv.func import fetch_on_demand, gather_scatter, implicit_gemm
from torchsparse.nn.functional.conv.func.fetch_on_demand import (
    FetchOnDemandConvolutionFuntion,
)
from torchsparse.nn.functional.conv.func.gather_scatter import GatherScatterConvolutionFuntion
from torchsparse.nn.functional.conv.func.implicit_gemm import ImplicitGEMMConvolutionFuntion

__all__ = [
    "FetchOnDemandConvolutionFuntion",
    "GatherScatterConvolutionFuntion",
    "ImplicitGEMMConvolutionFuntion",
    "fetch_on_demand",
    "gather_scatter",
    "implicit_gemm",
]
