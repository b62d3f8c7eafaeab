"""``sphashquery`` and ``convert_transposed_out_in_map``, where TorchSparse 2.1 keeps them."""

from torchsparse.nn.functional.conv.maps import convert_transposed_out_in_map
from torchsparse.nn.functional.query import sphashquery

__all__ = ["convert_transposed_out_in_map", "sphashquery"]
