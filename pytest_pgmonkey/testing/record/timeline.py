"""A test's statements as lines to read: when, how long, by whom, what, and what came of it."""

from __future__ import annotations

import os
import re
import reprlib
from typing import TYPE_CHECKING, Any, Final

from ...secrets import SENSITIVE_PARTS
from ..sql.lexer import Verb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import CodeType

    from .record import Entry

__all__ = ["cut", "place_of", "shown_sql", "timeline"]

_HIDDEN: Final = "…"
_LITERAL: Final = re.compile(
    r"""[EeBbXxUu]?&?'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$|\b\d[\d.]*\b""",
    re.DOTALL,
)
_SENSITIVE: Final = re.compile("|".join((*SENSITIVE_PARTS, "passwd")), re.IGNORECASE)
_TAG_NUMBER: Final = re.compile(rb"(\d+)\0?$")
_WIDEST_PLACE: Final = 28
_LEAST_SQL: Final = 24
_TITLES: Final = ("at ms", "took", "connection, place", "rows", "statement")
_ENDS: Final = frozenset({Verb.COMMIT, Verb.ROLLBACK})
_RESULTS: Final = frozenset({Verb.QUERY, Verb.WRITE, Verb.DECLARE})


def timeline(
    entries: Iterable[Entry], began: float, missing: int, width: int, *, params: bool
) -> str:
    """Give a line for each run of equal statements; empty where there are none.

    `began` is when the test did, `missing` how many earlier statements are no longer known, and
    `width` that of the terminal in columns.
    """
    runs = [_Run(found, params=params) for found in group(entries)]
    if not runs:
        return ""
    rows = [_TITLES, *(run.cells(began) for run in runs)]
    brackets = [" ", *_brackets(runs)]
    errors = ["", *(run.error for run in runs)]
    sizes = [max(len(row[column]) for row in rows) for column in range(4)]
    room = max(_LEAST_SQL, width - sum(sizes) - 8)
    lines = [f"({missing} earlier statements are no longer known)"] if missing else []
    for (at, took, where, outcome, sql), bracket, error in zip(rows, brackets, errors, strict=True):
        before = f"{at:>{sizes[0]}} {took:>{sizes[1]}}  {where:<{sizes[2]}} {bracket} "
        lines.append(f"{before}{cut(sql, room):<{room}}  {outcome:>{sizes[3]}}".rstrip())
        if error:
            lines.append(f"{'':>{len(before)}}! {error}")
    return "\n".join(lines)


def group(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Put together what one connection has run again and again, in one place and with one text."""
    runs: list[list[Entry]] = []
    for entry in entries:
        if runs and not entry.error and _is_same(runs[-1][-1], entry):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs


def _is_same(one: Entry, other: Entry) -> bool:
    return not one.error and (
        one.statement.text,
        one.connection,
        one.code,
        one.instruction,
    ) == (other.statement.text, other.connection, other.code, other.instruction)


class _Run:
    """Equal statements, one after the other."""

    def __init__(self, entries: Sequence[Entry], *, params: bool) -> None:
        self.entries: Final = entries
        self.first: Final = entries[0]
        self.last: Final = entries[-1]
        self._params: Final = params

    def cells(self, began: float) -> tuple[str, str, str, str, str]:
        """Give when, how long, where, what came of it, and the statement."""
        took = sum(entry.took for entry in self.entries)
        return (
            f"{(self.first.began - began) * 1000:.1f}",
            f"{took * 1000:.2f}" if took else "",
            f"#{self.first.connection} {place_of(self.first)}",
            self._outcome(),
            self._statement(),
        )

    @property
    def error(self) -> str:
        """What the last one failed with; without its words where they may quote a secret."""
        hides = is_sensitive(self.last.statement.text)
        return self.last.error.partition(":")[0] if hides else self.last.error

    def _outcome(self) -> str:
        number = _number(self.last.rows)
        if number is None or self.last.statement.verb not in _RESULTS:
            return ""
        return str(number)

    def _statement(self) -> str:
        times = f"× {len(self.entries)} " if len(self.entries) > 1 else ""
        shown = times + shown_sql(self.first.statement.text)
        if self._params and self.first.params is not None:
            hides = is_sensitive(self.first.statement.text)
            shown += f"  {_HIDDEN if hides else _values(self.first.params)}"
        return shown


def _brackets(runs: Sequence[_Run]) -> list[str]:
    """Give for each line where the transaction of its connection begins and ends."""
    marks: list[str] = []
    open_at: dict[int, int] = {}
    for at, run in enumerate(runs):
        connection, verb = run.first.connection, run.first.statement.verb
        begun = open_at.get(connection)
        if verb in _ENDS:
            marks.append("└" if begun is not None else " ")
            open_at.pop(connection, None)
        elif run.last.in_block or verb is Verb.BEGIN:
            marks.append("┌" if begun is None else "│")
            open_at.setdefault(connection, at)
        else:
            marks.append(" ")
            open_at.pop(connection, None)
    return marks


def place_of(entry: Entry) -> str:
    """Give where a statement came from: a line of the user's code, or a client."""
    if entry.client is not None:
        name = entry.client.application or "client"
        shown = f"{name} ({entry.client.pid})" if entry.client.pid else name
    elif entry.code is None:
        return ""
    else:
        shown = f"{_short(entry.code.co_filename)}:{_line(entry.code, entry.instruction)}"
    return shown if len(shown) <= _WIDEST_PLACE else f"…{shown[1 - _WIDEST_PLACE :]}"


def _short(file: str) -> str:
    try:
        return os.path.relpath(file)
    except ValueError:  # another drive
        return file


def _line(code: CodeType, instruction: int) -> int:
    for begin, end, line in code.co_lines():
        if line is not None and begin <= instruction < end:
            return line
    return code.co_firstlineno


def is_sensitive(text: str) -> bool:
    """Whether a statement speaks of something secret, so that its values are hidden."""
    return _SENSITIVE.search(text) is not None


def shown_sql(text: str) -> str:
    """Give a statement on one line, without its literals where they may be secret."""
    if is_sensitive(text):
        text = _LITERAL.sub(_HIDDEN, text)
    return " ".join(text.split())


def _values(params: Any) -> str:
    try:
        return _repr.repr(params)
    except Exception:  # of an object of the application's
        return _HIDDEN


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 40


def _number(rows: Any) -> int | None:
    if isinstance(rows, int):
        return rows if rows >= 0 else None
    found = _TAG_NUMBER.search(rows) if rows else None
    return int(found[1]) if found else None


def cut(text: str, room: int) -> str:
    """Give a text that is no longer than so many columns."""
    return text if len(text) <= room else f"{text[: room - 1]}…"
