"""Blocks that are undone by themselves: handles and clients of one test go on as before."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import ALL, SYNC, block, call, execute
from helpers.waiting import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.process import INSERT, TAKEN, Process, numbers
from pytest_pgmonkey.errors import SandboxError
from pytest_pgmonkey.testing.isolation import KitError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_pgmonkey.testing.fixture_value import PGMonkey

LEFT_OPEN = (
    "pgmonkey.checkpoint() was still open when the test ended: use it as `with "
    "pgmonkey.checkpoint():`"
)


@pytest.fixture
def test(process: Process) -> Iterator[PGMonkey]:
    with process.test() as test:
        yield test


@pytest.fixture(params=["handle", "client"])
def conn(request: pytest.FixtureRequest, process: Process, test: PGMonkey) -> Iterator[Any]:
    """A connection by either door."""
    if request.param == "client":
        with psycopg.connect(test.dsn) as conn:
            yield conn
            if not conn.closed:
                conn.rollback()
    else:
        with test.normal as conn:
            yield conn
            if not conn.closed:
                conn.rollback()


def test_whoever_writes_inside(test):
    test.execute(INSERT.format(0))
    for _ in range(2):
        with test.checkpoint():
            with test.pool as conn, psycopg.connect(test.dsn) as client:
                conn.execute(INSERT.format(1))
                conn.commit()
                client.execute(INSERT.format(2))
            test.execute("CREATE TABLE made (n int)")
            assert numbers(test) == [0, 1, 2]
        assert numbers(test) == [0]


def test_nested(test):
    with test.checkpoint():
        test.execute(INSERT.format(1))
        for _ in range(2):
            with test.checkpoint():
                test.execute(INSERT.format(2))
            assert numbers(test) == [1]
        with pytest.raises(psycopg.errors.DivisionByZero), test.checkpoint():
            test.execute("INSERT INTO t SELECT 1 / (n - 1) FROM t")
        assert numbers(test) == [1]
    assert numbers(test) == []


@pytest.mark.parametrize("type_", ALL)
def test_every_type(test, process, type_):
    """The block is a sync one in async tests, too."""

    async def taken(conn: Any) -> Any:
        return await call((await execute(conn, TAKEN)).fetchall())

    async def whole() -> None:
        async with block(process.kit.handles.make(type_)) as conn:
            await execute(conn, INSERT.format(1))
            with test.checkpoint():
                await execute(conn, INSERT.format(2))
                assert await taken(conn) == [(1,), (2,)]
            assert await taken(conn) == [(1,)]

    asyncio.run(whole())
    assert numbers(test) == [1]


@pytest.mark.parametrize("how", ["commit", "rollback", "fail", "nothing"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_transaction_that_was_open_before_goes_on(test, conn, how, is_first):
    rows = [] if is_first else [0]
    for n in rows:
        test.execute(INSERT.format(n))
    conn.execute(INSERT.format(1))
    conn.execute("SET LOCAL work_mem = '7MB'")
    with test.checkpoint():
        conn.execute(INSERT.format(2))
        conn.execute("SET lock_timeout = '99s'")
        if how == "fail":
            with pytest.raises(psycopg.errors.DivisionByZero):
                conn.execute("SELECT 1/0")
        elif how != "nothing":
            getattr(conn, how)()
            conn.execute(INSERT.format(3))
    assert numbers(conn) == [*rows, 1]
    assert conn.execute("SHOW lock_timeout").fetchone() == ("0",)
    assert conn.execute("SHOW work_mem").fetchone() == ("7MB",)
    conn.execute(INSERT.format(4))
    conn.rollback()
    assert numbers(test) == rows


def test_others_still_wait_for_it(process, test, conn):
    """It has written what it has not committed, and keeps the turn."""
    conn.execute(INSERT.format(1))
    with test.checkpoint():
        test.execute(INSERT.format(2))
    with (
        process.waiting(0.01),
        pytest.raises(SandboxError, match="changes that are not committed"),
    ):
        test.execute(INSERT.format(3))
    process.kit._rollback.refusals.take_waits()
    conn.rollback()
    assert numbers(test) == []


def test_others_do_not_wait_for_one_that_has_read(test, conn):
    numbers(conn)
    with test.checkpoint():
        numbers(conn)
    test.execute(INSERT.format(1))
    assert numbers(conn) == [1]


@pytest.mark.parametrize("before", ["SELECT 1", "DELETE FROM t"])
def test_others_do_not_wait_for_one_that_reads_afterwards(test, before):
    """What was written inside is not taken for its own."""
    for _ in range(2):
        test.execute(before)
    with test.checkpoint():
        test.execute(INSERT.format(2))
    with test.normal as reader, test.pool as writer:
        found = numbers(reader)
        writer.execute(INSERT.format(3))
        writer.commit()
        assert numbers(reader) == [*found, 3]


def test_a_connection_that_is_closed_inside(test, conn):
    """What it had not committed is nobody's."""
    conn.execute(INSERT.format(1))
    with test.checkpoint():
        conn.close()
    if "Sandbox" not in type(conn).__name__:
        return  # whether a client has gone by then is not known
    test.execute(INSERT.format(2))
    assert numbers(test) == [2]


