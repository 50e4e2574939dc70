"""Servers that restart and backends that are killed."""

# What raises is often the end of a block.
# ruff: noqa: PT012

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import ALL, POOLS, Kind, block, call, execute, pid, value

if TYPE_CHECKING:
    from pytest_pgmonkey import PGConnectionManager

pytestmark = pytest.mark.asyncio


EIGHT = {"min_size": 8, "max_size": 8}


async def warm(handle: Any, connections: int) -> list[int]:
    """Have a pool hold so many connections; gives their backends."""
    async with AsyncExitStack() as stack:
        conns = [
            await stack.enter_async_context(block(handle.connection())) for _ in range(connections)
        ]
        return [await pid(conn) for conn in conns]


async def test_killed_in_a_block(kind: Kind, admin: Any) -> None:
    """A backend that is killed ends its block with an error; the next block works."""
    handle = await kind.get(pool={"max_size": 1})
    with pytest.raises(psycopg.OperationalError):
        async with block(handle) as conn:
            admin.execute("SELECT pg_terminate_backend(%s, 10000)", [await pid(conn)])
            await execute(conn, "SELECT 1")
    async with block(handle) as conn:
        assert await value(conn, "SELECT 1") == 1


async def test_loss_that_was_swallowed(kind: Kind, admin: Any) -> None:
    """A block that swallowed the loss of its connection does not end as if all were well."""
    handle = await kind.get()
    with pytest.raises(psycopg.OperationalError, match="lost in this block"):
        async with block(handle) as conn:
            admin.execute("SELECT pg_terminate_backend(%s, 10000)", [await pid(conn)])
            with pytest.raises(psycopg.OperationalError):
                await execute(conn, "SELECT 1")


async def test_users_error_is_not_hidden_by_the_loss(kind: Kind, admin: Any) -> None:
    """An exception comes out as it is, though the connection it left can no longer roll back."""
    handle = await kind.get()
    with pytest.raises(ZeroDivisionError):
        async with block(handle) as conn:
            admin.execute("SELECT pg_terminate_backend(%s, 10000)", [await pid(conn)])
            raise ZeroDivisionError


@pytest.mark.parametrize("kind", POOLS, indirect=True)
async def test_one_dead_connection_at_most(kind: Kind, admin: Any) -> None:
    """After one dead connection was handed out, the next borrower gets a live one."""
    handle = await kind.get(pool={"min_size": 4, "max_size": 4})
    for number in await warm(handle, 4):
        admin.execute("SELECT pg_terminate_backend(%s, 10000)", [number])
    with pytest.raises(psycopg.OperationalError):
        async with block(handle) as conn:
            await execute(conn, "SELECT 1")
    for _ in range(4):
        async with block(handle) as conn:
            assert await value(conn, "SELECT 1") == 1


@pytest.mark.parametrize("kind", POOLS, indirect=True)
async def test_check_on_checkout(kind: Kind, admin: Any) -> None:
    """With `check_on_checkout` no dead connection is handed out, and none is waited for in turn."""
    handle = await kind.get(pool={**EIGHT, "check_on_checkout": "on", "timeout": 5})
    for number in await warm(handle, 8):
        admin.execute("SELECT pg_terminate_backend(%s, 10000)", [number])
    for _ in range(4):
        async with block(handle) as conn:
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert await value(conn, "SELECT 1") == 1


@pytest.mark.parametrize("type_", ALL)
@pytest.mark.parametrize("crash", [False, True], ids=["restart", "crash"])
async def test_restart(
    type_: str, crash: bool, restartable_server: Any, manager: PGConnectionManager
) -> None:
    """After a restart of the server a handle works again, after one failed block at most."""
    kind = Kind(type_, restartable_server.config("postgres"), manager)
    handle = await kind.get(pool={"min_size": 2, "max_size": 2})
    if kind.type.is_pool:
        await warm(handle, 2)
    if crash:
        # The server's role is not yet on disk, and its commit is asynchronous.
        with psycopg.connect(**restartable_server.admin_conninfo(), autocommit=True) as conn:
            conn.execute("CHECKPOINT")
    restartable_server.halt(crash=crash)
    if not kind.type.is_pool:
        with pytest.raises(psycopg.OperationalError):
            await call(handle.test_connection())
    restartable_server.resume()
    if kind.type.is_pool:
        with pytest.raises(psycopg.OperationalError):
            await call(handle.test_connection())
    for _ in range(3):
        async with block(handle) as conn:
            assert await value(conn, "SELECT 1") == 1


@pytest.mark.parametrize("type_", ALL)
async def test_server_that_comes_later(
    type_: str, restartable_server: Any, manager: PGConnectionManager
) -> None:
    """A failure is not remembered: once the server is there, the same request succeeds."""
    kind = Kind(type_, restartable_server.config("postgres"), manager)
    restartable_server.halt()
    with pytest.raises(psycopg.OperationalError) as caught:
        await kind.get()
    assert type(caught.value) is psycopg.OperationalError
    restartable_server.resume()
    async with block(await kind.get()) as conn:
        assert await value(conn, "SELECT 1") == 1
