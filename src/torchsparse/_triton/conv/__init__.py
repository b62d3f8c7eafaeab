"""Convolution on given kernel maps."""

from torchsparse._triton.conv.plan import choose_layout, make_pairs, make_plan, table_of
from torchsparse._triton.conv.product import dense, finish, gather_gemm, weight_grad
from torchsparse._triton.launch import compile_ahead

__all__ = [
    "choose_layout",
    "compile_ahead",
    "dense",
    "finish",
    "gather_gemm",
    "make_pairs",
    "make_plan",
    "table_of",
    "weight_grad",
]
