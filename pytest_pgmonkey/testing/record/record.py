"""The record of a test's statements, of bounded size, in which nothing is formatted.

One for each process, in the passage: it sees handles and clients, in either isolation.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import count
from time import perf_counter
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..passage import ARGUMENTS
from ..sandbox.core.places import Peer, user_code
from ..sql.lexer import Verb, statements

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from types import CodeType

    from ..sql.lexer import Statement

    Steps = Generator[Any, Any, Any]

__all__ = ["Entry", "Record"]

_MOST: Final = 1000
_COUNTED: Final = frozenset({Verb.QUERY, Verb.WRITE, Verb.DDL, Verb.DECLARE, Verb.CURSOR})
# What drivers and frameworks ask by themselves, mostly when they connect.
_DRIVERS_OWN: Final = re.compile(
    r"\s*(SHOW\b|SELECT\s+pg_catalog\.version\(\)|SELECT\s+current_schema\(\)"
    r"|WITH\s+RECURSIVE\s+typeinfo_tree\b|SELECT\b.*\bFROM\s+(pg_catalog\.)?pg_type\b)",
    re.IGNORECASE | re.DOTALL,
)
# A list costs a third of an object; its last element is set when the statement ends.
_Noted = list[Any]
_END: Final = -1
_ENDS: Final = {word: statements(word)[0] for word in ("COMMIT", "ROLLBACK")}


class Entry(NamedTuple):
    """One statement, or the end of a transaction by a driver's method."""

    number: int
    """How many there are in the test up to it."""
    statement: Statement
    connection: int
    """Connections are numbered as they came."""
    client: Peer | None
    """Where it came from, if through the gateway; else from an instruction of this code."""
    code: CodeType | None
    instruction: int
    params: Any
    began: float
    took: float
    in_block: bool
    """Whether a transaction of the application's own was open after it."""
    rows: Any
    """Their number, or the status tag that has it."""
    error: str

    @classmethod
    def of(cls, noted: _Noted) -> Entry:
        number, statement, connection, origin, params, began, end = noted
        client, code, instruction = None, None, -1
        if isinstance(origin, Peer):
            client = origin
        else:
            code, instruction = origin
        ended, in_block, rows, error = end or (began, False, None, "")
        source = (client, code, instruction, params)
        return cls(
            number, statement, connection, *source, began, ended - began, in_block, rows, error
        )


class Record:
    """Notes what passes while a test runs.

    `arguments` gives those of a call of psycopg's that has not begun.
    """

    def __init__(self, arguments: Callable[[Any], Mapping[str, Any]]) -> None:
        self._arguments: Final = arguments
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
        self._noted: deque[_Noted] = deque(maxlen=_MOST)
        self._counts.clear()
        # Threads count, too: neither loses one.
        self._numbers = count(1)
        self._counted: list[None] = []

    @property
    def number(self) -> int:
        """How many statements the test has run, ends of transactions by methods included."""
        noted = self._noted
        return noted[-1][0] if noted else 0

    @property
    def counted(self) -> int:
        """How many of them are the application's own queries."""
        return len(self._counted)

    def since(self, number: int) -> Iterator[Entry]:
        """Give what is known of the statements that came after so many."""
        return (Entry.of(noted) for noted in list(self._noted) if noted[0] > number)

    # What passes: each statement pays for these lines

    def passing(self, statement: Statement, operation: Any, run: Steps) -> Steps:
        """Note a statement that is about to run; gives the generator that runs it."""
        if not self._is_on:
            return run
        kind = type(operation)
        if kind is GeneratorType:
            operation = self._arguments(operation)
        elif kind not in ARGUMENTS:
            noted = self._note(statement, operation, operation.origin, None)
            return self._watched(noted, operation, None, run)
        cursor = operation["self"]
        source = cursor.connection
        noted = self._note(statement, source, user_code(5), operation.get("params"))
        return self._watched(noted, source, cursor, run)

    def note_end(self, source: Any, word: str) -> None:
        """Note that a connection's method has ended its transaction: COMMIT or ROLLBACK."""
        if self._is_on:
            noted = self._note(_ENDS[word], source, user_code(3), None)
            noted[_END] = perf_counter(), False, None, ""

    def _note(self, statement: Statement, source: Any, origin: Any, params: Any) -> _Noted:
        counts = self._counts.get(statement.text)
        if counts is None:
            counts = self._counts[statement.text] = is_counted(statement)
        if counts:
            self._counted.append(None)
        known: tuple[object, int] | None = getattr(source, "pgmonkey_record", None)
        if known is None or known[0] is not self._test:
            known = source.pgmonkey_record = self._test, next(self._connections)
        noted = [next(self._numbers), statement, known[1], origin, params, perf_counter(), None]
        self._noted.append(noted)
        return noted

    @staticmethod
    def _watched(noted: _Noted, source: Any, cursor: Any, run: Steps) -> Steps:
        """Run a statement of a cursor, or of a client where there is none, and note its end."""
        try:
            results = yield from run
        except BaseException as error:
            noted[_END] = perf_counter(), source.in_block, None, _shown(error)
            raise
        ended = perf_counter()
        if results and cursor is not None:
            rows = results[-1].ntuples
        else:
            rows = source.tag if cursor is None else cursor.rowcount
        noted[_END] = ended, source.in_block, rows, ""
        return results


def is_counted(statement: Statement) -> bool:
    """Whether a statement is a query of the application's, as budgets count them."""
    if statement.verb not in _COUNTED or statement.sets_config:
        return False
    return statement.verb is not Verb.QUERY or not _DRIVERS_OWN.match(statement.text)


def _shown(error: BaseException) -> str:
    if isinstance(error, GeneratorExit):  # raised while its interruption is handled
        error = error.__context__ or error
    state = getattr(error, "sqlstate", None)
    text = getattr(error, "text", "") or str(error)
    first = text.strip().partition("\n")[0]
    return f"{state or type(error).__name__}: {first}"
