"""Looks at a running test from outside: what they show, and that the test goes on as before."""

from __future__ import annotations

import asyncio
import gc
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import pytest
from helpers.four_types import ALL, ASYNC, SYNC, block, execute
from helpers.waiting import PATIENCE, until
from psycopg.conninfo import conninfo_to_dict

from gateway import raw
from gateway.process import INSERT, Process, Raw, Told, numbers
from gateway.raw import FLUSH, RawClient
from gateway.raw import SYNC as SYNC_MESSAGE
from gateway.test_wider import refuses
from pytest_pgmonkey.testing.sandbox.psycopg_door.connections import SandboxConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_pgmonkey.testing.fixture_value import PGMonkey

TAKEN = "SELECT n FROM t ORDER BY n"
SLEEP = "SELECT pg_sleep(600)"
SOON = 5.0  # seconds, of the 600 that somebody sleeps


class Looker(Raw):
    """A client that looks, by simple queries or by extended ones."""

    def __init__(self, dsn: str, **parameters: str) -> None:
        self.socket = RawClient(conninfo_to_dict(dsn))  # type: ignore[arg-type]
        self.socket.start(**parameters)
        self.status = b"I"

    def run_extended(self, query: str) -> list[str]:
        return self.codes(raw.run(query), SYNC_MESSAGE)


class Scene:
    """A running test and those who look at it."""

    def __init__(self, process: Process, test: PGMonkey, stack: ExitStack) -> None:
        self.process = process
        self.test = test
        self.stack = stack

    @property
    def backend(self) -> Any:
        return self.process.kit._rollback.leads_to.backend

    def looker(self, **parameters: str) -> Looker:
        looker = Looker(self.test.peek, **parameters)
        self.stack.callback(looker.close)
        return looker

    def sees(self) -> list[int]:
        return self.looker().numbers()

    def client(self) -> Raw:
        """Give a client of the test's."""
        client = Looker(self.test.dsn)
        self.stack.callback(client.close)
        return client

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        conn = psycopg.connect(self.test.dsn, **options)
        self.stack.callback(conn.close)
        return conn

    def handle(self, type_: str = "normal") -> Any:
        return self.process.kit.handles.make(type_)

    def until_sleeping(self) -> None:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        until(lambda: self.process.real(query)[0][0])

    def until_looked_at(self) -> None:
        until(lambda: self.backend.look is not None)

    def long_look(self, query: str = SLEEP) -> Looker:
        """Give a looker in the middle of a statement."""
        looker = self.looker()
        looker.socket.send(raw.query(query))
        self.until_sleeping()
        return looker

    @staticmethod
    def was_ended(looker: Looker) -> bool:
        """Whether a look was cancelled, and only that."""
        answers = looker.socket.until()
        errors = [body["C"] for kind, body in answers if kind == "E"]
        return errors == ["57014"] and answers[-1] == ("Z", b"I")


@pytest.fixture
def scene(process: Process) -> Iterator[Scene]:
    """A test in rollback isolation, of which nothing is told when it has ended."""
    with process.test() as test, ExitStack() as stack:
        yield Scene(process, test, stack)


# What is seen


@pytest.mark.parametrize("type_", ALL)
def test_what_handles_have_written(scene, type_):
    """Uncommitted, committed, in savepoints, and what was rolled back no more."""

    async def work() -> None:
        handle = scene.handle(type_)
        async with block(handle) as conn:
            assert scene.sees() == []
            await execute(conn, INSERT.format(1))
            assert scene.sees() == [1]
            async with block(conn.transaction()):
                await execute(conn, INSERT.format(2))
                with suppress(ZeroDivisionError):
                    async with block(conn.transaction()):
                        await execute(conn, INSERT.format(3))
                        assert scene.sees() == [1, 2, 3]
                        raise ZeroDivisionError
                assert scene.sees() == [1, 2]
        assert scene.sees() == [1, 2]
        with suppress(ZeroDivisionError):
            async with block(handle) as conn:
                await execute(conn, "DELETE FROM t")
                assert scene.sees() == []
                raise ZeroDivisionError
        assert scene.sees() == [1, 2]

    asyncio.run(work())


def test_what_clients_have_written(scene):
    """The same of psycopg over the gateway, and of simple, extended and autocommit statements."""
    conn = scene.connect()
    conn.execute(INSERT.format(1))
    assert scene.sees() == [1]
    with conn.transaction(force_rollback=True):
        conn.execute(INSERT.format(2))
        assert scene.sees() == [1, 2]
    assert scene.sees() == [1]
    conn.commit()
    client = scene.client()
    client.ask(INSERT.format(3))
    client.say(raw.run("BEGIN"), raw.run(INSERT.format(4)), SYNC_MESSAGE)
    assert scene.sees() == [1, 3, 4]
    client.ask("ROLLBACK")
    assert scene.sees() == numbers(scene.test) == [1, 3]


def test_definitions(scene):
    """Tables, columns and types that the test has just made, described by the protocol, too."""
    with scene.handle() as conn:
        conn.execute("CREATE TYPE colour AS ENUM ('red')")
        conn.execute("CREATE TABLE own (c colour, more text DEFAULT 'x')")
        conn.execute("INSERT INTO own VALUES ('red')")
        looker = scene.looker()
        assert looker.ask("SELECT * FROM own") == [("red", "x")]
        assert looker.run_extended("SELECT * FROM own") == ["SELECT 1", "I"]
        conn.execute("ALTER TABLE own DROP more")
        assert looker.ask("SELECT * FROM own") == [("red",)]
        conn.execute("DROP TABLE own")
        refuses(looker, "SELECT * FROM own", "42P01")


