"""A test's statements as lines to read: when, how long, by whom, what, and what came of it."""

from __future__ import annotations

import os
import re
import reprlib
from typing import TYPE_CHECKING, Any, Final

from ...secrets import SENSITIVE_PARTS, redact_text
from ..sql.lexer import Verb
from .lines import Role, cut, cut_line, plain, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import CodeType

    from .lines import Line
    from .record import Entry

__all__ = [
    "Run",
    "brackets",
    "group",
    "origin_of",
    "place_of",
    "shown_sql",
    "timeline",
    "without_secrets",
]

_HIDDEN: Final = "…"
_LITERAL: Final = re.compile(
    r"""[EeBbXxUu]?&?'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$|\b\d[\d.]*\b""",
    re.DOTALL,
)
_SENSITIVE: Final = re.compile("|".join((*SENSITIVE_PARTS, "passwd")), re.IGNORECASE)
_TAG_NUMBER: Final = re.compile(rb"(\d+)\0?$")
_WIDEST_PLACE: Final = 28
_LEAST_SQL: Final = 24
_LONGEST_VALUE: Final = 40
_LONGEST_TEXT: Final = 100_000
_LONGEST_ERROR: Final = 500
_TITLES: Final = ("at ms", "took", "connection, place", "rows")
_STATEMENT: Final = "statement"
_ENDS: Final = frozenset({Verb.COMMIT, Verb.ROLLBACK})
_BOUNDS: Final = _ENDS | {Verb.BEGIN, Verb.SAVEPOINT}
_RESULTS: Final = frozenset({Verb.QUERY, Verb.WRITE, Verb.DECLARE, Verb.CURSOR})


def timeline(
    entries: Iterable[Entry], began: float, missing: int, width: int, *, params: bool
) -> list[Line]:
    """Give a line for each run of equal statements, after a heading; none where there are none.

    `began` is when the test did, `missing` how many earlier statements are no longer known, and
    `width` that of the terminal in columns.
    """
    runs = group(entries)
    if not runs:
        return []
    rows = [_TITLES, *(_cells(run, began) for run in runs)]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(_LEAST_SQL, width - sum(sizes) - 8)
    told = f"({missing} earlier statements are no longer known)"
    lines: list[Line] = [[(Role.QUIET, told)]] if missing else []
    titles = _columns(_TITLES, sizes, " ", cut_line([(Role.PLAIN, _STATEMENT)], room))
    lines.append([(Role.QUIET, plain([titles]))])
    indent = " " * (sum(sizes[:3]) + 6)
    for run, cells, bracket in zip(runs, rows[1:], brackets(runs), strict=True):
        statement = cut_line(_statement(run, params=params), room)
        lines.append(_columns(cells, sizes, bracket, statement))
        if run.error:
            lines.append(
                [(Role.PLAIN, indent), (Role.ERROR, visible(f"! {cut(run.error, _LONGEST_ERROR)}"))]
            )
    return lines


def _columns(cells: Sequence[str], sizes: Sequence[int], bracket: str, statement: Line) -> Line:
    at, took, where, outcome = cells
    return [
        (Role.QUIET, f"{at:>{sizes[0]}} {took:>{sizes[1]}}  "),
        (Role.PLAIN, f"{where:<{sizes[2]}} "),
        (Role.TRANSACTION, bracket),
        (Role.PLAIN, " "),
        *statement,
        (Role.PLAIN, f"  {outcome:>{sizes[3]}}"),
    ]


class Run:
    """Equal statements of one connection, from one place, one after the other."""

    def __init__(self, first: Entry) -> None:
        self.entries: Final = [first]
        self.first: Final = first

    @property
    def last(self) -> Entry:
        """The last one of them; it alone may have failed, and then it is the only one."""
        return self.entries[-1]

    @property
    def took(self) -> float:
        """The seconds that all of them took."""
        return sum(entry.took for entry in self.entries)

    @property
    def rows(self) -> int | None:
        """The number of rows of the last one, where it is one that has any and they are known."""
        return _number(self.last.rows) if self.last.statement.verb in _RESULTS else None

    @property
    def error(self) -> str:
        """What the last one failed with; without its words where they may quote a secret."""
        hides = is_sensitive(self.last.statement.text)
        return self.last.error.partition(":")[0] if hides else redact_text(self.last.error)

    def values(self, longest: int) -> str:
        """Give the parameters of the first one, each cut to a length; empty where it has none."""
        if self.first.params is None:
            return ""
        if is_sensitive(self.first.statement.text):
            return _HIDDEN
        return _values(self.first.params, longest)

    def takes(self, entry: Entry) -> bool:
        """Whether another statement is one of them."""
        return not (entry.error or self.last.error) and self._key(entry) == self._key(self.last)

    @staticmethod
    def _key(entry: Entry) -> tuple[object, ...]:
        return entry.statement.text, entry.connection, entry.code, entry.instruction


