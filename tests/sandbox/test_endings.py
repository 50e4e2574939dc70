"""The end of a test: what it leaves behind, what goes on too long, and what has escaped."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import SYNC, block, value
from helpers.waiting import PATIENCE, until

from pytest_pgmonkey import SandboxError
from pytest_pgmonkey.testing.sandbox.psycopg_door import connections

from .twins import World, rows, sandboxed, sync_handle

if TYPE_CHECKING:
    from .twins import Twins


def is_clean(twins: Twins) -> bool:
    """Whether a next test works, and sees nothing of the last one."""
    handle = sync_handle(World(twins, "normal", real=False))
    with handle.connection() as conn:
        count = conn.execute("SELECT count(*) FROM t").fetchone()
        conn.execute("INSERT INTO t VALUES (77, 'next')")
    return bool(count == (0,)) and twins.sandbox.reset() == [] and rows(twins) == []


def test_reset_undoes_everything(own: Twins) -> None:
    """Committed, uncommitted and failed work of a test is gone at its end."""
    handle = sync_handle(World(own, "pool", real=False), "pool")
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
    open_ = handle.pool.getconn()
    open_.execute("INSERT INTO t VALUES (2, 'a')")
    assert own.sandbox.reset() == []
    with pytest.raises(psycopg.OperationalError, match="has ended"):
        open_.execute("SELECT 1")
    assert open_.closed
    assert is_clean(own)


def test_sequences_and_locks(own: Twins) -> None:
    """Session advisory locks end with the test, also those that a function took."""
    handle = sync_handle(World(own, "normal", real=False))
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
    for hidden in (False, True):
        with handle.connection() as conn:
            conn.execute(
                "CREATE FUNCTION lock() RETURNS void LANGUAGE plpgsql AS "
                "$$BEGIN PERFORM pg_advisory_lock(2); END$$"
            )
            conn.execute("SELECT lock()" if hidden else "SELECT pg_advisory_lock(1)")
            assert own.admins[False].execute(query).fetchone() == (1,)
        assert own.sandbox.reset() == []
        until(lambda: own.admins[False].execute(query).fetchone() == (0,))


def test_what_functions_prepare_ends(own: Twins) -> None:
    """Those of the schema, which no statement of a test shows."""
    name = "hidden_prepare"
    own.admins[False].execute(
        f"CREATE FUNCTION {name}() RETURNS void LANGUAGE plpgsql AS "
        "$$BEGIN EXECUTE 'PREPARE hidden AS SELECT 1'; END$$"
    )
    try:
        handle = sync_handle(World(own, "normal", real=False))
        for _ in range(3):
            with handle.connection() as conn:
                assert conn.execute("SELECT * FROM pg_prepared_statements").fetchall() == []
                conn.execute(f"SELECT {name}()")
                conn.execute("EXECUTE hidden")
            assert own.sandbox.reset() == []
    finally:
        own.sandbox.close()
        own.admins[False].execute(f"DROP FUNCTION {name}")


def test_prepared_statements_end(own: Twins) -> None:
    """Prepared statements of a test, psycopg's and SQL's, are not there in the next."""
    handle = sync_handle(World(own, "normal", real=False))
    with handle.connection() as conn:
        conn.execute("SELECT 1", prepare=True)
        conn.execute("PREPARE mine AS SELECT 1")
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (2,)
    own.sandbox.reset()
    with handle.connection() as conn:
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


def test_settings_end(own: Twins) -> None:
    """Session settings of a test's borrowers are not there in the next."""
    world = World(own, "normal", real=False)
    plain = sync_handle(world)
    given = sync_handle(world, settings={"work_mem": "1MB"})
    for _ in range(2):
        with given.connection() as conn:
            assert conn.execute("SHOW work_mem").fetchone() == ("1MB",)
            conn.execute("SET work_mem = '2MB'")
        own.sandbox.reset()
        with plain.connection() as conn:
            assert conn.execute("SHOW work_mem").fetchone() == ("4MB",)
            conn.execute("SET work_mem = '3MB'")
            conn.commit()
        with given.connection() as conn:
            assert conn.execute("SHOW work_mem").fetchone() == ("1MB",)
        own.sandbox.reset()
    with plain.connection() as conn:
        assert conn.execute("SHOW work_mem").fetchone() == ("4MB",)