def test_data_of_wider_scopes(process):
    """That of pgmonkey_module, and of a client's transaction from outside of the test."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.kit.share() as shared:
        shared.execute(INSERT.format(2))
        for _ in range(2):
            with process.test() as test, ExitStack() as stack:
                scene = Scene(process, test, stack)
                assert scene.sees() == [1, 2]
                client.ask(INSERT.format(3))
                assert scene.sees() == client.numbers() == [1, 2, 3]
            with process.test() as test, ExitStack() as stack:
                scene = Scene(process, test, stack)
                test.execute(INSERT.format(4))
                looker = scene.looker()
                assert looker.numbers() == [1, 2, 4]
                refuses(looker, INSERT.format(9), "57P03")
                assert numbers(test) == [1, 2, 4]
    client.ask("ROLLBACK")


def test_looks_by_drivers(scene):
    """Psycopg with and without autocommit, and in its ways to fetch; asyncpg, whose pool resets."""
    with scene.handle() as conn:
        conn.execute("INSERT INTO t SELECT generate_series(1, 300)")
        with psycopg.connect(scene.test.peek) as look:
            assert look.execute("SELECT count(*) FROM t").fetchone() == (300,)
            for _ in range(8):  # from the sixth on it is a prepared statement
                assert look.execute("SELECT n FROM t WHERE n = %s", [5]).fetchone() == (5,)
            with look.cursor() as cursor:
                assert len(list(cursor.stream(TAKEN))) == 300
                with cursor.copy("COPY t TO STDOUT") as copy:
                    assert len(list(copy.rows())) == 300
                with look.pipeline():
                    cursor.execute("SELECT 1")
                    assert cursor.fetchone() == (1,)
            with pytest.raises(psycopg.errors.CannotConnectNow):
                look.execute("DELETE FROM t")
            look.rollback()
            look.commit()
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (300,)

        async def by_asyncpg() -> None:
            keywords: Any = conninfo_to_dict(scene.test.peek)
            keywords["database"] = keywords.pop("dbname")
            look = await asyncpg.connect(**keywords)
            for _ in range(3):
                assert await look.fetchval("SELECT count(*) FROM t WHERE n < $1", 11) == 10
                async with look.transaction(readonly=True):
                    assert len(await look.fetch(TAKEN)) == 300
            with pytest.raises(asyncpg.CannotConnectNowError):
                await look.execute("DELETE FROM t")
            await look.close()

        asyncio.run(by_asyncpg())
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (300,)


PSQL = ["psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=0"]


def psql(dsn: str, text: str) -> tuple[str, str]:
    found = subprocess.run(
        [*PSQL, "-d", dsn],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    return found.stdout, found.stderr


def test_psql(scene):
    """Tables, their descriptions, variables, a transaction of its own, and an error."""
    with scene.handle() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'seen')")
        conn.execute("CREATE TABLE own (id int PRIMARY KEY)")
        told, errors = psql(
            scene.test.peek,
            "TABLE t;\n\\d own\n\\dt\nBEGIN;\nSELECT x FROM t;\nDELETE FROM t;\nSELECT 'after';\n"
            "COMMIT;\n\\copy t to stdout\nSELECT 'last';\n",
        )
        assert told.split("\n")[0] == "1|seen"
        assert "id|integer||not null|" in told
        assert "public|own|table" in told
        assert "1\tseen" in told
        assert told.rstrip().endswith("last")
        assert errors.count("ERROR") == 1
        assert "only reads" in errors
        assert numbers(conn) == [1]


# The test goes on as before

STATE = """
SELECT pg_backend_pid(), pg_current_xact_id_if_assigned()::text, now()::text,
    current_setting('a.b', true), current_setting('search_path'), current_setting('role'),
    current_setting('transaction_isolation'), current_setting('transaction_read_only'),
    current_setting('TimeZone'), (SELECT array_agg(n ORDER BY n) FROM t),
    (SELECT array_agg(name ORDER BY name) FROM pg_cursors WHERE name <> ''),
    (SELECT array_agg(objid ORDER BY objid) FROM pg_locks
        WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT array_agg(name ORDER BY name) FROM pg_prepared_statements WHERE from_sql),
    (SELECT array_agg(channel) FROM pg_listening_channels() AS channel),
    (SELECT array_agg(relname ORDER BY relname) FROM pg_class
        WHERE relnamespace = 'public'::regnamespace),
    (SELECT last_value FROM numbers)
"""
WRITES = [
    "INSERT INTO t VALUES (9)",
    "UPDATE t SET x = 'looked'",
    "DELETE FROM t",
    "TRUNCATE t CASCADE",
    "MERGE INTO t USING t AS s ON t.n = s.n WHEN MATCHED THEN DELETE",
    "WITH x AS (INSERT INTO t VALUES (9) RETURNING 1) SELECT * FROM x",
    "SELECT 1 AS n INTO own",
    "CREATE TABLE own ()",
    "CREATE TEMP TABLE own ()",
    "CREATE VIEW own AS SELECT 1",
    "CREATE FUNCTION own() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER TABLE t ADD z int",
    "DROP TABLE t",
    "COMMENT ON TABLE t IS 'looked'",
    "GRANT SELECT ON t TO PUBLIC",
    "COPY t FROM STDIN",
    "SELECT nextval('numbers')",
    "SELECT setval('numbers', 5)",
    "SELECT put(9)",
    "SELECT lo_create(0)",
    "SELECT * FROM t FOR UPDATE",
    "EXPLAIN ANALYZE INSERT INTO t VALUES (9)",
    "DO $$ BEGIN INSERT INTO t VALUES (9); END $$",
    "DO $$ BEGIN COMMIT; END $$",
    "DO $$ BEGIN ROLLBACK; END $$",
    "DO $$ BEGIN SET transaction_read_only = off; INSERT INTO t VALUES (9); END $$",
    "SET TRANSACTION READ WRITE",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET transaction_read_only = off",
    "RESET transaction_read_only",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SELECT set_config('transaction_read_only', 'off', true)",
    "SAVEPOINT mine",
    "RELEASE mine",
    "ROLLBACK TO mine",
    "PREPARE TRANSACTION 'x'",
    "COMMIT PREPARED 'x'",
    "PREPARE own AS SELECT 1",
    "DEALLOCATE prepared",
    "DISCARD ALL",
    "DISCARD TEMP",
    "VACUUM",
]
#: They may be refused or answered, but leave nothing.
OTHERS = [
    "DO $$ BEGIN BEGIN DELETE FROM t; EXCEPTION WHEN OTHERS THEN NULL; END; END $$",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "SET default_transaction_read_only = off",
    "SET search_path = pg_catalog",
    "SET LOCAL search_path = pg_catalog",
    "SET a.b = 'looked'",
    "SET LOCAL a.b = 'looked'",
    "SET TIME ZONE 'Asia/Tokyo'",
    "SELECT set_config('a.b', 'looked', false), set_config('a.b', 'looked', true)",
    "SET ROLE NONE",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET ALL",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "SET CONSTRAINTS ALL DEFERRED",
    "LISTEN looked",
    "UNLISTEN *",
    "NOTIFY looked",
    "LOCK TABLE t",
    "LOCK TABLE t IN ACCESS EXCLUSIVE MODE",
    "DECLARE own CURSOR FOR SELECT 1",
    "DECLARE own CURSOR WITH HOLD FOR SELECT 1",
    "FETCH mine",
    "FETCH ALL FROM mine",
    "MOVE mine",
    "CLOSE mine",
    "CLOSE ALL",
    "DEALLOCATE ALL",
    "EXECUTE prepared",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_lock_shared(7)",
    "SELECT pg_advisory_xact_lock(7)",
    "SELECT pg_advisory_unlock(1)",
    "SELECT pg_advisory_unlock_all()",
    'SELECT "pg_advisory_unlock_all"()',
    "SELECT pg_catalog.pg_advisory_unlock_all ()",
    "DO $$ BEGIN PERFORM pg_advisory_unlock_all(); END $$",
    "DO $$ BEGIN EXECUTE 'SELECT pg_advi' || 'sory_unlock_all()'; END $$",
    "SELECT pg_advisory_unlock_all /* look */ ()",
    'SELECT pg_catalog."txid_current"()',
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
    "SELECT txid_current()",
    "SELECT pg_current_xact_id()",
    "SELECT pg_logical_emit_message(true, 'looked', '')",
    "SELECT pg_export_snapshot()",
    "ANALYZE",
    "ANALYZE t",
    "REINDEX TABLE t",
    "CLUSTER t USING t_pkey",
    "CHECKPOINT",
    "SELECT noisy('looked')",
    "SELECT 1/0",
    "SELECT nothing",
    "SELEC",
    "",
    "TABLE t",
    "SHOW ALL",
    "COPY t TO STDOUT",
    "BEGIN",
    "BEGIN READ WRITE",
    "START TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "COMMIT",
    "END",
    "ROLLBACK",
    "ABORT",
    "COMMIT AND CHAIN",
    "ROLLBACK AND CHAIN",
]
SCRIPTS = [
    "BEGIN; INSERT INTO t VALUES (9)",
    "COMMIT; INSERT INTO t VALUES (9)",
    "ROLLBACK; INSERT INTO t VALUES (9); COMMIT",
    "SELECT 1; COMMIT",
    "SELECT 1; ROLLBACK; SELECT 2",
    "SET TRANSACTION READ WRITE; DELETE FROM t",
    "SET transaction_read_only = off; DELETE FROM t",
    "SELECT 1; DELETE FROM t",
    "SAVEPOINT s; ROLLBACK TO s",
    "ROLLBACK TO SAVEPOINT _pgmonkey; DELETE FROM t",
    "RELEASE _pgmonkey_1; SELECT 1",
    "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;",
    "/* look */ -- at\n; ;COMMIT",
]


def prepare(conn: Any, *, writes: bool) -> None:
    """Bring about everything that a look could disturb, in an open transaction."""
    conn.execute("SET LOCAL a.b = 'mine'")
    conn.execute("SET TIME ZONE 'Europe/Paris'")
    conn.execute("SELECT pg_advisory_lock(1)")
    conn.execute("DECLARE mine CURSOR FOR SELECT generate_series(1, 9)")
    assert conn.execute("FETCH mine").fetchone() == (1,)
    conn.execute("PREPARE prepared AS SELECT 'prepared'")
    conn.execute("SAVEPOINT mine")
    if writes:
        conn.execute(INSERT.format(1))
        conn.execute("INSERT INTO late VALUES (1, 99)")
    conn.execute("SET CONSTRAINTS ALL DEFERRED")


def differences(conn: Any, before: Any, cursor: int) -> list[Any]:
    """Tell what is no longer as it was, and go on with all of it."""
    try:
        found = [pair for pair in zip(before, state(conn), strict=True) if pair[0] != pair[1]]
        if conn.execute("FETCH mine").fetchone() != (cursor,):
            found.append("cursor")
        if conn.execute("EXECUTE prepared").fetchone() != ("prepared",):
            found.append("prepared")
        return found
    except psycopg.Error as error:
        return [str(error)]


def state(conn: Any) -> Any:
    return conn.execute(STATE).fetchone()


@contextmanager
def holder(scene: Scene, door: str) -> Iterator[Any]:
    """A connection of the test's by either door."""
    if door == "handle":
        with scene.handle() as conn:
            yield conn
            conn.rollback()
    else:
        conn = scene.connect()
        yield conn
        conn.rollback()


