"""Transactions that clients begin outside of tests: what tests see of them, and how they end."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import psycopg2
import pytest
import sqlalchemy
from helpers.four_types import ALL, block, execute
from helpers.waiting import PATIENCE, wait_until
from psycopg_pool import ConnectionPool

from gateway import raw
from gateway.process import INSERT, TAKEN, Client, Process, Raw, Told, numbers
from gateway.raw import FLUSH, SYNC
from pytest_pgmonkey.testing.fixture_value import PGMonkey
from pytest_pgmonkey.testing.isolation import KitError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOT_IN_A_TEST = "none of them can end it"
NEVER_REAL = "unblock()"


# Clients


class ByPsycopg(Client):
    """psycopg in autocommit, where each statement is as it is written."""

    def __init__(self, process: Process) -> None:
        self.conn: Any = self.connect(process)

    def connect(self, process: Process) -> Any:
        return psycopg.connect(process.dsn, autocommit=True)

    @property
    def is_open(self) -> bool:
        return str(self.conn.info.transaction_status.name) in ("INTRANS", "INERROR")

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        try:
            cursor = self.conn.execute(query)
            return list(cursor.fetchall()) if cursor.description else []
        except psycopg.Error as error:
            raise Told(error.sqlstate, str(error)) from None

    def close(self) -> None:
        self.conn.close()


class ByURL(ByPsycopg):
    def connect(self, process: Process) -> Any:
        return psycopg.connect(process.url, autocommit=True)


class ByVariables(ByPsycopg):
    """psycopg is told nothing: libpq's variables lead it."""

    def connect(self, process: Process) -> Any:
        names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
        with pytest.MonkeyPatch.context() as patch:
            for keyword, value in process.by_tcp.items():
                patch.setenv(names.get(keyword, f"PG{keyword.upper()}"), value)
            return psycopg.connect(autocommit=True)


class Implicit(ByPsycopg):
    """psycopg without autocommit, which begins by itself."""

    def connect(self, process: Process) -> Any:
        return psycopg.connect(process.dsn)

    def open(self, *queries: str) -> None:
        for query in queries:
            self.ask(query)


class Pipelined(ByPsycopg):
    """psycopg in pipeline mode: the BEGIN and what follows are one batch."""

    def open(self, *queries: str) -> None:
        with self.conn.pipeline():
            super().open(*queries)


class ByPsycopg2(Client):
    def __init__(self, process: Process) -> None:
        self.conn = psycopg2.connect(process.dsn)
        self.conn.autocommit = True

    @property
    def is_open(self) -> bool:
        return bool(self.conn.get_transaction_status() in (2, 3))

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        try:
            with self.conn.cursor() as cursor:
                cursor.execute(query)
                return cursor.fetchall() if cursor.description else []
        except psycopg2.Error as error:
            raise Told(error.pgcode, str(error)) from None

    def close(self) -> None:
        self.conn.close()


class ByAsyncpg(Client):
    """asyncpg, in an event loop that runs for the time of a statement."""

    def __init__(self, process: Process) -> None:
        self.loop = asyncio.new_event_loop()
        self.conn: Any = self.loop.run_until_complete(asyncpg.connect(process.url))

    @property
    def is_open(self) -> bool:
        return bool(self.conn.is_in_transaction())

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        try:
            return [tuple(row) for row in self.loop.run_until_complete(self.conn.fetch(query))]
        except asyncpg.PostgresError as error:
            raise Told(error.sqlstate, str(error)) from None

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.run_until_complete(self.conn.close())
            self.loop.close()


class Script(Raw):
    """The BEGIN and what follows are one simple query."""

    def open(self, *queries: str) -> None:
        self.ask("; ".join(["BEGIN", *queries]))


class Extended(Raw):
    """Extended queries, each with a Sync of its own."""

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        return self.rows(self.say(raw.run(query), SYNC))


class Batch(Extended):
    """The BEGIN and what follows are one batch up to its Sync, as JDBC sends it."""

    def open(self, *queries: str) -> None:
        self.rows(self.say(*map(raw.run, ("BEGIN", *queries)), SYNC))


CLIENTS = {
    "psycopg": ByPsycopg,
    "psycopg by URL": ByURL,
    "psycopg by variables": ByVariables,
    "psycopg without autocommit": Implicit,
    "psycopg in a pipeline": Pipelined,
    "psycopg2": ByPsycopg2,
    "asyncpg": ByAsyncpg,
    "simple": Raw,
    "script": Script,
    "extended": Extended,
    "batch": Batch,
}


@pytest.fixture(params=CLIENTS.values(), ids=CLIENTS.keys())
def client(process: Process, request: pytest.FixtureRequest) -> Any:
    """A client of each kind, outside of a test."""
    return process.client(request.param)


def told(client: Any, query: str) -> tuple[str | None, str]:
    """Ask for something that is refused."""
    with pytest.raises(Told) as caught:
        client.ask(query)
    return caught.value.sqlstate, caught.value.text


def refuses(client: Any, query: str, sqlstate: str, text: str = "") -> None:
    found, said = told(client, query)
    assert (found, text in said) == (sqlstate, True), (found, said)


# What every client gets


def test_tests_see_it_and_cannot_end_it(process, client):
    """What each of them does is undone by itself, and the transaction goes on after it."""
    client.open(INSERT.format(1))
    seen = [1]
    for run in range(3):
        with process.test() as test:
            assert numbers(test) == client.numbers() == seen
            client.ask(INSERT.format(7))
            assert client.numbers() == [*seen, 7]
            for end in ("COMMIT", "ROLLBACK", "END", "ABORT"):
                refuses(client, end, "57P03", NOT_IN_A_TEST)
            assert client.is_open
        assert client.is_open
        assert client.numbers() == seen
        client.ask(INSERT.format(run + 2))
        seen.append(run + 2)
        assert process.real() == process.at_first
    assert process.numbers() == seen
    client.ask("ROLLBACK")
    assert not client.is_open
    assert process.numbers() == client.numbers() == []


@pytest.mark.parametrize("tests", [0, 1, 2])
def test_a_commit_outside(process, client, tests):
    """It is refused with the advice, and the transaction has ended with it."""
    client.open(INSERT.format(1))
    for _ in range(tests):
        assert process.numbers() == [1]
    refuses(client, "COMMIT", "57P03", NEVER_REAL)
    assert not client.is_open
    assert client.numbers() == process.numbers() == []
    if not isinstance(client, Implicit):  # of which each statement begins a transaction
        refuses(client, INSERT.format(2), "57P03", "outside of a test")
    with process.test() as test:
        client.ask(INSERT.format(3))
        with suppress(Told):
            client.ask("COMMIT")
        assert numbers(test) == [3]


def test_it_ends_with_its_client(process, client):
    """One that goes without a word takes its data with it."""
    client.open(INSERT.format(1))
    assert process.numbers() == [1]
    with process.leaving():
        client.close()
    assert process.numbers() == []


def test_it_is_begun_again_and_again(process, client):
    """Each transaction is a scope of its own, and leaves nothing to the next."""
    for n in range(5):
        client.open(INSERT.format(n))
        assert process.numbers() == [n]
        client.ask("ROLLBACK")
        assert process.numbers() == []


