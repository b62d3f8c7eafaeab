"""Depthwise convolution on given kernel maps."""

from torchsparse._triton.depthwise.product import depthwise, weight_grad

__all__ = ["depthwise", "weight_grad"]
