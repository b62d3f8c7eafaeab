"""Functions of features alone, applied to sparse tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchsparse.tensor import SparseTensor, check_sparse, wrap

__all__ = ["fapply"]


def fapply(
    input: SparseTensor, fn: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> SparseTensor:
    """Apply a function to the features.

    Args:
        input: A sparse tensor with features [N, C].
        fn: From [N, C] to [N, any].
        *args: Further arguments of ``fn``.
        **kwargs: Further arguments of ``fn``.

    Returns:
        A new tensor with ``feats = fn(input.feats, ...)``; coordinates, stride, range and caches
        are shared.

    Raises:
        TypeError: No sparse tensor.
        ValueError: ``fn`` changed the number of rows.
    """
    check_sparse(input)
    given = input.feats
    feats = fn(given, *args, **kwargs)
    if feats.shape != given.shape and feats.shape[:1] != given.shape[:1]:
        raise ValueError(
            f"the function must keep the number of rows, "
            f"got {list(given.shape)} -> {list(feats.shape)}"
        )
    return wrap(feats, input)