def test_a_failed_one(process, client):
    """Tests see nothing of it, and it may be ended anywhere: nothing is left that could be kept."""
    client.open(INSERT.format(1))
    refuses(client, INSERT.format(1), "23505")
    with process.test() as test:
        assert numbers(test) == []
        refuses(client, "SELECT 1", "25P02")
        client.ask("ROLLBACK")
        assert not client.is_open
        client.ask(INSERT.format(2))
        with suppress(Told):
            client.ask("COMMIT")
        assert numbers(test) == [2]
    assert process.numbers() == []


def test_one_that_fails_in_a_test(process, client):
    """The failure ends with the test: the next finds what was there before."""
    client.open(INSERT.format(1))
    for _ in range(2):
        with process.test():
            client.ask(INSERT.format(2))
            refuses(client, INSERT.format(1), "23505")
            refuses(client, "SELECT 1", "25P02")
        with process.test() as test:
            assert numbers(test) == [1]
            client.ask("SAVEPOINT mine")
            refuses(client, "SELECT nothing", "42703")
            client.ask("ROLLBACK TO mine")
            assert client.numbers() == [1]
    client.ask("ROLLBACK")


def test_a_transaction_that_has_only_read(process, client):
    """It is no scope: it goes on in the test, and is committed there."""
    client.open(TAKEN)
    assert client.is_open
    with process.test() as test:
        client.ask(INSERT.format(1))
        client.ask("COMMIT")
        assert not client.is_open
        assert numbers(test) == client.numbers() == [1]
        with suppress(Told):
            client.ask("COMMIT")
    assert process.numbers() == []


def test_a_transaction_that_has_only_read_for_long(process, client):
    """Tests come and go, and then it writes: a scope like any other."""
    client.open("SELECT 1")
    for _ in range(3):
        assert process.numbers() == []
    client.ask(INSERT.format(1))
    assert process.numbers() == [1]
    client.ask("ROLLBACK")


def test_djangos_pattern(process, client):
    """Savepoints in the set-up of a class, and in each of its tests."""
    client.open("SAVEPOINT outer_one", INSERT.format(1), "RELEASE SAVEPOINT outer_one")
    for _ in range(3):
        with process.test() as test:
            assert numbers(test) == [1]
            client.ask("SAVEPOINT inner_one")
            client.ask(INSERT.format(2))
            client.ask("SAVEPOINT innermost")
            client.ask("DELETE FROM t")
            assert client.numbers() == []
            client.ask("ROLLBACK TO SAVEPOINT innermost")
            client.ask("RELEASE SAVEPOINT innermost")
            assert client.numbers() == [1, 2]
            client.ask("ROLLBACK TO SAVEPOINT inner_one")
            client.ask("RELEASE SAVEPOINT inner_one")
            assert client.numbers() == [1]
    client.ask("ROLLBACK")


# Ends in one message with something else


INSERT_5 = INSERT.format(5)
ENDS: tuple[tuple[list[str], list[str], list[int]], ...] = (
    (["ROLLBACK", "SELECT 1"], ["ROLLBACK", "SELECT 1", "I"], []),
    (["ROLLBACK", "SELECT 1/0"], ["ROLLBACK", "22012", "I"], []),
    ([INSERT_5, "ABORT", "SELECT 1"], ["INSERT 0 1", "ROLLBACK", "SELECT 1", "I"], []),
    (["COMMIT", "SELECT 1"], ["57P03", "I"], []),
    (["SELECT 1", "COMMIT"], ["SELECT 1", "57P03", "I"], []),
    # What could write after the end would be lost: nothing of the message is done.
    (["ROLLBACK", INSERT_5], ["57P03", "T"], [1]),
    (["ROLLBACK", "BEGIN", INSERT_5], ["57P03", "T"], [1]),
    (["ROLLBACK", "BEGIN"], ["57P03", "T"], [1]),
    (["ROLLBACK AND CHAIN"], ["57P03", "T"], [1]),
    (["COMMIT AND CHAIN"], ["57P03", "T"], [1]),
)


@pytest.mark.parametrize("tests", [0, 1])
@pytest.mark.parametrize("shape", ["script", "batch"])
@pytest.mark.parametrize(
    ("queries", "answers", "seen"), ENDS, ids=["; ".join(queries) for queries, _, _ in ENDS]
)
def test_ends_among_other_statements(process, tests, shape, queries, answers, seen):
    """What comes after the end is told as what it is, and what is told to be written is there."""
    client = process.raw()
    client.open(INSERT.format(1))
    for _ in range(tests):
        assert process.numbers() == [1]
    if shape == "script":
        assert client.run("; ".join(queries)) == answers
    else:
        assert client.codes(*map(raw.run, queries), SYNC) == answers
    assert process.numbers() == seen
    client.run("ROLLBACK")
    assert process.numbers() == []


@pytest.mark.parametrize("shape", ["script", "batch"])
def test_no_words_end_it_in_a_test(process, shape):
    """Whatever else is in the message; what came before the refusal is the test's own work."""
    client = process.raw()
    client.open(INSERT.format(1))
    for queries in (
        ["ROLLBACK", "SELECT 1"],
        ["COMMIT", "BEGIN"],
        [INSERT.format(2), "COMMIT"],
        ["COMMIT AND CHAIN"],
        ["ROLLBACK AND CHAIN"],
        ["SAVEPOINT s", "ROLLBACK"],
        ["SELECT 1", "END", INSERT.format(3)],
    ):
        with process.test():
            if shape == "script":
                found = client.run("; ".join(queries))
            else:
                found = client.codes(*map(raw.run, queries), SYNC)
            assert "57P03" in found, (queries, found)
            assert found[-1] in "TE"
        assert process.numbers() == [1], queries
    for refused in ("PREPARE TRANSACTION 'x'", "DISCARD ALL", "VACUUM t", "CREATE DATABASE x"):
        with process.test():
            found = client.run(refused)
            assert found[0] in ("0A000", "25001"), (refused, found)
        assert process.numbers() == [1], refused
    client.run("ROLLBACK")


# Its client goes, or is in the middle of something