@pytest.mark.parametrize("first", [True, False])
def test_escape(own: Twins, first: bool) -> None:
    """A real COMMIT behind psycopg's back is found, named, and the sandbox knows itself spoiled."""
    handle = sync_handle(World(own, "normal", real=False))
    with handle.connection() as conn:
        if not first:
            conn.execute("INSERT INTO t VALUES (1, 'a')")
            conn.commit()
        conn.execute("INSERT INTO t VALUES (2, 'b')")
        conn.pgconn.exec_(b"COMMIT")
    (problem,) = own.sandbox.reset()
    assert "INSERT INTO t VALUES (2, 'b')" in problem
    assert "test_endings.py" in problem
    assert own.sandbox.spoiled
    assert (2,) in rows(own)
    own.admins[False].execute("DELETE FROM t")
    assert is_clean(own)


def test_escape_as_the_last_thing(own: Twins) -> None:
    """An escape after which nothing more is sent is found at the end of the test that did it."""
    handle = sync_handle(World(own, "normal", real=False))
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        conn.commit()
        conn.execute("INSERT INTO t VALUES (2, 'a')")
        conn.commit()
        conn.pgconn.exec_(b"COMMIT")
    (problem,) = own.sandbox.reset()
    assert "ended from inside" in problem
    assert own.sandbox.spoiled


def test_terminated_backend(own: Twins) -> None:
    """A backend that is terminated fails the test, which does not reconnect in silence."""
    handle = sync_handle(World(own, "normal", real=False))
    with pytest.raises(psycopg.OperationalError), handle.connection() as conn:  # noqa: PT012 - the whole block is meant
        pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]
        own.admins[False].execute("SELECT pg_terminate_backend(%s, 1000)", [pid])
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
        assert conn.closed
        assert conn.broken
    with pytest.raises(psycopg.OperationalError), handle.connection() as conn:
        conn.execute("SELECT 1")
    assert "the server closed" in own.sandbox.reset()[0]
    assert is_clean(own)


def test_terminated_between_tests(own: Twins) -> None:
    """A backend that died before the test began is replaced without a word."""
    handle = sync_handle(World(own, "normal", real=False))
    with handle.connection() as conn:
        pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]
    own.sandbox.reset()
    own.admins[False].execute("SELECT pg_terminate_backend(%s, 1000)", [pid])
    with handle.connection() as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert own.sandbox.reset() == []


def test_thread_still_running(own: Twins) -> None:
    """A statement of a thread that outlives its test is cancelled and reported."""
    handle = sync_handle(World(own, "pool", real=False), "pool")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with handle.connection() as conn:
                conn.execute("INSERT INTO t VALUES (1, 'a')")
                conn.execute("SELECT pg_sleep(60)")
        except psycopg.Error as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    pgconn = own.sandbox.backend.pgconn
    until(lambda: "pg_sleep" in running(own, pgconn.backend_pid))
    (problem,) = own.sandbox.reset()
    assert "test_endings.py" in problem
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(errors[0], psycopg.errors.QueryCanceled)
    assert is_clean(own)
    assert own.sandbox.backend.pgconn is pgconn


