"""The record of a test's statements, of bounded size, in which nothing is formatted.

One for each process, in the passage: it sees handles and clients, in either isolation.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from time import perf_counter
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Final

from ..sandbox.core.places import Peer, is_passed_over
from ..sql.lexer import Verb, statements

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import CodeType

    from ..sql.lexer import Statement

    Steps = Generator[Any, Any, Any]

__all__ = ["Entry", "Record"]

_MOST: Final = 1000
_COUNTED: Final = frozenset({Verb.QUERY, Verb.WRITE, Verb.DDL, Verb.DECLARE})
# What drivers and frameworks ask by themselves, mostly when they connect.
_DRIVERS_OWN: Final = re.compile(
    r"\s*(SHOW\b|SELECT\s+pg_catalog\.version\(\)|SELECT\s+current_schema\(\)"
    r"|WITH\s+RECURSIVE\s+typeinfo_tree\b|SELECT\b.*\bFROM\s+(pg_catalog\.)?pg_type\b)",
    re.IGNORECASE | re.DOTALL,
)
_ENDS: Final = {word: statements(word)[0] for word in ("COMMIT", "ROLLBACK")}


class Entry:
    """One statement, or the end of a transaction by a driver's method."""

    __slots__ = (
        "began",
        "client",
        "code",
        "connection",
        "error",
        "in_block",
        "instruction",
        "number",
        "params",
        "rows",
        "statement",
        "took",
    )

    number: int
    """How many came before it in the test, and it."""
    began: float
    """Seconds since some time in the past."""
    took: float
    connection: int
    """Numbered as they came."""
    client: Peer | None
    """Where it came from, if through the gateway; else from an instruction of this code."""
    code: CodeType | None
    instruction: int
    statement: Statement
    params: Any
    rows: Any
    """Their number, or the status tag that has it."""
    error: str
    in_block: bool
    """Whether a transaction of the application's own was open after it."""


class Record:
    """Notes what passes while a test runs.

    `read` gives the connection, the cursor and the parameters of a call of psycopg's.
    """

    def __init__(self, read: Callable[[Any], tuple[Any, Any, Any]]) -> None:
        self._read: Final = read
        self._entries: deque[Entry] = deque(maxlen=_MOST)
        self._is_on = False
        self._connections = 0
        self._counts: dict[str, bool] = {}
        self._test: object = None
        # Reentrant: a signal may run statements in the middle of a line.
        self._counting: Final = threading.RLock()
        self.number = 0
        """How many statements the test has run, ends of transactions by methods included."""
        self.counted = 0
        """How many of them are the application's own queries."""
        self.began = 0.0

    def begin(self) -> None:
        """Begin a test's record."""
        self.forget()
        self._test = object()  # of which connections know that they are numbered in it
        self._connections = 0
        self.began = perf_counter()
        self._is_on = True

    def end(self) -> None:
        """Note nothing more; what there is can be read until it is forgotten."""
        self._is_on = False

    def forget(self) -> None:
        """Let go of all statements, and of their parameters."""
        self._entries.clear()
        self._counts.clear()
        self.number = self.counted = 0

    def since(self, number: int) -> Iterator[Entry]:
        """Give what is known of the statements that came after so many."""
        return (entry for entry in list(self._entries) if entry.number > number)

    # What passes

    def passing(self, statement: Statement, operation: Any, run: Steps) -> Steps:
        """Note a statement that is about to run; gives the generator that runs it."""
        if not self._is_on:
            return run
        if type(operation) is not GeneratorType:
            entry = self._add(statement, operation)
            entry.client = operation.origin
            return self._of_client(entry, operation, run)
        source, cursor, params = self._read(operation)
        entry = self._add(statement, source)
        entry.params = params
        self._place(entry)
        return self._of_cursor(entry, source, cursor, run)

    def note_end(self, source: Any, word: str) -> None:
        """Note that a connection's method has ended its transaction: COMMIT or ROLLBACK."""
        if self._is_on:
            entry = self._add(_ENDS[word], source)
            self._place(entry)

    def _add(self, statement: Statement, source: Any) -> Entry:
        counts = self._counts.get(statement.text)
        if counts is None:
            counts = self._counts[statement.text] = is_counted(statement)
        entry = Entry()
        with self._counting:
            self.number += 1
            self.counted += counts
            entry.number = self.number
        entry.statement = statement
        entry.connection = self._number_of(source)
        entry.client = entry.code = entry.params = entry.rows = None
        entry.instruction = -1
        entry.error = ""
        entry.took, entry.in_block = 0.0, False
        entry.began = perf_counter()
        self._entries.append(entry)
        return entry

    def _number_of(self, source: Any) -> int:
        known: tuple[object, int] | None = getattr(source, "pgmonkey_record", None)
        if known is None or known[0] is not self._test:
            self._connections += 1
            known = source.pgmonkey_record = self._test, self._connections
        return known[1]

    @staticmethod
    def _place(entry: Entry) -> None:
        frame = sys._getframe(3)
        while frame.f_back is not None and is_passed_over(frame.f_code.co_filename, frame):
            frame = frame.f_back
        entry.code, entry.instruction = frame.f_code, frame.f_lasti

    def _of_cursor(self, entry: Entry, source: Any, cursor: Any, run: Steps) -> Steps:
        try:
            results = yield from run
        except BaseException as error:
            entry.error = _shown(error)
            raise
        finally:
            entry.took = perf_counter() - entry.began
            entry.in_block = source.in_block
        entry.rows = results[-1].ntuples if results else cursor.rowcount
        return results

    def _of_client(self, entry: Entry, client: Any, run: Steps) -> Steps:
        try:
            results = yield from run
        except BaseException as error:
            entry.error = _shown(error)
            raise
        finally:
            entry.took = perf_counter() - entry.began
            entry.in_block = client.in_block
        entry.rows = client.tag
        return results


def is_counted(statement: Statement) -> bool:
    """Whether a statement is a query of the application's, as budgets count them."""
    if statement.verb not in _COUNTED or statement.sets_config:
        return False
    return statement.verb is not Verb.QUERY or not _DRIVERS_OWN.match(statement.text)


def _shown(error: BaseException) -> str:
    state = getattr(error, "sqlstate", None)
    text = getattr(error, "text", "") or str(error)
    first = text.strip().partition("\n")[0]
    return f"{state or type(error).__name__}: {first}"