@pytest.mark.parametrize("politely", [True, False])
@pytest.mark.parametrize(
    "state", ["idle", "after a write", "failed", "in a statement", "in a COPY", "in a batch"]
)
def test_a_client_that_goes_in_a_test(process, state, politely):
    """The test goes on with the data of before, and no other sees any of it."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.test() as test:
        if state == "after a write":
            client.ask(INSERT.format(2))
        elif state == "failed":
            refuses(client, "SELECT nothing", "42703")
        elif state == "in a statement":
            client.socket.send(raw.query("SELECT pg_sleep(600)"))
            process.until_busy()
        elif state == "in a COPY":
            client.socket.send(raw.query("COPY t FROM STDIN"))
            client.socket.until("G")
            client.socket.send(raw.copy_data("2\tx\n"))
        elif state == "in a batch":
            client.socket.send(raw.run(INSERT.format(2)), FLUSH)
            client.socket.until("C")
        with process.leaving():
            if politely:
                client.socket.send(raw.TERMINATE)
            client.close()
        assert numbers(test) == [1]
        test.execute(INSERT.format(3))
        assert numbers(test) == [1, 3]
    assert process.numbers() == []


@pytest.mark.parametrize("politely", [True, False])
@pytest.mark.parametrize("state", ["in a statement", "in a COPY", "in a batch", "failed"])
def test_a_client_that_goes_outside_of_a_test(process, state, politely):
    """What it has begun is not finished by anybody, and nobody waits for it."""
    client = process.raw()
    client.open(INSERT.format(1))
    if state == "in a statement":
        client.socket.send(raw.query("SELECT pg_sleep(600)"))
        process.until_busy()
    elif state == "in a COPY":
        client.socket.send(raw.query("COPY t FROM STDIN"))
        client.socket.until("G")
    elif state == "in a batch":
        client.socket.send(raw.run(INSERT.format(2)), FLUSH)
        client.socket.until("C")
    else:
        refuses(client, "SELECT nothing", "42703")
    with process.leaving():
        if politely:
            client.socket.send(raw.TERMINATE)
        client.close()
    assert process.numbers() == []


def test_a_statement_that_runs_when_a_test_begins(process):
    """It is cancelled, its client is told, and no test waits for it."""
    client = process.raw()
    client.open(INSERT.format(1))
    client.socket.send(raw.query("SELECT pg_sleep(600)"))
    process.until_busy()
    assert process.numbers() == []
    answers = client.socket.until()
    assert [body["C"] for kind, body in answers if kind == "E"] == ["57014"]
    assert answers[-1] == ("Z", b"E")
    refuses(client, "SELECT 1", "25P02")
    client.ask("ROLLBACK")
    client.open(INSERT.format(2))
    assert process.numbers() == [2]


def test_a_statement_that_runs_when_a_test_ends(process):
    """It is cancelled, and the transaction is there for the next test."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.test():
        client.ask(INSERT.format(2))
        client.socket.send(raw.query("SELECT pg_sleep(600)"))
        process.until_busy()
    answers = client.socket.until()
    assert [body["C"] for kind, body in answers if kind == "E"] == ["57014"]
    with process.test() as test:
        assert numbers(test) == client.numbers() == [1]
    client.ask("ROLLBACK")


def test_a_copy_that_is_open_when_a_test_begins(process):
    """The test begins, and the client is told that its COPY has failed."""
    client = process.raw()
    client.open(INSERT.format(1))
    client.socket.send(raw.query("COPY t FROM STDIN"))
    client.socket.until("G")
    client.socket.send(raw.copy_data("2\tx\n"))
    with process.test() as test:
        assert 2 not in numbers(test)
    client.socket.send(raw.copy_data("3\tx\n"), raw.COPY_DONE)
    answers = client.socket.until()
    assert [kind for kind, _ in answers if kind in "EC"] == ["E"]
    assert answers[-1] == ("Z", b"E")
    client.ask("ROLLBACK")


def test_a_copy_that_is_open_when_a_test_ends(process):
    """It ends with the test; what was there before it is there for the next."""
    client = process.raw()
    client.open(INSERT.format(1))
    shared = process.kit.share()
    with shared as conn:
        conn.execute(INSERT.format(10))
        with process.test():
            client.socket.send(raw.query("COPY t FROM STDIN"))
            client.socket.until("G")
            client.socket.send(raw.copy_data("2\tx\n"))
        client.socket.send(raw.copy_data("3\tx\n"), raw.COPY_DONE)
        answers = client.socket.until()
        assert [kind for kind, _ in answers if kind in "EC"] == ["E"]
        assert answers[-1][1] in (b"T", b"E")
        assert process.numbers() == [1, 10]
    client.ask("ROLLBACK")


def test_a_batch_without_its_sync_when_a_test_begins(process):
    """What it has done is there, and the test need not wait for the Sync."""
    client = process.raw()
    client.open()
    client.socket.send(raw.run(INSERT.format(1)), FLUSH)
    assert client.socket.until("C")[-1] == ("C", ("INSERT 0 1",))
    with process.test() as test:
        assert numbers(test) == [1]
        assert client.say(SYNC) == [("Z", b"T")]
        assert client.numbers() == [1]
    assert process.numbers() == [1]
    client.ask("ROLLBACK")


