"""What a test does wrong does not reach the next one."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import select
import signal
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.waiting import until
from psycopg import pq

from pytest_pgmonkey import SandboxError

from .twins import World, rows, sync_handle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from .twins import Twins

SLOW = "SELECT pg_sleep(.05), %s"


#: What the collector calls, the last one being of hypothesis: nobody would get an error from there.
SWALLOWING = {"__del__", "_remove", "remove", "unraisable_hook", "gc_callback"}


class AlarmError(BaseException):
    """What a time-out by signal raises, pytest-timeout's for one."""


@pytest.fixture
def handle(own: Twins) -> Any:
    """A sync handle with a pool."""
    return sync_handle(World(own, "pool", real=False), "pool")


def next_test_is_well(twins: Twins) -> bool:
    """Whether a next test finds an empty database and a session that works, and leaves nothing."""
    handle = sync_handle(World(twins, "normal", real=False))
    with handle.connection() as conn:
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM pg_cursors").fetchone() == (0,)
        conn.execute("INSERT INTO t VALUES (77, 'next')")
    with handle.connection() as conn, conn.pipeline():
        conn.execute("INSERT INTO t VALUES (78, 'next')")
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (2,)
    return twins.sandbox.reset() == [] and rows(twins) == []


def alarm(after: float, error: type[BaseException] = AlarmError) -> None:
    """Raise an error in the main thread after so many seconds."""

    def ring(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name in SWALLOWING:
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                return
            frame = frame.f_back
        raise error

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, after)


