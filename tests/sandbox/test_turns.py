"""Who may use the one session: borrowers in several threads, tasks, and in one."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg_pool
import pytest
from helpers.four_types import POOLS, block, call, execute, value
from helpers.waiting import PATIENCE, until

from pytest_pgmonkey import SandboxError

from .twins import Boom, World, sandboxed, sync_handle, twin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .twins import Twins


@pytest.fixture
def sync_world(twins: Twins) -> Iterator[World]:
    """A world of sync handles, reset at its end; the test sees no problems of its own making."""
    with sandbox_world(twins, "pool") as world:
        yield world


@pytest.fixture
def patient(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's wait for the session takes too long, however busy the machine is."""
    monkeypatch.setattr(twins.sandbox, "wait_timeout", PATIENCE)


@contextmanager
def sandbox_world(twins: Twins, type_: str) -> Iterator[World]:
    with twins.intercepting():
        yield World(twins, type_, real=False)
        twins.sandbox.take_refusals()
        assert twins.sandbox.reset() == []


@sandboxed
async def test_same_task_is_refused_at_once(w: World) -> None:
    """Who holds a transaction open with changes cannot wait for itself, and both places show."""
    async with block(await w.handle()) as one, block(await w.handle()) as two:
        await execute(one, "INSERT INTO t VALUES (1, 'a')")
        start = time.monotonic()
        with pytest.raises(psycopg.OperationalError, match="never end") as caught:
            await execute(two, "SELECT 1")
        assert time.monotonic() - start < 0.3
        assert isinstance(caught.value, SandboxError)
        assert len(re.findall(r"borrowed at tests/\S+\.py:\d+", str(caught.value))) == 2
        await call(one.commit())
        assert await value(two, "SELECT n FROM t") == 1
    assert len(w.twins.sandbox.take_refusals()) == 1


@sandboxed
async def test_committed_or_rolled_back_excludes_nobody(w: World) -> None:
    """A transaction excludes others to its end, and no longer."""
    async with block(await w.handle()) as one, block(await w.handle()) as two:
        for end in (one.commit, one.rollback):
            await execute(one, "INSERT INTO t VALUES (1, 'a') ON CONFLICT DO NOTHING")
            await call(end())
            await execute(two, "INSERT INTO t VALUES (2, 'a') ON CONFLICT DO NOTHING")
            await call(two.commit())


@sandboxed
async def test_an_idle_connection_ends_without_waiting(w: World) -> None:
    """With nothing open, commit and rollback do nothing, whoever else has changes."""
    async with block(await w.handle()) as one, block(await w.handle()) as two:
        await execute(two, "SELECT 1")
        await call(two.commit())
        await execute(one, "INSERT INTO t VALUES (1, 'a')")
        for _ in range(2):
            await call(two.commit())
            await call(two.rollback())
        await call(one.commit())
        assert await value(two, "SELECT n FROM t") == 1
        await call(two.close())
        for end in (two.commit, two.rollback):
            with pytest.raises(psycopg.OperationalError, match="closed"):
                await call(end())
    assert w.twins.sandbox.take_refusals() == []


@pytest.mark.usefixtures("patient")
def test_threads_wait_in_order(sync_world: World) -> None:
    """Threads that wait for a transaction get it one after the other when it ends."""
    handle = sync_handle(sync_world, "pool", pool={"max_size": 9})
    turn = sync_world.twins.sandbox.backend.turn
    served: list[int] = []

    def work(number: int) -> None:
        with handle.connection() as conn:
            conn.execute("INSERT INTO t VALUES (%s, 'thread')", [number])
            served.append(number)

    with ThreadPoolExecutor(5) as threads, handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (0, 'a')")
        futures = []
        for number in range(1, 5):
            futures.append(threads.submit(work, number))
            until(lambda number=number: turn.waiting == number)
        assert served == []
        conn.commit()
        for future in futures:
            future.result(PATIENCE)
    assert served == [1, 2, 3, 4]


def test_a_wait_that_takes_too_long(sync_world: World) -> None:
    """A thread that waits longer than the time-out gets an error with both places."""
    handle = sync_handle(sync_world, "pool")

    def work() -> None:
        with handle.connection() as conn:
            conn.execute("SELECT 1")

    with ThreadPoolExecutor(1) as threads, handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (0, 'a')")
        with pytest.raises(psycopg.OperationalError, match=r"waited 0\.5 s") as caught:
            threads.submit(work).result(5)
    assert len(re.findall(r"borrowed at tests/\S+\.py:\d+", str(caught.value))) == 2
    assert 'isolation="clone"' in str(caught.value)
    assert len(sync_world.twins.sandbox.take_refusals()) == 1


