"""What becomes of clients as tests begin and end, and how they wait for one another."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from helpers import refused
from helpers.waiting import PATIENCE
from psycopg_pool import ConnectionPool

from gateway import raw
from gateway.clients import PLACES, World
from gateway.raw import SYNC, RawClient
from pytest_pgmonkey.testing.addresses.purpose import Purpose
from pytest_pgmonkey.testing.gateway.entrance.entrance import Entrance
from pytest_pgmonkey.testing.gateway.gateway import Gateway
from pytest_pgmonkey.testing.sandbox.core.outer import OuterTransaction
from pytest_pgmonkey.testing.sandbox.psycopg_door.connections import SandboxConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.clients import Stage

TAKEN = "SELECT n FROM t ORDER BY n"


@pytest.fixture
def lasting(stage: Stage) -> Iterator[psycopg.Connection[Any]]:
    """A connection in autocommit that lives on from test to test."""
    with psycopg.connect(stage.session_dsn, autocommit=True, application_name="lasting") as conn:
        yield conn


def numbers(conn: psycopg.Connection[Any]) -> list[int]:
    return [n for (n,) in conn.execute(TAKEN)]


def sqlstate_of(function: Callable[..., Any], *args: Any) -> tuple[str | None, str]:
    with pytest.raises(psycopg.Error) as caught:
        function(*args)
    return caught.value.sqlstate, str(caught.value)


# The end of a test


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("work", ["", "SELECT 1", "BEGIN", "BEGIN; INSERT INTO t VALUES (1)"])
def test_connections_of_the_test_end_with_it(stage, place, work):
    """They are told why: 57P01, as by a server that shuts down."""
    with stage.test(place):
        client = RawClient(stage.conninfo())
        client.start()
        client.ask(raw.query(work))
    answers = client.until("E")
    assert answers[-1][1]["C"] == "57P01"
    assert answers[-1][1]["S"] == "FATAL"
    assert "the test has ended" in answers[-1][1]["M"]
    assert client.until("")[-1] == "end"
    client.close()


def test_a_connection_of_the_test_outside_of_one(stage):
    """It is refused by one sentence."""
    state, text = sqlstate_of(psycopg.connect, stage.dsn)
    assert "pgmonkey.dsn leads to a running test, and none runs" in text
    client = RawClient(stage.conninfo())
    assert client.start()[0][1]["C"] == "57P03"
    client.close()
    assert state is None  # libpq gives none for a connection that it has not got


@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", PLACES)
def test_a_lasting_connection_goes_from_test_to_test(stage, lasting, first, second):
    """Each begins without what the one before has written, and with its own settings kept."""
    lasting.execute("SET a.b = 'kept'")
    query = "SELECT x FROM t WHERE n = %s"
    for place in (first, second, first):
        with stage.test(place):
            assert numbers(lasting) == []
            lasting.execute("INSERT INTO t VALUES (1, %s)", [place], prepare=True)
            assert lasting.execute(query, [1], prepare=True).fetchone() == (place,)
            assert lasting.execute("SHOW a.b").fetchone() == ("kept",)
            assert lasting.execute("SHOW application_name").fetchone() == ("lasting",)


def test_a_test_rolls_settings_back_that_were_not_committed(stage, lasting):
    """Those that were committed stay, as in production."""
    with stage.test():
        lasting.execute("SET timezone = 'Asia/Tokyo'")
        lasting.execute("BEGIN; SET timezone = 'Europe/Paris'")
    assert lasting.info.transaction_status.name == "INTRANS"
    lasting.execute("ROLLBACK")
    with stage.test():
        assert lasting.execute("SHOW timezone").fetchone() == ("Asia/Tokyo",)
    lasting.execute("RESET timezone")


def test_a_pool_that_lives_on(stage):
    """Its connections serve one test after the other; in between they are only checked."""
    with ConnectionPool(stage.session_dsn, min_size=2, max_size=4) as pool:
        pool.wait(PATIENCE)
        pool.check()
        for n in range(6):
            with stage.test(PLACES[n % 2]):
                with pool.connection() as conn:
                    assert numbers(conn) == []
                    conn.execute("INSERT INTO t VALUES (%s)", [n])
                with pool.connection() as conn, pool.connection() as other:
                    assert numbers(conn) == numbers(other) == [n]
            pool.check()
        assert pool.get_stats()["connections_num"] <= 4


def test_an_asyncpg_pool_that_lives_on(stage):
    """What it knows of types and statements is right in each test, whatever the one before did."""

    async def program() -> None:
        keywords = World(stage, stage.conninfo(ends_with_test=False)).asyncpg_keywords
        async with asyncpg.create_pool(**keywords, min_size=1, max_size=2) as pool:
            for n in range(6):
                with stage.test(PLACES[n % 2]):
                    await pool.execute("INSERT INTO typed VALUES ($1, NULL, $2)", n, "glad")
                    assert await pool.fetch("SELECT id, m FROM typed") == [(n, "glad")]
                    async with pool.acquire() as conn, conn.transaction():
                        await conn.execute("INSERT INTO t VALUES ($1)", n)
                        assert [tuple(r) async for r in conn.cursor(TAKEN)] == [(n,)]
                assert await pool.fetch(TAKEN) == []

    asyncio.run(program())


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_an_engine_that_lives_on(stage, driver):
    """It is made outside of any test, and pings its connections before each use."""
    engine = sqlalchemy.create_engine(
        f"postgresql+{driver}://",
        connect_args=dict(stage.conninfo(ends_with_test=False)),
        pool_pre_ping=True,
    )
    with engine.connect() as conn:
        assert conn.execute(sqlalchemy.text("SELECT 1")).scalar() == 1
    for n in range(6):
        with stage.test(PLACES[n % 2]):
            with engine.begin() as conn:
                conn.execute(sqlalchemy.text("INSERT INTO t VALUES (:n)"), {"n": n})
            with engine.connect() as conn:
                assert conn.execute(sqlalchemy.text(TAKEN)).all() == [(n,)]
    engine.dispose()


# A transaction that its test has not ended


@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", [*PLACES, ""])
@pytest.mark.parametrize("end", ["ROLLBACK", "COMMIT", "ABORT", "END"])
def test_a_transaction_outlived_by_its_client(stage, lasting, first, second, end):
    """It is a failed one until the client ends it itself, in the next test or outside of any."""
    with stage.test(first):
        lasting.execute("BEGIN")
        lasting.execute("INSERT INTO t VALUES (1)")

    def go_on() -> None:
        assert sqlstate_of(lasting.execute, "SELECT 1")[0] == "25P02"
        assert lasting.info.transaction_status.name == "INERROR"
        assert sqlstate_of(lasting.execute, "SELECT %s", [1])[0] == "25P02"
        assert sqlstate_of(lasting.execute, "SAVEPOINT s")[0] == "25P02"
        assert lasting.execute(end).statusmessage == "ROLLBACK"
        assert lasting.info.transaction_status.name == "IDLE"
        assert numbers(lasting) == []

    if second:
        with stage.test(second):
            go_on()
            lasting.execute("INSERT INTO t VALUES (2)")
            assert numbers(lasting) == [2]
    else:
        go_on()


def test_a_transaction_outlived_message_by_message(stage):
    """By simple and extended queries, in scripts, and with a portal and a COPY open."""
    client = RawClient(stage.conninfo(ends_with_test=False))
    client.start()

    def codes(*data: bytes) -> list[str]:
        return [m[1]["C"] if m[0] == "E" else m[0] for m in client.ask(*data)]

    begun = (
        raw.query("BEGIN"),
        raw.query("BEGIN; SELECT 1/0"),
        raw.query("BEGIN; DECLARE c CURSOR FOR SELECT 1"),
        raw.run("BEGIN") + raw.parse("SELECT 1") + raw.bind(portal="p") + SYNC,
    )
    for start in begun:
        with stage.test():
            client.ask(start)
        with stage.test():
            assert codes(raw.query("SELECT 1; ROLLBACK")) == ["25P02", "Z"]
            assert codes(raw.run("SELECT 1"), raw.run("SELECT 2"), SYNC) == ["25P02", "Z"]
            assert codes(raw.execute("p"), SYNC)[-1] == "Z"
            assert codes(raw.query("")) == ["I", "Z"]
            assert codes(SYNC) == ["Z"]
            assert client.ask(SYNC) == [("Z", b"E")]
            assert codes(raw.run("ROLLBACK"), raw.run("SELECT 1"), SYNC)[-1] == "Z"
            assert client.ask(raw.query("SELECT 1"))[-1] == ("Z", b"I")
    with stage.test():
        client.ask(raw.query("BEGIN"))
    with stage.test():
        answer = client.ask(raw.query("ROLLBACK; INSERT INTO t VALUES (7); SELECT  nothing"))
        assert answer[0] == ("C", ("ROLLBACK",))
        assert answer[-2][1]["P"] == "45"
        assert answer[-1] == ("Z", b"I")
    with stage.test():
        client.send(raw.query("BEGIN; COPY t FROM STDIN"))
        client.until("G")
        client.send(raw.copy_data("1\tx\n"))
        problems = stage.end()
        assert all("still ran when the test ended" in problem for problem in problems)
        stage.begin()
        client.send(raw.COPY_DONE)
    client.close()


# Outside of tests


def test_outside_of_tests_reads_are_answered_and_writes_refused(stage, lasting):
    """Engines and pools ask for versions and types when they connect; nobody writes for good."""
    assert lasting.execute("SELECT 1").fetchone() == (1,)
    assert psycopg.types.TypeInfo.fetch(lasting, "mood") is not None
    for query in ("INSERT INTO t VALUES (1)", "CREATE TABLE own ()", "SELECT put(1)"):
        state, text = sqlstate_of(lasting.execute, query)
        assert state == "57P03"
        assert "outside of a test" in text
        assert "unblock()" in text
    with pytest.raises(psycopg.errors.CannotConnectNow), lasting.transaction():
        lasting.execute("INSERT INTO t VALUES (%s)", [1])
    lasting.execute("SET a.b = 'set outside'")
    with stage.test():
        assert lasting.execute("SHOW a.b").fetchone() == ("set outside",)
        lasting.execute("INSERT INTO t VALUES (1)")
    assert numbers(lasting) == []


@pytest.mark.parametrize(
    "trick",
    [
        "SET default_transaction_read_only = off",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        "BEGIN READ WRITE",
        "BEGIN; SET TRANSACTION READ WRITE",
        "SELECT set_config('default_transaction_read_only', 'off', false)",
        "SELECT set_config('transaction_read_only', 'off', false)",
        "RESET ALL",
        "DISCARD ALL",
        "SET transaction_read_only = off; INSERT INTO t VALUES (66)",
    ],
)
def test_outside_of_tests_nothing_is_written_for_good(stage, trick):
    """Whatever a client says: a program that asks for a read-write transaction is not rare."""
    before = stage.persisted()
    client = RawClient(stage.conninfo(ends_with_test=False))
    client.start()
    client.ask(raw.query(trick))
    client.ask(raw.query("INSERT INTO t VALUES (66)"))
    client.ask(raw.query("COMMIT"))
    client.ask(raw.query("INSERT INTO t VALUES (67)"))
    client.close()
    try:
        assert before == stage.persisted()
    finally:
        stage.admins["test"].execute("DELETE FROM t WHERE n IN (66, 67)")


# Turns


def handle_of(stage: Stage) -> Any:
    """Give a connection as handles give them."""
    return stage.rollback._sandbox.lend(SandboxConnection)


def test_a_client_waits_for_a_handle(stage):
    """It goes on as soon as that has committed."""
    with stage.test():
        handle = handle_of(stage)
        handle.execute("INSERT INTO t VALUES (1)")
        found: list[Any] = []

        def work() -> None:
            with psycopg.connect(stage.dsn) as conn:
                found.append(numbers(conn))

        thread = threading.Thread(target=work)
        thread.start()
        stage.until_waiting()
        handle.commit()
        thread.join(PATIENCE)
        assert found == [[1]]
        handle.close()


def test_a_wait_for_a_handle_that_is_too_long(stage):
    """55P03 names both: the client by application and process, the handle by its place."""
    with stage.test():
        handle = handle_of(stage)
        handle.execute("INSERT INTO t VALUES (1)")
        with (
            stage.waiting(0.1),
            psycopg.connect(stage.dsn, application_name="the app", autocommit=True) as conn,
        ):
            state, text = sqlstate_of(conn.execute, "INSERT INTO t VALUES (2)")
        assert state == "55P03"
        assert "'the app'" in text
        assert f"process {os.getpid()}" in text
        assert "test_life.py:" in text
        handle.commit()
        assert len(stage.rollback.leads_to.take_refusals()) == 1


def test_a_begin_waits_for_nobody(stage):
    """The first statement may be refused; drivers take BEGIN for done, as it never fails."""

    async def program(given: dict[str, str]) -> list[int]:
        keywords = {"host": given["host"], "port": int(given["port"]), "user": given["user"]}
        first, second = [
            await asyncpg.connect(**keywords, database=given["dbname"]) for _ in range(2)
        ]
        async with first.transaction():
            await first.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(asyncpg.LockNotAvailableError):
                async with second.transaction():
                    await second.execute("INSERT INTO t VALUES (2)")
            async with second.transaction(isolation="serializable"):
                pass  # it has done nothing
        async with second.transaction():
            await second.execute("INSERT INTO t VALUES (3)")
        found = [row["n"] for row in await first.fetch(TAKEN)]
        await first.close()
        await second.close()
        return found

    with stage.test(), stage.waiting(0.1):
        assert asyncio.run(program(stage.conninfo())) == [1, 3]
        assert len(stage.rollback.leads_to.take_refusals()) == 1


def test_a_wait_for_a_client_that_is_too_long(stage):
    """A client that waits for another gets 55P03; a transaction of its own has failed then."""
    with stage.test(), stage.waiting(0.1):
        first = psycopg.connect(stage.dsn, application_name="first")
        second = psycopg.connect(stage.dsn, application_name="second")
        first.execute("INSERT INTO t VALUES (1)")
        state, text = sqlstate_of(second.execute, "INSERT INTO t VALUES (2)")
        assert state == "55P03"
        assert "'first'" in text
        assert "'second'" in text
        second.rollback()
        first.commit()
        second.execute("INSERT INTO t VALUES (3)")
        second.commit()
        assert numbers(first) == [1, 3]
        first.close()
        second.close()
        assert len(stage.rollback.leads_to.take_refusals()) == 1


def test_readers_do_not_wait(stage):
    """A transaction that has only read gives its turn on, and goes on afterwards."""
    with stage.test():
        conns = [psycopg.connect(stage.dsn) for _ in range(3)]
        for _ in range(3):
            for conn in conns:
                assert numbers(conn) == []
        conns[0].execute("INSERT INTO t VALUES (1)")
        conns[0].commit()
        assert numbers(conns[1]) == [1]
        for conn in conns:
            conn.close()


def test_a_cancelled_wait(stage):
    """A client that goes while it waits for its turn keeps nobody."""
    with stage.test():
        first = psycopg.connect(stage.dsn)
        first.execute("INSERT INTO t VALUES (1)")
        waiting = RawClient(stage.conninfo())
        waiting.start()
        waiting.send(raw.query("INSERT INTO t VALUES (2)"))
        stage.until_waiting()
        waiting.close()
        first.commit()
        first.close()
        with psycopg.connect(stage.dsn) as conn:
            assert 1 in numbers(conn)


def test_the_isolation_level_of_a_first_transaction(stage):
    """It can be had as long as nothing has been done, and is refused with advice afterwards."""
    for level in ("SERIALIZABLE", "REPEATABLE READ"):
        with stage.test(), psycopg.connect(stage.dsn, autocommit=True) as conn:
            conn.execute(f"BEGIN ISOLATION LEVEL {level}")  # type: ignore[arg-type]
            shown = conn.execute("SHOW transaction_isolation").fetchone()
            assert shown == (level.lower(),)
            conn.execute("COMMIT")
    with stage.test(), psycopg.connect(stage.dsn, autocommit=True) as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        state, text = sqlstate_of(conn.execute, "BEGIN ISOLATION LEVEL SERIALIZABLE")
        assert state in ("25001", "0A000")
        assert 'isolation="clone"' in text
        assert numbers(conn) == [1]


@pytest.mark.parametrize("protocol", ["simple", "extended"])
def test_what_counts_as_refused(stage, protocol):
    """What a clone would serve, in whichever process the client is; a look at the test is none."""
    refusals = stage.rollback.refusals
    with stage.test():
        client = RawClient(stage.conninfo())
        client.start()
        for queries, counts in ((refused.COUNTS, True), (refused.COUNTS_NOT, False)):
            for query in queries:
                refusals.begin(moves=False)
                if protocol == "simple":
                    client.ask(raw.query(query))
                else:
                    for part in query.split("; "):
                        client.ask(raw.run(part) + SYNC)
                client.ask(raw.query("ROLLBACK"))
                assert bool(refusals.first) == counts, query
        client.close()
        looker = RawClient(stage.gateway.conninfo(Purpose.PEEK))
        looker.start()
        refusals.begin(moves=False)
        looker.ask(raw.query("PREPARE TRANSACTION 'x'"))
        assert not refusals.first
        looker.close()
        stage.rollback.leads_to.take_refusals()


def test_two_phase_commits_are_refused(stage):
    """With the advice, in simple and extended queries."""
    with stage.test():
        client = RawClient(stage.conninfo())
        client.start()
        for message in (
            raw.query("PREPARE TRANSACTION 'x'"),
            raw.run("COMMIT PREPARED 'x'") + SYNC,
        ):
            answer = [m for m in client.ask(message) if m[0] == "E"]
            assert answer[0][1]["C"] == "0A000"
            assert 'isolation="clone"' in answer[0][1]["M"]
        client.close()


def test_a_scope_s_data_is_seen_by_clients(stage):
    """What pgmonkey_module has written is there, test after test, and nothing of it is lost."""
    scope = stage.rollback.open_scope()
    shared = scope.connection
    try:
        shared.execute("INSERT INTO t VALUES (1, 'shared')")
        with psycopg.connect(stage.session_dsn, autocommit=True) as lasting:
            for _ in range(2):
                with stage.test():
                    assert numbers(lasting) == [1]
                    lasting.execute("INSERT INTO t VALUES (2)")
                    lasting.execute("DELETE FROM t WHERE n = 1")
                    with psycopg.connect(stage.dsn) as conn:
                        assert numbers(conn) == [2]
    finally:
        stage.rollback.close_scope(scope)


def test_a_statement_that_still_runs_at_the_end(stage):
    """It is cancelled, and the report names its client."""
    with stage.test():
        client = RawClient(stage.conninfo())
        client.start(application_name="sleeper")
        client.send(raw.query("SELECT pg_sleep(60)"))
        World(stage, stage.conninfo()).wait_until_sleeping()
        (problem,) = stage.end()
        assert "'sleeper'" in problem
        stage.begin()
    client.close()


def test_a_statement_of_another_process_that_still_runs_at_the_end(stage):
    """It is cancelled without a word: a test cannot wait for another process."""
    with stage.test():
        psql = subprocess.Popen(
            ["psql", "-X", "-d", stage.session_dsn, "-c", "SELECT pg_sleep(60)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        World(stage, stage.conninfo()).wait_until_sleeping()
    _, told = psql.communicate(timeout=PATIENCE)
    assert b"ERROR" in told or b"FATAL" in told


def test_an_open_portal_keeps_the_turn(stage):
    """Trap 4: portals of several clients would share one namespace; a commit ends them."""
    with stage.test():
        client = RawClient(stage.conninfo())
        client.start()
        client.ask(raw.query("BEGIN"))
        portal = raw.parse("SELECT generate_series(1, 3)") + raw.bind(portal="p")
        client.ask(portal, raw.execute("p", 1), SYNC)
        other = RawClient(stage.conninfo())
        other.start()
        with stage.waiting(0.1):
            assert other.ask(portal, SYNC)[0][1]["C"] == "55P03"
        assert client.ask(raw.execute("p", 1), SYNC)[0] == ("D", [b"2"])
        client.ask(raw.query("COMMIT"))
        assert other.ask(portal, raw.execute("p", 1), SYNC)[2] == ("D", [b"1"])
        assert client.ask(raw.execute("p", 1), SYNC)[0][1]["C"] == "34000"
        for each in (client, other):
            each.close()
        assert len(stage.rollback.leads_to.take_refusals()) == 1


# In runs of pytest

CHILD = """
import sys
sys.path[:0] = {path!r}
from psycopg.conninfo import conninfo_to_dict
from gateway import raw
clients = []
for work in ("", "BEGIN", "INSERT INTO item (name) VALUES ('child')"):
    client = raw.RawClient(conninfo_to_dict(sys.argv[1]))
    client.start()
    client.ask(raw.query(work))
    clients.append(client)
