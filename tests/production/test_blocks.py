"""Which connection a block has, whoever enters and leaves it: threads, tasks, stacks."""

# What warns is a collection.
# ruff: noqa: PT031

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg_pool
import pytest
from helpers.four_types import ASYNC, NOWHERE, POOLS, SYNC, Kind, block, call, execute, pid, value

from pytest_pgmonkey import PGConnectionManager, PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pytest_pgmonkey import AsyncHandle, Handle


@pytest.fixture(params=SYNC)
def handle(request: pytest.FixtureRequest, config: Any, manager: PGConnectionManager) -> Any:
    kind = Kind(request.param, config, manager)
    return manager.get_database_connection_from_dict(
        kind.sections(pool={"min_size": 1, "max_size": 8}), request.param
    )


@pytest.fixture(params=ASYNC)
def async_kind(request: pytest.FixtureRequest, config: Any, manager: PGConnectionManager) -> Kind:
    return Kind(request.param, config, manager)


def backend(conn: Any) -> int:
    return int(conn.execute("SELECT pg_backend_pid()").fetchone()[0])


# --- threads ---


def test_eight_threads(handle: Handle, rows: Any) -> None:
    """Threads that use one handle at the same time have a connection each."""
    together = threading.Barrier(8, timeout=20)

    def work(number: int) -> int:
        with handle as conn:
            together.wait()
            for n in range(10):
                conn.execute("INSERT INTO t VALUES (%s)", [number * 10 + n])
            return backend(conn)

    with ThreadPoolExecutor(8) as threads:
        pids = list(threads.map(work, range(8)))
    assert len(set(pids)) == 8
    assert rows() == list(range(80))


@pytest.mark.parametrize("type_", SYNC)
def test_eight_threads_make_one(type_: str, config: Any) -> None:
    """Threads that ask for a handle at the same time get the same one, proved and opened once."""
    together = threading.Barrier(8, timeout=20)
    opened: list[Any] = []

    def get(_: int) -> Any:
        together.wait()
        return manager.get_database_connection_from_dict(sections, type_)

    with PGConnectionManager(configure=opened.append) as manager:
        sections = Kind(type_, config, manager).sections(pool={"min_size": 0})
        with ThreadPoolExecutor(8) as threads:
            handles = list(threads.map(get, range(8)))
        assert len({id(handle) for handle in handles}) == 1
        assert len(opened) == 1


def test_threads_share_the_failure_of_an_opening(config: Any, manager: PGConnectionManager) -> None:
    """Where the one opening fails, each of the threads that waited for it hears of it."""
    together = threading.Barrier(8, timeout=20)
    kind = Kind("pool", config, manager)

    def get(_: int) -> Any:
        together.wait()
        with pytest.raises(psycopg.OperationalError, match="No such file"):
            manager.get_database_connection_from_dict(kind.sections(host=NOWHERE), "pool")
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(get, range(8)))
    assert manager.cache_info["size"] == 0


def test_generator_entered_in_one_thread_and_left_in_another(handle: Handle, rows: Any) -> None:
    """A generator's block is its own, whichever thread resumes it, in whichever order."""

    def dependency(number: int) -> Iterator[Any]:
        with handle as conn:
            conn.execute("INSERT INTO t VALUES (%s)", [number])
            yield conn

    one, two = dependency(1), dependency(2)
    with ThreadPoolExecutor(1) as first:
        first.submit(next, one).result()
        first.submit(next, two).result()
    with ThreadPoolExecutor(1) as second:
        second.submit(next, one, None).result()
    assert rows() == [1]
    two.close()
    assert rows() == [1]


def test_stack_left_in_another_thread(handle: Handle, rows: Any) -> None:
    """The only open block is the one that ends, also where nothing else tells."""
    stack = ExitStack()
    with ThreadPoolExecutor(1) as other:
        conn = other.submit(stack.enter_context, handle).result()
    conn.execute("INSERT INTO t VALUES (1)")
    stack.close()
    assert rows() == [1]


def test_stack_left_inside_of_other_blocks(handle: Handle, rows: Any) -> None:
    """A stack does not end the block of a `with` that goes on, nor of a generator that waits."""

    def dependency() -> Iterator[Any]:
        with handle as conn:
            conn.execute("INSERT INTO t VALUES (1)")
            yield conn

    stack = ExitStack()
    stack.enter_context(handle).execute("INSERT INTO t VALUES (2)")
    waiting = dependency()
    next(waiting)
    with handle as conn:
        conn.execute("INSERT INTO t VALUES (3)")
        stack.close()
        assert rows() == [2]
        waiting.close()
    assert rows() == [2, 3]