def test_a_batch_without_its_sync_when_a_test_ends(process):
    """It belongs to the test, and the client goes on in the next."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.test():
        client.socket.send(raw.run(INSERT.format(2)), FLUSH)
        assert client.socket.until("C")[-1] == ("C", ("INSERT 0 1",))
    assert client.say(SYNC)[-1] == ("Z", b"T")
    with process.test() as test:
        assert numbers(test) == client.numbers() == [1]
    client.ask("ROLLBACK")


def test_a_huge_answer_that_is_not_read(process):
    """Neither the begin nor the end of a test waits until somebody reads it."""
    for in_test in (False, True):
        client = process.raw()
        client.open(INSERT.format(1))
        huge = raw.query("SELECT repeat('x', 100000) FROM generate_series(1, 1000)")
        if in_test:
            with process.test():
                client.socket.send(huge)
                process.until_busy()
        else:
            client.socket.send(huge)
            process.until_busy()
        process.kit.begin("rollback")
        process.kit.end()
        client.close()
        assert wait_until(lambda: not process.kit._rollback.has_wider, 10)
        assert process.numbers() == []


# Transactions that keep nothing


FUNCTION = "SELECT current_schema()"  # it could write, as far as its words tell


def test_functions_that_only_read(process):
    """A transaction that has called one is committed as one that has only read, anywhere."""
    client = process.raw()
    client.open(FUNCTION)
    assert client.run("COMMIT") == ["COMMIT", "I"]
    client.open(FUNCTION)
    assert process.numbers() == []
    assert client.run("COMMIT") == ["COMMIT", "I"]
    client.open(FUNCTION)
    with process.test():
        assert client.run("COMMIT") == ["COMMIT", "I"]


def test_functions_that_write(process):
    """They are found out, although the statement is a SELECT."""
    client = process.raw()
    for query in ("SELECT put(1)", "SELECT setval('numbers', 3)", "SELECT lo_create(0)"):
        with suppress(Told):
            client.open("CREATE SEQUENCE numbers", query)
            refuses(client, "COMMIT", "57P03", NEVER_REAL)
            continue
        pytest.fail(query)
    client.open("SELECT put(1)")
    assert process.numbers() == [1]
    refuses(client, "COMMIT", "57P03", NEVER_REAL)


def test_what_was_undone_by_a_savepoint(process):
    """A COMMIT of it says either that there is nothing, or that nothing was kept."""
    client = process.raw()
    client.open("SAVEPOINT s", INSERT.format(1), "ROLLBACK TO s")
    assert process.numbers() == []
    assert client.run("COMMIT") in (["COMMIT", "I"], ["57P03", "I"])
    assert client.run("SELECT 1") == ["SELECT 1", "I"]


def test_the_modes_of_a_transaction(process):
    """They hold in the tests, too: nothing else was asked for."""
    client = process.raw()
    for mode, shown in (("SERIALIZABLE", "serializable"), ("REPEATABLE READ", "repeatable read")):
        client.ask(f"BEGIN ISOLATION LEVEL {mode}")
        client.ask(INSERT.format(1))
        for _ in range(2):
            with process.test() as test:
                assert numbers(test) == [1]
                assert client.ask("SHOW transaction_isolation") == [(shown,)]
        client.ask("ROLLBACK")
    client.ask("BEGIN READ ONLY")
    client.ask(FUNCTION)
    refuses(client, INSERT.format(1), "25006")
    client.ask("ROLLBACK")
    client.ask("BEGIN READ ONLY")
    client.ask(FUNCTION)
    with process.test():
        refuses(client, INSERT.format(1), "25006")
    client.ask("ROLLBACK")


# Settings, and what else belongs to a transaction or a session


SETS = ["SET a.b = 'mine'", "SELECT set_config('a.b', 'mine', false)", "SET LOCAL a.b = 'mine'"]


@pytest.mark.parametrize("query", SETS)
def test_settings_from_before_the_first_write(process, query):
    """They are made in the transaction, and hold in it as before the write."""
    client = process.raw()
    client.open(query, INSERT.format(1))
    assert client.ask("SHOW a.b") == [("mine",)]
    client.ask("ROLLBACK")


SURVIVES = pytest.mark.xfail(strict=True, reason="SET before the first write survives the ROLLBACK")


@pytest.mark.parametrize("query", [pytest.param(SETS[0], marks=SURVIVES), *SETS[1:]])
def test_settings_from_before_the_first_write_that_are_rolled_back(process, query):
    """They are gone with the transaction in which they were made."""
    client = process.raw()
    client.open(query, INSERT.format(1))
    client.ask("ROLLBACK")
    assert client.ask("SELECT current_setting('a.b', true)")[0][0] in (None, "")


def test_settings_of_a_transaction_that_has_only_read(process):
    """They go on with it in the test, and are kept where it is committed."""
    client = process.raw()
    client.open("SET search_path = pg_catalog")
    with process.test():
        assert client.ask("SHOW search_path") == [("pg_catalog",)]
        client.ask("COMMIT")
        assert client.ask("SHOW search_path") == [("pg_catalog",)]
    assert client.ask("SHOW search_path") == [("pg_catalog",)]


@pytest.mark.parametrize("how", ["SET", "SET LOCAL"])
def test_settings_across_tests(process, how):
    """They last as long as the transaction; local ones are in force for nobody in tests."""
    client = process.raw()
    client.open(INSERT.format(1), f"{how} a.b = 'mine'")
    in_tests = "mine" if how == "SET" else ""
    for n in range(3):
        with process.test() as test:
            (found,) = test.execute("SELECT current_setting('a.b', true)").fetchone()
            assert found in (None, "")
            assert client.ask("SHOW a.b") == [(in_tests,)], n
            client.ask("SET a.b = 'of a test'")
        assert client.ask("SHOW a.b") == [("mine",)]
    client.ask("ROLLBACK")
    assert client.ask("SELECT current_setting('a.b', true)")[0][0] in (None, "")
    with process.test():
        assert client.ask("SELECT current_setting('a.b', true)")[0][0] in (None, "")


def test_what_is_local_to_the_transaction(process):
    """What is local to the transaction limits nobody in the tests."""
    client = process.raw()
    client.open(INSERT.format(1), "SET LOCAL search_path = nowhere")
    for _ in range(2):
        with process.test() as test, process.kit.handles.make("normal") as conn:
            assert numbers(test) == numbers(conn) == [1]
    refuses(client, TAKEN, "42P01")
    client.ask("ROLLBACK")


def test_the_search_path_of_a_tenant(process):
    """What `SET` has chosen before the first write decides where the rows go."""
    client = process.raw()
    client.open(
        "CREATE SCHEMA tenant",
        "CREATE TABLE tenant.t (n int)",
        "SET search_path = tenant",
        INSERT.format(1),
    )
    with process.test() as test:
        assert client.numbers() == [1]
        assert numbers(test) == []
        assert test.execute("SELECT n FROM tenant.t").fetchall() == [(1,)]
    client.ask("ROLLBACK")
    conn = process.psycopg()
    conn.execute("SET search_path = information_schema, public")
    conn.execute(INSERT.format(2))
    assert conn.execute("SHOW search_path").fetchone() == ("information_schema, public",)
    conn.rollback()


@pytest.mark.parametrize("action", ["PRESERVE ROWS", "DELETE ROWS", "DROP"])
def test_temporary_tables(process, action):
    """They last as long as the transaction, whatever they do at its commit."""
    client = process.raw()
    client.open(f"CREATE TEMP TABLE own (n int) ON COMMIT {action}", "INSERT INTO own VALUES (1)")
    for _ in range(2):
        with process.test():
            assert client.ask("SELECT n FROM own") == [("1",)]
            client.ask("INSERT INTO own VALUES (2)")
        assert client.ask("SELECT n FROM own") == [("1",)]
    client.ask("ROLLBACK")
    refuses(client, "SELECT n FROM own", "42P01")


@pytest.mark.parametrize("hold", ["", "WITH HOLD "])
def test_cursors(process, hold):
    """A cursor of the transaction's is there in the tests, which may read on."""
    client = process.raw()
    client.open(INSERT.format(1), f"DECLARE c CURSOR {hold}FOR SELECT generate_series(1, 9)")
    assert client.ask("FETCH c") == [("1",)]
    with process.test():
        assert client.ask("FETCH c") == [("2",)]
        client.ask("DECLARE own CURSOR FOR SELECT 'own'")
        assert client.ask("FETCH own") == [("own",)]
    with process.test():
        refuses(client, "FETCH own", "34000")
    client.ask("ROLLBACK")


def test_prepared_statements(process):
    """Those of the protocol outlive the transaction, and each of the tests."""
    client = process.raw()
    client.say(raw.parse("SELECT count(*) FROM t WHERE n < $1", "before", (23,)), SYNC)
    client.open(INSERT.format(1))
    client.say(raw.parse("SELECT max(n) FROM t WHERE n < $1", "inside", (23,)), SYNC)

    def both() -> list[Any]:
        found = [
            client.rows(client.say(raw.bind("9", name=name), raw.execute(), SYNC))
            for name in ("before", "inside")
        ]
        return [row[0] for rows in found for row in rows]

    for n in range(2):
        assert both() == ["1", "1"]
        with process.test():
            assert both() == ["1", "1"]
            client.say(raw.parse("SELECT 'own'", f"own {n}"), SYNC)
        assert client.say(raw.bind(name=f"own {n}"), raw.execute(), SYNC)[0] == ("D", [b"own"])
    client.ask("ROLLBACK")
    assert both() == ["0", None]


def test_savepoints_from_outside_of_the_test(process):
    """A test cannot go back behind its own begin; its client may, after the tests."""
    client = process.raw()
    client.open(INSERT.format(1), "SAVEPOINT s", INSERT.format(2))
    with process.test():
        assert client.run("ROLLBACK TO s")[-1] in "TE"
    with process.test():
        assert client.run("RELEASE s")[-1] in "TE"
    assert process.numbers() == [1, 2]
    assert client.run("ROLLBACK TO s") == ["ROLLBACK", "T"]
    assert process.numbers() == [1]
    assert client.run("RELEASE s") == ["RELEASE", "T"]
    assert process.numbers() == [1]
    client.ask("ROLLBACK")


# What is written


