"""What the time of a GPU went to: maps, convolution, elementwise work, other; by kernel name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.timing import Span

GROUPS = ("maps", "convolution", "elementwise", "other")

OURS = {
    "maps": (
        # coords
        "bounds_kernel", "check_kernel", "fit_kernel", "find_kernel", "invert_kernel",
        "assign_kernel", "begin_kernel", "collect_kernel", "create_kernel", "insert_kernel",
        "level_kernel", "unpack_kernel",
        "bin_sum_kernel", "bin_start_kernel", "blank_kernel", "bucket_kernel", "rank_kernel",
        # conv: order, pairs
        "row_key_kernel", "start_kernel", "place_kernel", "tile_kernel", "untile_kernel",
        "count_kernel", "list_kernel",
        # maps: several at once
        "clear_kernel", "describe_kernel", "find_together_kernel", "invert_together_kernel",
        "key_together_kernel", "place_together_kernel", "start_together_kernel",
        "tile_together_kernel",
        # table
        "_hash_kernel", "_site_kernel", "_insert_kernel", "_find_kernel", "_lookup_kernel",
    ),
    "convolution": (
        "dense_kernel", "gemm_kernel", "narrow_kernel", "sum_kernel", "wgrad_kernel",
        "sum_chunks_kernel",
        "fetch_kernel", "turn_kernel", "depthwise_kernel", "depthwise_grad_kernel",
    ),
    "elementwise": (
        # batch_norm, norm
        "_moments_kernel", "_moments_end_kernel", "_normalise_kernel", "_sums_kernel",
        "_sums_end_kernel", "_rows_kernel", "_mean_kernel", "_affine_kernel",
    ),
    "other": (
        # sums, reduce, grouping: pools
        "_chunks_kernel", "_groups_kernel", "_count_kernel", "_max_kernel", "_decode_kernel",
        "_argmax_kernel", "_tally_kernel", "_place_kernel", "_group_keys_kernel",
        "_starts_kernel",
        # pool: over windows
        "_pool_sum_kernel", "_pool_shares_kernel", "_pool_max_kernel", "_unpool_max_kernel",
        "_pick_rows_kernel",
        # points
        "_flat_index_kernel", "_claim_kernel", "_scatter_kernel",
        "_gather_kernel", "_gather_strided_kernel", "_share_kernel", "_devoxelize_kernel",
        "_weight_grad_kernel", "_trilinear_kernel",
        # inputs
        "place_input_kernel",
        # voxels
        "_cells_kernel", "_changes_kernel", "_voxels_kernel", "_vote_kernel", "_win_kernel",
        "_elect_kernel",
    ),
}  # fmt: skip
"""The kernels of `torchsparse._triton`, by group."""

_GROUP = {name: group for group, names in OURS.items() for name in names}

# Of PyTorch, its libraries and SpConv: the first pattern that is found decides.
PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), group)
    for pattern, group in (
        # SpConv's own; the first takes a `tv::gemm::Activation`.
        (r"bias_add|activation_inplace", "elementwise"),
        (r"conv_kernel|gemm_kernel|nvrtc_kernel|cumm::|(gather|scatter)kernel", "convolution"),
        (r"spconv::csrc|conv_indices|indice|hash|unique|maximum_value", "maps"),
        # Memory: what is filled or read is mostly a counter or a table.
        (r"memcpy dtod|memcpy \(device -> device\)", "elementwise"),
        (r"memcpy|memset|fillfunctor", "other"),
        # PyTorch
        (r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|dot_kernel", "convolution"),
        (r"thrust|cub::|radix|sort|scan", "maps"),
        (r"batch_?norm|\bbn_|cudnn|catarray|multi_tensor|elementwise|reduce_kernel|copy|index|gather",
         "elementwise"),
        (r"\b(arange|fill|init\w*)_kernel", "maps"),
    )
)  # fmt: skip


def group(name: str) -> str:
    """Of a kernel, copy or fill, by the name that the profiler gives it."""
    if name in _GROUP:
        return _GROUP[name]
    return next((found for pattern, found in PATTERNS if pattern.search(name)), "other")


def account(spans: Iterable[Span]) -> dict[str, float]:
    """Milliseconds of each group; together those of all kernels."""
    found: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for span in spans:
        found[group(span.name)] += span.ms
    return {f"{name}_ms": ms for name, ms in found.items()}
