"""The dictionary of configurations, where TorchSparse 2.1 keeps it."""

from torchsparse.nn.functional.conv.utils import collections
from torchsparse.nn.functional.conv.utils.collections import (
    AttributeDict,
    attrdict,
    attributedict,
)

__all__ = ["AttributeDict", "attrdict", "attributedict", "collections"]
