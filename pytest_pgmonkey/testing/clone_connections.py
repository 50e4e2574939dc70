"""The real connections of handles in clone isolation: psycopg's, whose statements are recorded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ..connecting import Connector
from . import passage
from .sandbox.core.places import Left, caller
from .sandbox.psycopg_door.internals import (
    DECLARE,
    STATEMENT,
    end_of,
    holds,
    query_text,
    read_operation,
)
from .sql.lexer import declaration, statements

if TYPE_CHECKING:
    from collections.abc import Generator

    from psycopg.pq.abc import PGconn

    from ..connecting import AnyConnection, Steps
    from .sandbox.core.places import Place
    from .sql.lexer import Statement

_STATUS: Final = pq.TransactionStatus

__all__ = ["AsyncCloneConnection", "CloneConnection", "CloneConnector", "Loans"]


class _Past:
    """What both classes need for the record."""

    pgconn: PGconn
    _is_ours = False  # for as long as its statements are not the application's
    _is_prepared = False  # it has proved that its pool can connect, and waits for the pool

    @property
    def in_block(self) -> bool:
        """Whether a transaction is open."""
        return _is_open(self)


class CloneConnection(_Past, psycopg.Connection[Any]):
    """A psycopg `Connection` to the database of the test."""

    __module__ = "pytest_pgmonkey"

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(_past_the_passage(self, gen), *args, **kwargs)


class AsyncCloneConnection(_Past, psycopg.AsyncConnection[Any]):
    """A psycopg `AsyncConnection` to the database of the test."""

    __module__ = "pytest_pgmonkey"

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().wait(_past_the_passage(self, gen), *args, **kwargs)


def _past_the_passage(conn: Any, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    if conn._is_ours:
        return gen
    if word := end_of(gen):
        return _ending(conn, gen, word)
    parts = _statements(conn, gen)
    return passage.all_passing(parts, gen, gen)


def _ending(conn: Any, gen: Any, word: str) -> Generator[Any, Any, Any]:
    """Run a commit or a rollback, and record it if it ended a transaction."""
    was_in_block = conn.in_block
    result = yield from gen
    if was_in_block:
        passage.ended(conn, word)
    return result


def _statements(conn: Any, gen: Any) -> tuple[Statement, ...]:
    """Give what the application wrote, as rollback isolation takes it apart."""
    kind, sql, cursor = read_operation(gen)
    if kind is STATEMENT:
        return statements(query_text(sql, conn))
    if kind is DECLARE:
        return (declaration(cursor.name, query_text(sql, conn), holds=holds(cursor)),)
    return ()


class CloneConnector(Connector):
    """Opens connections whose statements are recorded, except the settings of their file.

    The connection that proves a pool's configuration becomes the pool's first: a second one would
    take about as long as the rest of the test.
    """

    sync_class = CloneConnection
    async_class = AsyncCloneConnection

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._proofs: list[Any] = []

    def prove(self) -> Steps[None]:
        conn = yield from self.connect()
        conn._is_prepared = True
        self._proofs.append(conn)

    def prepare(self, conn: AnyConnection) -> Steps[None]:
        ours: Any = conn
        if ours._is_prepared:
            ours._is_prepared = False
        else:
            yield from super().prepare(conn)

    def apply_settings(self, conn: AnyConnection) -> Steps[None]:
        ours: Any = conn
        ours._is_ours = True
        yield from super().apply_settings(conn)
        ours._is_ours = False

    def pool_arguments(self, *functions: Any) -> dict[str, Any]:
        arguments = super().pool_arguments(*functions)
        return {**arguments, "connection_class": _ProofFirst(self._class, self._proofs)}

    def forget_proofs(self) -> None:
        """Close what no pool has taken."""
        while self._proofs:
            self._proofs.pop().pgconn.finish()


class _ProofFirst:
    """What a pool connects with: the class, once there is no proof left."""

    def __init__(self, class_: Any, proofs: list[Any]) -> None:
        self._class = class_
        self._proofs = proofs

    def connect(self, conninfo: str = "", **kwargs: Any) -> Any:
        try:
            conn = self._proofs.pop()
        except IndexError:
            return self._class.connect(conninfo, **kwargs)
        is_async = issubclass(self._class, psycopg.AsyncConnection)
        return asyncio.sleep(0, conn) if is_async else conn


class Loans:
    """The connections that a handle has lent, with the places where they were borrowed."""

    def __init__(self) -> None:
        self._loans: dict[int, tuple[Any, Any, Place]] = {}

    def note(self, source: Any, conn: Any) -> Any:
        """Note that a connection was borrowed, and return it."""
        self._loans[id(conn)] = source, conn, caller()
        return conn

    def end(self, conn: Any) -> Any:
        """Forget a returned connection, and return the source that it came from."""
        return self._loans.pop(id(conn))[0]

    @property
    def left(self) -> list[Left]:
        """The connections that were not returned."""
        return [Left(place, _is_open(conn)) for _, conn, place in self._loans.values()]


def _is_open(conn: Any) -> bool:
    return conn.pgconn.transaction_status in (_STATUS.INTRANS, _STATUS.INERROR)
