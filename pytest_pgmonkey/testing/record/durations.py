"""What a run has spent in the database: by statement, and by test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .lines import cut
from .timeline import shown_sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .record import Entry

    #: A statement's text, how often it ran, and its seconds in all.
    Spent = list[tuple[str, int, float]]

__all__ = ["Durations", "spent"]

_LEAST_SQL: Final = 30


def spent(entries: Iterable[Entry]) -> Spent:
    """Add a test's statements up by their text."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        found.setdefault(shown_sql(entry.statement.text), []).append(entry.took)
    return [(text, len(times), sum(times)) for text, times in found.items()]


class Durations:
    """Adds up what tests have spent, wherever they ran."""

    def __init__(self) -> None:
        self._tests: dict[str, tuple[float, int]] = {}
        self._statements: dict[str, list[tuple[float, int, str]]] = {}

    def add(self, test: str, found: Spent) -> None:
        """Add a test; where it ran twice, the last time counts for it."""
        total, number = sum(each[2] for each in found), sum(each[1] for each in found)
        self._tests[test] = total, number
        for text, count, seconds in found:
            self._statements.setdefault(text, []).append((seconds, count, test))

    def lines(self, most: int, width: int) -> list[str]:
        """Give the slowest statements and the tests with most time in the database."""
        if not self._tests:
            return []
        sums = {text: sum(each[0] for each in found) for text, found in self._statements.items()}
        slowest = sorted(sums, key=lambda text: -sums[text])[:most]
        lines = [f"{'total ms':>9} {'count':>7}  statement, and the test that spent most on it"]
        room = max(_LEAST_SQL, width - 19)
        for text in slowest:
            found = self._statements[text]
            count = sum(each[1] for each in found)
            lines.append(f"{sums[text] * 1000:9.1f} {count:7}  {cut(text, room)}")
            lines.append(f"{'':19}{max(found)[2]}")
        lines.append(f"{'total ms':>9} {'count':>7}  test")
        tests = sorted(self._tests.items(), key=lambda each: -each[1][0])[:most]
        for test, (seconds, number) in tests:
            lines.append(f"{seconds * 1000:9.1f} {number:7}  {test}")
        return lines