@pytest.mark.usefixtures("patient")
def test_tasks_wait_for_each_other(twins: Twins) -> None:
    """Tasks that write wait for one another, whichever async type they use."""
    with sandbox_world(twins, "async_pool") as world:

        async def program() -> list[Any]:
            handles = [
                await world.handle("async_pool", pool={"max_size": 4}),
                await world.handle("async"),
            ]

            async def work(number: int) -> None:
                async with handles[number % 2].connection() as conn:
                    await conn.execute("INSERT INTO t VALUES (%s, 'task')", [number])
                    await asyncio.sleep(0)
                    async with conn.transaction():
                        await conn.execute("UPDATE t SET x = 'done' WHERE n = %s", [number])

            await asyncio.gather(*(work(number) for number in range(20)))
            async with handles[1] as conn:
                cursor = await conn.execute("SELECT count(*), min(x) FROM t")
                return await cursor.fetchall()

        assert twins.drive(program(), loop=True) == [(20, "done")]


def test_a_parent_that_awaits_its_child_is_told(twins: Twins) -> None:
    """A task that waits for its parent's transaction times out with both places."""
    with sandbox_world(twins, "async") as world:

        async def program() -> None:
            handle = await world.handle()

            async def child() -> None:
                async with handle.connection() as conn:
                    await conn.execute("SELECT 1")

            async with handle.connection() as conn:
                await conn.execute("INSERT INTO t VALUES (1, 'a')")
                with pytest.raises(psycopg.OperationalError, match="waited"):
                    await asyncio.create_task(child())

        twins.drive(program(), loop=True)


def test_sync_code_inside_a_task_is_refused_at_once(twins: Twins) -> None:
    """A blocking wait in the loop that the holder needs is refused, not hung."""
    with sandbox_world(twins, "async") as world:
        normal = sync_handle(world)

        async def program() -> None:
            async with (await world.handle()).connection() as conn:
                await conn.execute("INSERT INTO t VALUES (1, 'a')")
                with pytest.raises(psycopg.OperationalError, match="never end"), normal as other:
                    other.execute("SELECT 1")
                await conn.commit()
                with normal as other:
                    assert other.execute("SELECT n FROM t").fetchone() == (1,)

        twins.drive(program(), loop=True)


@pytest.mark.usefixtures("patient")
def test_eight_threads(sync_world: World) -> None:
    """Eight threads on one handle, reading and writing, lose and mix nothing."""
    handle = sync_handle(sync_world, "pool", pool={"max_size": 8})

    def work(number: int) -> None:
        for round_ in range(10):
            with handle.connection() as conn:
                rows = conn.execute("SELECT count(*) FROM t WHERE x = %s", [str(number)])
                assert rows.fetchone() == (round_,)
                conn.execute("INSERT INTO t VALUES (%s, %s)", [number * 100 + round_, str(number)])
            with handle.connection() as conn, conn.transaction(force_rollback=True):
                conn.execute("DELETE FROM t")

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(work, number) for number in range(8)]:
            future.result(PATIENCE)
    with handle as conn:
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (80,)


@pytest.mark.usefixtures("patient")
def test_threads_and_tasks_together(twins: Twins) -> None:
    """Threads and the tasks of a loop share the session without harm."""
    with sandbox_world(twins, "async_pool") as world:
        pool = sync_handle(world, "pool", pool={"max_size": 4})

        def in_thread(number: int) -> None:
            for round_ in range(5):
                with pool.connection() as conn:
                    conn.autocommit = bool(number % 2)
                    conn.execute("INSERT INTO t VALUES (%s, 'x')", [number * 10 + round_])

        async def program() -> None:
            handle = await world.handle()

            async def in_task(number: int) -> None:
                for round_ in range(5):
                    async with handle.connection() as conn:
                        await conn.execute("INSERT INTO t VALUES (%s, 'x')", [number * 10 + round_])

            await asyncio.gather(
                *(asyncio.to_thread(in_thread, number) for number in range(4)),
                *(in_task(number) for number in range(4, 10)),
            )
            async with handle as conn:
                cursor = await conn.execute("SELECT count(*) FROM t")
                assert await cursor.fetchone() == (50,)

        twins.drive(program(), loop=True)


@pytest.mark.parametrize("type_", POOLS)
@sandboxed
async def test_pool_limits(w: World) -> None:
    """A pool lends `max_size` connections and no more, and lets `max_waiting` wait."""
    handle = await w.handle(pool={"min_size": 1, "max_size": 2, "timeout": 0.02})
    async with block(handle.connection()), block(handle.connection()):
        with pytest.raises(psycopg_pool.PoolTimeout):
            async with block(handle.connection()):
                raise AssertionError
    async with block(handle.connection()), block(handle.connection()):
        pass


