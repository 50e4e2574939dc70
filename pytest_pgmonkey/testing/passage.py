"""The place that every statement of a test passes before it runs, in either isolation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from .sql.lexer import Statement

    Steps = Generator[Any, Any, Any]


# What a frame's `f_locals` is: a dictionary, or a proxy from Python 3.13.
ARGUMENTS: Final = frozenset({dict, type((lambda: sys._getframe().f_locals)())})


class Recorder(Protocol):
    """Notes the statements that pass."""

    def passing(self, statement: Statement, operation: Any, run: Steps) -> Steps:
        """Note a statement, and give what runs it."""

    def note_end(self, source: Any, word: str) -> None:
        """Note the end of a transaction by a driver's method: COMMIT or ROLLBACK."""


recorder: Recorder | None = None


def passing(
    statement: Statement,
    operation: Any,
    run: Steps,
) -> Steps:
    """See a statement that is about to run, and give the generator that runs it.

    `operation` is what the application called, as its door knows it. For psycopg it is the
    generator of the call, from which `psycopg_door.internals` reads the cursor and the parameters
    as long as it has not run; or its arguments by name, where these have been read already.

    `run` ends with the statement, or raises its error: a generator around it would see both. The
    rows are then the cursor's, except in a script of rollback isolation, where `run` gives the
    statement's own results. Where a string of several statements is sent as a whole, each of them
    passes before it is sent, and they end together. In pipeline mode, and for `stream()` and
    `copy()`, a statement ends when it is sent.

    Only what the application wrote as SQL passes. What psycopg's methods send does not: BEGIN,
    COMMIT, ROLLBACK and savepoints, and a server-side cursor's FETCH, MOVE and CLOSE.
    """
    return run if recorder is None else recorder.passing(statement, operation, run)


def all_passing(parts: Iterable[Statement], operation: Any, run: Steps) -> Steps:
    """See all statements of an operation that runs them at once."""
    for part in parts:
        run = passing(part, operation, run)
    return run


def ended(source: Any, word: str) -> None:
    """Note that a connection's method has ended its transaction by COMMIT or ROLLBACK."""
    if recorder is not None:
        recorder.note_end(source, word)
