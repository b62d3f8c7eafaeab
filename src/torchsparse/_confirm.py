"""Which of several changes pay when they act together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["paying"]

T = TypeVar("T")


def paying(
    changes: Sequence[T],
    time: Callable[[Sequence[T]], Sequence[float]],
    slack: float,
) -> list[T]:
    """The changes to keep.

    Each was found to pay by itself. Together they may not: parts of a network share work, which a
    change of one of them makes the others do alone. So all are tried at once, and if that does not
    pay one after another, each on top of those kept so far.

    Args:
        changes: The most promising first.
        time: Seconds of one or several uses with some of the changes, the use that counts last.
        slack: Share of a time that is taken for noise. The last use must gain more, and no other
            use may lose more.
    """
    if not changes:
        return []
    before = time([])
    if _pays(time(changes), before, slack):
        return list(changes)
    kept: list[T] = []
    for change in changes if len(changes) > 1 else ():
        after = time([*kept, change])
        if _pays(after, before, slack):
            kept.append(change)
            before = after
    return kept


def _pays(after: Sequence[float], before: Sequence[float], slack: float) -> bool:
    worse = any(new > (1 + slack) * old for new, old in zip(after, before))
    return not worse and after[-1] < (1 - slack) * before[-1]