@pytest.mark.parametrize("writes", [False, True], ids=["has read", "has written"])
@pytest.mark.parametrize("door", ["handle", "client"])
@pytest.mark.parametrize("by", ["simple", "extended"])
def test_nothing_is_written_or_disturbed(scene, door, writes, by):
    """By no statement that anybody could think of, in an open transaction of the test's."""
    scene.test.execute("CREATE SEQUENCE numbers")
    looker = scene.looker()
    ask = looker.run if by == "simple" else looker.run_extended
    wrong: list[Any] = []
    with holder(scene, door) as conn:
        prepare(conn, writes=writes)
        before, at = state(conn), 2
        for query in [*WRITES, *OTHERS, *(SCRIPTS if by == "simple" else [])]:
            found = ask(query)
            if found[-1] not in "IT":
                wrong.append((query, found))
            if query in WRITES and (len(found) != 2 or len(found[0]) != 5 or found[0] == "MERGE"):
                wrong.append((query, found))
            if changed := differences(conn, before, at):
                wrong.append((query, changed))
                conn.rollback()
                conn.execute("DEALLOCATE ALL; SELECT pg_advisory_unlock_all()")
                prepare(conn, writes=writes)
                before, at = state(conn), 1
            at += 1
            if at > 8:
                conn.execute("CLOSE mine")
                conn.execute("DECLARE mine CURSOR FOR SELECT generate_series(1, 9)")
                at = 1
        assert not wrong, wrong
        conn.execute("ROLLBACK TO mine")
        conn.execute("RELEASE mine")
        conn.rollback()
        assert numbers(conn) == []
        conn.execute("SELECT pg_advisory_unlock_all()")


def test_a_test_that_has_begun_nothing(scene):
    """A look before its first statement leaves no transaction, and no level of isolation."""
    looker = scene.looker()
    pid = scene.backend.backend_pid
    shown = "state, xact_start, backend_xid, backend_xmin"
    query = f"SELECT {shown} FROM pg_stat_activity WHERE pid = {pid}"
    for ask in ("TABLE t", "SELECT 1/0", "BEGIN", "TABLE t", "COMMIT", "SET a.b = 'looked'"):
        with suppress(Told):
            looker.ask(ask)
        assert scene.process.real(query) == [("idle", None, None, None)]
    with scene.connect(autocommit=True) as conn:
        conn.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
        assert looker.numbers() == []
        assert conn.execute("SHOW transaction_isolation").fetchone() == ("serializable",)
        conn.execute(INSERT.format(1))
        assert looker.numbers() == [1]
        conn.execute("COMMIT")