def is_there(twins: Twins, pid: int) -> bool:
    """Whether the server still has a session."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
    return twins.admins[False].execute(query, [pid]).fetchone() != (0,)


def is_suspended(operation: Any) -> bool:
    return inspect.getgeneratorstate(operation) == inspect.GEN_SUSPENDED


# Programs that misbehave: each gets a handle over a pool, and may raise whatever it likes.


def executemany_meets_a_time_out(handle: Any) -> None:
    with pytest.raises(AlarmError), handle.connection() as conn:
        alarm(0.1)
        conn.cursor().executemany(SLOW, [(i,) for i in range(20)])


def close_in_a_pipeline(handle: Any) -> None:
    with pytest.raises(psycopg.OperationalError), handle.connection() as conn, conn.pipeline():
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        conn.close()


def drop_a_generator_in_a_pipeline(handle: Any) -> None:
    def generate() -> Iterator[None]:
        with handle.connection() as conn, conn.pipeline():
            conn.execute("INSERT INTO t VALUES (1, 'a')")
            yield

    next(generate())


def keep_a_generator_in_a_pipeline(handle: Any) -> None:
    def generate() -> Iterator[None]:
        with handle.connection() as conn, conn.pipeline():
            conn.execute("INSERT INTO t VALUES (1, 'a')")
            yield

    handle.kept = generate()
    next(handle.kept)


def return_before_the_pipeline_ends(handle: Any) -> None:
    conn = handle.pool.getconn()
    pipeline = conn.pipeline()
    pipeline.__enter__()
    conn.execute("INSERT INTO t VALUES (1, 'a')")
    handle.pool.putconn(conn)
    with pytest.raises(psycopg.OperationalError):
        pipeline.__exit__(None, None, None)


def leave_in_the_wrong_order(handle: Any) -> None:
    with pytest.raises(psycopg.OperationalError), ExitStack() as outer, ExitStack() as inner:
        conn = inner.enter_context(handle.connection())
        outer.enter_context(conn.pipeline())
        conn.execute("INSERT INTO t VALUES (1, 'a')")


def copy_by_a_client_cursor(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        psycopg.ClientCursor(conn).executemany("copy t from stdin", [()])


def copy_out_by_a_client_cursor(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        psycopg.ClientCursor(conn).executemany("copy t to stdout", [(), ()])


def enter_the_mode_by_hand(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        conn.pgconn.enter_pipeline_mode()


def queue_by_hand(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        conn.pgconn.enter_pipeline_mode()
        conn.pgconn.send_query_params(b"INSERT INTO t VALUES (1, 'a')", None)


def send_by_hand(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        conn.pgconn.send_query(b"INSERT INTO t VALUES (1, 'a'); SELECT pg_sleep(60)")


def begin_a_copy_by_hand(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        conn.pgconn.send_query(b"COPY t FROM STDIN")


def end_the_session(handle: Any) -> None:
    with suppress(psycopg.Error), handle.connection() as conn:
        conn.pgconn.finish()


def begin_another_session(handle: Any) -> None:
    conn = handle.pool.getconn()
    conn.execute("INSERT INTO t VALUES (1, 'a')")
    conn.pgconn.reset_start()


def stream_and_forget(handle: Any) -> None:
    # Not in a block: psycopg's lock, which the generator holds, would keep it from committing.
    handle.kept = handle.pool.getconn().cursor().stream("SELECT generate_series(1, 100000)")
    next(handle.kept)


def meet_a_time_out_in_a_statement(handle: Any) -> None:
    with pytest.raises(AlarmError), handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        alarm(0.05)
        conn.execute("SELECT pg_sleep(60)")


def meet_a_time_out_in_a_copy(handle: Any) -> None:
    with (
        pytest.raises(AlarmError),
        handle.connection() as conn,
        conn.cursor().copy("COPY t FROM STDIN") as copy,
    ):
        alarm(0.05)
        for number in itertools.count(100):
            copy.write_row((number, "a"))


def interrupt_a_pipeline(handle: Any) -> None:
    with pytest.raises(KeyboardInterrupt), handle.connection() as conn, conn.pipeline():
        alarm(0.05, KeyboardInterrupt)
        for number in range(100):
            conn.execute(SLOW, [number])
        conn.execute("SELECT 1").fetchall()


def prepare_before_ddl(handle: Any) -> None:
    with handle.connection() as conn:
        conn.execute("SELECT 1", prepare=True)
        conn.execute("CREATE TABLE made (n int)")


def prepare_in_a_block_of_code(handle: Any) -> None:
    with handle.connection() as conn:
        conn.execute("DO $$ BEGIN EXECUTE 'PREPARE hidden AS SELECT 1'; END $$")


def leave_a_cursor_with_hold(handle: Any) -> None:
    with handle.connection() as conn:
        conn.execute("DECLARE held CURSOR WITH HOLD FOR SELECT 1")


MISBEHAVING: list[Callable[[Any], None]] = [
    executemany_meets_a_time_out,
    close_in_a_pipeline,
    drop_a_generator_in_a_pipeline,
    keep_a_generator_in_a_pipeline,
    return_before_the_pipeline_ends,
    leave_in_the_wrong_order,
    copy_by_a_client_cursor,
    copy_out_by_a_client_cursor,
    enter_the_mode_by_hand,
    queue_by_hand,
    send_by_hand,
    begin_a_copy_by_hand,
    end_the_session,
    begin_another_session,
    stream_and_forget,
    meet_a_time_out_in_a_statement,
    meet_a_time_out_in_a_copy,
    interrupt_a_pipeline,
    prepare_before_ddl,
    prepare_in_a_block_of_code,
    leave_a_cursor_with_hold,
]


@pytest.mark.parametrize("program", MISBEHAVING, ids=lambda program: program.__name__)
@pytest.mark.parametrize(
    "before", ["", "INSERT INTO t VALUES (5, 'before')"], ids=["first", "later"]
)
def test_misbehaving(own: Twins, handle: Any, program: Callable[[Any], None], before: str) -> None:
    """Whatever a test has left, the next two are well."""
    ringing = signal.getsignal(signal.SIGALRM)
    for _ in range(2):
        if before:
            with handle.connection() as conn:
                conn.execute(before)
        try:
            program(handle)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, ringing)
        problems = own.sandbox.reset()
        ends = program in (end_the_session, begin_another_session)
        assert problems == (["the server closed the test's connection while the test ran"] * ends)
        assert next_test_is_well(own)
        assert next_test_is_well(own)
        if (kept := getattr(handle, "kept", None)) is not None:
            with suppress(psycopg.Error):
                kept.close()


def test_a_thread_left_in_a_pipeline(own: Twins, handle: Any) -> None:
    """A thread that sits in a pipeline when its test ends cannot touch the next test's session."""
    inside, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with handle.connection() as conn, conn.pipeline():
                conn.execute("INSERT INTO t VALUES (1, 'a')")
                inside.set()
                go_on.wait()
                conn.execute("INSERT INTO t VALUES (2, 'a')")
        except psycopg.OperationalError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert own.sandbox.reset() == []
    other = sync_handle(World(own, "normal", real=False))
    with other.connection() as conn, conn.pipeline():
        conn.execute("INSERT INTO t VALUES (3, 'a')")
        go_on.set()
        thread.join()
        assert conn.pgconn.pipeline_status == pq.PipelineStatus.ON
        assert conn.execute("SELECT n FROM t").fetchall() == [(3,)]
    assert "has ended" in str(errors[0])
    assert own.sandbox.reset() == []
    assert next_test_is_well(own)


