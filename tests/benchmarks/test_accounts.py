"""Every kernel has a group; names that a profiler gave for others have theirs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torchsparse
from benchmarks import accounts
from benchmarks.timing import Span

KERNELS = Path(torchsparse.__file__).parent / "_triton"


def defined() -> list[str]:
    """The functions under `triton.jit` that are launched, by their names."""
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                    found.append(node.name)
    return found


def test_every_kernel_has_one_group() -> None:
    names = defined()
    assert len(names) > 50
    assert len(names) == len(set(names)), "a profiler could not tell them apart"
    listed = [name for group in accounts.OURS.values() for name in group]
    assert sorted(listed) == sorted(names)
    assert tuple(accounts.OURS) == accounts.GROUPS


SPCONV = "spconvlib::spconv::csrc::sparse::all::ops3d::kernel"
CUMM = "spconvlib::cumm::conv::main::Ampere_f16f16f16f16f16tnt_m64n64k32_C301LLL_SK"
FUNCTOR = "at::native::vectorized_elementwise_kernel<4, at::native::"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("gemm_kernel", "convolution"),
        ("insert_kernel", "maps"),
        ("_normalise_kernel", "elementwise"),
        ("_place_kernel", "other"),
        (f"void {CUMM}::conv_kernel({CUMM}::ConvParams)", "convolution"),
        ("spconvlib::cumm::gemm::main::Turing_f16::gemm_kernel(...)", "convolution"),
        (f"void {SPCONV}::calc_subm_conv_indices_mask<tv::hash::LinearHashTable<int>>()", "maps"),
        (f"void {SPCONV}::arange_kernel<int>(int*, int)", "maps"),
        ("void cub::DeviceRadixSortOnesweepKernel<cub::DeviceRadixSortPolicy<...>>()", "maps"),
        ("void thrust::cuda_cub::core::_kernel_agent<...>(...)", "maps"),
        (
            "void spconvlib::spconv::csrc::sparse::inference::ker::bias_add_act_inplace_kernel"
            "<float, false>(float*, tv::gemm::Activation)",
            "elementwise",
        ),
        (f"void {FUNCTOR}CUDAFunctor_add<float>, 3>(int, ...)", "elementwise"),
        (f"void {FUNCTOR}FillFunctor<float>, 1>(int, ...)", "other"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>()", "elementwise"),
        ("void at::native::batch_norm_backward_reduce_channels_last_kernel<4>()", "elementwise"),
        ("void cudnn::bn_bw_1C11_kernel_new<float, float>()", "elementwise"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_cublas", "convolution"),
        ("nvjet_hsh_128x64_64x6_2x1_v_bz_TNT", "convolution"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("Memcpy DtoH (Device -> Pageable)", "other"),
        ("Memset (Device)", "other"),
        ("who knows", "other"),
    ],
)
def test_names_have_their_group(name: str, group: str) -> None:
    assert accounts.group(name) == group


def test_the_account_holds_all_time() -> None:
    spans = [Span("gemm_kernel", 3, 2.0), Span("find_kernel", 1, 1.0), Span("Memset", 9, 0.5)]
    assert accounts.account([*spans, Span("gemv", 1, 4.0)]) == {
        "maps_ms": 1.0, "convolution_ms": 6.0, "elementwise_ms": 0.0, "other_ms": 0.5,
    }  # fmt: skip
