"""Hashes and where they stand, where TorchSparse 2.1 keeps them."""

from torchsparse.nn.functional.conv.hash import hash, query
from torchsparse.nn.functional.conv.hash.hash import sphash
from torchsparse.nn.functional.conv.hash.query import convert_transposed_out_in_map, sphashquery

__all__ = ["convert_transposed_out_in_map", "hash", "query", "sphash", "sphashquery"]
