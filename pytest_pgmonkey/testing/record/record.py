"""The record of a test's statements, of bounded size, in which nothing is formatted.

One for each process, in the passage: it sees handles and clients, in either isolation.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import count
from time import perf_counter
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Final

from ..sandbox.core.places import Peer, user_code
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
    """One statement, or the end of a transaction by a driver's method.

    `number` tells how many came before it in the test, and it; `connection` is numbered as they
    came.
    """

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

    def __init__(self, number: int, statement: Statement, connection: int) -> None:
        self.number = number
        self.statement = statement
        self.connection = connection
        self.client: Peer | None = None
        """Where it came from, if through the gateway; else from an instruction of this code."""
        self.code: CodeType | None = None
        self.instruction = -1
        self.params: Any = None
        self.rows: Any = None
        """Their number, or the status tag that has it."""
        self.error = ""
        self.in_block = False
        """Whether a transaction of the application's own was open after it."""
        self.took = 0.0
        self.began = perf_counter()


class Record:
    """Notes what passes while a test runs.

    `read` gives the connection, the cursor and the parameters of a call of psycopg's.
    """

    def __init__(self, read: Callable[[Any], tuple[Any, Any, Any]]) -> None:
        self._read: Final = read
        self._is_on = False
        self._counts: dict[str, bool] = {}
        self._test: object = None
        self._connections = count(1)
        self.began = 0.0
        self.forget()

    def begin(self) -> None:
        """Begin a test's record."""
        self.forget()
        self._test = object()  # of which connections know that they are numbered in it
        self._connections = count(1)
        self.began = perf_counter()
        self._is_on = True

    def end(self) -> None:
        """Note nothing more; what there is can be read until it is forgotten."""
        self._is_on = False

    def forget(self) -> None:
        """Let go of all statements, and of their parameters."""
        self._entries: deque[Entry] = deque(maxlen=_MOST)
        self._counts.clear()
        # Threads add to both; their length is right all the same.
        self._all: list[None] = []
        self._counted: list[None] = []

    @property
    def number(self) -> int:
        """How many statements the test has run, ends of transactions by methods included."""
        return len(self._all)

    @property
    def counted(self) -> int:
        """How many of them are the application's own queries."""
        return len(self._counted)

    def since(self, number: int) -> Iterator[Entry]:
        """Give what is known of the statements that came after so many."""
        return (entry for entry in list(self._entries) if entry.number > number)

    # What passes: each statement pays for these lines

    def passing(self, statement: Statement, operation: Any, run: Steps) -> Steps:
        """Note a statement that is about to run; gives the generator that runs it."""
        if not self._is_on:
            return run
        if type(operation) is not GeneratorType:
            entry = self._add(statement, operation)
            entry.client = operation.origin
            return self._watched(entry, operation, None, run)
        source, cursor, params = self._read(operation)
        entry = self._add(statement, source)
        entry.params = params
        entry.code, entry.instruction = user_code(6)
        return self._watched(entry, source, cursor, run)

    def note_end(self, source: Any, word: str) -> None:
        """Note that a connection's method has ended its transaction: COMMIT or ROLLBACK."""
        if self._is_on:
            entry = self._add(_ENDS[word], source)
            entry.code, entry.instruction = user_code(3)

    def _add(self, statement: Statement, source: Any) -> Entry:
        counts = self._counts.get(statement.text)
        if counts is None:
            counts = self._counts[statement.text] = is_counted(statement)
        if counts:
            self._counted.append(None)
        self._all.append(None)
        known: tuple[object, int] | None = getattr(source, "pgmonkey_record", None)
        if known is None or known[0] is not self._test:
            known = source.pgmonkey_record = self._test, next(self._connections)
        entry = Entry(len(self._all), statement, known[1])
        self._entries.append(entry)
        return entry

    @staticmethod
    def _watched(entry: Entry, source: Any, cursor: Any, run: Steps) -> Steps:
        """Run a statement of a cursor, or of a client where there is none, and note its end."""
        try:
            results = yield from run
        except BaseException as error:
            entry.error = _shown(error)
            raise
        finally:
            entry.took = perf_counter() - entry.began
            entry.in_block = source.in_block
        if results and cursor is not None:
            entry.rows = results[-1].ntuples
        else:
            entry.rows = source.tag if cursor is None else cursor.rowcount
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
