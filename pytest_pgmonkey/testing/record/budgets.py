"""How many statements a piece of code may run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from .record import is_counted
from .timeline import place_of, shown_sql

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from .record import Record

__all__ = ["Budget", "excess"]

_LONGEST: Final = 100


class Budget:
    """A block that fails where it runs another number of statements, or more, than it says.

    The application's queries count: not BEGIN, COMMIT, savepoints and SET, nor what drivers ask by
    themselves. `executemany()` and COPY count once.
    """

    def __init__(self, record: Record, number: int, *, exactly: bool) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{number!r} is no number of statements: give 0 or more")
        self._record: Final = record
        self._number: Final = number
        self._exactly: Final = exactly
        self._before = self._start = 0

    @property
    def count(self) -> int:
        """How many have run in the block so far."""
        return self._record.counted - self._before

    def __enter__(self) -> Self:
        self._before, self._start = self._record.counted, self._record.number
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        if error is None and (told := self.verdict()):
            raise AssertionError(told)

    def verdict(self) -> str:
        """Tell what is wrong with the number; empty where it is right."""
        return excess(self._record, self._start, self.count, self._number, exactly=self._exactly)


def excess(record: Record, start: int, count: int, allowed: int, *, exactly: bool) -> str:
    """Tell of too many statements, or too few, since so many; empty where it is right."""
    if count == allowed or (count < allowed and not exactly):
        return ""
    difference = f"{abs(count - allowed)} too {'many' if count > allowed else 'few'}"
    allows = "expected" if exactly else "allowed"
    ran = "1 statement ran" if count == 1 else f"{count} statements ran"
    lines = [f"{ran}, {allowed} {'is' if allowed == 1 else 'are'} {allows} ({difference})"]
    found = [entry for entry in record.since(start) if is_counted(entry.statement)]
    if len(found) < count:
        lines.append(f"(the first {count - len(found)} are no longer known)")
    runs = Counter((place_of(entry), shown_sql(entry.statement.text)) for entry in found)
    width = max((len(place) for place, _ in runs), default=0)
    for (place, text), times in runs.items():
        lines.append(f"  {place.ljust(width)}  {times} × {text[:_LONGEST]}")
    return "\n".join(lines)