def test_constraints(process):
    """They judge what tests write by what was written outside, and the other way round."""
    client = process.raw()
    client.open(INSERT.format(1), "INSERT INTO soon VALUES (1, 1)")
    for _ in range(2):
        with process.test() as test:
            with pytest.raises(psycopg.errors.UniqueViolation):
                test.execute(INSERT.format(1))
            with pytest.raises(psycopg.errors.ForeignKeyViolation):
                test.execute("DELETE FROM t")
            test.execute("INSERT INTO late VALUES (1, 1)")
            assert numbers(test) == [1]
        with process.test():
            refuses(client, "INSERT INTO soon VALUES (2, 99)", "23503")
    client.ask("ROLLBACK")


def test_deferred_constraints(process):
    """What is put right before the test begins is right; in a test they are its own."""
    client = process.raw()
    client.open("INSERT INTO late VALUES (1, 1)", INSERT.format(1))
    for _ in range(2):
        with process.test() as test:
            assert test.execute("SELECT id FROM late").fetchall() == [(1,)]
            client.ask("INSERT INTO late VALUES (2, 99)")
            refuses(client, "SET CONSTRAINTS ALL IMMEDIATE", "23503")
    with process.test():
        client.ask("INSERT INTO late VALUES (3, 99)")
    with process.test() as test:
        assert test.execute("SELECT id FROM late").fetchall() == [(1,)]
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            test.execute("INSERT INTO late VALUES (3, 99)")
    client.ask("ROLLBACK")


def test_a_deferred_constraint_that_is_violated(process):
    """Nothing is lost silently: somebody is told, and the client as long as its data is gone."""
    client = process.raw()
    client.open(INSERT.format(1), "INSERT INTO late VALUES (1, 99)")
    seen: list[Any] = []
    for _ in range(2):
        with suppress(psycopg.errors.ForeignKeyViolation, KitError):
            seen.append(process.numbers())
    answer = client.run("SELECT n FROM late")
    if answer[0] == "SELECT 1":
        assert seen == [[1], [1]]  # it is not checked before its own commit
    else:
        assert answer == ["25P02", "E"]
        assert [1] not in seen
    client.ask("ROLLBACK")


def test_definitions(process):
    """Tables, types and functions that were made outside, and what tests do to them."""
    client = process.raw()
    client.open(
        "CREATE TYPE colour AS ENUM ('red', 'blue')",
        "CREATE TABLE own (id int GENERATED ALWAYS AS IDENTITY, c colour)",
        "INSERT INTO own (c) VALUES ('red')",
        "CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n'",
        "ALTER TABLE t ADD more text DEFAULT 'more'",
        INSERT.format(1),
        "ALTER TABLE late ADD CONSTRAINT few CHECK (id < 5)",
    )
    for _ in range(2):
        with process.test() as test:
            query = "SELECT twice(id), c::text, (SELECT more FROM t) FROM own"
            assert test.execute(query).fetchall() == [(2, "red", "more")]
            with pytest.raises(psycopg.errors.CheckViolation):
                test.execute("INSERT INTO late VALUES (5)")
            test.execute("INSERT INTO own (c) VALUES ('blue')")
            test.execute("ALTER TABLE own DROP c")
            test.execute("DROP TABLE t CASCADE")
    client.ask("DROP TABLE own")
    with process.test() as test, pytest.raises(psycopg.errors.UndefinedTable):
        test.execute("TABLE own")
    client.ask("ROLLBACK")


def test_copy(process):
    """In both directions, outside and in tests, by psycopg and by asyncpg."""
    conn = process.psycopg()
    with conn.cursor() as cursor, cursor.copy("COPY t FROM STDIN") as copy:
        for n in range(1000):
            copy.write_row((n, "wider"))
    other: ByAsyncpg = process.client(ByAsyncpg)
    for _ in range(2):
        with process.test() as test:
            assert test.execute("SELECT count(*), max(x) FROM t").fetchone() == (1000, "wider")
            with conn.cursor() as cursor, cursor.copy("COPY t (n) FROM STDIN") as copy:
                copy.write_row((1000,))
            with conn.cursor() as cursor, cursor.copy("COPY t TO STDOUT") as copy:
                assert len(list(copy.rows())) == 1001
    conn.rollback()
    other.open("SELECT 1")
    records = [(n, "wider") for n in range(1000)]
    other.loop.run_until_complete(other.conn.copy_records_to_table("t", records=records))
    for _ in range(2):
        with process.test() as test:
            assert test.execute("SELECT count(*) FROM t").fetchone() == (1000,)
    other.ask("ROLLBACK")


def test_much_data(process):
    """The first test waits for nothing but its begin, and each sees all of it."""
    client = process.raw()
    client.open("INSERT INTO t SELECT n, repeat('x', 100) FROM generate_series(1, 20000) n")
    for _ in range(40):
        with process.test() as test:
            assert test.execute("SELECT count(*) FROM t").fetchone() == (20000,)
            test.execute("DELETE FROM t WHERE n % 100 = 0")
    client.ask("ROLLBACK")


# Several of them


@pytest.mark.parametrize("how", ["ROLLBACK", "COMMIT", "close"])
def test_two_at_once(process, how):
    """Tests see both. The inner one ends first, and the outer's data is there as before."""
    outer, inner = process.raw(), process.raw()
    outer.open(INSERT.format(1))
    assert process.numbers() == [1]
    inner.open(INSERT.format(2))
    for _ in range(2):
        with process.test() as test:
            assert numbers(test) == outer.numbers() == inner.numbers() == [1, 2]
            inner.ask(INSERT.format(3))
            assert inner.numbers() == [1, 2, 3]
        with process.test():
            outer.ask(INSERT.format(3))
            assert outer.numbers() == [1, 2, 3]
    for client, left in ((inner, [1]), (outer, [])):
        if how == "close":
            with process.leaving():
                client.close()
        else:
            with suppress(Told):
                client.ask(how)
        for _ in range(2):
            assert process.numbers() == left


def test_two_of_which_the_outer_would_end_first(process):
    """Outside of tests it is told at once why not; in tests it works, and nothing is lost."""
    outer, inner = process.raw(), process.raw()
    outer.open(INSERT.format(1))
    inner.open(INSERT.format(2))
    for query in ("ROLLBACK", "COMMIT", INSERT.format(3), "SELECT 1"):
        refuses(outer, query, "57P03", "another transaction was begun")
        with process.test() as test:
            assert numbers(test) == outer.numbers() == inner.numbers() == [1, 2]
    inner.ask("ROLLBACK")
    assert outer.numbers() == process.numbers() == [1]
    outer.ask(INSERT.format(3))
    assert process.numbers() == [1, 3]
    outer.ask("ROLLBACK")


@pytest.mark.parametrize("in_test", [False, True])
def test_two_of_which_the_outer_goes_first(process, in_test):
    """What it has written stays below the inner one's data, until that ends, too."""
    outer, inner = process.raw(), process.raw()
    outer.open(INSERT.format(1))
    inner.open(INSERT.format(2))
    with ExitStack() as stack:
        if in_test:
            stack.enter_context(process.test())
        with process.leaving():
            outer.close()
    assert process.numbers() == [1, 2]
    assert inner.numbers() == [1, 2]
    inner.ask(INSERT.format(3))
    assert process.numbers() == [1, 2, 3]
    inner.ask("ROLLBACK")
    assert process.numbers() == []