def test_pool_waiting(sync_world: World) -> None:
    """One who waits for a pool's connection gets it when it is returned; too many are refused."""
    handle = sync_handle(
        sync_world, "pool", pool={"min_size": 1, "max_size": 1, "max_waiting": 1, "timeout": 5}
    )

    def work() -> str:
        with handle.connection() as conn:
            return str(conn.execute("SELECT 'late'").fetchone()[0])

    with ThreadPoolExecutor(1) as threads:
        with handle.connection():
            future = threads.submit(work)
            until(lambda: handle.pool.get_stats()["requests_waiting"] == 1)
            with pytest.raises(psycopg_pool.TooManyRequests):
                handle.pool.getconn()
        assert future.result(5) == "late"


def test_closed_pool(sync_world: World) -> None:
    """A pool that the application closes lends no more."""
    handle = sync_handle(sync_world, "pool")
    handle.pool.close()
    with pytest.raises(psycopg_pool.PoolClosed), handle:
        raise AssertionError


def test_reader_is_not_disturbed_by_writers(sync_world: World) -> None:
    """A reader goes on after others have written, as often as they like."""
    handle = sync_handle(sync_world, "normal")
    with handle.connection() as reader:
        for number in range(5):
            assert reader.execute("SELECT count(*) FROM t").fetchone() == (number,)
            with handle.connection() as writer:
                writer.execute("INSERT INTO t VALUES (%s, 'a')", [number])
            with pytest.raises(Boom), handle.connection() as writer:  # noqa: PT012 - the whole block is meant
                writer.execute("DELETE FROM t")
                raise Boom


def test_lost_connection(sync_world: World) -> None:
    """A connection that is dropped in the middle of its transaction is rolled back."""
    handle = sync_handle(sync_world, "pool")
    source = handle.pool
    lost = source.getconn()
    lost.execute("INSERT INTO t VALUES (1, 'lost')")
    with handle.connection() as conn:
        del lost
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)


@pytest.mark.parametrize("type_", POOLS)
@sandboxed
async def test_closed_connection_frees_its_place(w: World) -> None:
    """A borrowed connection that the application closes makes room in the pool."""
    for options in ({}, {"close_returns": True}):
        handle = await w.handle(pool={"max_size": 1, "timeout": 0.05, **options})
        for _ in range(3):
            async with block(handle.connection()) as conn:
                await call(conn.close())
        conn = await call(handle.pool.getconn())
        if options:
            await call(conn.close())
            conn = await call(handle.pool.getconn())
        await call(handle.pool.putconn(conn))


@pytest.mark.parametrize("type_", POOLS)
@sandboxed
async def test_pool_reset_function(w: World) -> None:
    """A pool's reset function gets each returned connection, idle, also after an error."""
    handle = await w.handle(pool={"max_size": 1, "timeout": 0.05})
    seen: list[str] = []

    def reset(conn: Any) -> None:
        seen.append(conn.info.transaction_status.name)
        raise ValueError

    async def areset(conn: Any) -> None:
        reset(conn)

    pool = handle.pool
    pool._reset = areset if w.type.is_async else reset
    for query in ("INSERT INTO t VALUES (1, 'a')", "SELECT 1"):
        conn = await call(pool.getconn())
        await execute(conn, query)
        await call(pool.putconn(conn))
    assert seen == ["IDLE", "IDLE"]
    conn = await call(pool.getconn())
    assert await value(conn, "SELECT count(*) FROM t") == 0
    pool._reset = None
    await call(pool.putconn(conn))


@sandboxed
async def test_a_stream_that_is_refused_leaves_the_others_answers(w: World) -> None:
    """psycopg looks for rows of a `stream()` that was refused; another's ROLLBACK is not its."""
    notices: list[Any] = []
    async with w.borrow() as one, block(one.pipeline()):
        one.add_notice_handler(notices.append)
        async with w.borrow() as other, block(other.transaction(force_rollback=True)):
            await execute(other, "INSERT INTO t VALUES (1, 'a')")
        rows = one.cursor().stream("SELECT 1")
        with pytest.raises(psycopg.ProgrammingError, match="pipeline mode"):
            await (anext(rows) if w.type.is_async else call(next(rows)))
    assert notices == []


@twin
async def test_a_pipeline_follows_a_stream(w: World) -> None:
    """libpq stays in single-row mode until a query is sent outside of a pipeline."""

    async def stream(conn: Any) -> None:
        rows = conn.cursor().stream("SELECT 1")
        w.note([row async for row in rows] if w.type.is_async else list(rows))

    async def pipeline(conn: Any) -> None:
        async with block(conn.pipeline()), w.noting():
            w.note(await value(conn, "SELECT 2"))
        await call(conn.commit())

    async with w.borrow() as one, w.borrow() as other:
        await stream(one)
        await call(one.commit())
        await pipeline(other)
        for end in (one.commit, one.rollback):
            await stream(one)
            await call(end())
            await pipeline(one)
        await stream(one)
        await pipeline(one)  # psycopg sends nothing before it, and fails
