"""Functions on kernel maps and sites, where TorchSparse 2.1 keeps them."""

from torchsparse.nn.functional.conv.kmap import build_kmap, downsample, upsample
from torchsparse.nn.functional.conv.kmap.build_kmap import build_kernel_map, transpose_kernel_map
from torchsparse.nn.functional.conv.kmap.downsample import spdownsample
from torchsparse.nn.functional.conv.kmap.upsample import spupsample_generative

__all__ = [
    "build_kernel_map",
    "build_kmap",
    "downsample",
    "spdownsample",
    "spupsample_generative",
    "transpose_kernel_map",
    "upsample",
]
