"""The public names: where programs written for TorchSparse 2.1 and before find them, and how
they are called. A name that disappears, moves or changes its arguments fails here first."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import torchsparse
from torchsparse import PointTensor, SparseTensor
from torchsparse.backend import GPUHashTable

CONV_CONFIG = """get_default_conv_config get_global_conv_config set_global_conv_config
    clear_global_conv_config"""
CONV_MODE = """ConvMode get_conv_mode set_conv_mode get_kmap_mode set_kmap_mode
    get_downsample_mode set_downsample_mode"""
CHECK = "keys_check"
KMAP = "build_kernel_map transpose_kernel_map spdownsample spupsample_generative"
MAPS = f"{KMAP} convert_transposed_out_in_map"
CONV = (
    f"conv1d conv2d conv3d conv4d Dataflow AttributeDict {CONV_CONFIG} {CONV_MODE} {MAPS} {CHECK}"
)
CACHE = """TensorCache TensorCacheMode get_tensor_cache_mode set_tensor_cache_mode
    get_global_tensor_cache set_global_tensor_cache clear_global_tensor_cache"""
LOCAL_POOLS = " ".join(
    f"{name}{ndim}d"
    for name in ("MaxPool", "AvgPool", "SumPool", "Unpool", "MaxUnpool")
    for ndim in (1, 2, 3, 4)
)
MODULES = f"""Conv1d Conv2d Conv3d Conv4d BatchNorm GroupNorm InstanceNorm ReLU LeakyReLU SiLU
    GlobalAvgPool
    GlobalMaxPool GlobalSumPool {LOCAL_POOLS} SparseCrop ToBEVReduction ToBEVConvolution
    ToDenseBEVConvolution ToBEVHeightCompression Linear LayerNorm Dropout CELU ELU GELU SELU
    Hardsigmoid Hardswish Hardtanh LogSigmoid Mish PReLU ReLU6 Sigmoid Softplus Softsign Tanh
    Sequential OnFeats SyncBatchNorm convert_sync_batchnorm"""
WINDOWS = "max_pool3d avg_pool3d sum_pool3d unpool3d max_unpool3d"
FUNCTIONS = """ImplicitGEMMConvolutionFuntion GatherScatterConvolutionFuntion
    FetchOnDemandConvolutionFuntion"""
OLD_UTILS = "sparse_quantize sparse_collate sparse_collate_fn"
BLOCKS = "SparseConvBlock SparseConvTransposeBlock SparseResBlock"

# What each module offers: exactly its `__all__`, and so what `import *` gives.
OFFERED: dict[str, str] = {
    "": """SparseTensor PointTensor cat compat generative_add __version__ backend backends nn
        inference operators tensor training tune utils""",
    "inference": "Graphed graphed warmup",
    "training": "Graphed graphed",
    "tensor": f"""SparseTensor PointTensor get_allow_negative_coordinates
        set_allow_negative_coordinates {CACHE}""",
    "operators": """cat generative_add align union intersection add sub mul prune broadcast
        broadcast_add broadcast_mul broadcast_cat""",
    "compat": "ADVICE forget_notes",
    "backend": "GPUHashTable",
    "backends": """benchmark hash_rsv_ratio infer_spatial_range device_capability allow_tf32
        allow_fp16 float32_precision fuse check_errors init""",
    "nn": f"functional utils {MODULES}",
    "nn.modules": MODULES,
    "nn.utils": "fapply get_kernel_offsets",
    "nn.functional": f"""relu silu leaky_relu sphash sphashquery spcount spvoxelize spdevoxelize
        calc_ti_weights spcrop global_avg_pool global_max_pool global_sum_pool {WINDOWS} {CONV}
        activation bev conv count crop devoxelize hash interpolate local_pooling norm
        pooling query voxelize
        interpolate_points point_voxel initial_voxelize point_to_voxel voxel_to_point
        conv_config conv_mode func kmap""",
    "nn.functional.bev": """to_bev_reduction to_bev_convolution to_dense_bev_convolution
        to_bev_height_compression""",
    "nn.functional.activation": "relu silu leaky_relu",
    "nn.functional.conv": f"""{CONV} sphash sphashquery conv conv_config conv_mode func hash kmap
        utils""",
    "nn.functional.conv.conv": "conv1d conv2d conv3d conv4d",
    "nn.functional.conv.conv_config": f"""{CONV_CONFIG} keys_check Dataflow AttributeDict
        ConvConfig""",
    "nn.functional.conv.conv_mode": CONV_MODE,
    "nn.functional.conv.func": f"{FUNCTIONS} fetch_on_demand gather_scatter implicit_gemm",
    "nn.functional.conv.func.implicit_gemm": "ImplicitGEMMConvolutionFuntion",
    "nn.functional.conv.func.gather_scatter": "GatherScatterConvolutionFuntion",
    "nn.functional.conv.func.fetch_on_demand": "FetchOnDemandConvolutionFuntion",
    "nn.functional.conv.hash": "sphash sphashquery convert_transposed_out_in_map hash query",
    "nn.functional.conv.hash.hash": "sphash",
    "nn.functional.conv.hash.query": "sphashquery convert_transposed_out_in_map",
    "nn.functional.conv.kmap": f"{KMAP} build_kmap downsample upsample",
    "nn.functional.conv.kmap.build_kmap": "build_kernel_map transpose_kernel_map",
    "nn.functional.conv.kmap.downsample": "spdownsample",
    "nn.functional.conv.kmap.upsample": "spupsample_generative",
    "nn.functional.conv.utils": "AttributeDict attributedict attrdict collections",
    "nn.functional.conv.utils.collections": "AttributeDict attributedict attrdict",
    "nn.functional.count": "spcount",
    "nn.functional.crop": "spcrop",
    "nn.functional.devoxelize": "spdevoxelize calc_ti_weights",
    "nn.functional.hash": "sphash",
    "nn.functional.interpolate": "interpolate_points",
    "nn.functional.norm": "group_norm instance_norm",
    "nn.functional.point_voxel": "initial_voxelize point_to_voxel voxel_to_point",
    "nn.functional.local_pooling": WINDOWS,
    "nn.functional.pooling": "global_avg_pool global_max_pool global_sum_pool",
    "nn.functional.query": "sphashquery",
    "nn.functional.voxelize": "spvoxelize",
    "utils": "make_ntuple make_tensor make_divisible to_dense",
    "utils.utils": "make_ntuple make_tensor make_divisible",
    "utils.to_dense": "to_dense",
    "utils.quantize": "sparse_quantize ravel_hash",
    "utils.voxelize": "VoxelizedPoints voxelize_points",
    "utils.collate": "sparse_collate sparse_collate_fn",
    "utils.tensor_cache": CACHE,
    "utils.tune": "tune compare Gain",
    "utils.helpers": f"{OLD_UTILS} ravel_hash_vec make_tuple",
    "utils.kernel_region": "KernelRegion",
    "checkpoints": "LAYOUTS Layout convert state_of",
    "models": """MinkUNet MinkResUNet SPVCNN SparseEncoder ResNetClassifier UNetDesign
        EncoderDesign MINKUNETS ENCODERS RESNETS MINKOWSKI_NAMES SPVNAS_NAMES""",
    "backbones": "SparseResNet SparseResNet21D SparseResUNet SparseResUNet42 modules resnet unet",
    "backbones.modules": BLOCKS,
    "backbones.modules.blocks": BLOCKS,
    "backbones.resnet": "SparseResNet SparseResNet21D",
    "backbones.unet": "SparseResUNet SparseResUNet42",
}

# Found there too, but not part of `import *`.
REACHED: dict[str, str] = {
    "": "sparse_tensor point_tensor",  # of versions before 2.0
    "utils": f"{OLD_UTILS} quantize collate tensor_cache tune voxelize voxelize_points",
}

# Helpers that sibling modules import; no promise to users.
HELPERS: dict[str, str] = {
    "nn.functional.conv.conv_config": "resolve_config",
    "nn.functional.count": "check_index",
    "nn.functional.local_pooling": "pool pool_max unpool unpool_max",
    "nn.functional.interpolate": "on_lattice",
    "nn.functional.pooling": "samples",
    "utils.collate": "as_tensor",
    "utils.quantize": "cell_size",
}

# Names and defaults of the parameters; as in TorchSparse 2.1, where it has them.
SIGNATURES: dict[str, str] = {
    "SparseTensor": "feats, coords, stride=1, spatial_range=None",
    "PointTensor": "feats, coords, idx_query=None, weights=None",
    "cat": "inputs",
    "generative_add": "a, b",
    "operators.prune": "input, mask",
    "operators.add": "a, b, sites='union', fill=0.0",
    "operators.align": "*inputs, sites='union', fill=0.0",
    "operators.broadcast": "input, vectors",
    "backend.GPUHashTable": "keys, vals=None",
    "nn.Conv3d": """in_channels, out_channels, kernel_size=3, stride=1, padding=0, dilation=1,
        bias=False, transposed=False, generative=False, config=None""",
    "nn.GlobalAvgPool": "",
    "nn.GlobalMaxPool": "",
    "nn.GlobalSumPool": "",
    "nn.SparseCrop": "coords_min=None, coords_max=None",
    "nn.ToBEVReduction": "dim=1",
    "nn.ToBEVConvolution": """in_channels, out_channels, n_kernels, stride=1, dim=1,
        bias=False""",
    "nn.utils.fapply": "input, fn, *args, **kwargs",
    "nn.utils.get_kernel_offsets": "size, stride=1, dilation=1, device='cpu'",
    "nn.functional.relu": "input, inplace=True",
    "nn.functional.silu": "input, inplace=True",
    "nn.functional.leaky_relu": "input, negative_slope=0.1, inplace=True",
    "nn.functional.sphash": "coords, offsets=None",
    "nn.functional.sphashquery": "queries, references",
    "nn.functional.spcount": "coords, num",
    "nn.functional.spvoxelize": "feats, coords, counts",
    "nn.functional.spdevoxelize": "feats, coords, weights",
    "nn.functional.calc_ti_weights": "coords, idx_query, scale=1",
    "nn.functional.spcrop": "input, coords_min=None, coords_max=None",
    "nn.functional.global_avg_pool": "input, batch_size=None",
    "nn.functional.global_max_pool": "input, batch_size=None",
    "nn.functional.max_pool3d": """input, kernel_size, stride=None, padding=0, dilation=1,
        return_indices=False, coordinates=None, config=None""",
    "nn.functional.avg_pool3d": """input, kernel_size, stride=None, padding=0, dilation=1,
        coordinates=None, config=None""",
    "nn.functional.unpool3d": """input, kernel_size, stride=None, padding=0, dilation=1,
        mode='mean', config=None""",
    "nn.functional.max_unpool3d": """input, indices, kernel_size, stride=None, padding=0,
        dilation=1, config=None""",
    "nn.functional.conv3d": """input, weight, kernel_size, bias=None, stride=1, padding=0,
        dilation=1, config=None, transposed=False, generative=False, training=False""",
    "nn.functional.build_kernel_map": """_coords, input_node_num, kernel_size=2, stride=2,
        padding=0, hashmap_keys=None, hashmap_vals=None, spatial_range=None, mode='hashmap',
        dataflow=Dataflow.ImplicitGEMM, downsample_mode='spconv', training=False, ifsort=False,
        generative=False, split_mask_num=1, split_mask_num_bwd=1, dilation=1""",
    "nn.functional.transpose_kernel_map": "kmap, *args, **kwargs",
    "nn.functional.spdownsample": """_coords, stride=2, kernel_size=2, padding=0,
        spatial_range=None, downsample_mode='spconv'""",
    "nn.functional.spupsample_generative": """_coords, stride=2, kernel_size=2, padding=0,
        spatial_range=None""",
    "nn.functional.convert_transposed_out_in_map": "out_in_map, size",
    "nn.functional.set_conv_mode": "conv_mode",
    "nn.functional.set_kmap_mode": "kmap_mode",
    "nn.functional.set_downsample_mode": "downsample_mode",
    "nn.functional.get_default_conv_config": "conv_mode=None, training=False",
    "nn.functional.set_global_conv_config": "conv_config",
    "nn.functional.conv.conv_config.keys_check": "conv_config",
    "utils.make_ntuple": "x, ndim",
    "utils.make_divisible": "x, divisor",
    "utils.make_tensor": "x, dtype=torch.int32, device='cuda'",
    "utils.to_dense": "feats, coords, spatial_range",
    "utils.quantize.sparse_quantize": """coords, voxel_size=1, *, return_index=False,
        return_inverse=False""",
    "utils.quantize.ravel_hash": "x",
    "utils.collate.sparse_collate": "inputs",
    "utils.collate.sparse_collate_fn": "inputs",
    "utils.kernel_region.KernelRegion": "kernel_size, tensor_stride=1, dilation=1",
    "backbones.modules.SparseConvBlock": """in_channels, out_channels, kernel_size, stride=1,
        dilation=1""",
    "backbones.modules.SparseConvTransposeBlock": """in_channels, out_channels, kernel_size,
        stride=1, dilation=1""",
    "backbones.modules.SparseResBlock": """in_channels, out_channels, kernel_size, stride=1,
        dilation=1""",
    "backbones.SparseResNet": "blocks, *, in_channels=4, width_multiplier=1.0",
    "backbones.SparseResNet21D": "**kwargs",
    "backbones.SparseResUNet": """stem_channels, encoder_channels, decoder_channels, *,
        in_channels=4, width_multiplier=1.0""",
    "backbones.SparseResUNet42": "**kwargs",
}
# What this library adds behind those parameters.
ADDED = {
    "cat": "fill=None",
    "nn.functional.conv3d": "coordinates=None, groups=1",
    "nn.Conv3d": "groups=1",
    "nn.functional.unpool3d": "coordinates=None",
}


# Names of earlier versions say what to write instead.
pytestmark = pytest.mark.filterwarnings("ignore:torchsparse.utils:DeprecationWarning")


def module(path: str) -> ModuleType:
    """`torchsparse.path`, found as `import torchsparse.path` finds it."""
    return importlib.import_module(f"torchsparse.{path}" if path else "torchsparse")


def reach(path: str) -> Any:
    """The object of a dotted path, by import as far as modules go."""
    where, _, name = path.rpartition(".")
    return getattr(module(where), name)


each_module = pytest.mark.parametrize("path", OFFERED, ids=lambda path: path or "(root)")


@each_module
def test_a_module_offers_exactly_its_names(path: str) -> None:
    found = module(path)
    listed = list(found.__all__)
    assert len(listed) == len(set(listed))
    assert set(listed) - set(HELPERS.get(path, "").split()) == set(OFFERED[path].split())
    missing = {*listed, *REACHED.get(path, "").split()} - set(dir(found)) - set(BACKEND_VALUES)
    assert not missing


# Annotations and properties of the module's class: `dir` need not list them.
BACKEND_VALUES = (
    "benchmark",
    "hash_rsv_ratio",
    "infer_spatial_range",
    "device_capability",
    "allow_tf32",
    "allow_fp16",
    "float32_precision",
    "fuse",
)


@pytest.mark.parametrize("name", BACKEND_VALUES)
def test_backends_values_can_be_read_and_written(name: str) -> None:
    value = getattr(torchsparse.backends, name)
    assert isinstance(value, str if name == "float32_precision" else int)
    setattr(torchsparse.backends, name, value)
    assert getattr(torchsparse.backends, name) == value


def test_a_name_is_the_same_object_wherever_it_is_found() -> None:
    """One class per name, so that isinstance and pickle agree on it."""
    # `conv` and its like are modules in one place and packages in another.
    places: dict[str, dict[int, list[str]]] = {}
    for path, names in OFFERED.items():
        for name in (*names.split(), *REACHED.get(path, "").split()):
            thing = getattr(module(path), name)
            if not isinstance(thing, (ModuleType, int)):
                places.setdefault(name, {}).setdefault(id(thing), []).append(path)
    split = {name: list(where.values()) for name, where in places.items() if len(where) > 1}
    # Evaluation and training have one each.
    assert len(places) > 60 and set(split) == {"Graphed", "graphed"}


def test_older_names_are_the_functions_of_today() -> None:
    assert reach("utils.helpers.ravel_hash_vec") is reach("utils.quantize.ravel_hash")
    assert reach("utils.helpers.make_tuple") is reach("utils.make_ntuple")


# Where TorchSparse 2.1 defines what programs import from there, and where it is at home here.
DEFINED: dict[str, str] = {
    "nn.functional.conv.hash.hash.sphash": "nn.functional.sphash",
    "nn.functional.conv.hash.query.sphashquery": "nn.functional.sphashquery",
    "nn.functional.conv.hash.query.convert_transposed_out_in_map": """
        nn.functional.convert_transposed_out_in_map""",
    "nn.functional.conv.hash.sphash": "nn.functional.sphash",
    "nn.functional.conv.hash.sphashquery": "nn.functional.sphashquery",
    "nn.functional.conv.kmap.build_kmap.build_kernel_map": "nn.functional.build_kernel_map",
    "nn.functional.conv.kmap.build_kmap.transpose_kernel_map": """
        nn.functional.transpose_kernel_map""",
    "nn.functional.conv.kmap.downsample.spdownsample": "nn.functional.spdownsample",
    "nn.functional.conv.kmap.upsample.spupsample_generative": """
        nn.functional.spupsample_generative""",
    "nn.functional.conv.kmap.build_kernel_map": "nn.functional.build_kernel_map",
    "nn.functional.conv.kmap.spdownsample": "nn.functional.spdownsample",
    "nn.functional.conv.utils.AttributeDict": "nn.functional.AttributeDict",
    "nn.functional.conv.utils.collections.AttributeDict": "nn.functional.AttributeDict",
    "nn.functional.conv.utils.collections.attributedict": "nn.functional.AttributeDict",
    "nn.functional.conv.utils.collections.attrdict": "nn.functional.AttributeDict",
}


@pytest.mark.parametrize("path", DEFINED)
def test_the_files_of_v21_hold_the_functions_of_today(path: str) -> None:
    assert reach(path) is reach(DEFINED[path].strip())


def test_the_defaults_of_v21_can_be_copied() -> None:
    config = module("nn.functional.conv.conv_config")
    defaults = config._default_conv_config
    plain, copied = dict(defaults), defaults.copy()
    assert plain == config.get_default_conv_config(0)
    assert defaults.kmap_mode == "hashmap_on_the_fly" and type(copied) is config.AttributeDict
    copied.ifsort = not defaults.ifsort
    assert plain == defaults != copied


def test_import_torchsparse_is_enough_for_the_v21_modules() -> None:
    """In a fresh interpreter: no other import has brought them in."""
    names = "tensor operators nn nn.functional nn.utils utils utils.quantize utils.collate"
    names += " backend backends"
    code = "import torchsparse\n" + "\n".join(f"torchsparse.{name}" for name in names.split())
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def parameters(thing: Any) -> list[str]:
    """Parameters as ``name``, ``name=default``, ``*``, ``*args``, ``**kwargs``."""
    found, keyword_only = [], False
    for p in inspect.signature(thing).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            found.append("*")
        keyword_only |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f"={_text(p.default)}"
        found.append(f"{stars}{p.name}{default}")
    return found


def _text(value: Any) -> str:
    return str(value) if hasattr(type(value), "__members__") else repr(value)


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@pytest.mark.parametrize("path", SIGNATURES)
def test_the_parameters_are_those_of_v21(path: str) -> None:
    want = listed(SIGNATURES[path]) + listed(ADDED.get(path, ""))
    assert parameters(reach(path)) == want


@pytest.mark.parametrize("kind", FUNCTIONS.split())
def test_the_convolution_classes_apply(kind: str) -> None:
    apply = reach(f"nn.functional.conv.func.{kind}").apply
    assert parameters(apply) == listed("feats, weight, kmap, config=None, transposed=False")


@each_module
def test_every_public_name_has_a_docstring(path: str) -> None:
    assert inspect.getdoc(module(path))
    for name in OFFERED[path].split():
        thing = getattr(module(path), name)
        if isinstance(thing, ModuleType) or callable(thing):
            own = thing.__doc__  # a class must not live off its parent's
            assert own and own.strip(), f"{path}.{name}"


@pytest.mark.parametrize(
    "kind", [SparseTensor, PointTensor, GPUHashTable], ids=lambda k: k.__name__
)
def test_every_public_method_has_a_docstring(kind: type) -> None:
    methods = [name for name, value in inspect.getmembers(kind, inspect.isfunction)]
    public = [name for name in methods if not name.startswith("_")]
    assert len(public) > 3
    assert [name for name in public if not inspect.getdoc(getattr(kind, name))] == []
