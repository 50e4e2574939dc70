"""What a borrower changes of a pooled connection ends with its block."""

# What raises is the block itself.
# ruff: noqa: PT012

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import POOLS, block, call, execute, pid
from psycopg import IsolationLevel
from psycopg.rows import dict_row, tuple_row

from pytest_pgmonkey import PGConnectionManager

if TYPE_CHECKING:
    from helpers.four_types import Kind

pytestmark = [pytest.mark.asyncio, pytest.mark.parametrize("kind", POOLS, indirect=True)]

ONE = {"min_size": 1, "max_size": 1}


def changes(conn: Any) -> dict[str, Any]:
    """Give another value for each attribute that a borrower can set."""
    is_async = isinstance(conn, psycopg.AsyncConnection)
    return {
        "autocommit": True,
        "isolation_level": IsolationLevel.SERIALIZABLE,
        "read_only": True,
        "deferrable": True,
        "row_factory": dict_row,
        "cursor_factory": psycopg.AsyncClientCursor if is_async else psycopg.ClientCursor,
        "server_cursor_factory": type("OwnCursor", (conn.server_cursor_factory,), {}),
        "prepare_threshold": None,
    }


async def change(conn: Any, name: str, value: Any) -> None:
    setter = getattr(conn, f"set_{name}", None)
    if setter is not None:
        await call(setter(value))
    else:
        setattr(conn, name, value)


async def test_changed_attributes_are_restored(kind: Kind) -> None:
    """The next borrower of a connection finds each attribute as the pool made it."""
    handle = await kind.get(pool=ONE)
    async with block(handle) as conn:
        first = await pid(conn)
        await call(conn.commit())
        before = {name: getattr(conn, name) for name in changes(conn)}
        for name, value in changes(conn).items():
            assert before[name] != value
            await change(conn, name, value)
    async with block(handle) as conn:
        assert await pid(conn) == first
        assert {name: getattr(conn, name) for name in before} == before


async def test_the_next_block_is_rolled_back(kind: Kind, rows: Any) -> None:
    """A borrower's autocommit does not take the rollback from the next block."""
    handle = await kind.get(pool=ONE)
    async with block(handle) as conn:
        await change(conn, "autocommit", True)
    with pytest.raises(ZeroDivisionError):
        async with block(handle) as conn:
            await execute(conn, "INSERT INTO t VALUES (1)")
            raise ZeroDivisionError
    assert rows() == []


async def test_what_the_pool_was_made_with_stays(kind: Kind) -> None:
    """The file's autocommit and the hook's row factory are what is restored."""

    def hook(conn: Any) -> None:
        conn.row_factory = dict_row

    async def ahook(conn: Any) -> None:
        conn.row_factory = dict_row

    async with PGConnectionManager(configure=hook, aconfigure=ahook) as manager:
        handle = await kind.get(manager, pool=ONE, autocommit=True)
        async with block(handle) as conn:
            await change(conn, "autocommit", False)
            conn.row_factory = tuple_row
        async with block(handle) as conn:
            assert conn.autocommit
            assert conn.row_factory is dict_row


async def test_a_connection_returned_by_hand(kind: Kind, rows: Any) -> None:
    """The pool restores what it is given back itself, in the middle of a transaction too."""
    pool = (await kind.get(pool=ONE)).pool
    conn = await call(pool.getconn())
    await change(conn, "autocommit", True)
    await execute(conn, "BEGIN")
    await execute(conn, "INSERT INTO t VALUES (1)")
    await call(pool.putconn(conn))
    async with block(pool.connection()) as again:
        assert again is conn
        assert not again.autocommit
    assert rows() == []


async def test_a_changed_connection_that_is_lost(kind: Kind, admin: Any) -> None:
    """A connection that died is replaced, whatever its borrower had changed."""
    handle = await kind.get(pool=ONE)
    with pytest.raises(psycopg.OperationalError):
        async with block(handle) as conn:
            await change(conn, "autocommit", True)
            admin.execute("SELECT pg_terminate_backend(%s)", [await pid(conn)])
            await execute(conn, "SELECT 1")
    async with block(handle) as conn:
        assert not conn.autocommit