def test_a_transaction_that_is_begun_inside_goes_on_with_nothing(test, conn):
    with test.checkpoint():
        conn.execute(INSERT.format(1))
    test.execute(INSERT.format(2))  # nobody waits for it
    conn.execute(INSERT.format(3))
    conn.commit()
    assert numbers(test) == [2, 3]


def test_one_that_has_failed_inside_is_well_afterwards(test, conn):
    with test.checkpoint(), pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("SELECT 1/0")
    conn.rollback()
    assert numbers(conn) == []


def test_settings(test, conn):
    conn.execute("SET work_mem = '7MB'")
    conn.commit()
    with test.checkpoint():
        conn.execute("SET work_mem = '8MB'")
        conn.commit()
        test.execute("SELECT 1")  # by another, so that it is handed over
        assert conn.execute("SHOW work_mem").fetchone() == ("8MB",)
        conn.commit()
    assert conn.execute("SHOW work_mem").fetchone() == ("7MB",)


def test_definitions_change_inside(test, conn):
    """What the driver has prepared for a table is of one that there was."""
    with test.checkpoint():
        conn.execute("ALTER TABLE t ADD made int")
        for _ in range(7):
            assert conn.execute("SELECT * FROM t").fetchall() == []
        conn.commit()
    for _ in range(7):
        assert conn.execute("SELECT * FROM t").fetchall() == []


def test_deferred_constraints(test, conn):
    test.execute("CREATE TABLE p (n int PRIMARY KEY)")
    test.execute("CREATE TABLE c (n int REFERENCES p DEFERRABLE INITIALLY DEFERRED)")
    conn.execute("INSERT INTO c VALUES (1)")
    with test.checkpoint():
        conn.execute("INSERT INTO p VALUES (1)")
        conn.commit()
    conn.execute("SELECT 1")  # or a client's driver takes its transaction for over
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        conn.commit()


def test_savepoints_from_before(test, conn):
    conn.execute("SAVEPOINT mine")
    conn.execute(INSERT.format(1))
    with test.checkpoint():
        for command in ("ROLLBACK TO mine", "RELEASE mine"):
            with pytest.raises((SandboxError, psycopg.Error), match="older than the checkpoint"):
                conn.execute(command)
    conn.execute("ROLLBACK TO mine")
    assert numbers(conn) == []


def test_a_client_that_waits_inside_to_begin_anew(process, test):
    """The BEGIN that was put off is void afterwards: its transaction from before is open."""
    with psycopg.connect(test.dsn) as client, test.normal as other, process.waiting(0.01):
        client.execute(INSERT.format(1))
        with test.checkpoint():
            client.commit()
            other.execute(INSERT.format(2))
            with pytest.raises(psycopg.Error):
                client.execute("SELECT 1")
        process.kit._rollback.refusals.take_waits()
        client.pgconn.exec_(b"")  # it hears that its transaction is open
        client.rollback()
        assert numbers(test) == []
        other.rollback()


@pytest.mark.parametrize("command", ["commit", "rollback"])
def test_the_end_of_a_transaction_with_savepoints_from_before(test, conn, command):
    conn.execute("SAVEPOINT mine")
    with test.checkpoint():
        getattr(conn, command)()
        test.execute(INSERT.format(1))
        assert numbers(test) == [1]
    conn.execute("ROLLBACK TO mine")
    conn.rollback()
    assert numbers(test) == []