def group(entries: Iterable[Entry]) -> list[Run]:
    """Put together what one connection has run again and again, in one place and with one text."""
    runs: list[Run] = []
    for entry in entries:
        if runs and runs[-1].takes(entry):
            runs[-1].entries.append(entry)
        else:
            runs.append(Run(entry))
    return runs


def _cells(run: Run, began: float) -> tuple[str, str, str, str]:
    """Give when, how long, where, and what came of it."""
    return (
        f"{(run.first.began - began) * 1000:.1f}",
        f"{run.took * 1000:.2f}" if run.took else "",
        f"#{run.first.connection} {place_of(run.first)}",
        "" if run.rows is None else str(run.rows),
    )


def _statement(run: Run, *, params: bool) -> Line:
    """Give the statement, how often it ran, and its parameters."""
    bounds = run.first.statement.verb in _BOUNDS
    text = shown_sql(run.first.statement.text)
    line = [(Role.TRANSACTION if bounds else Role.PLAIN, text)]
    if (times := len(run.entries)) > 1:
        line.insert(0, (Role.TIMES, f"× {times} "))
    if params and (values := run.values(_LONGEST_VALUE)):
        line.append((Role.QUIET, visible(f"  {values}")))
    return line


def brackets(runs: Sequence[Run]) -> list[str]:
    """Give for each run whether the transaction of its connection begins, goes on or ends there.

    That is ┌, │ or └, and a space outside of transactions.
    """
    marks: list[str] = []
    are_open: set[int] = set()
    for run in runs:
        connection, verb = run.first.connection, run.first.statement.verb
        was_open = connection in are_open
        if verb in _ENDS:
            marks.append("└" if was_open else " ")
            are_open.discard(connection)
        elif run.last.in_block or verb is Verb.BEGIN:
            marks.append("│" if was_open else "┌")
            are_open.add(connection)
        else:
            marks.append(" ")
            are_open.discard(connection)
    return marks


def place_of(entry: Entry) -> str:
    """Give where a statement came from, in no more than some columns."""
    shown = visible(origin_of(entry))
    return shown if len(shown) <= _WIDEST_PLACE else f"…{shown[1 - _WIDEST_PLACE :]}"


def origin_of(entry: Entry) -> str:
    """Give where a statement came from: a line of the user's code, or a client."""
    if entry.client is not None:
        name = entry.client.application or "client"
        return f"{name} ({entry.client.pid})" if entry.client.pid else name
    if entry.code is None:
        return ""
    return f"{_short(entry.code.co_filename)}:{_line(entry.code, entry.instruction)}"


def _short(file: str) -> str:
    try:
        return os.path.relpath(file)
    except (ValueError, OSError):  # another drive, or a working directory that is gone
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
    return visible(" ".join(without_secrets(text).split()))


def without_secrets(text: str) -> str:
    """Give a statement as it was written, without its literals where they may be secret.

    Of one that is enormous the beginning is enough.
    """
    if is_sensitive(text):
        return _LITERAL.sub(_HIDDEN, text)
    return redact_text(text[:_LONGEST_TEXT])


class _Shortener(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redact_text(x), level)


def _values(params: Any, longest: int) -> str:
    shortener = _Shortener()
    shortener.maxstring = shortener.maxother = longest
    try:
        return shortener.repr(params)
    except Exception:  # of an object of the application's
        return _HIDDEN


def _number(rows: Any) -> int | None:
    if isinstance(rows, int):
        return rows if rows >= 0 else None
    found = _TAG_NUMBER.search(rows) if rows else None
    return int(found[1]) if found else None