print("ready", flush=True)
sys.stdin.read()
"""


def test_whole_runs(project, run):
    """A project with a pool of its own, joined by both DSNs, in both isolations.

    It ends although a child process still holds connections.
    """
    (project.path / "child.py").write_text(CHILD.format(path=[*sys.path]))
    project.makeconftest(
        """
        import psycopg, pytest
        from psycopg_pool import ConnectionPool

        children = []

        @pytest.fixture(scope="session")
        def started():
            return children

        @pytest.hookimpl(trylast=True)
        def pytest_unconfigure():
            for child in children:
                assert child.poll() is None
                child.kill()
                child.communicate()

        @pytest.fixture(scope="session")
        def pool(pgmonkey_dsn):
            with ConnectionPool(pgmonkey_dsn, min_size=1, max_size=3) as pool:
                with pool.connection() as conn:
                    assert conn.execute("SELECT count(*) FROM item").fetchone() == (1,)
                with pytest.raises(psycopg.errors.CannotConnectNow), pool.connection() as conn:
                    conn.execute("INSERT INTO item (name) VALUES ('outside')")
                yield pool

        @pytest.fixture(scope="session", autouse=True)
        def seed(pgmonkey_database, pgmonkey_dsn):
            with pgmonkey_database.unblock():
                with psycopg.connect(pgmonkey_dsn) as conn:
                    conn.execute("INSERT INTO item (name) VALUES ('seed')")
        """
    )
    project.makepyfile(
        """
        import subprocess, sys
        import psycopg, pytest
        from app import add, names

        def insert(pool, name):
            with pool.connection() as conn:
                conn.execute("INSERT INTO item (name) VALUES (%s)", [name])

        def seen(dsn):
            with psycopg.connect(dsn) as conn:
                return sorted(x for x, in conn.execute("SELECT name FROM item"))

        @pytest.mark.parametrize("n", range(3))
        def test_rolled_back(pool, pgmonkey, pgmonkey_dsn, n):
            insert(pool, "pool")
            add("handle")
            command = "INSERT INTO item (name) VALUES ('child')"
            subprocess.run(["psql", "-X", "-q", "-c", command, "-d", pgmonkey.dsn], check=True)
            expected = ["child", "handle", "pool", "seed"]
            assert seen(pgmonkey.dsn) == seen(pgmonkey_dsn) == names() == expected

        @pytest.mark.parametrize("n", range(3))
        @pytest.mark.pgmonkey(isolation="clone")
        def test_cloned(pool, pgmonkey, pgmonkey_dsn, n):
            insert(pool, "pool")
            add("handle")
            assert seen(pgmonkey.dsn) == seen(pgmonkey_dsn) == names() == ["handle", "pool", "seed"]
            with pool.connection() as conn:
                name = conn.execute("SELECT current_database()").fetchone()[0]
            assert name == pgmonkey.config["connection_settings"]["dbname"]

        def test_joined_by_the_session_s_dsn_alone(pool):
            insert(pool, "alone")
            with pool.connection() as conn:
                conn.execute("SELECT 1")
                conn.rollback()

        left = {}

        def test_leaves_a_transaction_open(pgmonkey_dsn):
            left["conn"] = psycopg.connect(pgmonkey_dsn)
            left["conn"].execute("INSERT INTO item (name) VALUES ('left')")

        def test_finds_it_failed(pgmonkey_dsn):
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                left["conn"].execute("SELECT 1")
            left["conn"].rollback()
            assert left["conn"].execute("SELECT name FROM item").fetchall() == [("seed",)]
            left["conn"].close()

        def test_keeps_a_connection_of_its_own(pgmonkey):
            left["own"] = psycopg.connect(pgmonkey.dsn)
            left["own"].execute("SELECT 1")

        def test_finds_it_ended(pgmonkey):
            with pytest.raises(psycopg.errors.AdminShutdown, match="the test has ended"):
                left["own"].execute("SELECT 1")
            left["own"].close()

        def test_starts_a_child_that_hangs(pgmonkey_dsn, started):
            child = subprocess.Popen(
                [sys.executable, "child.py", pgmonkey_dsn],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            started.append(child)
            assert child.stdout.readline() == b"ready\\n"

        @pytest.mark.pgmonkey
        def test_nothing_is_left(pgmonkey):
            assert names() == ["seed"]
        """
    )
    result = run("-v")
    result.assert_outcomes(passed=13, errors=0)
    result.stdout.no_fnmatch_line("*Error*")


def test_a_run_that_asks_for_no_dsn_listens_nowhere(project, run):
    """Neither a thread nor a process nor a module of the gateway is there."""
    project.makepyfile(
        """
        import sys, threading
        import pytest
        from app import add, names

        def is_quiet():
            loaded = [name for name in sys.modules if ".testing.gateway." in name]
            names = ("pgmonkey-gateway", "pgmonkey-client")
            threads = [t.name for t in threading.enumerate() if t.name in names]
            print(loaded, threads)
            return not loaded and not threads

        def test_rolled_back(pgmonkey, pgmonkey_database):
            add("x")
            repr(pgmonkey), repr(pgmonkey_database), pgmonkey_database.dsn
            assert is_quiet()

        @pytest.mark.pgmonkey(isolation="clone")
        def test_cloned(pgmonkey):
            add("x")
            assert names() == ["x"]
            assert is_quiet()

        def test_somebody_asks(pgmonkey):
            assert pgmonkey.dsn
            assert not is_quiet()
        """
    )
    run("-v").assert_outcomes(passed=3)


class Leading:
    """What clients are led to, for as long as this is asked."""

    def __init__(self, leads_to):
        self.leads_to = leads_to


@pytest.mark.parametrize("place", ["transaction", "database"])
def test_a_server_that_is_reached_by_tls(tls_server, place):
    """Nothing can be passed on past the encryption: clients are refused in one sentence."""
    conninfo = tls_server.conninfo()
    outer = OuterTransaction(conninfo)
    leading = Leading(outer if place == "transaction" else conninfo)
    entrance = Entrance(conninfo["user"], conninfo["dbname"], lambda: gateway)
    gateway = Gateway(lambda: leading, lambda: conninfo, lambda: conninfo, entrance)
    try:
        conn = psycopg.connect(**gateway.conninfo(Purpose.TEST))
        with pytest.raises(psycopg.OperationalError, match="reached by TLS"):
            conn.execute("SELECT 1")
        conn.close()
    finally:
        gateway.close()
        outer.reset()
        outer.close()