def test_stacks_that_cannot_be_told_apart(handle: Handle) -> None:
    """Where it cannot be known which block ends, none is ended and the error says what to do."""
    one, two = ExitStack(), ExitStack()
    with ThreadPoolExecutor(1) as other:
        other.submit(one.enter_context, handle).result()
        other.submit(two.enter_context, handle).result()
        with pytest.raises(PGMonkeyError, match=r"handle\.connection\(\)"):
            one.close()
        other.submit(two.close).result()
        # The block of the stack that failed is still open, and now the only one.
        handle.__exit__(None, None, None)


def test_stacks_of_two_threads(handle: Handle, rows: Any) -> None:
    """Stacks entered and left in the same frames' places keep to their own thread's block."""
    entered, leave = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)

    def work(number: int) -> None:
        stack = ExitStack()
        conn = stack.enter_context(handle)
        entered.wait()
        conn.execute("INSERT INTO t VALUES (%s)", [number])
        leave.wait()
        if number == 1:
            stack.close()
        else:
            error = ZeroDivisionError()
            stack.__exit__(ZeroDivisionError, error, None)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, [1, 2]))
    assert rows() == [1]


def test_blocks_left_in_the_order_they_were_entered(handle: Handle, rows: Any) -> None:
    """`connection()` ends its own block, whatever the order."""
    one, two = handle.connection(), handle.connection()
    first, second = one.__enter__(), two.__enter__()
    first.execute("INSERT INTO t VALUES (1)")
    second.execute("INSERT INTO t VALUES (2)")
    error = ZeroDivisionError()
    one.__exit__(ZeroDivisionError, error, None)
    two.__exit__(None, None, None)
    assert rows() == [2]


def test_left_without_being_entered(handle: Handle) -> None:
    """An exit without a block is an error, not another's commit."""
    with pytest.raises(PGMonkeyError, match="0 blocks"):
        handle.__exit__(None, None, None)
    with pytest.raises(PGMonkeyError, match="not entered"):
        handle.connection().__exit__(None, None, None)


def test_thread_that_inherits_the_context(handle: Handle) -> None:
    """A thread that runs in a copy of the context does not get its parent's connection."""
    with handle as conn, ThreadPoolExecutor(1) as other:
        context = contextvars.copy_context()

        def work() -> Any:
            with handle.cursor() as cursor:
                return cursor.connection

        assert other.submit(context.run, work).result() is not conn


def test_thread_that_serves_the_next_request(handle: Handle) -> None:
    """In a thread where another context's block is still open, a cursor is on one of its own."""

    def dependency() -> Iterator[Any]:
        with handle as conn:
            yield conn

    with ThreadPoolExecutor(1) as worker:
        request = dependency()
        conn = worker.submit(contextvars.Context().run, next, request).result()

        def next_request() -> Any:
            with handle.transaction() as another:
                return another

        assert worker.submit(contextvars.Context().run, next_request).result() is not conn
        worker.submit(request.close).result()


def test_pool_waits_no_longer_than_asked(config: Any, manager: PGConnectionManager) -> None:
    """`connection(timeout=...)` gives up when it says."""
    kind = Kind("pool", config, manager)
    handle = manager.get_database_connection_from_dict(kind.sections(pool={"max_size": 1}), "pool")
    with handle, pytest.raises(psycopg_pool.PoolTimeout), handle.connection(timeout=0.01):
        pass


# --- tasks ---


@pytest.mark.asyncio
async def test_twenty_tasks(async_kind: Kind, rows: Any) -> None:
    """Tasks that use one handle at the same time have a connection each."""
    handle = await async_kind.get(pool={"max_size": 20})
    entered, everybody = 0, asyncio.Event()

    async def work(number: int) -> int:
        nonlocal entered
        async with handle as conn:
            entered += 1
            if entered == 20:
                everybody.set()
            await everybody.wait()
            await execute(conn, "INSERT INTO t VALUES (%s)", [number])
            return await pid(conn)

    pids = await asyncio.wait_for(asyncio.gather(*map(work, range(20))), 30)
    assert len(set(pids)) == 20
    assert rows() == list(range(20))


@pytest.mark.asyncio
async def test_twenty_tasks_make_one(async_kind: Kind) -> None:
    """Tasks that ask for a handle at the same time get the same one, proved and opened once."""
    opened: list[Any] = []
    async with PGConnectionManager(aconfigure=opened.append) as manager:
        attempts = [async_kind.get(manager, pool={"min_size": 0}) for _ in range(20)]
        handles = await asyncio.gather(*attempts)
        assert len({id(handle) for handle in handles}) == 1
        assert manager.cache_info["size"] == 1
        assert len(opened) == 1


