"""What a type checker is to know of the public names; read by mypy, never run."""

from __future__ import annotations

import asyncio
from pathlib import Path  # noqa: TC003
from typing import Any

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from typing_extensions import assert_type

from pytest_pgmonkey import (
    AsyncHandle,
    AsyncPoolHandle,
    ConnectionType,
    Handle,
    PGConnectionManager,
    PoolHandle,
)
from pytest_pgmonkey.testing import PGMonkey  # noqa: TC001


def register(conn: Connection[Any]) -> None: ...


async def aregister(conn: AsyncConnection[Any]) -> None: ...


def sync_types(manager: PGConnectionManager, path: Path) -> None:
    assert_type(manager.get_database_connection("a.yaml", "normal"), Handle)
    assert_type(manager.get_database_connection(path, "pool"), PoolHandle)
    assert_type(manager.get_database_connection(path, ConnectionType.POOL), PoolHandle)
    assert_type(
        manager.get_database_connection_from_dict({}, "pool", force_reload=True), PoolHandle
    )
    assert_type(manager.get_database_connection_from_dsn("host=h", "pool").pool.name, str)
    assert_type(manager.get_database_connection_from_dsn("host=h"), Handle)
    handle = manager.get_database_connection(path, "pool")
    with handle as conn:
        assert_type(conn, Connection[Any])
    with handle.connection(timeout=1) as conn:
        assert_type(conn, Connection[Any])
    with handle.transaction() as conn:
        assert_type(conn, Connection[Any])
    with handle.cursor() as cursor:
        assert_type(cursor, Cursor[Any])
    assert_type(handle.pool, ConnectionPool[Any])
    assert_type(manager.get_database_connection(path, "normal").pool, ConnectionPool[Any] | None)
    assert_type(handle.test_connection().server_version, str)


async def async_types(manager: PGConnectionManager, path: Path) -> None:
    assert_type(await manager.get_database_connection("a.yaml", "async"), AsyncHandle)
    assert_type(await manager.get_database_connection(path, ConnectionType.ASYNC), AsyncHandle)
    assert_type(await manager.get_database_connection_from_dict({}, "async_pool"), AsyncPoolHandle)
    async with manager.get_database_connection(path, "async") as conn:
        assert_type(conn, AsyncConnection[Any])
    pending = manager.get_database_connection_from_dsn("host=h", "async")
    assert_type(await pending, AsyncHandle)
    assert_type(await asyncio.create_task(pending), AsyncHandle)
    handle = await manager.get_database_connection(path, "async_pool")
    async with handle as conn:
        assert_type(conn, AsyncConnection[Any])
    async with handle.connection() as conn:
        assert_type(conn, AsyncConnection[Any])
    async with handle.transaction() as conn:
        assert_type(conn, AsyncConnection[Any])
    async with handle.cursor() as cursor:
        assert_type(cursor, AsyncCursor[Any])
    assert_type(handle.pool, AsyncConnectionPool[Any])
    single = await manager.get_database_connection(path, "async")
    assert_type(single.pool, AsyncConnectionPool[Any] | None)
    assert_type((await handle.test_connection()).tls, str | None)


def managers() -> None:
    with PGConnectionManager(configure=register, aconfigure=aregister) as manager:
        assert_type(manager, PGConnectionManager)
        assert_type(manager.cache_info["size"], int)
        assert_type(manager.cache_info["connection_types"], dict[str, str])


def type_known_at_run_time(manager: PGConnectionManager, type_: str) -> None:
    handle = manager.get_database_connection("a.yaml", type_)
    with handle:  # type: ignore[union-attr]  # It may have to be awaited.
        pass


def not_awaited(manager: PGConnectionManager) -> None:
    with manager.get_database_connection("a.yaml", "async"):  # type: ignore[attr-defined]
        pass


def in_tests(pgmonkey: PGMonkey) -> None:
    assert_type(pgmonkey.pool.pool.name, str)
    assert_type(pgmonkey.async_pool.pool, AsyncConnectionPool[Any])
    assert_type(pgmonkey.manager, PGConnectionManager)
    assert_type(pgmonkey.normal, Handle)
    assert_type(pgmonkey.dsn, str)
