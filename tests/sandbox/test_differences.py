"""What docs/isolation.md names as different from a database of the test's own, and is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from helpers.four_types import POOLS, block, call, execute, value

from .twins import World, sandboxed

if TYPE_CHECKING:
    from .twins import Twins


@sandboxed
async def test_a_view_that_writes(w: World) -> None:
    """What a view has written and the test has committed can be undone by a later rollback."""
    async with w.borrow() as conn:
        await execute(conn, "CREATE VIEW writing AS SELECT put(1) AS n")
        await call(conn.commit())
        await execute(conn, "SELECT n FROM writing")
        await call(conn.commit())
        await execute(conn, "INSERT INTO t VALUES (2, 'a')")
        await call(conn.rollback())
        assert await value(conn, "SELECT count(*) FROM t") == 0


@sandboxed
async def test_a_name_that_was_set(w: World) -> None:
    """A setting that another connection has invented is empty, and not unknown."""
    async with w.borrow() as conn:
        await execute(conn, "SET app.invented = 'x'")
    async with w.borrow() as conn:
        assert await value(conn, "SELECT current_setting('app.invented', true)") == ""


@sandboxed
async def test_prepared_in_sql_is_shared(w: World) -> None:
    """A statement that one connection has prepared in SQL is there for the others."""
    async with w.borrow() as one, w.borrow() as two:
        await execute(one, "PREPARE shared AS SELECT 1")
        await call(one.commit())
        assert await value(two, "EXECUTE shared") == 1


@sandboxed
async def test_ddl_beside_a_reader(w: World) -> None:
    """DDL goes through although another connection's transaction has read the table."""
    handle = await w.handle()
    async with block(handle.connection()) as reader, block(handle.connection()) as writer:
        await execute(reader, "SELECT * FROM t")
        await execute(writer, "ALTER TABLE t ADD COLUMN y int")


@sandboxed
async def test_isolation_level_stays(w: World) -> None:
    """Transactions after a committed serializable one are serializable too."""
    async with w.borrow() as conn:
        await call(conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE))
        await execute(conn, "INSERT INTO t VALUES (1, 'a')")
    async with w.borrow() as conn:
        assert await value(conn, "SHOW transaction_isolation") == "serializable"


@pytest.mark.parametrize("type_", POOLS)
@pytest.mark.parametrize("real", [True, False])
def test_pools_lend_new_connections(twins: Twins, type_: str, real: bool) -> None:
    """A real pool keeps what a borrower has SET, where each connection of a test is as new."""
    world = World(twins, type_, real=real)

    async def program() -> None:
        handle = await world.handle(pool={"min_size": 1, "max_size": 1})
        async with block(handle.connection()) as conn:
            await call(conn.set_autocommit(True))
            await execute(conn, "SET work_mem = '1MB'")
        async with block(handle.connection()) as conn:
            assert not conn.autocommit
            assert await value(conn, "SHOW work_mem") == ("1MB" if real else "4MB")
        await call(handle.disconnect())

    with twins.intercepting(not real):
        twins.drive(program(), loop=world.type.is_async)
    assert twins.sandbox.reset() == []
