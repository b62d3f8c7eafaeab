"""``AttributeDict`` and its other names, where TorchSparse 2.1 keeps them."""

from torchsparse.nn.functional.conv.conv_config import AttributeDict

__all__ = ["AttributeDict", "attrdict", "attributedict"]

attributedict = AttributeDict
attrdict = AttributeDict