def test_a_cursor_and_prepared_statements_from_before(test, conn):
    conn.execute("PREPARE mine AS SELECT 7")
    conn.execute("DECLARE mine CURSOR FOR SELECT generate_series(1, 3)")
    assert conn.execute("FETCH mine").fetchone() == (1,)
    with test.checkpoint():
        assert conn.execute("FETCH mine").fetchone() == (2,)
        conn.execute(INSERT.format(1))
    assert conn.execute("EXECUTE mine").fetchone() == (7,)
    assert conn.execute("FETCH mine").fetchone() == (3,)


def test_where_it_cannot_begin(test, conn):
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("SELECT 1/0")
    with pytest.raises(SandboxError, match="cannot begin here: its transaction has failed"):
        test.checkpoint().__enter__()
    conn.rollback()
    with (
        test.normal as piped,
        piped.pipeline(),
        pytest.raises(SandboxError, match=r"cannot begin here: .* COPY, a stream or a pipeline"),
    ):
        test.checkpoint().__enter__()
    with test.checkpoint():
        test.execute(INSERT.format(1))
    assert numbers(test) == []


def test_while_a_task_works(process):
    """It could not come to its end meanwhile, so it is not waited for."""

    async def whole() -> None:
        backend = process.kit._rollback.leads_to.backend
        async with process.kit.handles.make("async") as conn:
            task = asyncio.create_task(conn.execute("SELECT 1"))
            while not any(m.busy for m in backend.members):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
            with pytest.raises(SandboxError, match=r"cannot begin here: a statement .* tasks"):
                test.checkpoint().__enter__()
            await task

    with process.test() as test:
        asyncio.run(whole())


def test_where_it_cannot_end(process):
    with (
        process.test() as test,
        test.normal as conn,
        closing(conn.cursor().stream("SELECT 1")) as rows,
        pytest.raises(SandboxError, match=r"cannot undo what was written: .* in the middle"),
        test.checkpoint(),
    ):
        next(rows)
    assert process.numbers() == []


def test_left_open(process):
    with process.test(problems=[LEFT_OPEN]) as test:
        test.checkpoint().__enter__()
        test.execute(INSERT.format(1))
        test.checkpoint().__enter__()
        test.execute(INSERT.format(2))
    assert process.numbers() == []
    with process.test() as test:
        around, inside = test.checkpoint(), test.checkpoint()
        around.__enter__()
        inside.__enter__()
        test.execute(INSERT.format(1))
        around.__exit__(None, None, None)
        assert numbers(test) == []
        inside.__exit__(None, None, None)


def test_where_the_session_is_lost_inside(process):
    problem = "the server closed the test's connection while the test ran"
    with (
        process.test(problems=[problem]) as test,
        pytest.raises(psycopg.OperationalError),
        test.checkpoint(),
    ):
        test.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert process.numbers() == []


def test_in_a_clone(process):
    refused = pytest.raises(KitError, match="undoes nothing in clone isolation")
    with process.test("clone") as test, refused:
        test.checkpoint()


def test_a_refusal_moves_no_test_that_has_one(process):
    """Cases are undone by what a clone does not have."""
    with process.test("auto") as test:
        assert process.kit.may_move
        with test.checkpoint(), test.normal as conn:
            conn.execute("LISTEN here")
        assert (process.kit.may_move, process.kit.may_clone) == (False, False)
    assert process.kit.refusal == ""


def test_shared_data_is_there_afterwards(process):
    """A client's transaction from before the test stands aside for the test, and for a block."""
    wider = process.psycopg(autocommit=True)
    wider.execute("BEGIN")
    wider.execute(INSERT.format(1))
    with process.test() as test:
        wider.execute(INSERT.format(2))
        with test.checkpoint():
            wider.execute(INSERT.format(3))
            assert numbers(wider) == [1, 2, 3]
        assert numbers(wider) == [1, 2]
    assert numbers(wider) == [1]
    with process.leaving():
        wider.close()


def test_shared_data_where_the_test_has_done_nothing_before(process):
    """Its own savepoint must be around that of the block."""
    with process.kit.share() as shared:
        shared.execute(INSERT.format(1))
        for _ in range(2):
            with process.test() as test:
                with test.checkpoint():
                    test.execute(INSERT.format(2))
                assert numbers(test) == [1]
                test.execute(INSERT.format(3))


