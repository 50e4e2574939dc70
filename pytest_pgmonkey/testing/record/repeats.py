"""The same statement from the same place, one by one: found, and what to do instead."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from .lines import cut
from .record import is_counted
from .timeline import place_of, shown_sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .record import Entry

__all__ = ["repeats"]

_LONGEST: Final = 120
_READ: Final = "read all at once, with a join or = ANY(%s)"
_WRITE: Final = "executemany() sends all at once"
_WRITING: Final = ("INSERT", "UPDATE", "DELETE", "MERGE")


def repeats(entries: Iterable[Entry], threshold: int) -> list[str]:
    """Give a sentence for each statement that came so often from one place."""
    found = Counter(
        (place_of(entry), entry.statement.text) for entry in entries if is_counted(entry.statement)
    )
    return [
        f"{place} runs one statement {times} times: {cut(shown_sql(text), _LONGEST)} "
        f"({_WRITE if text.lstrip().upper().startswith(_WRITING) else _READ})"
        for (place, text), times in found.items()
        if times >= threshold
    ]