@pytest.mark.parametrize("type_", ALL)
def test_the_isolation_level_of_the_first_transaction(scene, type_):
    """It can be had by a handle although somebody has looked before."""

    async def work() -> None:
        async with block(scene.handle(type_)) as conn:
            looker = scene.looker()
            assert looker.numbers() == []
            await execute(conn, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            assert looker.numbers() == []
            cursor = await execute(conn, "SHOW transaction_isolation")
            assert await called(cursor.fetchone()) == ("repeatable read",)

    asyncio.run(work())


def test_the_role_and_settings_of_the_test(scene):
    """A look is made with the looker's own, and the test finds its own again."""
    with scene.handle() as conn:
        conn.execute("SET search_path = pg_catalog")
        conn.execute("SET application_name = 'the test'")
        looker = scene.looker(options="-c TimeZone=Asia/Tokyo")
        for _ in range(2):
            assert looker.ask("SHOW search_path") == [('"$user", public',)]
            assert looker.ask("SHOW timezone") == [("Asia/Tokyo",)]
            assert conn.execute("SHOW search_path").fetchone() == ("pg_catalog",)
            assert conn.execute("SHOW timezone").fetchone() == ("UTC",)
            assert conn.execute("SHOW application_name").fetchone() == ("the test",)
            conn.commit()


@pytest.mark.xfail(strict=True, reason="a looker is not told the name that it has given itself")
def test_the_name_of_a_looker(scene):
    """It is its own, as its other settings are."""
    looker = scene.looker(application_name="looker", options="-c TimeZone=Asia/Tokyo")
    for _ in range(2):
        assert looker.numbers() == []
        assert looker.ask("SHOW application_name") == [("looker",)]


def test_deferred_constraints_of_the_test(scene):
    """What is violated for the moment is not checked by a look, but at the commit as ever."""
    with scene.handle() as conn:
        conn.execute("INSERT INTO late VALUES (1, 5)")
        assert scene.looker().ask("SELECT id FROM late") == [("1",)]
        conn.execute(INSERT.format(5))
        conn.commit()
        conn.execute("INSERT INTO late VALUES (2, 6)")
        assert scene.looker().ask("SELECT id FROM late") == [("1",), ("2",)]
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            conn.commit()
        assert scene.sees() == [5]


def test_prepared_statements_of_both(scene):
    """Those of the test are there after a look, those of the looker in its next one."""
    conn = scene.connect(prepare_threshold=0)
    looker = psycopg.connect(scene.test.peek, autocommit=True, prepare_threshold=0)
    with looker, scene.handle() as handle:
        for n in range(3):
            handle.execute("INSERT INTO t VALUES (%s)", [n], prepare=True)
            assert looker.execute("SELECT n FROM t WHERE n >= %s", [n]).fetchall() == [(n,)]
            handle.commit()
            assert conn.execute("SELECT max(n) FROM t WHERE n < %s", [99]).fetchone() == (n,)
            conn.execute("UPDATE t SET x = %s", ["x"])
            assert looker.execute("SELECT max(x) FROM t WHERE n < %s", [99]).fetchone() == ("x",)
            conn.commit()
    conn.close()


@pytest.mark.parametrize("end", ["rollback", "commit"])
def test_a_looker_whose_driver_clears_up(process, end):
    """Psycopg deallocates its statements after a rollback, asyncpg resets what it gives back."""
    with process.test() as test, psycopg.connect(test.peek, prepare_threshold=0) as look:
        for _ in range(3):
            assert look.execute("SELECT %s::int", [1]).fetchone() == (1,)
            with pytest.raises(psycopg.Error):
                look.execute("DROP TABLE t")
            getattr(look, end)()
            assert look.execute("SELECT %s::int", [2]).fetchone() == (2,)
            getattr(look, end)()


@pytest.mark.parametrize("name", ["", "named"])
def test_portals_of_the_test(scene, name):
    """A suspended one goes on after a look, or there is none: it says at once why not."""
    client, looker = scene.client(), scene.looker()
    client.open(INSERT.format(1))
    portal = raw.parse("SELECT generate_series(1, 3)") + raw.bind(portal=name)
    assert client.say(portal, raw.execute(name, 1), SYNC_MESSAGE)[:1] == [("D", [b"1"])]
    assert looker.run("TABLE t") in (["SELECT 1", "I"], ["57P03", "I"])
    if not name:
        refuses(looker, "TABLE t", "57P03", "portal")
    assert client.say(raw.execute(name, 1), SYNC_MESSAGE)[0] == ("D", [b"2"])
    client.ask("COMMIT")
    assert looker.numbers() == [1]


def test_cursors_of_the_test(scene):
    """Psycopg's server-side cursors and a cursor that is held, read on between looks."""
    with scene.handle() as conn:
        conn.execute("INSERT INTO t SELECT generate_series(1, 100)")
        with conn.cursor("own") as own, conn.cursor("held", withhold=True) as held:
            own.execute(TAKEN)
            held.execute(TAKEN)
            for n in range(1, 50, 10):
                expected = [(each,) for each in range(n, n + 10)]
                assert own.fetchmany(10) == expected
                assert scene.sees()[-1] == 100
                assert held.fetchmany(10) == expected
                assert scene.sees()[-1] == 100
            conn.commit()
            assert scene.sees()[-1] == 100
            assert held.fetchone() == (51,)


# Where nothing can be read


def cannot_be_read(scene: Scene, why: str) -> None:
    """Lookers and the debugger's line say in one sentence why not, at once."""
    looker = scene.looker()
    with pytest.raises(Told, match=why) as caught:
        looker.ask("TABLE t")
    assert caught.value.sqlstate == "57P03"
    assert "\n" not in caught.value.text
    assert looker.run_extended("TABLE t") == ["57P03", "I"]
    pointer = scene.process.kit.pointer()
    assert re.search(why, pointer)
    assert "psql" not in pointer


@contextmanager
def cannot_read(scene: Scene, why: str) -> Iterator[None]:
    """Nothing can be read before the block, and all is as usual after it."""
    cannot_be_read(scene, why)
    yield
    scene.sees()
    assert "psql" in scene.process.kit.pointer()


@pytest.mark.parametrize("door", ["handle", "client"])
def test_a_failed_transaction(scene, door):
    """It reads nothing before it is rolled back."""
    with holder(scene, door) as conn:
        conn.execute(INSERT.format(1))
        with pytest.raises(psycopg.errors.DivisionByZero):
            conn.execute("SELECT 1/0")
        with cannot_read(scene, "has failed"):
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                conn.execute("SELECT 1")
            conn.rollback()


@pytest.mark.parametrize("door", ["handle", "client"])
def test_the_middle_of_a_copy(scene, door):
    """In both directions; the COPY goes on as if nobody had asked."""
    with holder(scene, door) as conn, conn.cursor() as cursor:
        with cursor.copy("COPY t (n) FROM STDIN") as copy:
            copy.write("1\n")
            until(lambda: any(each.busy or each.streaming for each in scene.backend.members))
            cannot_be_read(scene, "COPY|is running")
            copy.write("2\n")
        assert numbers(conn) == scene.sees() == [1, 2]


def test_the_middle_of_a_copy_out(scene):
    """A handle that reads a COPY row by row."""
    with scene.handle() as conn, conn.cursor() as cursor:
        conn.execute("INSERT INTO t SELECT generate_series(1, 5000)")
        with cursor.copy("COPY t TO STDOUT") as copy:
            rows = copy.rows()
            next(rows)
            with cannot_read(scene, "COPY"):
                assert len(list(rows)) == 4999


def test_the_middle_of_a_stream(scene):
    """Rows that are fetched one by one are all there."""
    with scene.handle() as conn, conn.cursor() as cursor:
        rows = cursor.stream("SELECT generate_series(1, 5000)")
        next(rows)
        with cannot_read(scene, "stream"):
            assert len(list(rows)) == 4999


def test_the_middle_of_a_pipeline(scene):
    """Of a handle's, and of a client's batch without its Sync."""
    with scene.handle() as conn:
        with conn.pipeline():
            conn.execute(INSERT.format(1))
            looker = scene.looker()
            refuses(looker, "TABLE t", "57P03", "pipeline")
        assert numbers(conn) == [1]
        conn.rollback()
    client = scene.client()
    client.socket.send(raw.run(INSERT.format(2)), FLUSH)
    client.socket.until("C")
    with cannot_read(scene, "pipeline"):
        assert client.say(SYNC_MESSAGE) == [("Z", b"I")]
    assert scene.sees() == [2]


@pytest.mark.parametrize("door", ["handle", "client"])
def test_while_a_statement_runs(scene, door):
    """The look is refused, and the statement comes to its own end."""
    with holder(scene, door) as conn:
        found: list[Any] = []
        query = "SELECT pg_advisory_lock(4711), 'done'"
        with psycopg.connect(scene.process.database.dsn, autocommit=True) as other:
            other.execute("SELECT pg_advisory_lock(4711)")
            conn.execute("SELECT set_config('lock_timeout', '0', true)")
            thread = threading.Thread(target=lambda: found.append(conn.execute(query).fetchone()))
            thread.start()
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
            until(lambda: other.execute(waiting).fetchone() == (1,))
            with cannot_read(scene, "a statement of .* is running"):
                other.execute("SELECT pg_advisory_unlock(4711)")
                thread.join(PATIENCE)
        assert found == [("", "done")]
        conn.execute("SELECT pg_advisory_unlock_all()")


# Whoever goes on with the test ends a look


@contextmanager
def soon() -> Iterator[None]:
    """Take no time."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON


async def goes_on(conn: Any, how: str) -> None:
    """Go on with a transaction of a handle's in one of the ways there are."""
    if how == "statement":
        assert await values(conn, TAKEN) == [1]
    elif how == "write":
        await execute(conn, INSERT.format(2))
    elif how == "COPY":
        async with block(conn.cursor()) as cursor, block(cursor.copy("COPY t FROM STDIN")):
            pass
    elif how == "savepoint":
        async with block(conn.transaction()):
            pass
    elif how == "pipeline":
        async with block(conn.pipeline()):
            await execute(conn, "SELECT 1")
    else:
        await called(getattr(conn, how)())


async def called(result: Any) -> Any:
    return await result if hasattr(result, "__await__") else result


async def values(conn: Any, query: str) -> list[Any]:
    cursor = await execute(conn, query)
    return [value for (value,) in await called(cursor.fetchall())]


HOWS = ["statement", "write", "COPY", "savepoint", "pipeline", "commit", "rollback", "close"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("type_", ALL)
def test_a_handle_that_goes_on(scene, type_, how):
    """Its next operation, whichever, ends a look at once, and has its own result."""

    async def work() -> None:
        handle = scene.handle(type_)
        async with block(handle) as conn:
            await execute(conn, INSERT.format(1))
            looker = scene.long_look()
            with soon():
                await goes_on(conn, how)
            assert scene.was_ended(looker)
            if how == "commit":
                assert scene.sees() == [1]
            elif how in ("rollback", "close"):
                assert scene.sees() == []
            else:
                assert 1 in await values(conn, TAKEN)
        with soon():
            looker = scene.long_look()
            async with block(handle) as conn:  # another connection
                await execute(conn, "SELECT 1")
            assert scene.was_ended(looker)

    asyncio.run(work())


@pytest.mark.parametrize(
    "query",
    ["SELECT 1", INSERT.format(2), "COMMIT", "ROLLBACK", "SAVEPOINT s", "", "SELECT 1; SELECT 2"],
)
@pytest.mark.parametrize("by", ["simple", "extended"])
def test_a_client_that_goes_on(scene, by, query):
    """In a transaction and in autocommit, by simple and extended queries."""
    if by == "extended" and ";" in query:
        query = query.partition(";")[0]
    client = scene.client()
    ask = client.run if by == "simple" else client.run_extended
    for opens in (True, False):
        if opens:
            client.open(INSERT.format(1))
        looker = scene.long_look()
        with soon():
            ask(query)
            if not query:
                client.numbers()  # an empty one asks nobody
        assert scene.was_ended(looker)
        client.run("ROLLBACK")
        client.ask("DELETE FROM t")


def test_a_reader_that_is_displaced(scene):
    """Somebody takes the turn of a transaction that has only read, while somebody looks."""
    for first in SYNC:
        for second in SYNC:
            with scene.handle(first) as a, scene.handle(second) as b:
                b.execute("SELECT 1")
                b.commit()
                for n in range(3):
                    assert numbers(a) == []
                    looker = scene.long_look()
                    with soon():
                        b.execute(INSERT.format(n))
                    assert scene.was_ended(looker)
                    b.rollback()


@pytest.mark.parametrize("first", ASYNC)
@pytest.mark.parametrize("second", ASYNC)
def test_an_async_reader_that_is_displaced(scene, first, second):
    """The same in an event loop."""

    async def work() -> None:
        async with scene.handle(first) as a, scene.handle(second) as b:
            await b.execute("SELECT 1")
            await b.commit()
            assert await values(a, TAKEN) == []
            looker = scene.long_look()
            with soon():
                await asyncio.wait_for(b.execute(INSERT.format(1)), SOON)
            assert scene.was_ended(looker)
            await b.rollback()

    asyncio.run(work())


def test_a_client_that_displaces_a_reader(scene):
    """The same between clients."""
    a, b = scene.connect(), scene.client()
    b.ask("SELECT 1")
    for n in range(3):
        assert numbers(a) == []
        looker = scene.long_look()
        with soon():
            b.open(INSERT.format(n))
        assert scene.was_ended(looker)
        b.ask("ROLLBACK")
    a.close()


def test_an_abandoned_connection(scene):
    """One that was dropped unclosed is rolled back by whoever needs its turn, not in the look."""
    with scene.handle() as conn:
        conn.execute("SELECT 1")
        conn.commit()
        dropped = scene.process.kit._rollback._sandbox.lend(SandboxConnection)
        dropped.execute(INSERT.format(66))
        looker = scene.long_look()
        del dropped
        gc.collect()
        with soon():
            assert numbers(conn) == []
        assert scene.was_ended(looker)
    assert scene.sees() == []


def test_a_client_that_fails_after_a_look(scene):
    """Its error undoes its own statement and nothing else, whatever the look stood in."""
    client = scene.client()
    client.ask(INSERT.format(1))
    looker = scene.long_look()
    refuses(client, "SELECT 1/0", "22012")
    assert scene.was_ended(looker)
    assert numbers(scene.test) == [1]
    with scene.handle() as conn:
        conn.execute(INSERT.format(2))
        conn.commit()
        looker = scene.long_look()
        refuses(client, "SELECT nothing", "42703")
        assert scene.was_ended(looker)
        assert numbers(conn) == [1, 2]


@pytest.mark.parametrize(
    "huge",
    [
        "SELECT repeat('x', 100000) FROM generate_series(1, 2000)",
        "COPY (SELECT repeat('x', 100000) FROM generate_series(1, 2000)) TO STDOUT",
    ],
)
def test_a_looker_that_does_not_read(scene, huge):
    """It is cut off: nobody waits until it has taken what it has asked for."""
    with scene.handle() as conn:
        conn.execute(INSERT.format(1))
        looker = scene.looker()
        looker.socket.send(raw.query(huge))
        assert looker.socket.until("TH")
        with soon():
            assert numbers(conn) == [1]
        assert scene.sees() == [1]


def test_an_async_looker_in_the_loop_of_the_test(scene):
    """The loop stands still while the handle waits for the look: it does not wait for itself."""

    async def work() -> None:
        look = await psycopg.AsyncConnection.connect(scene.test.peek, autocommit=True)
        async with scene.handle("async") as conn:
            await conn.execute(INSERT.format(1))
            huge = asyncio.create_task(
                look.execute("SELECT repeat('x', 100000) FROM generate_series(1, 2000)")
            )
            sleep = asyncio.create_task(asyncio.to_thread(scene.until_looked_at))
            await sleep
            with soon():
                assert await values(conn, TAKEN) == [1]
            with suppress(psycopg.Error):
                await huge
        await look.close()

    asyncio.run(work())


# Lookers


def test_a_looker_that_is_interrupted(scene):
    """A cancel request ends its look, and nothing of the test's; a late one does nothing."""
    with scene.handle() as conn:
        conn.execute(INSERT.format(1))
        looker = scene.long_look()
        looker.socket.cancel()
        assert scene.was_ended(looker)
        for _ in range(20):
            looker.socket.cancel()
            assert looker.numbers() == [1]
            looker.socket.cancel()
            assert numbers(conn) == [1]


def test_psql_that_is_interrupted(scene):
    """Ctrl-C ends the look and not psql."""
    with scene.handle() as conn:
        conn.execute(INSERT.format(1))
        program = subprocess.Popen(
            [*PSQL, "-d", scene.test.peek],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert program.stdin is not None
        program.stdin.write(f"{SLEEP};\n")
        program.stdin.flush()
        scene.until_sleeping()
        program.send_signal(signal.SIGINT)
        told, errors = program.communicate("SELECT n FROM t;\n", timeout=PATIENCE)
        assert "canceling statement" in errors
        assert told.split() in (["1"], [])  # psql itself may end: its input is no terminal
        assert numbers(conn) == [1]


def test_two_lookers(scene):
    """One at a time: the second waits its time or is refused; neither ends the other's look."""
    with scene.handle() as conn:
        conn.execute(INSERT.format(1))
        first = scene.long_look("SELECT pg_sleep(0.5), n FROM t")
        second = scene.looker()
        with suppress(Told):
            assert second.numbers() == [1]
        assert first.rows(first.socket.until()) == [("", "1")]
        assert second.numbers() == first.numbers() == [1]
        counts: Counter[Any] = Counter()

        def look() -> None:
            looker = scene.looker()
            for _ in range(100):
                try:
                    counts[tuple(looker.numbers())] += 1
                except Told as told:
                    counts[told.text] += 1

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert counts[(1,)] > 4
        assert set(counts) <= {(1,), *(text for text in counts if "somebody else looks" in text)}
        assert numbers(conn) == [1]


def test_a_looker_that_goes(scene):
    """In the middle of a look, of a transaction of its own, without a word or with one."""
    with scene.handle() as conn:
        conn.execute(INSERT.format(1))
        for politely in (True, False):
            looker = scene.long_look()
            if politely:
                looker.socket.send(raw.TERMINATE)
            looker.close()
            until(lambda: scene.backend.look is None)
            looker = scene.looker()
            looker.ask("BEGIN")
            looker.close()
            assert scene.sees() == numbers(conn) == [1]


def test_a_looker_across_tests(process):
    """Its connection ends with the test; outside of tests there is none to be had."""
    with process.test() as test:
        dsn = test.peek
        idle, busy = Looker(dsn), Looker(dsn)
        assert idle.numbers() == []
        busy.socket.send(raw.query(SLEEP))
        with ExitStack() as stack:
            Scene(process, test, stack).until_sleeping()
    for looker in (idle, busy):
        answers = looker.socket.until("")
        assert answers[-1] == "end"
        errors = [body["C"] for kind, body in answers[:-1] if kind == "E"]
        assert errors[-1] == "57P01"
        looker.close()
    with pytest.raises(psycopg.OperationalError, match="none runs"):
        psycopg.connect(dsn)
    with process.test() as test, psycopg.connect(dsn) as look:
        assert dsn == test.peek
        assert numbers(look) == []


def test_the_end_of_a_test_ends_a_look(process):
    """Whatever the test has left open, and nothing is told of it."""
    for left in ("nothing", "a transaction", "a client"):
        with ExitStack() as stack, soon(), process.test() as test:
            scene = Scene(process, test, stack)
            if left == "a transaction":
                conn = process.kit._rollback._sandbox.lend(SandboxConnection)
                conn.execute(INSERT.format(1))
                stack.callback(conn.close)
            elif left == "a client":
                scene.client().open(INSERT.format(1))
            scene.long_look()
        assert process.numbers() == []


def test_what_a_looker_is_told(scene):
    """Tags and statuses are those of a server, as far as it can have what it asks for."""
    looker = scene.looker()
    assert looker.run("BEGIN") == ["BEGIN", "T"]
    assert looker.run("SELECT 1") == ["SELECT 1", "T"]
    assert looker.run("COMMIT") == ["COMMIT", "I"]
    assert looker.run("START TRANSACTION") == ["START TRANSACTION", "T"]
    assert looker.run("ABORT") == ["ROLLBACK", "I"]
    assert looker.run("BEGIN READ ONLY") == ["BEGIN", "T"]
    assert looker.run("END") == ["COMMIT", "I"]
    assert looker.run_extended("BEGIN") == ["BEGIN", "T"]
    assert looker.run_extended("SELECT 1") == ["SELECT 1", "T"]
    assert looker.run_extended("ROLLBACK") == ["ROLLBACK", "I"]
    assert looker.run("") == ["I"]
    with pytest.raises(Told) as caught:
        looker.ask("SELECT nothing FROM t")
    assert caught.value.sqlstate == "42703"
    for query in ("PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'"):
        assert looker.run(query)[0] in ("0A000", "57P03")
    position = [body["P"] for kind, body in looker.say(raw.query("SELECT  nothing")) if kind == "E"]
    assert position == ["9"]


# While the test does not stand still

#: What a look may be told instead of an answer, while others work.
REFUSED = {"57P03", "57014"}
LOOKS = [
    "SELECT n FROM t ORDER BY n",
    "SELECT n, pg_sleep(0.002) FROM t ORDER BY n",
    "SELECT 1/0",
    "SELECT n FROM t WHERE n > 0 ORDER BY n LIMIT 5",
    "DELETE FROM t",
    "SELECT count(*), repeat('x', 20000) FROM t",
]


class Hammer:
    """Somebody who looks in a loop, in a thread; whoever looks sees what the test had written."""

    def __init__(self, scene: Scene, *, extended: bool) -> None:
        self.looked = 0
        """How many looks were answered."""
        self.problems: list[Any] = []
        self._looker = scene.looker()
        self._extended = extended
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Hammer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.problems == []

    def _run(self) -> None:
        looker = self._looker
        ask = looker.run_extended if self._extended else looker.run
        try:
            while not self._stop.is_set():
                for query in LOOKS:
                    found = ask(query)
                    self.looked += found[0].startswith("SELECT")
                    known = {*REFUSED, "22012"} if "/" in query or "DEL" in query else REFUSED
                    if found[-1] != "I" or not (found[0] in known or "SELECT" in found[0]):
                        self.problems.append((query, found))
        except BaseException as error:
            self.problems.append(error)


@contextmanager
def often_switching() -> Iterator[None]:
    """Let threads take turns in the middle of everything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Work:
    """Small transactions of the test's, each with a result that is known beforehand."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.rows: list[int] = []
        self.next = 0

    def take(self) -> int:
        self.next += 1
        return self.next

    async def check(self, conn: Any, *more: int) -> None:
        assert await values(conn, TAKEN) == sorted([*self.rows, *more])
        assert conn.info.transaction_status.name in ("INTRANS", "IDLE")

    async def commits(self, conn: Any) -> None:
        one, other = self.take(), self.take()
        await execute(conn, "INSERT INTO t VALUES (%s)", [one])
        assert conn.info.transaction_status.name == "INTRANS"
        await execute(conn, "INSERT INTO t VALUES (%s)", [other])
        await self.check(conn, one, other)
        await called(conn.commit())
        assert conn.info.transaction_status.name == "IDLE"
        self.rows += [one, other]
        await self.check(conn)

    async def rolls_back(self, conn: Any) -> None:
        await execute(conn, "DELETE FROM t")
        assert conn.info.transaction_status.name == "INTRANS"
        assert await values(conn, TAKEN) == []
        await called(conn.rollback())
        await self.check(conn)

    async def fails(self, conn: Any) -> None:
        await execute(conn, "DELETE FROM t")
        with pytest.raises(psycopg.errors.DivisionByZero):
            await execute(conn, "SELECT 1/0")
        assert conn.info.transaction_status.name == "INERROR"
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await execute(conn, TAKEN)
        await called(conn.rollback())
        await self.check(conn)

    async def has_savepoints(self, conn: Any) -> None:
        one = self.take()
        async with block(conn.transaction()):
            await execute(conn, "INSERT INTO t VALUES (%s)", [one])
            with suppress(ZeroDivisionError):
                async with block(conn.transaction()):
                    await execute(conn, "DELETE FROM t")
                    raise ZeroDivisionError
            await self.check(conn, one)
        self.rows.append(one)
        await self.check(conn)

    async def copies(self, conn: Any) -> None:
        one = self.take()
        async with (
            block(conn.cursor()) as cursor,
            block(cursor.copy("COPY t (n) FROM STDIN")) as copy,
        ):
            await called(copy.write_row([one]))
        await self.check(conn, one)
        await called(conn.commit())
        self.rows.append(one)

    async def reads(self, conn: Any) -> None:
        await self.check(conn)

    @property
    def kinds(self) -> list[Callable[[Any], Any]]:
        return [
            self.commits,
            self.rolls_back,
            self.fails,
            self.has_savepoints,
            self.reads,
            self.copies,
        ]


@pytest.mark.parametrize("by", ["simple", "extended"])
def test_small_transactions_while_somebody_looks(scene, by):
    """Hundreds, on all four types and over the gateway: each has the result that it must have."""
    work = Work(scene)

    async def program() -> None:
        own: Any = scene.connect()
        own_async = await psycopg.AsyncConnection.connect(scene.test.dsn)
        handles = [scene.handle(type_) for type_ in ALL]
        for turn in range(2):
            for kind in work.kinds:
                for handle in handles:
                    async with block(handle) as conn:
                        await kind(conn)
                for conn in (own, own_async):
                    await kind(conn)
                    await called(conn.rollback())
            assert numbers(scene.test) == sorted(work.rows), turn
        await own_async.close()

    with often_switching(), Hammer(scene, extended=by == "extended") as hammer:
        asyncio.run(program())
    assert hammer.looked > 10
    assert scene.sees() == sorted(work.rows)


def test_autocommit_while_somebody_looks(scene):
    """Statements that are transactions by themselves, right and wrong, of clients and handles."""
    client, rows = scene.client(), []
    with (
        often_switching(),
        Hammer(scene, extended=False) as hammer,
        scene.handle() as reader,
        scene.handle("pool") as writer,
    ):
        for n in range(1, 40):
            ask = client.run_extended if n % 2 else client.run
            assert ask(INSERT.format(n)) == ["INSERT 0 1", "I"]
            rows.append(n)
            assert ask("SELECT 1/0") == ["22012", "I"]
            assert numbers(scene.test) == rows
            assert ask(INSERT.format(n)) == ["23505", "I"]
            # Readers are displaced by whoever comes next.
            assert numbers(reader) == rows
            assert numbers(writer) == rows
            assert client.numbers() == rows
            writer.execute("DELETE FROM t")
            writer.rollback()
            assert numbers(reader) == rows
            assert reader.info.transaction_status.name == "INTRANS"
    assert hammer.looked > 10
    assert scene.sees() == rows


def test_the_statuses_that_are_told_while_somebody_looks(scene):
    """A client and a handle are never told of a look's failure, nor that something runs."""
    client = scene.client()
    with often_switching(), Hammer(scene, extended=False) as hammer:
        client.open(INSERT.format(0))
        for n in range(1, 100):
            assert client.run(INSERT.format(n)) == ["INSERT 0 1", "T"]
        client.ask("COMMIT")
        with scene.handle() as conn:
            for type_ in ("read", "written"):
                conn.execute("SELECT 1" if type_ == "read" else "DELETE FROM t")
                before = hammer.looked
                found: Counter[str] = Counter()
                while hammer.looked < before + 10:
                    found[conn.info.transaction_status.name] += 1
                assert set(found) == {"INTRANS"}
            conn.rollback()
            before = hammer.looked
            while hammer.looked < before + 10:
                assert conn.info.transaction_status.name == "IDLE"


def test_a_look_at_a_known_state_among_others(scene):
    """While two look in loops and the test writes, a third sees each state as it is."""
    rows: list[int] = []
    looker = scene.looker()
    with (
        often_switching(),
        Hammer(scene, extended=False),
        Hammer(scene, extended=True),
        scene.handle() as conn,
    ):
        for n in range(25):
            conn.execute(INSERT.format(n))
            rows.append(n)
            if n % 3 == 0:
                conn.commit()
            while (answer := looker.say(raw.query(TAKEN)))[0][0] == "E":
                assert answer[0][1]["C"] == "57P03", answer  # another looks just now
            assert [int(body[0]) for kind, body in answer if kind == "D"] == rows
            assert numbers(conn) == rows
        conn.rollback()
    assert scene.sees() == rows


PROGRAM = """
import sys, psycopg

dsn, looks = sys.argv[1], 0
print("there", flush=True)
for line in sys.stdin:
    pass_on = line.strip()
    if pass_on == "stop":
        break
    try:
        with psycopg.connect(dsn, autocommit=True) as conn:
            for _ in range(20):
                try:
                    found = [n for n, in conn.execute("SELECT n FROM t ORDER BY n")]
                    assert found == list(range(len(found))), found
                    looks += 1
                except psycopg.errors.QueryCanceled:
                    pass
                except psycopg.errors.CannotConnectNow:
                    pass
    except psycopg.OperationalError as error:
        # The test has ended. (psycopg may find that out before it has read why.)
        if error.sqlstate != "57P01" and not any(
            words in str(error) for words in ("none runs", "server closed the connection")
        ):
            raise
print(looks)
"""


def test_lookers_in_another_process_across_many_tests(process):
    """They come and go while tests begin, write and end; no test is told of them."""
    with process.test() as test:
        command = [sys.executable, "-c", PROGRAM, test.peek]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        for turn in range(30):
            child.stdin.write("look\n")
            child.stdin.flush()
            with process.test() as test:
                for n in range(6):
                    if turn % 2:
                        test.execute(INSERT.format(n))
                        assert numbers(test) == [*range(n + 1)]
                    else:
                        with process.kit.handles.make("pool") as conn:
                            conn.execute(INSERT.format(n))
                            assert numbers(conn) == [*range(n + 1)]
        told, errors = child.communicate("stop\n", timeout=PATIENCE)
    finally:
        child.kill()
        child.wait()
    assert errors == ""
    assert int(told) > 10


# Clone isolation


@pytest.fixture
def clone(process: Process) -> Iterator[Scene]:
    """A test in clone isolation; whoever waits for a lock in it fails instead."""
    with process.test("clone") as test, ExitStack() as stack:
        test.execute("SET lock_timeout = '5s'")
        yield Scene(process, test, stack)


def test_a_clone_shows_what_is_committed(clone):
    """And nothing else: others' transactions are real ones there."""
    with clone.handle() as conn:
        conn.execute(INSERT.format(1))
        looker = clone.looker()
        assert looker.numbers() == []
        conn.commit()
        assert looker.numbers() == [1]
        conn.execute(INSERT.format(2))
        looker.ask("BEGIN")
        assert looker.numbers() == [1]
        conn.commit()
        assert looker.numbers() == [1, 2]
        looker.ask("COMMIT")
        told, errors = psql(clone.test.peek, "SELECT count(*) FROM t;\nDELETE FROM t;\n")
        assert told == "2\n"
        assert "ERROR" in errors
        assert clone.process.kit.pointer().startswith("the test's data: psql ")


@pytest.mark.parametrize("by", ["simple", "extended"])
def test_nothing_is_written_or_locked_in_a_clone(clone, by):
    """Whatever is tried, the test's next statements find what they would have found."""
    test = clone.test
    test.execute("CREATE SEQUENCE numbers")
    test.execute(INSERT.format(1))
    its_own = ("PREPARE own", "DEALLOCATE", "DISCARD")  # the looker's session is another here
    looker, other = clone.looker(), clone.looker()
    ask = looker.run if by == "simple" else looker.run_extended
    before = state(test)[3:]
    wrong: list[Any] = []
    for query in [*WRITES, *OTHERS, *(SCRIPTS if by == "simple" else [])]:
        found = ask(query)
        other.run(INSERT.format(9))
        other.run("COMMIT")
        refused = len(found[0]) == 5 and found[0] != "MERGE"
        if query in WRITES and not refused and not query.startswith(its_own):
            wrong.append((query, found))
        if state(test)[3:] != before:
            wrong.append((query, state(test)))
        try:
            test.execute(
                "SELECT pg_advisory_lock(n), pg_advisory_unlock(n) FROM (VALUES (1), (7)) v (n)"
            )
            test.execute("ALTER TABLE t ADD y int")
            test.execute("ALTER TABLE t DROP y")
        except psycopg.Error as error:
            wrong.append((query, str(error)))
        ask("ROLLBACK")
    assert not wrong, wrong


def test_clones_end_while_somebody_looks(process):
    """Whatever a looker is at just then, the test ends, and it has not failed."""

    def look(dsn: str, has_looked: threading.Event, ends: threading.Event) -> None:
        while not ends.is_set():
            # The end of a test is an error for its lookers, of a kind or another.
            with suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute("SELECT count(*) FROM t, pg_class")
                has_looked.set()
                conn.execute("TABLE t")

    for _ in range(12):
        ends, looked = threading.Event(), [threading.Event() for _ in range(3)]
        with ThreadPoolExecutor(3) as threads:
            try:
                with process.test("clone") as test:
                    looks = [threads.submit(look, test.peek, each, ends) for each in looked]
                    assert all(each.wait(PATIENCE) for each in looked)
            finally:
                ends.set()
            assert [each.exception() for each in looks] == [None] * 3


def test_definitions_change_while_somebody_looks_at_a_clone(clone):
    """A look that is over keeps no lock that the test needs, however it has ended."""
    looker = clone.looker()
    for n, query in enumerate(["TABLE t", "SELECT 1/0 FROM t", "LOCK TABLE t", "COPY t TO STDOUT"]):
        looker.run(query)
        clone.test.execute(f"ALTER TABLE t ADD y{n} int")
        clone.test.execute("TRUNCATE t CASCADE")
    clone.test.execute("VACUUM FULL t")
    clone.test.execute("DROP TABLE t CASCADE")


def test_a_looker_at_a_clone_in_a_transaction_of_its_own(clone):
    """psycopg begins one by itself; it keeps no lock, either."""
    looker = clone.looker()
    looker.ask("BEGIN")
    looker.ask("TABLE t")
    clone.test.execute("SET lock_timeout = '500ms'")
    clone.test.execute("TRUNCATE t CASCADE")


def test_a_looker_at_a_clone_ends_with_the_test(process):
    """In the middle of a look, too; the next test has another database."""
    for _ in range(2):
        with process.test("clone") as test, ExitStack() as stack, soon():
            scene = Scene(process, test, stack)
            looker = Looker(test.peek)
            looker.socket.send(raw.query(SLEEP))
            scene.until_sleeping()
        assert looker.socket.until("")[-1] == "end"
        looker.close()


# At a breakpoint

LINE = "pgmonkey: the test's data: psql "
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    *shlex.split("-p no:cacheprovider -p no:hypothesispytest"),
]


def debugged(project: pytest.Pytester, *args: str, typed: str) -> str:
    """Run pytest with somebody who types, and give all that is shown."""
    found = project.run(*PYTEST, *args, stdin=typed.encode(), timeout=PATIENCE)
    return found.stdout.str() + found.stderr.str()


def test_breakpoints(project):
    """One line tells how to look, or why one cannot; none where the test uses no database."""
    project.makepyfile(
        """
        import psycopg, pytest
        from app import add, names, pool

        def listening():
            import sys
            return [name for name in sys.modules if ".testing.gateway." in name]

        def test_a_none_used():
            breakpoint()

        def test_b_used(pgmonkey):
            add("x")
            repr(pgmonkey)
            assert not listening()
            breakpoint()
            assert listening()
            assert names() == ["x"]

        def test_c_failed(pgmonkey):
            with pgmonkey.normal as conn:
                with pytest.raises(psycopg.Error):
                    conn.execute("SELECT 1/0")
                breakpoint()
                conn.rollback()
                assert conn.execute("SELECT 1").fetchone() == (1,)

        def test_d_streams(pgmonkey):
            with pgmonkey.normal as conn, conn.cursor() as cursor:
                rows = list()
                for row in cursor.stream("SELECT generate_series(1, 3)"):
                    rows.append(row)
                    if len(rows) == 1:
                        breakpoint()
                assert len(rows) == 3

        @pytest.mark.pgmonkey(isolation="clone")
        def test_e_cloned(pgmonkey):
            add("x")
            breakpoint()
            assert names() == ["x"]

        @pytest.mark.asyncio
        async def test_f_async(pgmonkey_async_pool):
            async with pgmonkey_async_pool as conn:
                await conn.execute("INSERT INTO item (name) VALUES ('x')")
                breakpoint()
                cursor = await conn.execute("SELECT count(*) FROM item")
                assert await cursor.fetchone() == (1,)

        @pytest.mark.pgmonkey
        def test_g_has_begun_nothing():
            breakpoint()
            assert names() == []

        def test_h_none_used_after_others():
            breakpoint()

        def test_i_only_the_server(pgmonkey_server, pgmonkey_database):
            breakpoint()
        """
    )
    shown = debugged(project, "-v", typed="c\n" * 9)
    assert re.search(r"=+ 9 passed", shown), shown
    of_tests = re.split(r"(?m)^test_breakpoints\.py::test_", shown)[1:]
    lines = {
        part[0]: [x for x in part.splitlines() if x.startswith("pgmonkey:")] for part in of_tests
    }
    assert {name: len(found) for name, found in lines.items()} == {
        **dict.fromkeys("bcdefg", 1),
        **dict.fromkeys("ahi", 0),
    }
    for name in "befg":
        assert lines[name][0].startswith(LINE), lines
    assert "cannot be read now: its transaction has failed" in lines["c"][0]
    assert "in the middle of a COPY, a stream or a pipeline" in lines["d"][0]


def test_a_debugger_after_a_failure(project):
    """`--pdb` shows the data of the test that has failed, before it is undone."""
    project.makepyfile(
        """
        import psycopg, pytest
        from app import add

        def test_fails(pgmonkey):
            add("x")
            assert False

        def test_fails_in_a_transaction(pgmonkey):
            with pgmonkey.pool as conn:
                conn.execute("INSERT INTO item (name) VALUES ('y')")
                conn.execute("SELECT 1/0")

        def test_fails_without():
            assert False

        def test_goes_on(pgmonkey):
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (0,)
        """
    )
    shown = debugged(project, "--pdb", typed="c\n" * 3)
    assert re.search(r"=+ 3 failed, 1 passed", shown), shown
    assert [line.startswith(LINE) for line in shown.splitlines() if "pgmonkey: the" in line] == [
        True,
        True,
    ]


def test_a_look_at_a_breakpoint(project):
    """The line's own psql, while the test stands still in a transaction; then it goes on."""
    project.makepyfile(
        """
        import pytest

        def test_stands_still(pgmonkey):
            with pgmonkey.normal as conn:
                conn.execute("INSERT INTO item (name) VALUES ('uncommitted')")
                breakpoint()
                rows = conn.execute("SELECT name FROM item").fetchall()
                assert rows == [("uncommitted",)]
        """
    )
    run = subprocess.Popen(
        [*PYTEST, "-v"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=project.path,
    )
    try:
        assert run.stdin is not None
        assert run.stdout is not None
        line = next((each for each in run.stdout if each.startswith(LINE)), "")
        command = shlex.split(line.partition(": ")[2].partition(": ")[2])
        assert command[0] == "psql"
        (dsn,) = command[1:]
        told, errors = psql(dsn, "SELECT name FROM item;\nDELETE FROM item;\nSELECT 'there';\n")
        assert told == "uncommitted\nthere\n"
        assert errors.count("ERROR") == 1
        looker = Looker(dsn)
        looker.socket.send(raw.query(SLEEP))
        with soon():
            rest, _ = run.communicate("c\n", timeout=PATIENCE)
        answers = looker.socket.until("")
        assert answers[-1] == "end"
        looker.close()
        assert "1 passed" in rest
    finally:
        run.kill()
        run.wait()