def test_many(process):
    """One in the other, ended from the innermost; each time tests see what is left."""
    clients = [process.raw() for _ in range(6)]
    for n, client in enumerate(clients):
        client.open(INSERT.format(n))
        assert process.numbers() == [*range(n + 1)]
    for n in reversed(range(6)):
        if n % 2:
            clients[n].ask("ROLLBACK")
        else:
            with process.leaving():
                clients[n].close()
        assert process.numbers() == [*range(n)]


@pytest.mark.parametrize("order", ["module, client", "client, module", "module, client, class"])
def test_together_with_module_and_class(process, order):
    """Each sees what was there before it, tests see all, and each takes its own with it."""
    client = process.raw()
    expected: list[int] = []
    with ExitStack() as stack:
        for n, name in enumerate(order.split(", ")):
            if name == "client":
                client.open(INSERT.format(n))
                stack.callback(client.ask, "ROLLBACK")
                assert client.numbers() == [*expected, n]
            else:
                shared = stack.enter_context(process.kit.share())
                shared.execute(INSERT.format(n))
                assert numbers(shared) == [*expected, n]
            expected.append(n)
            for _ in range(2):
                with process.test() as test:
                    assert numbers(test) == expected
                    test.execute("DELETE FROM t")
                with process.test() as test:
                    if "client" in order.split(", ")[: n + 1]:
                        assert client.numbers() == expected
                        client.ask("DELETE FROM t")
    assert process.numbers() == []


@pytest.mark.parametrize("in_test", [False, True])
def test_a_client_that_goes_beneath_a_module_s_data(process, in_test):
    """The module's tests go on with both, and afterwards there is nothing."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.kit.share() as shared:
        shared.execute(INSERT.format(10))
        assert process.numbers() == [1, 10]
        with ExitStack() as stack:
            if in_test:
                stack.enter_context(process.test())
            with process.leaving():
                client.close()
        for _ in range(2):
            assert process.numbers() == [1, 10]
        assert numbers(shared) == [1, 10]
    assert process.numbers() == []


# Clone isolation


def test_a_test_in_a_clone(process):
    """It is refused in one sentence as long as such a transaction is open, and then goes well."""
    client = process.raw()
    client.open(INSERT.format(1))
    for _ in range(2):
        with pytest.raises(KitError, match="a clone does not have that data") as caught:
            process.kit.begin("clone")
        assert "\n" not in str(caught.value)
        assert process.numbers() == [1]
    client.ask("ROLLBACK")
    with process.test("clone") as test:
        assert numbers(test) == client.numbers() == []
        client.open(INSERT.format(2))
        client.ask("COMMIT")
        assert numbers(test) == [2]
    client.open(INSERT.format(3))
    with pytest.raises(KitError, match="a clone does not have that data"):
        process.kit.begin("clone")
    with process.leaving():
        client.close()
    with process.test("clone") as test:
        assert numbers(test) == []


def test_a_transaction_that_has_only_read_in_a_clone(process):
    """It goes on there as a real one."""
    client = process.raw()
    client.open(TAKEN)
    with process.test("clone") as test:
        client.ask(INSERT.format(1))
        assert numbers(test) == []
        client.ask("COMMIT")
        assert numbers(test) == [1]


# Beside it: handles, connections of tests, unblock()


@pytest.mark.parametrize("type_", ALL)
def test_handles_beside_it(process, type_):
    """They see its data, and it sees what they commit, and nothing of what they do not."""
    client = process.raw()
    client.open(INSERT.format(1))

    async def work() -> None:
        handle = process.kit.handles.make(type_)
        for n in (2, 3):
            async with block(handle) as conn:
                await execute(conn, INSERT.format(n))
        with suppress(ZeroDivisionError):
            async with block(handle) as conn:
                await execute(conn, INSERT.format(4))
                raise ZeroDivisionError
        assert client.numbers() == [1, 2, 3]
        async with block(handle) as conn:
            await execute(conn, "DELETE FROM t WHERE n = 1")
        assert client.numbers() == [2, 3]
        # From now on it has the session to itself: it can never commit.
        client.ask(INSERT.format(5))
        assert client.numbers() == [2, 3, 5]

    for _ in range(2):
        with process.test():
            asyncio.run(work())
        assert process.numbers() == client.numbers() == [1]
    client.ask("ROLLBACK")


def test_connections_of_the_test_beside_it(process):
    """Those of `pgmonkey.dsn` see its data, commit, and end with the test."""
    client = process.raw()
    client.open(INSERT.format(1))
    for _ in range(2):
        with process.test() as test, psycopg.connect(test.dsn) as conn:
            assert numbers(conn) == [1]
            conn.execute(INSERT.format(2))
            conn.commit()
            assert client.numbers() == [1, 2]
    client.ask("ROLLBACK")


def test_readers_do_not_wait_for_it(process):
    """In a test it has written nothing yet: everybody takes turns as with any reader."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.waiting(0.1), process.test() as test, psycopg.connect(test.dsn) as conn:
        for _ in range(3):
            assert client.numbers() == numbers(conn) == numbers(test) == [1]
    with process.waiting(0.1), process.test(refused=1) as test:
        client.ask(INSERT.format(2))
        with pytest.raises(psycopg.OperationalError, match=r"waited 0\.1 s for .* a client"):
            test.execute("SELECT 1")
    client.ask("ROLLBACK")


@pytest.fixture
def clean(process: Process) -> Iterator[None]:
    """Take back what a test writes for good."""
    yield
    process.stack.close()
    process.real("DELETE FROM t RETURNING n")


def test_unblock_beside_it(process, clean):
    """What others write for good is there for all tests; a wider transaction stays what it is."""
    client = process.raw()
    client.open(INSERT.format(1))
    with process.database.unblock():
        with psycopg.connect(process.dsn) as conn:
            conn.execute(INSERT.format(5))
        client.ask(INSERT.format(2))
        refuses(client, "COMMIT", "57P03")
    assert process.real(TAKEN) == [(5,)]
    assert process.numbers() == [5]


def test_a_reader_that_writes_in_unblock(process, clean):
    """A transaction that has only read goes on there: what it commits is real."""
    conn = process.psycopg()
    assert numbers(conn) == []
    with process.database.unblock():
        conn.execute(INSERT.format(1))
        conn.commit()
    assert process.real(TAKEN) == [(1,)]
    assert process.numbers() == [1]


@pytest.mark.parametrize("begun", [False, True])
def test_unblock_waits_for_no_reader(process, begun):
    """Whoever has read outside keeps no lock on what is changed for good."""
    reader = process.psycopg(autocommit=not begun)
    assert numbers(reader) == []
    with process.database.unblock(), process.kit.handles.make("normal") as conn:
        conn.execute("SET LOCAL lock_timeout = '5s'")
        conn.execute("ALTER TABLE t ADD y int")
        conn.rollback()
    assert numbers(reader) == []


# Pools, engines, event loops


