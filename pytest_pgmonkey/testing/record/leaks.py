"""What a test has left open at its end, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sandbox.core.places import Peer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..sandbox.core.places import Left

__all__ = ["leaks"]


def leaks(left: Iterable[Left]) -> list[str]:
    """Give a sentence for each; a client may keep its connection, if it changes nothing with it."""
    return [
        _sentence(each) for each in left if each.has_changes or not isinstance(each.origin, Peer)
    ]


def _sentence(left: Left) -> str:
    if isinstance(left.origin, Peer):
        return f"{left.origin} was left in a transaction with changes that were not committed"
    changes = ", with changes that were not committed" if left.has_changes else ""
    return f"{left.origin} was not returned{changes}"