def test_other_threads_go_on(process, test):
    """Whatever they are at just then, what they write inside is undone."""
    ends, wrong = threading.Event(), list[BaseException]()

    def work(by: str) -> None:
        taken = itertools.count(int(by == "client"), 2)
        try:
            while not ends.is_set():
                with psycopg.connect(test.dsn) if by == "client" else test.pool as conn:
                    for n in itertools.islice(taken, 3):
                        conn.execute(INSERT.format(n))
                        assert conn.execute("SELECT 1").fetchone() == (1,)
        except BaseException as error:
            wrong.append(error)

    with process.waiting(PATIENCE):
        threads = [threading.Thread(target=work, args=[by]) for by in ("client", "handle")]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100):
                with test.checkpoint():
                    test.execute("CREATE TABLE mine ()")
                assert test.execute("SELECT to_regclass('mine')").fetchone() == (None,)
        finally:
            ends.set()
            for thread in threads:
                thread.join()
    assert wrong == []


# Random programs: what is done inside makes no difference afterwards

PROGRAMS = int(os.environ.get("PGMONKEY_CHECKPOINTS", "100"))
READS = (TAKEN, "SHOW lock_timeout", "SHOW work_mem", "SELECT to_regclass('made')")
WRITES = (
    INSERT.format(1),
    "DELETE FROM t",
    "SELECT 1/0",
    "SET lock_timeout = '7s'",
    "SET LOCAL work_mem = '7MB'",
    "CREATE TABLE made ()",
    "SAVEPOINT a",
    "COMMIT",
    "ROLLBACK",
)
#: By which of the connections, and what.
steps = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([*READS, *WRITES])), max_size=8)


class Four:
    """A test's connections: of two handles and two clients."""

    def __init__(self, process: Process, test: PGMonkey, stack: ExitStack) -> None:
        handles = [process.kit.handles.make(type_) for type_ in SYNC]
        clients = [psycopg.connect(test.dsn), psycopg.connect(test.dsn, autocommit=True)]
        self.conns = [stack.enter_context(each) for each in (*handles, *clients)]

    def join(self) -> None:
        """Have the clients known to the test: their settings are then those from before."""
        self.do([(2, "SELECT 1"), (2, "ROLLBACK"), (3, "SELECT 1")])

    def do(self, program: list[tuple[int, str]]) -> list[Any]:
        return [self._ask(self.conns[which], query) for which, query in program]

    @staticmethod
    def _ask(conn: Any, query: str) -> Any:
        try:
            if query in ("COMMIT", "ROLLBACK"):
                return getattr(conn, query.lower())()
            cursor = conn.execute(query)
            return cursor.fetchall() if cursor.description else None
        except psycopg.Error as error:
            return error.sqlstate or type(error).__name__

    def learn(self) -> None:
        """Let the clients' drivers hear whether a transaction is open."""
        for conn in self.conns[2:]:
            conn.pgconn.exec_(b"")

    def end(self) -> list[Any]:
        """Give what is left when everybody has rolled back."""
        self.do([(n, "ROLLBACK") for n in range(4)])
        return self.do([(n, query) for n in range(4) for query in READS])


def run(process: Process, is_shared: bool, is_fresh: bool, *programs: Any) -> Any:
    with ExitStack() as around:
        if is_shared:
            around.enter_context(process.kit.share()).execute(INSERT.format(0))
        return run_test(process, is_fresh, *programs)


def run_test(process: Process, is_fresh: bool, before: Any, inside: Any, after: Any) -> Any:
    with process.test() as test, process.waiting(0.01):
        with ExitStack() as stack:
            four = Four(process, test, stack)
            if not is_fresh:
                four.join()
            noted = four.do(before)
            try:
                with test.checkpoint():
                    four.do(inside)
            except SandboxError:
                noted.append("a transaction that has failed")
            else:
                four.learn()
                noted += [*four.do(after), *four.end()]
            four.end()
        process.kit._rollback.refusals.take_waits()
    return noted


@settings(
    max_examples=PROGRAMS,
    deadline=None,
    database=None,
    derandomize="PGMONKEY_CHECKPOINTS" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.booleans(), st.booleans(), steps, steps, steps)
def test_programs(
    process: Process, is_shared: bool, is_fresh: bool, before: Any, inside: Any, after: Any
) -> None:
    """In shared data or not; where a test has done nothing before, its handles work inside."""
    if is_fresh:
        inside = [(which % 2, query) for which, query in inside]
    expected = run(process, is_shared, is_fresh, before, [], after)
    assert run(process, is_shared, is_fresh, before, inside, after) == expected
