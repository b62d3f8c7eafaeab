"""Functions that a program puts in the place of the library's own: it is told that they are not
called, once, when a map is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import clouds
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.nn import functional as F
from torchsparse.nn.functional.conv import replaced

STRIDED: dict[str, Any] = {"kernel_size": 2, "stride": 2}
GENERATIVE: dict[str, Any] = {**STRIDED, "transposed": True, "generative": True}


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced, "_warned", set())


def cloud(device: torch.device) -> SparseTensor:
    coords = torch.from_numpy(clouds.odd()).to(device)
    return SparseTensor(torch.ones(len(coords), 2, device=device), coords)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it must not be called")


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "parameters", "advice"),
    [
        ("spdownsample", STRIDED, "`coordinates=` to Conv3d.forward or F.conv3d"),
        ("build_kernel_map", STRIDED, "`coordinates=` to Conv3d.forward or F.conv3d"),
        ("build_kernel_map", {}, "`coordinates=` to Conv3d.forward or F.conv3d"),
        ("build_kernel_map", GENERATIVE, "`coordinates=` to Conv3d.forward or F.conv3d"),
        ("spupsample_generative", GENERATIVE, "torchsparse.operators.prune"),
    ],
)
def test_a_replaced_function_is_named_once(
    name: str,
    parameters: dict[str, Any],
    advice: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = spnn.Conv3d(2, 3, **parameters).to(device)
    want = layer(cloud(device)).coords
    monkeypatch.setattr(F, name, never)
    with pytest.warns(UserWarning, match=f"functional.{name} was replaced") as caught:
        got = layer(cloud(device)).coords
    assert len(caught) == 1 and advice in str(caught[0].message)
    assert caught[0].filename == __file__
    assert torch.equal(got, want)
    layer(cloud(device))  # warnings are errors: it is not said twice


def test_a_wrapper_is_a_replacement_too(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "spdownsample", wrapped(F.spdownsample))
    with pytest.warns(UserWarning, match="spdownsample was replaced"):
        spnn.Conv3d(2, 3, 2, 2).to(device)(cloud(device))


def test_a_warning_that_was_made_an_error_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = spnn.Conv3d(2, 3, 2, 2)
    monkeypatch.setattr(F, "spdownsample", never)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="spdownsample was replaced"):
                layer(cloud(torch.device("cpu")))


def test_what_does_not_concern_a_layer_is_not_said(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that are given, maps that are there already, and layers that never called it."""
    x, layer = cloud(device), spnn.Conv3d(2, 3, 2, 2).to(device)
    coarse = layer(x).coords
    monkeypatch.setattr(F, "spdownsample", never)
    layer(x)
    layer(cloud(device), coordinates=coarse.flip(0).contiguous())
    spnn.Conv3d(2, 3, 3).to(device)(cloud(device))
    F.conv3d(x, torch.ones(1, 2, 3, device=device), 1)
