"""Convolution on given kernel maps."""

from torchsparse._triton.conv.plan import choose_layout, make_pairs, make_plan
from torchsparse._triton.conv.product import finish, gather_gemm, weight_grad

__all__ = ["choose_layout", "finish", "gather_gemm", "make_pairs", "make_plan", "weight_grad"]
