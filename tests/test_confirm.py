"""Changes that pay one by one are tried together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from torchsparse._confirm import paying


def clock(gains: dict[str, tuple[float, float]]) -> Callable[[Sequence[str]], list[float]]:
    """Two uses that take 1 s without changes; what each change adds to them."""
    return lambda changes: [1 + sum(gains[change][use] for change in changes) for use in (0, 1)]


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ({}, ""),
        ({"a": (0.0, -0.1)}, "a"),
        ({"a": (-0.1, -0.1), "b": (-0.1, -0.1)}, "ab"),
        ({"a": (-0.1, -0.1), "b": (-0.1, 0.2)}, "a"),  # together slower
        ({"a": (0.1, -0.3), "b": (-0.05, -0.05)}, "b"),  # slower in the other use
        ({"a": (0.1, -0.3)}, ""),
        ({"a": (-0.2, 0.0)}, ""),  # no gain in what counts
        ({"a": (0.0, -0.001)}, ""),  # within the noise
        ({"a": (0.001, -0.1)}, "a"),  # a loss within the noise
    ],
)
def test_what_is_kept(gains: dict[str, tuple[float, float]], kept: str) -> None:
    assert "".join(paying(list(gains), clock(gains), slack=0.01)) == kept


def test_changes_that_undo_each_other() -> None:
    """Each pays alone, both together do not: the first one stays."""

    def time(changes: Sequence[str]) -> list[float]:
        return [{0: 1.0, 1: 0.9, 2: 1.1}[len(changes)]]

    assert paying("ab", time, slack=0.0) == ["a"]


def test_a_single_change_is_timed_once() -> None:
    calls: list[Sequence[str]] = []

    def time(changes: Sequence[str]) -> list[float]:
        calls.append(list(changes))
        return [1.0]

    assert paying(["a"], time, slack=0.0) == []
    assert calls == [[], ["a"]]