@pytest.mark.asyncio
async def test_tasks_share_the_failure_of_an_opening(async_kind: Kind) -> None:
    """Where the one opening fails, each of the tasks that waited for it hears of it."""
    attempts = [async_kind.get(host=NOWHERE) for _ in range(20)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {psycopg.OperationalError}
    assert async_kind.manager.cache_info["size"] == 0


@pytest.mark.asyncio
async def test_cancelled_opening_is_taken_over(async_kind: Kind) -> None:
    """Where the task that opens is cancelled, one that waits opens in its stead."""
    leader = asyncio.create_task(async_kind.get())
    followers = [asyncio.create_task(async_kind.get()) for _ in range(3)]
    await asyncio.sleep(0)
    leader.cancel()
    handles = await asyncio.gather(*followers)
    assert leader.cancelled()
    async with block(handles[0]) as conn:
        assert await value(conn, "SELECT 1") == 1


@pytest.mark.asyncio
async def test_task_that_inherits_the_context(async_kind: Kind) -> None:
    """A child task has its parent's context and none of its connections."""
    handle: AsyncHandle = await async_kind.get()

    async def child() -> Any:
        async with handle.transaction() as conn:
            return conn

    async with handle as conn:
        assert await asyncio.create_task(child()) is not conn
        async with handle.transaction() as same:
            assert same is conn


@pytest.mark.asyncio
async def test_async_generators_and_stacks(async_kind: Kind, rows: Any) -> None:
    """Blocks in async generators and exit stacks end with their own connection."""
    handle: AsyncHandle = await async_kind.get()

    async def dependency(number: int) -> AsyncIterator[Any]:
        async with handle as conn:
            await execute(conn, "INSERT INTO t VALUES (%s)", [number])
            yield conn

    one, two = dependency(1), dependency(2)
    await anext(one)
    await anext(two)
    await anext(one, None)
    assert rows() == [1]
    await two.aclose()  # type: ignore[attr-defined]
    async with AsyncExitStack() as stack:
        conn = await stack.enter_async_context(handle)
        await execute(conn, "INSERT INTO t VALUES (3)")
    assert rows() == [1, 3]


@pytest.mark.asyncio
async def test_cancelled_tasks_lose_nothing(async_kind: Kind, rows: Any) -> None:
    """Tasks cancelled at any point of their block commit all or nothing and give back."""
    handle = await async_kind.get(pool={"max_size": 2, "timeout": 10})

    async def work(number: int) -> None:
        async with handle as conn:
            await execute(conn, "INSERT INTO t VALUES (%s)", [number])
            await execute(conn, "INSERT INTO t VALUES (%s)", [number + 1000])

    for number in range(30):
        task = asyncio.create_task(work(number))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    done = rows()
    assert [n + 1000 for n in done if n < 1000] == [n for n in done if n >= 1000]
    async with handle as one:
        assert await value(one, "SELECT 1") == 1
    if handle.pool is not None:
        assert handle.pool.get_stats()["pool_available"] >= 1


# --- reload and disconnect under load ---


def test_reload_under_load(config: Any, manager: PGConnectionManager, rows: Any) -> None:
    """Reloads under load lose no block: those that wait for the old pool go to the new one."""
    kind = Kind("pool", config, manager)
    sections = kind.sections(pool={"min_size": 1, "max_size": 2})
    handle = manager.get_database_connection_from_dict(sections, "pool")

    def work(number: int) -> None:
        for n in range(20):
            with handle as conn:
                conn.execute("INSERT INTO t VALUES (%s)", [number * 20 + n])

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(work, number) for number in range(8)]
        for _ in range(5):
            manager.get_database_connection_from_dict(sections, "pool", force_reload=True)
        for each in running:
            each.result()
    assert rows() == list(range(160))
    assert manager.cache_info["size"] == 1


@pytest.mark.asyncio
async def test_async_reload_under_load(async_kind: Kind, rows: Any) -> None:
    """Async reloads under load lose no block either."""
    handle = await async_kind.get(pool={"max_size": 2})

    async def work(number: int) -> None:
        for n in range(5):
            async with handle as conn:
                await execute(conn, "INSERT INTO t VALUES (%s)", [number * 5 + n])

    async def reload() -> None:
        for _ in range(5):
            await async_kind.get(pool={"max_size": 2}, force_reload=True)

    await asyncio.gather(reload(), *map(work, range(10)))
    assert rows() == list(range(50))
    assert async_kind.manager.cache_info["size"] == 1


# --- what is lost ---


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", POOLS, indirect=True)
async def test_lost_connection_is_a_warning(kind: Kind) -> None:
    """A connection that was taken and never given back is reported with where it was taken."""
    handle = await kind.get()
    taken = handle.connection()
    await call(taken.__aenter__() if kind.type.is_async else taken.__enter__())
    with pytest.warns(ResourceWarning, match=r"taken at .*test_blocks\.py:\d+, was never"):
        del taken
        gc.collect()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", POOLS, indirect=True)
async def test_lost_handle_with_an_open_block_is_a_warning(kind: Kind) -> None:
    """A handle that is lost with an open block is reported with where that was entered."""

    async def lose() -> None:
        handle = await kind.get(PGConnectionManager())
        await call(handle.__aenter__() if kind.type.is_async else handle.__enter__())

    with pytest.warns(ResourceWarning, match=r"block entered at .*test_blocks\.py:\d+ was open"):
        await lose()
        gc.collect()