def test_connection_shown_while_its_test_ends(own: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its representation is one, as a thread that logs it would have it."""
    conn = sync_handle(World(own, "pool", real=False), "pool").pool.getconn()

    def summary(pgconn: Any) -> str:
        assert pgconn.status == psycopg.pq.ConnStatus.OK
        own.sandbox.reset()
        return str(pgconn.db.decode())

    monkeypatch.setattr(connections, "connection_summary", summary)
    assert own.sandbox_name in repr(conn)
    assert conn.closed


def test_thread_that_waits(own: Twins) -> None:
    """A thread that still waits for its turn when the test ends is refused and reported."""
    own.sandbox.wait_timeout = PATIENCE
    handle = sync_handle(World(own, "pool", real=False), "pool")
    with ThreadPoolExecutor(1) as threads:
        conn = handle.pool.getconn()
        conn.execute("INSERT INTO t VALUES (1, 'a')")

        def work() -> None:
            with handle.connection() as other:
                other.execute("INSERT INTO t VALUES (2, 'a')")

        future = threads.submit(work)
        until(lambda: own.sandbox.backend.turn.waiting == 1)
        (problem,) = own.sandbox.reset()
        assert "still waiting" in problem
        assert isinstance(future.exception(5), psycopg.OperationalError)
    assert is_clean(own)


def test_task_of_a_stopped_loop(own: Twins) -> None:
    """A task that is in the middle of a statement when its loop stops costs the backend."""
    loop = asyncio.new_event_loop()
    world = World(own, "async", real=False)

    async def work() -> None:
        async with (await world.handle()).connection() as conn:
            await conn.execute("INSERT INTO t VALUES (1, 'a')")
            await conn.execute("SELECT pg_sleep(60)")

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(work())
        pid = own.sandbox.backend.backend_pid
        while not task.done() and "pg_sleep" not in running(own, pid):  # noqa: ASYNC110 - the server brings it about
            await asyncio.sleep(0.002)
        return task

    task = loop.run_until_complete(begin())
    start = time.monotonic()
    (problem,) = own.sandbox.reset()
    assert time.monotonic() - start < 1.5
    assert "still ran" in problem
    assert is_clean(own)
    with pytest.raises(psycopg.OperationalError):
        loop.run_until_complete(asyncio.wait_for(task, 5))
    assert is_clean(own)
    loop.close()


def test_task_between_statements(own: Twins) -> None:
    """A task that goes on in a later test is refused there, whatever it then does."""
    loop = asyncio.new_event_loop()
    world = World(own, "async_pool", real=False)
    go_on = asyncio.Event()

    async def work() -> None:
        async with (await world.handle()).connection() as conn:
            await conn.execute("INSERT INTO t VALUES (1, 'a')")
            await go_on.wait()
            await conn.execute("INSERT INTO t VALUES (2, 'a')")

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(work())
        while not task.done() and own.sandbox.backend.level.name != "DIRECT":  # noqa: ASYNC110 - the server brings it about
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.01)
        return task

    task = loop.run_until_complete(begin())
    assert own.sandbox.reset() == []
    go_on.set()
    with pytest.raises(psycopg.OperationalError, match="has ended"):
        loop.run_until_complete(asyncio.wait_for(task, 5))
    assert is_clean(own)
    loop.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child(own: Twins) -> None:
    """A forked child that uses a connection of the test's gets a clear error."""
    handle = sync_handle(World(own, "normal", real=False))
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                conn.execute("SELECT 1")
            except SandboxError as error:
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert b"forked" in os.read(reading, 1000)
        os.close(reading)
        os.close(writing)
        assert conn.execute("SELECT n FROM t").fetchone() == (1,)
    assert is_clean_after(own)


def is_clean_after(twins: Twins) -> bool:
    return twins.sandbox.reset() == [] and is_clean(twins)


def running(twins: Twins, pid: int) -> str:
    query = "SELECT query FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    row = twins.admins[False].execute(query, [pid]).fetchone()
    return str(row[0]) if row else ""


@pytest.mark.parametrize("type_", SYNC)
@sandboxed
async def test_cancel(w: World) -> None:
    """`cancel()` reaches the borrower's own statement and nobody else's."""
    pid = w.twins.sandbox.backend.backend_pid
    with ThreadPoolExecutor(1) as threads:
        handle = await w.handle()
        async with block(handle.connection()) as one, block(handle.connection()) as two:
            one.execute("INSERT INTO t VALUES (1, 'a')")
            future = threads.submit(one.execute, "SELECT pg_sleep(60)")
            until(lambda: "pg_sleep" in running(w.twins, pid))
            two.cancel()
            two.cancel_safe()
            assert "pg_sleep" in running(w.twins, pid)
            one.cancel()
            assert isinstance(future.exception(5), psycopg.errors.QueryCanceled)
            assert one.info.transaction_status.name == "INERROR"
            one.rollback()
            assert await value(one, "SELECT count(*) FROM t") == 0


@pytest.mark.parametrize("type_", ["async", "async_pool"])
@pytest.mark.parametrize("autocommit", [True, False])
def test_cancelled_task(own: Twins, type_: str, autocommit: bool) -> None:
    """A statement whose task is cancelled or timed out leaves what it leaves in production."""
    noted = []
    for real in (False, True):
        world = World(own, type_, real=real)

        async def program(world: World = world) -> None:
            async with world.borrow(connection={"autocommit": autocommit}) as conn:
                await world.run(conn, "INSERT INTO t VALUES (1, 'a')")
                async with world.noting():
                    await asyncio.wait_for(conn.execute("SELECT pg_sleep(60)"), 0.05)
                world.status(conn)
                await world.do(conn.rollback)
                await world.rows(conn)
                async with world.noting(), conn.transaction():
                    await asyncio.wait_for(conn.execute("SELECT pg_sleep(60)"), 0.05)
                await world.rows(conn)
            await world.finish()

        with own.intercepting(not real):
            own.drive(program(), loop=True)
        noted.append(world.noted)
    own.renew()
    assert own.sandbox.reset() == []
    assert noted[0] == noted[1]
    assert is_clean(own)


def test_keyboard_interrupt(own: Twins) -> None:
    """Ctrl-C in the middle of a statement cancels it, and the block rolls back."""
    handle = sync_handle(World(own, "normal", real=False))
    pid = own.sandbox.backend.backend_pid
    main = threading.get_ident()

    def interrupt() -> None:
        until(lambda: "pg_sleep" in running(own, pid))
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), handle.connection() as conn:  # noqa: PT012 - the whole block is meant
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        conn.execute("SELECT pg_sleep(60)")
    thread.join()
    with handle.connection() as conn:
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert is_clean_after(own)


