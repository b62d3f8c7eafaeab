"""Convolution: the function, its configuration and its kernel maps."""

from torchsparse.nn.functional.conv import (
    conv,
    conv_config,
    conv_mode,
    func,
    hash,
    kmap,
    utils,
)
from torchsparse.nn.functional.conv.conv import conv1d, conv2d, conv3d, conv4d
from torchsparse.nn.functional.conv.conv_config import (
    AttributeDict,
    Dataflow,
    clear_global_conv_config,
    get_default_conv_config,
    get_global_conv_config,
    keys_check,
    set_global_conv_config,
)
from torchsparse.nn.functional.conv.conv_mode import (
    ConvMode,
    get_conv_mode,
    get_downsample_mode,
    get_kmap_mode,
    set_conv_mode,
    set_downsample_mode,
    set_kmap_mode,
)
from torchsparse.nn.functional.conv.hash import sphash, sphashquery
from torchsparse.nn.functional.conv.maps import (
    build_kernel_map,
    convert_transposed_out_in_map,
    spdownsample,
    spupsample_generative,
    transpose_kernel_map,
)

__all__ = [
    "AttributeDict",
    "ConvMode",
    "Dataflow",
    "build_kernel_map",
    "clear_global_conv_config",
    "conv",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv4d",
    "conv_config",
    "conv_mode",
    "convert_transposed_out_in_map",
    "func",
    "get_conv_mode",
    "get_default_conv_config",
    "get_downsample_mode",
    "get_global_conv_config",
    "get_kmap_mode",
    "hash",
    "keys_check",
    "kmap",
    "set_conv_mode",
    "set_downsample_mode",
    "set_global_conv_config",
    "set_kmap_mode",
    "spdownsample",
    "sphash",
    "sphashquery",
    "spupsample_generative",
    "transpose_kernel_map",
    "utils",
]