def test_a_task_left_in_a_pipeline(own: Twins) -> None:
    """A task in a loop of wider scope that sits in a pipeline cannot touch the next test either."""
    world = World(own, "async", real=False)
    errors: list[BaseException] = []

    async def work(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        try:
            async with (await world.handle()).connection() as conn, conn.pipeline():
                await conn.execute("INSERT INTO t VALUES (1, 'a')")
                inside.set()
                await go_on.wait()
                await conn.execute("INSERT INTO t VALUES (2, 'a')")
        except psycopg.OperationalError as error:
            errors.append(error)

    async def first(go_on: asyncio.Event) -> asyncio.Task[None]:
        inside = asyncio.Event()
        task = asyncio.create_task(work(inside, go_on))
        await inside.wait()
        return task

    async def second(go_on: asyncio.Event, task: asyncio.Task[None]) -> list[Any]:
        async with (await world.handle()).connection() as conn, conn.pipeline():
            await conn.execute("INSERT INTO t VALUES (3, 'a')")
            go_on.set()
            await task
            found: list[Any] = await (await conn.execute("SELECT n FROM t")).fetchall()
            return found

    go_on = asyncio.Event()
    task = own.loop.run_until_complete(first(go_on))
    assert own.sandbox.reset() == []
    assert own.loop.run_until_complete(second(go_on, task)) == [(3,)]
    assert errors
    assert own.sandbox.reset() == []
    assert next_test_is_well(own)


@pytest.mark.parametrize(
    "before", ["SELECT 1", "INSERT INTO t VALUES (5, 'before')"], ids=["first", "later"]
)
def test_an_interrupted_operation_is_closed_at_once(own: Twins, handle: Any, before: str) -> None:
    """Nothing of it is left to the collector, which can crash in psycopg's compiled generators."""
    ringing = signal.getsignal(signal.SIGALRM)
    with pytest.raises(AlarmError), handle.connection() as conn:
        conn.execute(before)
        operation = conn.cursor()._execute_gen("SELECT pg_sleep(60)")

        def ring() -> None:
            while not is_suspended(operation):
                time.sleep(0.001)
            signal.setitimer(signal.ITIMER_REAL, 0.001)

        thread = threading.Thread(target=ring)
        alarm(60)
        thread.start()
        conn.wait(operation)
    thread.join()
    signal.signal(signal.SIGALRM, ringing)
    assert inspect.getgeneratorstate(operation) == inspect.GEN_CLOSED
    assert own.sandbox.reset() == []
    assert next_test_is_well(own)


@pytest.mark.parametrize(
    "before", ["SELECT 1", "INSERT INTO t VALUES (5, 'before')"], ids=["first", "later"]
)
def test_an_operation_cancelled_twice_is_closed_at_once(own: Twins, before: str) -> None:
    """The second time while psycopg cancels the statement: it closes the session then.

    On the server the statement would go on, and keep the next test waiting for its locks. The
    oldest psycopg leaves the session open.
    """
    world = World(own, "async", real=False)
    operations = []

    async def work() -> None:
        async with (await world.handle()).connection() as conn:
            await conn.execute(before)
            operations.append(conn.cursor()._execute_gen("SELECT pg_sleep(60)"))
            await conn.wait(operations[0])

    async def cancel() -> None:
        task = asyncio.create_task(work())
        while not (operations and is_suspended(operations[0])):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    own.loop.run_until_complete(cancel())
    assert inspect.getgeneratorstate(operations[0]) == inspect.GEN_CLOSED
    backend = own.sandbox.backend
    own.sandbox.reset()
    assert own.sandbox.backend is backend or not is_there(own, backend.backend_pid)
    assert next_test_is_well(own)


def test_an_interrupted_reset_is_made_up_for(own: Twins, handle: Any) -> None:
    """A reset that a signal has ended half-way is done by the next test's first connection."""
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")

    def interrupted() -> None:
        raise AlarmError

    backend = own.sandbox.backend
    backend.undo_frame = interrupted  # type: ignore[method-assign]
    with pytest.raises(AlarmError):
        own.sandbox.reset()
    assert next_test_is_well(own)
    assert own.sandbox.backend is not backend
    until(lambda: not is_there(own, backend.backend_pid))


def test_closed_is_closed(own: Twins, handle: Any) -> None:
    """A connection that was returned answers nothing any more, as psycopg's do."""
    with handle.connection() as conn:
        assert conn.fileno() > 0
        pid = conn.info.backend_pid
        cursor = conn.cursor()
    assert pid == own.sandbox.backend.backend_pid
    assert conn.closed
    assert not conn.broken
    for asked in ("backend_pid", "dbname", "server_version"):
        with pytest.raises(psycopg.OperationalError, match="closed"):
            getattr(conn.info, asked)
    with pytest.raises(psycopg.OperationalError, match="closed"):
        conn.fileno()
    with pytest.raises(psycopg.OperationalError, match="closed"):
        cursor.execute("SELECT 1")
    assert conn.info.status == pq.ConnStatus.BAD
    assert conn.info.transaction_status == pq.TransactionStatus.UNKNOWN


def test_broken_stays_broken(own: Twins, handle: Any) -> None:
    """A connection whose session was ended is broken, also after it was closed."""
    conn = handle.pool.getconn()
    conn.execute("INSERT INTO t VALUES (1, 'a')")
    pid = own.sandbox.backend.backend_pid
    own.admins[False].execute("SELECT pg_terminate_backend(%s)", [pid])
    with pytest.raises(psycopg.OperationalError):
        conn.execute("SELECT pg_sleep(60)")
    assert conn.broken
    conn.close()
    assert conn.broken
    assert own.sandbox.reset() == ["the server closed the test's connection while the test ran"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_closes_nothing(own: Twins, handle: Any) -> None:
    """A child that leaves its parent's block does nothing to the parent's work."""
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                conn.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert conn.execute("SELECT n FROM t").fetchall() == [(1,)]
    assert next_test_after_reset(own)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_takes_no_answer(own: Twins, handle: Any) -> None:
    """A child that is the first to ask for something leaves the parent what is under way."""
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
    assert own.sandbox.reset() == []
    backend = own.sandbox.backend
    assert backend.behind  # the answer to its ROLLBACK
    until(lambda: select.select([backend.pgconn.socket], [], [], 0)[0] != [])
    child = os.fork()
    if child == 0:
        with suppress(BaseException), handle.connection() as conn:
            try:
                conn.execute("SELECT 1")
            except SandboxError:
                os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert next_test_is_well(own)


def test_a_trace_ends_with_its_test(own: Twins, handle: Any, tmp_path: Path) -> None:
    """Its file may be closed then, and the number be that of something else."""
    path = tmp_path / "trace"
    with path.open("wb") as file:
        with handle.connection() as conn:
            try:
                conn.pgconn.trace(file.fileno())
            except psycopg.NotSupportedError:
                pytest.skip("libpq traces on Linux only")
            conn.execute("SELECT 'traced'")
        assert own.sandbox.reset() == []
        traced = path.read_bytes()
        assert b"traced" in traced
        assert next_test_is_well(own)
        assert path.read_bytes() == traced


def next_test_after_reset(twins: Twins) -> bool:
    return twins.sandbox.reset() == [] and next_test_is_well(twins)


def test_a_cursor_with_hold_ends_with_its_borrower(own: Twins, handle: Any) -> None:
    """The next borrower may use the same name, and sees no other's cursor."""
    for _ in range(2):
        with handle.connection() as conn:
            conn.execute("DECLARE held CURSOR WITH HOLD FOR SELECT 1")
        with handle.connection() as conn:
            with conn.cursor("named", withhold=True) as cursor:
                cursor.execute("SELECT 2")
            conn.execute('DECLARE "Left" CURSOR WITH HOLD FOR SELECT 3')
        with handle.connection() as conn:
            assert conn.execute("SELECT name FROM pg_cursors").fetchall() == []
    assert next_test_after_reset(own)


def test_late_cancels_end_nothing(own: Twins, handle: Any) -> None:
    """Cancel requests from outside in quick succession: what was reported as committed is there."""
    stop = threading.Event()
    pid = own.sandbox.backend.backend_pid

    def bother() -> None:
        while not stop.wait(0.0007):
            own.admins[True].execute("SELECT pg_cancel_backend(%s)", [pid])

    thread = threading.Thread(target=bother)
    with handle.connection() as conn:
        assert conn.info.backend_pid == pid
    kept = set()
    thread.start()
    try:
        for number in range(400):
            with suppress(psycopg.errors.QueryCanceled):
                with handle.connection() as conn:
                    conn.execute("INSERT INTO t VALUES (%s, 'a')", [number])
                kept.add((number,))
    finally:
        stop.set()
        thread.join()
    with handle.connection() as conn:
        assert set(conn.execute("SELECT n FROM t").fetchall()) == kept
    assert kept
    assert next_test_after_reset(own)


def test_a_dead_session_is_replaced_whatever_else_is_told(own: Twins, handle: Any) -> None:
    """A test that has ended badly in another way, too, leaves no dead session to the next one."""
    own.sandbox.wait_timeout = 60
    with handle.connection() as conn:
        conn.execute("INSERT INTO t VALUES (0, 'a')")
    holder = handle.pool.getconn()
    holder.execute("INSERT INTO t VALUES (1, 'a')")
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            with handle.connection() as conn:
                conn.execute("INSERT INTO t VALUES (2, 'a')")
        except psycopg.OperationalError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    backend = own.sandbox.backend
    until(lambda: backend.turn.waiting == 1)
    own.admins[False].execute("SELECT pg_terminate_backend(%s)", [backend.backend_pid])
    until(backend.has_died)
    (problem,) = own.sandbox.reset()
    assert "still waiting" in problem
    thread.join()
    assert errors
    assert next_test_is_well(own)


@pytest.mark.parametrize("statement", [SLOW, "COPY t FROM STDIN"], ids=["statement", "copy"])
def test_an_interrupted_scope(own: Twins, statement: str) -> None:
    """Data of a scope whose making was interrupted is gone; that of the scope around it stays."""
    around = own.sandbox.open_scope()
    around.connection.execute("INSERT INTO t VALUES (1, 'a')")
    scope = own.sandbox.open_scope()
    scope.connection.execute("INSERT INTO t VALUES (2, 'a')")
    ringing = signal.getsignal(signal.SIGALRM)
    with pytest.raises(AlarmError), scope.connection.cursor() as cursor:
        alarm(0.05)
        if statement == SLOW:
            cursor.execute("SELECT pg_sleep(60)")
        with cursor.copy(statement) as copy:
            for number in itertools.count(100):
                copy.write_row((number, "a"))
    signal.signal(signal.SIGALRM, ringing)
    scope.close()
    handle = sync_handle(World(own, "normal", real=False))
    for _ in range(2):
        own.sandbox.begin()
        with handle.connection() as conn:
            assert conn.execute("SELECT n FROM t").fetchall() == [(1,)]
            conn.execute("INSERT INTO t VALUES (3, 'a')")
        assert own.sandbox.reset() == []
    around.close()
    assert next_test_is_well(own)


def terminate(own: Twins) -> None:
    own.admins[False].execute("SELECT pg_terminate_backend(%s)", [own.sandbox.backend.backend_pid])
    until(own.sandbox.backend.has_died)


def close_in_a_statement(own: Twins) -> None:
    pgconn = own.sandbox.backend.pgconn
    pgconn.send_query(b"SELECT pg_sleep(60)")
    pgconn.finish()


@pytest.mark.parametrize("end", [terminate, close_in_a_statement])
def test_the_session_ends_in_a_scope(own: Twins, end: Callable[[Twins], None]) -> None:
    """The next test has another one, and waits for no lock, if the scope is closed or not."""
    for closes in (True, False):
        around = own.sandbox.open_scope()
        scope = own.sandbox.open_scope()
        scope.connection.execute("INSERT INTO t VALUES (77, 'a')")
        pid = own.sandbox.backend.backend_pid
        end(own)
        if closes:
            scope.close()
        else:
            own.sandbox.begin()
        assert around.lost
        assert scope.lost
        assert not is_there(own, pid)
        assert next_test_is_well(own)
