"""Pooling over all rows of a sample, as modules."""

from __future__ import annotations

from torch import Tensor, nn

from torchsparse.nn.functional.pooling import global_avg_pool, global_max_pool, global_sum_pool
from torchsparse.tensor import SparseTensor

__all__ = ["GlobalAvgPool", "GlobalMaxPool", "GlobalSumPool"]


class GlobalAvgPool(nn.Module):
    """Mean of the rows of each sample, [B, C]; see ``functional.global_avg_pool``."""

    def __init__(self) -> None:  # so that its signature is not (*args, **kwargs)
        super().__init__()

    def forward(self, input: SparseTensor, batch_size: int | None = None) -> Tensor:
        return global_avg_pool(input, batch_size)


class GlobalMaxPool(nn.Module):
    """Maximum of each channel over the rows of each sample, [B, C]; see
    ``functional.global_max_pool``."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, input: SparseTensor, batch_size: int | None = None) -> Tensor:
        return global_max_pool(input, batch_size)


class GlobalSumPool(nn.Module):
    """Sum of the rows of each sample, [B, C]; see ``functional.global_sum_pool``."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, input: SparseTensor, batch_size: int | None = None) -> Tensor:
        return global_sum_pool(input, batch_size)
