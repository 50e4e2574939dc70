"""The pool of a handle is one of psycopg_pool's, to `isinstance` and to those who call it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg_pool
import pytest
from helpers.four_types import POOLS, block, call, execute
from helpers.waiting import until

from .twins import sandboxed, sync_handle, twin

if TYPE_CHECKING:
    from collections.abc import Callable

    from .twins import World

pytestmark = pytest.mark.parametrize("type_", POOLS)


def pool_class(w: World) -> Any:
    return psycopg_pool.AsyncConnectionPool if w.type.is_async else psycopg_pool.ConnectionPool


def callback(w: World, function: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Give a pool's callback as its type wants it."""

    async def awaited(conn: Any) -> None:
        function(conn)

    return awaited if w.type.is_async else function


async def tried(w: World, what: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call, and note what came of it in psycopg_pool's own words."""
    try:
        w.note(await call(what(*args, **kwargs)))
    except Exception as error:
        # Some are less specific in psycopg_pool 3.3.0.
        vague = isinstance(error, psycopg.OperationalError)
        kind = "OperationalError" if vague else type(error).__name__
        # A connection's repr has an address in it.
        w.note(kind, str(error).partition(": <")[0])


@twin
async def test_methods(w: World) -> None:
    """All methods that need no particular connection, on an open and on a closed pool."""
    handle = await w.handle(pool={"name": "mine", "min_size": 1, "max_size": 2})
    pool = handle.pool
    w.note(isinstance(pool, pool_class(w)), handle.pool is pool)
    for _ in ("open", "closed"):
        w.note(pool.name, pool.closed, pool.timeout, pool.max_waiting, pool.close_returns)
        w.note({k: v for k, v in pool.get_stats().items() if k in ("pool_min", "pool_max")})
        await tried(w, pool.open)
        await tried(w, pool.open, wait=True, timeout=5)
        await tried(w, pool.wait, timeout=5)
        if not pool.closed:
            await tried(w, pool.check)
        await tried(w, pool.drain)
        for sizes in ((5, 3), (-1,), (0, 0), (2,), (1, 3)):
            await tried(w, pool.resize, *sizes)
            w.note(pool.min_size, pool.max_size)
            if pool.closed:
                break
        await tried(w, pool.close, 1)
    for what in (pool.getconn, block(pool.connection()).__aenter__, block(pool).__aenter__):
        await tried(w, what)


@twin
async def test_context_managers(w: World) -> None:
    """`with pool`, and in it `with pool.connection()`, end as psycopg_pool has it."""
    handle = await w.handle()
    async with block(handle.pool) as pool:
        async with block(pool.connection()) as conn:
            await w.run(conn, "INSERT INTO t VALUES (1, 'committed')")
        async with w.noting(), block(pool.connection(timeout=5)) as conn:
            await w.run(conn, "INSERT INTO t VALUES (2, 'rolled back')")
            await w.run(conn, "SELECT 1 / 0")
        async with block(pool.connection()) as conn:
            await w.rows(conn)
    w.note(pool.closed)


@twin
async def test_connections_that_do_not_belong(w: World) -> None:
    """A pool takes back what it has lent, once."""
    pool = (await w.handle(pool={"name": "mine"})).pool
    other = (await w.handle(pool={"name": "other"})).pool
    direct = await w.handle("async" if w.type.is_async else "normal")
    conn, foreign = await call(pool.getconn()), await call(other.getconn())
    await tried(w, pool.putconn, foreign)
    await tried(w, pool.putconn, conn)
    await tried(w, pool.putconn, conn)
    await tried(w, other.putconn, foreign)
    async with block(direct.connection()) as conn:
        await tried(w, pool.putconn, conn)
        await w.run(conn, "SELECT 1")


@twin
async def test_check(w: World) -> None:
    """A pool's `check` function judges each connection before it is given."""
    seen: list[str] = []
    failing: list[type[BaseException]] = []

    def check(conn: Any) -> None:
        seen.append(conn.info.transaction_status.name)
        if failing:
            raise failing.pop()

    options = {"max_size": 1, "timeout": 0.3, "check": callback(w, check)}
    pool = (await w.handle(pool=options)).pool
    await call(pool.wait(5))
    failing += [psycopg.OperationalError]
    async with block(pool.connection()) as conn:
        await w.run(conn, "SELECT 1")
    failing += [ValueError] * 10
    await tried(w, pool.getconn)
    w.note(len(failing))
    failing.clear()
    async with block(pool.connection()) as conn:
        await w.run(conn, "SELECT 1")
    w.note(seen)


@sandboxed
async def test_interrupted_check(w: World) -> None:
    """A `check` function that is interrupted costs the pool no connection."""
    failing = [KeyboardInterrupt]

    def check(_: Any) -> None:
        if failing:
            raise failing.pop()

    options = {"max_size": 1, "timeout": 0.3, "check": callback(w, check)}
    pool = (await w.handle(pool=options)).pool
    with pytest.raises(KeyboardInterrupt):
        await call(pool.getconn())
    await call(pool.putconn(await call(pool.getconn())))


@twin
async def test_psycopg_pools_own_check(w: World) -> None:
    """`check_connection`, the function that psycopg_pool has for it."""
    handle = await w.handle(pool={"check": pool_class(w).check_connection})
    async with block(handle) as conn:
        w.note(conn.autocommit)
        await w.run(conn, "INSERT INTO t VALUES (1, 'a')")


@sandboxed
async def test_limits_of_resize(w: World) -> None:
    """A pool lends as many connections as `resize()` says, until the test ends."""
    handle = await w.handle(pool={"min_size": 1, "max_size": 1, "timeout": 0.01})
    pool = handle.pool
    one = await call(pool.getconn())
    with pytest.raises(psycopg_pool.PoolTimeout):
        await call(pool.getconn())
    await call(pool.resize(1, 2))
    two = await call(pool.getconn())
    for conn in one, two:
        await call(pool.putconn(conn))
    assert w.twins.sandbox.reset() == []
    assert (handle.pool.min_size, handle.pool.max_size) == (1, 1)
    one = await call(handle.pool.getconn())
    with pytest.raises(psycopg_pool.PoolTimeout):
        await call(pool.getconn())
    await call(pool.putconn(one))


@sandboxed
async def test_borrowers_after_a_close(w: World) -> None:
    """Who has a connection may use it to the end; it is returned without the `reset` function."""

    def reset(_: Any) -> None:
        raise AssertionError("called")

    pool = (await w.handle(pool={"reset": reset})).pool
    conn = await call(pool.getconn())
    await call(pool.close())
    await execute(conn, "INSERT INTO t VALUES (1, 'a')")
    await call(pool.putconn(conn))
    assert conn.closed


def waiting(pool: Any) -> bool:
    return bool(pool.get_stats()["requests_waiting"])


@sandboxed
async def test_waiters_of_a_closed_pool(w: World) -> None:
    """Who waits for a connection when the pool is closed is told so at once."""
    if not w.type.is_async:
        pool = sync_handle(w, "pool", pool={"min_size": 1, "max_size": 1, "name": "mine"}).pool
        with ThreadPoolExecutor(1) as threads, pool.connection():
            waiter = threads.submit(pool.getconn)
            until(lambda: waiting(pool))
            pool.close()
            with pytest.raises(psycopg_pool.PoolClosed, match="the pool 'mine' is closed"):
                waiter.result(5)
        return
    pool = (await w.handle(pool={"min_size": 1, "max_size": 1, "name": "mine"})).pool
    async with pool.connection():
        task = asyncio.ensure_future(pool.getconn())
        await asyncio.sleep(0)
        assert waiting(pool)
        await pool.close()
        with pytest.raises(psycopg_pool.PoolClosed, match="the pool 'mine' is closed"):
            await task