@pytest.mark.parametrize("type_", ["async", "async_pool"])
def test_many_cancelled_tasks(own: Twins, type_: str) -> None:
    """Tasks that are cancelled anywhere leave a sandbox that works."""
    world = World(own, type_, real=False)

    async def program() -> None:
        handle = await world.handle(pool={"max_size": 4})

        async def work(number: int) -> None:
            async with handle.connection() as conn:
                await conn.execute("INSERT INTO t VALUES (%s, 'a')", [number])
                async with conn.transaction():
                    await conn.execute("SELECT pg_sleep(0.0005)")
                await conn.commit()
                conn.cursor()
                await conn.execute("SELECT 1")

        for number in range(60):
            task = asyncio.create_task(work(number))
            for _ in range(number % 15):
                await asyncio.sleep(0)
            if number % 4:
                await asyncio.sleep(number / 40000)
            task.cancel()
            await asyncio.wait([task])
        async with handle.connection() as conn:
            await conn.execute("INSERT INTO t VALUES (1000, 'a')")

    own.drive(program(), loop=True)
    assert is_clean_after(own)


def test_stream_left_open(own: Twins) -> None:
    """A COPY or a stream in the middle of which the test ends is ended too."""
    handle = sync_handle(World(own, "pool", real=False), "pool")
    for query in ("COPY t FROM STDIN", "COPY (SELECT generate_series(1, 1000000)) TO STDOUT"):
        conn = handle.pool.getconn()
        copy = conn.cursor().copy(query)
        copy.__enter__()
        assert own.sandbox.reset() == []
        assert is_clean(own)
        with pytest.raises(psycopg.OperationalError, match="has ended"):
            conn.execute("SELECT 1")
        with suppress(psycopg.OperationalError):  # or the collector would meet it
            copy.__exit__(None, None, None)
    conn = handle.pool.getconn()
    stream = conn.cursor().stream("SELECT generate_series(1, 1000000)")
    next(stream)
    assert own.sandbox.reset() == []
    assert is_clean(own)


def test_problems_are_told_once(own: Twins) -> None:
    """What went wrong in one test is not told of the next."""
    handle = sync_handle(World(own, "normal", real=False))
    with handle.connection() as one, handle.connection() as two:
        one.execute("INSERT INTO t VALUES (1, 'a')")
        with pytest.raises(psycopg.OperationalError):
            two.execute("SELECT 1")
    assert len(own.sandbox.take_refusals()) == 1
    assert own.sandbox.reset() == []
    assert own.sandbox.take_refusals() == []