def test_a_pool_that_is_closed_in_a_test(process):
    """A connection with such a transaction is given back, or the pool goes: the data goes, too."""
    for how in ("close", "putconn"):
        pool = ConnectionPool(process.dsn, min_size=1, max_size=2, open=True)
        conn = pool.getconn()
        conn.execute(INSERT.format(1))
        with process.test() as test:
            with pool.connection() as other:
                assert numbers(other) == [1]
            with process.leaving():
                if how == "putconn":
                    pool.putconn(conn)  # rolls back, which is refused: it is discarded
                else:
                    pool.close()
                    conn.close()
            assert numbers(test) == [1]
        assert process.numbers() == []
        pool.close()


def test_an_engine_that_is_disposed_in_a_test(process):
    """SQLAlchemy's connections are rolled back and closed: the test keeps what it has seen."""
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        connect_args=dict(process.conninfo),
        pool_reset_on_return="rollback",
    )
    with process.test():
        pass
    conn = engine.connect()
    conn.execute(sqlalchemy.text(INSERT.format(1)))
    with process.test() as test:
        assert conn.execute(sqlalchemy.text(TAKEN)).scalars().all() == [1]
        with engine.begin() as other:
            assert other.execute(sqlalchemy.text(TAKEN)).scalars().all() == [1]
        with conn.begin_nested() as nested:
            conn.execute(sqlalchemy.text(INSERT.format(2)))
            nested.rollback()
        with process.leaving():
            engine.dispose()
            conn.invalidate()
        assert numbers(test) == [1]
    assert process.numbers() == []
    conn = engine.connect()
    conn.execute(sqlalchemy.text(INSERT.format(3)))
    assert process.numbers() == [3]
    conn.close()  # rolls back
    engine.dispose()
    assert process.numbers() == []


def test_in_an_event_loop(process):
    """Tests that begin and end in the loop of the clients do not wait for them in vain."""

    async def program() -> None:
        conn = await psycopg.AsyncConnection.connect(process.dsn)
        other = await asyncpg.connect(process.url)
        await conn.execute(INSERT.format(1))
        transaction = other.transaction()
        await transaction.start()
        await other.execute(INSERT.format(2))
        for _ in range(3):
            with process.test() as test:
                assert numbers(test) == [1, 2]
                assert await (await conn.execute(TAKEN)).fetchall() == [(1,), (2,)]
                async with other.transaction():
                    await other.execute(INSERT.format(3))
                assert len(await other.fetch(TAKEN)) == 3
                with pytest.raises(asyncpg.CannotConnectNowError):
                    await other.execute("COMMIT")
        sleep = asyncio.create_task(other.execute("SELECT pg_sleep(600)"))
        assert await asyncio.to_thread(lambda: wait_until(lambda: process.sessions[1].member.busy))
        assert process.numbers() == [1]  # it is cancelled
        with pytest.raises(asyncpg.QueryCanceledError):
            await sleep
        await transaction.rollback()
        await other.close()
        await conn.rollback()
        await conn.close()

    asyncio.run(program())


# Many tests beside a client that never stops

HAMMER = """
import mmap, struct, sys
import psycopg

dsn, path, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(path, "r+b") as file:
    shared = mmap.mmap(file.fileno(), 24)
conn = psycopg.connect(dsn, autocommit=True)
conn.execute("BEGIN")
for n in range(1, most + 1):
    shared[0:8] = struct.pack("Q", n)
    assert conn.execute("INSERT INTO t VALUES (%s)", [n]).statusmessage == "INSERT 0 1"
    shared[8:16] = struct.pack("Q", n)
    if shared[16:24] != bytes(8):
        break
rows = conn.execute("SELECT count(*) FROM t").fetchone()[0]
assert 0 < rows <= n, (rows, n)
print("done")
"""


