"""A test's statements as plain data, which can be sent to another process and written to a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..sql.lexer import Verb
from .lines import cut
from .timeline import brackets, group, origin_of, without_secrets

if TYPE_CHECKING:
    from .record import Entry, Record
    from .timeline import Run

    #: Of lists, dictionaries with text as keys, text, numbers and None.
    Trace = dict[str, Any]

__all__ = ["CONTROL", "ERROR", "KIND", "SQL", "TIMES", "TOOK", "plain", "trace"]

#: Where in a run's list the page's collector finds what it adds up.
TOOK: Final = 1
TIMES: Final = 5
KIND: Final = 6
SQL: Final = 7
ERROR: Final = 11
CONTROL: Final = "control"
_KINDS: Final = {
    Verb.QUERY: "read",
    Verb.DECLARE: "read",
    Verb.CURSOR: "read",
    Verb.WRITE: "write",
    Verb.DDL: "schema",
}
_LONGEST_SQL: Final = 20_000
_LONGEST_VALUE: Final = 400
_LONGEST_ERROR: Final = 2000


def trace(record: Record, *, params: bool) -> Trace:
    """Give what is known of the test that began last: its lanes, and its runs of equal statements.

    A lane is a connection or a client. A run has when its first statement began, the time that
    all of them took, when the last one ended (milliseconds, since the test began), the lane's
    index, the bracket of its transaction, how many there are, kind, SQL, parameters (unless they
    are to be hidden), origin, rows and error.
    """
    entries = list(record.since(0))
    runs = group(entries)
    lanes: dict[int, int] = {}
    for run in runs:
        lanes.setdefault(run.first.connection, len(lanes))
    named = {run.first.connection: _name(run.first) for run in reversed(runs)}
    return {
        "lanes": [named[connection] for connection in lanes],
        "missing": record.number - len(entries),
        "runs": [
            _listed(run, mark, lanes[run.first.connection], record.began, params=params)
            for run, mark in zip(runs, brackets(runs), strict=True)
        ],
    }


def _name(entry: Entry) -> str:
    number = f"#{entry.connection}"
    return plain(f"{number} {origin_of(entry)}") if entry.client is not None else number


def _listed(run: Run, mark: str, lane: int, began: float, *, params: bool) -> list[Any]:
    return [
        _ms(run.first.began - began),
        _ms(run.took),
        _ms(run.last.began + run.last.took - began),
        lane,
        mark,
        len(run.entries),
        _KINDS.get(run.first.statement.verb, CONTROL),
        plain(cut(without_secrets(run.first.statement.text).strip(), _LONGEST_SQL)),
        plain(run.values(_LONGEST_VALUE)) if params else "",
        plain(origin_of(run.first)),
        run.rows,
        plain(cut(run.error, _LONGEST_ERROR)),
    ]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def plain(text: str) -> str:
    """Give a text that is UTF-8 for sure: names of files may hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
