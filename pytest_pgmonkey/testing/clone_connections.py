"""The real connections that handles give in clone isolation: psycopg's own, past the passage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg

from ..connecting import Connector
from . import passage
from .sandbox.psycopg_door.internals import DECLARE, STATEMENT, holds, query_text, read_operation
from .sql.lexer import declaration, statements

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..connecting import AnyConnection, Steps
    from .sql.lexer import Statement

__all__ = ["AsyncCloneConnection", "CloneConnection", "CloneConnector"]


class CloneConnection(psycopg.Connection[Any]):
    """A psycopg `Connection` to the database of the test."""

    __module__ = "pytest_pgmonkey"

    _is_ours = False  # for as long as its statements are not the application's

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(_past_the_passage(self, gen), *args, **kwargs)


class AsyncCloneConnection(psycopg.AsyncConnection[Any]):
    """A psycopg `AsyncConnection` to the database of the test."""

    __module__ = "pytest_pgmonkey"

    _is_ours = False

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().wait(_past_the_passage(self, gen), *args, **kwargs)


def _past_the_passage(conn: Any, gen: Any) -> Generator[Any, Any, Any]:
    parts = () if conn._is_ours else _statements(conn, gen)
    return passage.all_passing(parts, gen, gen)


def _statements(conn: Any, gen: Any) -> tuple[Statement, ...]:
    """Give what the application wrote, as rollback isolation takes it apart."""
    kind, sql, cursor = read_operation(gen)
    if kind is STATEMENT:
        return statements(query_text(sql, conn))
    if kind is DECLARE:
        return (declaration(cursor.name, query_text(sql, conn), holds=holds(cursor)),)
    return ()


class CloneConnector(Connector):
    """Opens connections whose statements pass, the settings of their file excepted."""

    sync_class = CloneConnection
    async_class = AsyncCloneConnection

    def apply_settings(self, conn: AnyConnection) -> Steps[None]:
        ours: Any = conn
        ours._is_ours = True
        yield from super().apply_settings(conn)
        ours._is_ours = False
