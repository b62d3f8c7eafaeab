"""The input of a captured network, placed in one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchsparse._capacity import PAD
from torchsparse._ops.inputs import place_input
from torchsparse._reference import inputs as reference
from torchsparse._triton import inputs

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("twin", [inputs, reference])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 4, 5])
def test_rows_padding_and_their_number(
    channels: int, dtype: torch.dtype, twin: Any, device: torch.device
) -> None:
    """Larger and smaller scans take turns; what lies behind ``filled`` is left alone."""
    room = 700
    coords = torch.full((room, 4), PAD, dtype=torch.int32, device=device)
    feats = torch.zeros((room, channels), dtype=dtype, device=device).requires_grad_()
    count = torch.zeros(1, dtype=torch.int64, device=device)
    filled = 0
    for n in (300, 600, 1, 0, 700):
        draw = torch.Generator().manual_seed(n)
        sites = torch.randint(-9, 9, (n, 4), generator=draw).int().to(device)
        rows = torch.randn((n, channels), generator=draw).to(device, dtype)
        version = feats._version
        twin.place_input(sites, rows.requires_grad_(), coords, feats, count, filled)
        assert count.item() == n
        assert torch.equal(coords[:n], sites) and bool((coords[n:] == PAD).all())
        assert torch.equal(feats[:n], rows) and not feats[n:].any()
        assert feats.is_leaf and feats._version - version in (0, 2)
        filled = n


def test_rows_apart_in_memory_and_rows_without_channels(device: torch.device) -> None:
    wide = torch.arange(80, dtype=torch.int32, device=device).view(10, 8)
    coords = torch.full((16, 4), PAD, dtype=torch.int32, device=device)
    feats = torch.zeros((16, 3), device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    place_input(wide[:, ::2], wide[:, :3].float().t().contiguous().t(), coords, feats, count, 12)
    assert torch.equal(coords[:10], wide[:, ::2]) and torch.equal(feats[:10], wide[:, :3].float())
    assert count.item() == 10
    place_input(wide[:3, :4], feats[:3, :0], coords, feats[:, :0], count, 10)
    assert torch.equal(coords[:3], wide[:3, :4]) and bool((coords[3:] == PAD).all())
    assert count.item() == 3