class Progress:
    """What a writer in another process has sent, and what it was answered."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(24))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 24)

    def _read(self, at: int) -> int:
        return int(struct.unpack("Q", self._shared[at : at + 8])[0])

    @property
    def sent(self) -> int:
        return self._read(0)

    @property
    def answered(self) -> int:
        return self._read(8)

    def passes(self, number: int, child: subprocess.Popen[str]) -> bool:
        """Wait until this one is answered; false where the writer has ended before."""
        return wait_until(lambda: self.answered > number or child.poll() is not None)

    def stop(self) -> None:
        self._shared[16:24] = struct.pack("Q", 1)


def test_a_writer_in_another_process_that_never_stops(process, tmp_path):
    """No test sees a row of another's, each sees all that was written before it."""
    progress = Progress(tmp_path / "progress")
    command = [sys.executable, "-c", HAMMER, process.dsn, str(tmp_path / "progress"), "200000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept: set[int] = set()
    undone: set[int] = set()
    outside, looked = 1, 0
    try:
        assert progress.passes(20, child)
        for _ in range(60):
            kept.update(range(outside, progress.answered + 1))
            process.kit.begin("rollback")
            inside = progress.sent + 1
            with process.waiting(0.02), suppress(psycopg.OperationalError):
                found = set(numbers(PGMonkey(process.kit)))  # where the client has not the turn
                assert kept <= found
                assert not undone & found
                looked += 1
            assert progress.passes(inside, child)
            undone.update(range(inside, progress.answered + 1))
            failures, _ = process.kit.end()
            assert failures == []
            outside = progress.sent + 1
            assert progress.passes(outside, child)
        assert child.poll() is None
    finally:
        progress.stop()
        told, problems = child.communicate(timeout=PATIENCE)
    assert (told, problems) == ("done\n", "")
    assert looked > 5
    assert kept
    assert undone


class Visitor:
    """Comes, begins, writes, looks and goes, again and again, in a thread."""

    def __init__(self, process: Process, number: int) -> None:
        self.wrote = 0
        self.problems: list[Any] = []
        self._process = process
        self._number = number
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(PATIENCE)

    def _run(self) -> None:
        turn = 0
        while not self._stop.is_set() and not self.problems:
            turn += 1
            conn = psycopg.connect(self._process.dsn, autocommit=True)
            try:
                self._visit(conn, turn)
            except psycopg.Error as error:
                # Another has the turn or is inside of this one, or a test has begun or ended.
                if error.sqlstate not in ("55P03", "25P02", "57P01", "57P03", "57014"):
                    self.problems.append(error)
            except BaseException as error:
                self.problems.append(error)
            finally:
                conn.close()

    def _visit(self, conn: psycopg.Connection[Any], turn: int) -> None:
        conn.execute("BEGIN")
        row = self._number + 10 * turn
        conn.execute(INSERT.format(row))
        assert row in numbers(conn)
        self.wrote += 1
        if turn % 3:
            conn.execute("ROLLBACK" if turn % 2 else "COMMIT")


def written_since(before: int, visitors: list[Visitor]) -> bool:
    return sum(visitor.wrote for visitor in visitors) > before


def read_repeatedly(process: Process) -> tuple[int, ...]:
    """Give what a transaction of a test sees, which has the session to itself."""
    with process.kit.handles.make("normal") as conn:
        conn.execute(INSERT.format(0))
        first = numbers(conn)
        for _ in range(5):
            assert numbers(conn) == first
        return tuple(first)


def test_clients_that_come_and_go_while_tests_run(process):
    """What a test reads is the same all the time, and nothing of theirs is left in the end."""
    seen: set[tuple[int, ...]] = set()
    with process.waiting(0.2):
        visitors = [Visitor(process, n) for n in (1, 2, 3)]
        for visitor in visitors:
            visitor.thread.start()
        try:
            for _ in range(40):
                before = sum(visitor.wrote for visitor in visitors)
                assert wait_until(partial(written_since, before, visitors))
                process.kit.begin("rollback")
                try:
                    with suppress(psycopg.OperationalError):  # a wait for a visitor was in vain
                        seen.add(read_repeatedly(process))
                finally:
                    failures, _ = process.kit.end()
                assert all("was still waiting" in failure for failure in failures)
        finally:
            for visitor in visitors:
                visitor.stop()
    assert [problem for visitor in visitors for problem in visitor.problems] == []
    assert all(found[0] == 0 for found in seen)
    assert len(seen) > 1


# In runs of pytest


def test_whole_runs(project, run):
    """Fixtures of session, module and class scope; a clone is refused in between, by one line."""
    project.makeconftest(
        """
        import psycopg, pytest

        @pytest.fixture(scope="session")
        def session_client(pgmonkey_dsn, pgmonkey_database):
            with psycopg.connect(pgmonkey_dsn) as conn:
                conn.execute("INSERT INTO item (name) VALUES ('session')")
                yield conn
                conn.rollback()
        """
    )
    project.makepyfile(
        """
        import psycopg, pytest
        from app import add, names
        from psycopg import errors

        def of(conn):
            return [x for x, in conn.execute("SELECT name FROM item ORDER BY name")]

        @pytest.fixture(scope="module")
        def module_client(session_client, pgmonkey_dsn):
            with psycopg.connect(pgmonkey_dsn, autocommit=True) as conn:
                conn.execute("BEGIN")
                conn.execute("INSERT INTO item (name) VALUES ('module')")
                yield conn
                conn.execute("ROLLBACK")

        class TestClass:
            @pytest.fixture(scope="class", autouse=True)
            def data(self, module_client, pgmonkey_url):
                with psycopg.connect(pgmonkey_url, autocommit=True) as conn:
                    conn.execute("BEGIN")
                    conn.execute("SAVEPOINT s1")
                    conn.execute("INSERT INTO item (name) VALUES ('class')")
                    conn.execute("RELEASE SAVEPOINT s1")
                    TestClass.conn = conn
                    yield
                    conn.execute("ROLLBACK")

            @pytest.mark.parametrize("n", range(3))
            def test_sees_all(self, pgmonkey, n):
                assert names() == of(self.conn) == ["class", "module", "session"]
                add("handle")
                assert of(self.conn) == ["class", "handle", "module", "session"]
                with self.conn.transaction(force_rollback=True):
                    self.conn.execute("DELETE FROM item")
                for end in ("COMMIT", "ROLLBACK"):
                    with pytest.raises(errors.CannotConnectNow, match="none of them can end it"):
                        self.conn.execute(end)

            @pytest.mark.asyncio
            async def test_async(self, pgmonkey_async_pool):
                async with pgmonkey_async_pool as conn:
                    cursor = await conn.execute("SELECT count(*) FROM item")
                    assert await cursor.fetchone() == (3,)

            @pytest.mark.pgmonkey(isolation="clone")
            def test_cloned(self, pgmonkey):
                raise AssertionError("it does not get here")

        def test_after_the_class(module_client, session_client, pgmonkey):
            assert of(module_client) == of(session_client) == names() == ["module", "session"]

        @pytest.fixture
        def in_teardown(module_client):
            yield
            with pytest.raises(errors.CannotConnectNow):
                module_client.execute("ROLLBACK")

        def test_teardown(pgmonkey, in_teardown):
            pass

        @pytest.mark.parametrize("n", range(2))
        def test_module_and_class_fixtures_of_ours(module_client, pgmonkey_module, pgmonkey, n):
            if not n:
                pgmonkey_module  # asked for first here
            assert names() == ["module", "session"]
        """,
        test_other="""
        import pytest
        from app import names

        def test_another_module(session_client, pgmonkey):
            assert names() == ["session"]
        """,
        test_zz_without="""
        import pytest
        from app import names

        @pytest.mark.pgmonkey
        def test_the_session_s_is_still_open():
            assert names() == ["session"]
        """,
    )
    result = run("-v")
    result.assert_outcomes(passed=10, errors=1)
    result.stdout.fnmatch_lines(["pgmonkey: a client has written in a transaction that it began*"])
    text = result.stdout.str()
    assert text.count("a clone does not have that data") <= 2  # the line, and the summary
    assert "Traceback" not in text


def test_a_connection_from_before_any_test(project, run):
    """One that the application opens when it is imported, which has read and not committed."""
    (project.path / "shop.py").write_text(
        "import os, psycopg\n"
        "conn = psycopg.connect(os.environ['DATABASE_URL'])\n"
        "version = conn.execute('SELECT version()').fetchone()\n"
        "with psycopg.connect(os.environ['DATABASE_URL']) as other:\n"
        "    try:\n"
        "        other.execute('CREATE TABLE early ()')\n"
        "    except psycopg.errors.CannotConnectNow as error:\n"
        "        refused = str(error)\n"
        "    other.rollback()\n"
    )
    project.makeini(
        """
        [pytest]
        pgmonkey_schema = schema.sql
        pgmonkey_env = DATABASE_URL = url
        pythonpath = .
        """
    )
    project.makepyfile(
        """
        import psycopg, pytest
        import shop

        def insert(name):
            shop.conn.execute("INSERT INTO item (name) VALUES (%s)", [name])

        def names():
            return [x for x, in shop.conn.execute("SELECT name FROM item")]

        def test_the_first_goes_on_with_it(pgmonkey):
            assert "outside of a test" in shop.refused
            insert("first")
            shop.conn.commit()
            assert pgmonkey.execute("SELECT name FROM item").fetchall() == [("first",)]

        def test_the_second_begins_anew():
            assert names() == []
            insert("second")

        def test_the_third_is_told():
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                names()
            shop.conn.rollback()
            assert names() == []
            shop.conn.rollback()

        @pytest.fixture(scope="class")
        def wider():
            insert("wider")
            yield
            shop.conn.rollback()

        class TestWider:
            @pytest.mark.parametrize("n", range(2))
            def test_sees(self, wider, pgmonkey, n):
                assert pgmonkey.execute("SELECT name FROM item").fetchall() == [("wider",)]
                insert("own")
                assert names() == ["wider", "own"]
                with pytest.raises(psycopg.errors.CannotConnectNow):
                    shop.conn.commit()

        def test_afterwards():
            assert names() == []
        """
    )
    run("-v").assert_outcomes(passed=6)


def test_a_child_that_is_killed(process):
    """A process that goes without a word takes its transaction with it."""
    program = "import os, psycopg, sys; c = psycopg.connect(sys.argv[1]); "
    program += "c.execute('INSERT INTO t VALUES (1)'); print('there', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, process.dsn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        assert process.numbers() == [1]
        with process.test() as test:
            assert numbers(test) == [1]
            with process.leaving():
                child.kill()
            assert numbers(test) == [1]
    finally:
        child.kill()
        child.communicate()
    assert process.numbers() == []
