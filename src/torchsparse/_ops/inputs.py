"""The input of a captured network, brought to where its graph reads it."""

from __future__ import annotations

from torch import Tensor

from torchsparse._ops.dispatch import reference, twin

__all__ = ["place_input"]

MOST_WORDS = 1 << 30  # as the kernel counts them, its last block included


def place_input(
    coords: Tensor, feats: Tensor, into_coords: Tensor, into_feats: Tensor, count: Tensor,
    filled: int,
) -> None:  # fmt: skip
    """Write rows, padding behind them, and how many are real, without gradients.

    Args:
        coords: [N, 1 + D] int32.
        feats: [N, C].
        into_coords: [R, 1 + D] int32, R >= N; rows from N to ``filled`` become PAD.
        into_feats: [R, C] in the dtype of feats; these rows become 0.
        count: [1] int64, becomes N.
        filled: Rows that may hold something other than padding.
    """
    rows = max(coords.shape[0], filled)
    most = rows * max(coords.shape[1], feats.shape[1] * feats.element_size() // 2)
    few = feats.shape[1] > 0 and most <= MOST_WORDS
    chosen = twin("inputs", coords) if few else reference("inputs")
    chosen.place_input(coords, feats, into_coords, into_feats, count, filled)
