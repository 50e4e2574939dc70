"""The gateway's side of the protocol, message by message, is a real server's."""

from __future__ import annotations

import itertools
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.waiting import PATIENCE

from gateway import raw
from gateway.clients import PLACES, World, twin
from gateway.raw import FLUSH, SYNC, RawClient
from pytest_pgmonkey.testing.sandbox.core.backend import Backend

if TYPE_CHECKING:
    from gateway.clients import Stage


def connect(world: World, *, quiet: bool = True, minor: int = 0, **parameters: str) -> RawClient:
    """Give a client that has started, and is closed with the program."""
    client = RawClient(world.conninfo)
    world.stack.callback(client.close)
    answer = client.start(minor, **parameters)
    if not quiet:
        parameters_told = sorted(body for kind, body in answer if kind == "S")  # in any order
        world.note(parameters_told, [each for each in answer if each[0] != "S"])
    return client


def ask(world: World, client: RawClient, *data: bytes) -> None:
    world.note("asked")
    world.noted += client.ask(*data)


# Starting


@twin
def test_start(world):
    """Protocol 3.0, with its parameters and a key of four bytes."""
    connect(world, quiet=False)
    connect(world, quiet=False, application_name="mine", timezone="Asia/Tokyo", datestyle="german")
    connect(world, quiet=False, options="-c search_path=public -c a.b=c -cintervalstyle=iso_8601")


@twin
def test_start_with_newer_protocols(world):
    """3.2 has longer keys; what is newer or unknown is negotiated down."""
    connect(world, quiet=False, minor=2)
    connect(world, quiet=False, minor=2, **{"_pq_.own": "1", "_pq_.other": "x"})
    connect(world, quiet=False, **{"_pq_.own": "1"})
    connect(world, quiet=False, minor=99)


@twin
def test_start_with_requests_for_encryption(world):
    """Both are refused, and the client goes on in plain text."""
    client = RawClient(world.conninfo)
    world.stack.callback(client.close)
    for request in (raw.GSSENC, raw.SSL):
        client.send(request)
        world.note(client.exactly(1))
    world.note(client.start()[-1])
    ask(world, client, raw.query("SELECT 1"))


@twin
def test_start_that_fails(world):
    """By its settings or its version; the socket is closed afterwards."""
    for parameters in ({"timezone": "nonsense"}, {"options": "-c nonsense=1"}):
        client = RawClient(world.conninfo)
        answer = client.start(**parameters)
        world.note(answer[-1], [(m[1]["C"], m[1]["S"]) for m in answer if m[0] == "E"])
        client.close()
    client = RawClient(world.conninfo)
    client.send(raw.startup(2 << 16, {"user": "x"}))
    answer = client.until()
    world.note(answer[-1])  # the server's words are in the form of version 2
    client.close()


# Simple queries


@twin
def test_simple_queries(world):
    """Rows, nothing, errors with positions, and several statements in one."""
    client = connect(world)
    for text in (
        "SELECT 1 AS a, 'x' AS b, NULL",
        "",
        "  ; -- nothing\n",
        "INSERT INTO t VALUES (1, 'one'); SELECT x FROM t",
        "SELECT 1; SELECT nothing; SELECT 2",
        "SELECT 1/0; SELECT 1",
        "INSERT INTO t VALUES (2); SELECT 1/0",
        "SELECT noisy('x'); SELECT noisy('y')",
        "SELEC 1",
        "SELECT 1; SELEC 1",
        "BEGIN; SELECT 1;  SELECT nothing",
        "SELECT 1",
        "",
        "SELECT 1; ROLLBACK",
        "ROLLBACK; INSERT INTO t VALUES (3); COMMIT;   SELECT 'ä' || nothing",
        "ROLLBACK",
        "BEGIN; INSERT INTO t VALUES (4); COMMIT; INSERT INTO t VALUES (5)",
        "TABLE t",
        "BEGIN",
        "SELECT 'ä',  nothing FROM t",
        "COMMIT",
        "START TRANSACTION READ ONLY",
        "INSERT INTO t VALUES (6)",
        "END",
        "SAVEPOINT s",
        "ROLLBACK TO s",
        "RELEASE s",
        "SET LOCAL datestyle = sql",
        "SET TRANSACTION READ ONLY",
        "SET CONSTRAINTS ALL DEFERRED",
        "BEGIN; SAVEPOINT s; SELECT 1/0; ROLLBACK TO s",
        "ROLLBACK TO s; RELEASE s; SAVEPOINT s; SELECT 1",
        "COMMIT AND CHAIN",
        "ROLLBACK AND NO CHAIN",
        "COMMIT AND CHAIN",
        "EXPLAIN (COSTS off) SELECT 1",
        "CREATE TABLE own (n int); DROP TABLE own; CREATE TABLE own (m int)",
        "SELECT $1",
    ):
        world.note(text)
        ask(world, client, raw.query(text))


@twin
def test_positions_in_scripts(world):
    """Trap 8: a position counts from the start of the client's own string."""
    client = connect(world)
    for text in (
        "BEGIN; SELECT 1; SELECT nothing",
        "ROLLBACK;   SELECT nothing",
        "ROLLBACK; SELECT 'é'; COMMIT; SELECT 'é' || nothing",
        "/* é */ BEGIN; /* é */ SELECT 1; SELEC 2",
        "BEGIN; SAVEPOINT a; SELECT 1; RELEASE a; SELECT    nothing; COMMIT",
        "COMMIT; SELECT 1; SELECT 2; COMMIT; SELECT 3 FROM nothing",
        "BEGIN; SELECT 'SELECT nothing', nothing; SELECT nothing",
        "ROLLBACK",
    ):
        world.note(text)
        ask(world, client, raw.query(text))


@twin
def test_deferred_constraints(world):
    """Trap 6: where a commit fails, its error takes the place of the tag."""
    client = connect(world)
    late = "INSERT INTO late VALUES (1, 99)"
    ask(world, client, raw.query(late))
    ask(world, client, raw.query(f"{late} RETURNING id"))
    ask(world, client, raw.query(f"SELECT 1; {late}"))
    ask(world, client, raw.run(late), SYNC)
    ask(world, client, raw.run(late), raw.run("SELECT 1"), SYNC)
    ask(world, client, raw.query(f"BEGIN; {late}; COMMIT; SELECT 1"))
    ask(world, client, raw.query("BEGIN"))
    ask(world, client, raw.query(late))
    ask(world, client, raw.query("COMMIT"))
    ask(world, client, raw.query("BEGIN"))
    ask(world, client, raw.query(late))
    ask(world, client, raw.run("COMMIT"), raw.run("SELECT 1"), SYNC)
    ask(world, client, raw.query("SELECT count(*) FROM late"))
    ask(world, client, raw.query(f"BEGIN; {late}"))
    ask(world, client, raw.query("SET CONSTRAINTS ALL IMMEDIATE"))
    ask(world, client, raw.query("COMMIT"))


# Extended queries


@twin
def test_extended_queries(world):
    """Parameters, descriptions, errors that skip to the Sync, and statements by name."""
    client = connect(world)
    ask(world, client, raw.run("SELECT $1::int + 1 AS n, $2", "1", "x"), SYNC)
    ask(world, client, raw.run("INSERT INTO t VALUES ($1)", "1"), SYNC)
    ask(world, client, raw.run("SELECT nothing"), raw.run("SELECT 1"), SYNC)
    ask(world, client, raw.run("INSERT INTO t VALUES (2)"), raw.run("SELECT 1/0"), SYNC)
    ask(world, client, raw.run(""), SYNC)
    ask(world, client, raw.run("SELECT 1; SELECT 2"), SYNC)
    ask(world, client, raw.parse("SELECT m, $1::mood FROM typed", "named"), SYNC)
    ask(world, client, raw.describe("S", "named"), SYNC)
    ask(world, client, raw.parse("SELECT 1", "named"), SYNC)
    ask(world, client, raw.bind(None, name="named"), raw.execute(), SYNC)
    ask(world, client, raw.bind(name="named"), raw.execute(), SYNC)
    ask(world, client, raw.bind("angry", name="named"), raw.execute(), SYNC)
    ask(world, client, raw.close("S", "named"), raw.close("S", "unknown"), SYNC)
    ask(world, client, raw.bind(name="named"), SYNC)
    ask(world, client, raw.describe("S", "named"), SYNC)
    ask(world, client, raw.describe("P", "unknown"), SYNC)
    ask(world, client, raw.execute("unknown"), SYNC)
    ask(world, client, raw.bind(), raw.execute(), SYNC)
    ask(world, client, SYNC)
    ask(world, client, raw.run("TABLE t"), SYNC)


@twin
def test_unnamed_statement_outlives_its_sync(world):
    """It stays until the next Parse of none, or a simple query."""
    client = connect(world)
    ask(world, client, raw.parse("SELECT $1::int"), SYNC)
    ask(world, client, raw.bind("1"), raw.execute(), SYNC)
    ask(world, client, raw.bind("2"), raw.execute(), raw.bind("3"), raw.execute(), SYNC)
    ask(world, client, raw.describe("S"), SYNC)
    ask(world, client, raw.parse("SELECT 'named'", "named"), raw.bind("4"), raw.execute(), SYNC)
    ask(world, client, raw.query("SELECT 1"))
    ask(world, client, raw.bind("5"), raw.execute(), SYNC)
    ask(world, client, raw.parse("SELECT nothing"), SYNC)
    ask(world, client, raw.bind("6"), raw.execute(), SYNC)
    ask(world, client, raw.parse("SELECT 7"), raw.close("S"), raw.bind(), raw.execute(), SYNC)


@twin
def test_two_clients_with_statements_of_one_name(world):
    """Trap 3: the unnamed statement, and those with names, are each client's own."""
    first, second = connect(world), connect(world)
    for name in ("", "same"):
        ask(world, first, raw.parse("SELECT 'first'", name), SYNC)
        ask(world, second, raw.parse("SELECT 'second', $1::int", name), SYNC)
        ask(world, first, raw.bind(name=name), raw.describe(), raw.execute(), SYNC)
        ask(world, second, raw.bind("1", name=name), raw.describe(), raw.execute(), SYNC)
    ask(world, first, raw.query("DEALLOCATE ALL"))
    ask(world, first, raw.bind(name="same"), SYNC)
    ask(world, second, raw.bind("1", name="same"), raw.execute(), SYNC)


@twin
def test_flush_without_sync(world):
    """Trap 1: what was asked is answered at once, and the transaction goes on."""
    client = connect(world)
    client.send(raw.parse("INSERT INTO t VALUES ($1)", "own"), raw.describe("S", "own"), FLUSH)
    world.noted += client.until("nE")
    client.send(raw.bind("1", name="own"), raw.execute(), FLUSH)
    world.noted += client.until("CE")
    client.send(raw.bind("2", name="own"), raw.execute(), FLUSH)
    world.noted += client.until("CE")
    client.send(raw.run("SELECT * FROM t ORDER BY n"), FLUSH)
    world.noted += client.until("CE")
    client.send(raw.bind("1", name="own"), raw.execute(), FLUSH)
    world.noted += client.until("CE")
    # The Sync ends the skipping, and what was done since the last one is gone.
    ask(world, client, raw.run("SELECT 1"), FLUSH, raw.run("SELECT 2"), FLUSH, SYNC)
    ask(world, client, raw.query("TABLE t"))


@twin
def test_transactions_by_extended_queries(world):
    """Trap 2: they end also where the transaction has failed, when no statement can be parsed."""
    client = connect(world)
    for texts in (
        ["BEGIN"],
        ["INSERT INTO t VALUES (1)"],
        ["SELECT 1/0"],
        ["SELECT 1"],
        ["ROLLBACK"],
        ["BEGIN", "INSERT INTO t VALUES (2)", "COMMIT"],
        ["INSERT INTO t VALUES (3)", "BEGIN", "INSERT INTO t VALUES (4)", "ROLLBACK"],
        ["INSERT INTO t VALUES (5)", "COMMIT", "INSERT INTO t VALUES (6)", "SELECT 1/0"],
        ["BEGIN", "SAVEPOINT s", "INSERT INTO t VALUES (7)"],
        ["SELECT 1/0"],
        ["ROLLBACK TO s", "INSERT INTO t VALUES (8)"],
        ["COMMIT"],
        ["COMMIT"],
        ["SAVEPOINT s"],
        ["BEGIN", "BEGIN"],
        ["SELECT 1/0", "ROLLBACK"],
        ["COMMIT"],
        ["INSERT INTO t VALUES (9)", "ROLLBACK", "INSERT INTO t VALUES (10)"],
        ["BEGIN", "COMMIT AND CHAIN"],
        ["ROLLBACK"],
        ["TABLE t"],
    ):
        world.note(texts)
        ask(world, client, *map(raw.run, texts), SYNC)


@twin
def test_prepared_transaction_commands(world):
    """Named BEGIN and COMMIT, described, used again, and closed."""
    client = connect(world)
    for text in ("BEGIN", "COMMIT", "ROLLBACK"):
        ask(world, client, raw.parse(text, text), raw.describe("S", text), SYNC)
    for text in ("BEGIN", "COMMIT", "COMMIT", "BEGIN", "ROLLBACK"):
        ask(world, client, raw.bind(name=text), raw.describe(), raw.execute(), SYNC)
    ask(world, client, raw.bind(name="BEGIN"), raw.execute(), SYNC)
    ask(world, client, raw.query("SELECT 1/0"))
    ask(world, client, raw.bind(name="COMMIT"), raw.execute(), SYNC)
    ask(world, client, raw.close("S", "COMMIT"), SYNC)
    ask(world, client, raw.bind(name="COMMIT"), raw.execute(), SYNC)
    ask(world, client, raw.parse("BEGIN", "BEGIN"), SYNC)


@twin
def test_portals(world):
    """Trap 4: rows in pieces, portals and cursors of one namespace, and their end at a commit."""
    client = connect(world)
    ask(world, client, raw.query("BEGIN"))
    series = raw.parse("SELECT generate_series(1, 5) AS n")
    ask(world, client, series, raw.bind(portal="p"), raw.describe("P", "p"), SYNC)
    ask(world, client, raw.execute("p", 2), SYNC)
    ask(world, client, raw.query("FETCH 1 FROM p"))
    ask(world, client, raw.execute("p", 2), SYNC)
    ask(world, client, series, raw.bind(portal="p"), SYNC)
    ask(world, client, raw.query("ROLLBACK"))
    ask(world, client, raw.query("BEGIN"))
    ask(world, client, series, raw.bind(portal="q"), raw.execute("q", 1), raw.close("P", "q"), SYNC)
    ask(world, client, raw.execute("q"), SYNC)
    ask(world, client, raw.query("ROLLBACK"))
    ask(world, client, raw.query("BEGIN; DECLARE c CURSOR FOR SELECT generate_series(1, 3)"))
    ask(world, client, raw.describe("P", "c"), raw.execute("c", 2), SYNC)
    ask(world, client, series, raw.bind(portal="r"), raw.execute("r", 1), SYNC)
    ask(world, client, raw.query("COMMIT"))
    ask(world, client, raw.execute("r", 1), SYNC)
    ask(world, client, raw.query("FETCH 1 FROM c"))
    # Outside of a block a portal lives to the Sync.
    ask(world, client, series, raw.bind(portal="s"), raw.execute("s", 2), raw.execute("s"), SYNC)
    ask(world, client, raw.execute("s", 1), SYNC)
    client.send(series, raw.bind(), raw.execute("", 2), FLUSH)
    world.noted += client.until("sCE")
    ask(world, client, raw.execute("", 2), raw.execute("", 2), SYNC)


@twin
def test_function_calls(world):
    """By their OID, in a transaction that has failed too."""
    client = connect(world)
    upper, sqrt, floats = 871, 1344, struct.Struct("!d")
    ask(world, client, raw.call(upper, b"abc"))
    ask(world, client, raw.call(sqrt, floats.pack(-1.0)))
    ask(world, client, raw.query("BEGIN"))
    ask(world, client, raw.call(sqrt, floats.pack(4.0)))
    ask(world, client, raw.call(sqrt, floats.pack(-1.0)))
    ask(world, client, raw.call(upper, b"abc"))
    ask(world, client, raw.query("ROLLBACK"))
    ask(world, client, raw.call(4_000_000_000))


@twin
def test_copy_by_simple_query(world):
    """In, out, failed by either side, and in a script."""
    client = connect(world)
    world.noted += client_copy(client, raw.query("COPY t FROM STDIN"), "1\tone\n", "2\ttwo\n")
    ask(world, client, raw.query("COPY t TO STDOUT"))
    world.noted += client_copy(client, raw.query("COPY t FROM STDIN"), "3\tx\n", "1\tx\n")
    client.send(raw.query("COPY t FROM STDIN"), raw.copy_data("4\tx\n"))
    ask(world, client, raw.message("f", b"no more\0"))
    ask(world, client, raw.query("COPY t FROM STDIN (FORMAT nonsense)"))
    script = raw.query("INSERT INTO t VALUES (5); COPY t FROM STDIN; SELECT n FROM t ORDER BY n")
    world.noted += client_copy(client, script, "6\tsix\n")
    ask(world, client, raw.query("COPY (SELECT 1/(2-g) FROM generate_series(1, 3) g) TO STDOUT"))
    ask(world, client, raw.query("BEGIN"))
    world.noted += client_copy(client, raw.query("COPY t FROM STDIN"), "bad\n")
    ask(world, client, raw.query("COMMIT"))
    script = raw.query("BEGIN; COPY t FROM STDIN; COMMIT; COPY t TO STDOUT")
    world.noted += client_copy(client, script, "7\tseven\n")


def client_copy(client: RawClient, first: bytes, *rows: str, last: bytes = b"") -> list[Any]:
    return client.ask(first, *map(raw.copy_data, rows), raw.COPY_DONE, last)


@twin
def test_copy_by_extended_query(world):
    """Trap 7: with the Sync at once and only after it, and with an error that comes early."""
    client = connect(world)
    copy = raw.parse("COPY t FROM STDIN") + raw.bind() + raw.execute()
    client.send(copy, SYNC)
    world.noted += client.until("GE")
    client.send(raw.copy_data("1\tone\n"), raw.COPY_DONE, SYNC)
    world.noted += client.until()
    client.send(copy, FLUSH)
    world.noted += client.until("GE")
    client.send(raw.copy_data("2\ttwo\n"), raw.COPY_DONE, SYNC)
    world.noted += client.until()
    ask(world, client, raw.query("SELECT n FROM t ORDER BY n"))
    # An error, after which the rest of the client's data is dropped up to its Sync.
    client.send(copy, FLUSH)
    world.noted += client.until("GE")
    client.send(raw.copy_data("3\tx\ty\n"), raw.copy_data("4\tfour\n" * 10_000))
    world.noted += client.until("E")
    client.send(raw.copy_data("5\tfive\n" * 10_000), raw.COPY_DONE, SYNC)
    world.noted += client.until()
    ask(world, client, raw.query("SELECT n FROM t ORDER BY n"))


@twin
def test_copy_with_an_early_error(world):
    """Trap 7: it is told while the client still sends, and stray data is dropped."""
    client = connect(world)
    client.send(raw.query("COPY t FROM STDIN"))
    world.noted += client.until("GE")
    client.send(raw.copy_data("bad\n"), raw.copy_data("1\tx\n" * 20_000))
    world.noted += client.until()
    ask(world, client, raw.copy_data("2\tx\n" * 1000), raw.COPY_DONE, raw.query("SELECT 1"))
    ask(world, client, raw.copy_data("stray"), raw.message("f", b"x\0"), raw.query("SELECT 2"))
    ask(world, client, raw.copy_data("stray"), raw.run("SELECT 3"), SYNC)


# What is each client's own


@twin
def test_deallocate_and_discard(world):
    """Trap 5: they end the client's own statements, and nobody else's."""
    client, other = connect(world), connect(world)
    for each in (client, other):
        each.ask(raw.parse("SELECT 1", "one"), raw.parse("SELECT 2", "two"), SYNC)
    ask(world, client, raw.query("DEALLOCATE one"))
    ask(world, client, raw.query("DEALLOCATE one"))
    ask(world, client, raw.bind(name="one"), raw.execute(), SYNC)
    ask(world, client, raw.bind(name="two"), raw.execute(), SYNC)
    ask(world, client, raw.query("DEALLOCATE ALL"))
    ask(world, client, raw.bind(name="two"), raw.execute(), SYNC)
    ask(world, client, raw.parse("SELECT 3", "one"), SYNC)
    ask(world, client, raw.bind(name="one"), raw.execute(), SYNC)
    ask(world, client, raw.run("DEALLOCATE ALL"), SYNC)
    ask(world, client, raw.bind(name="one"), raw.execute(), SYNC)
    ask(world, client, raw.parse("SELECT 4", "one"), SYNC)
    ask(world, client, raw.query("BEGIN"))
    ask(world, client, raw.query("DISCARD ALL"))
    ask(world, client, raw.query("ROLLBACK"))
    ask(world, client, raw.bind(name="one"), raw.execute(), SYNC)
    ask(world, client, raw.query("DISCARD ALL"))
    ask(world, client, raw.bind(name="one"), raw.execute(), SYNC)
    ask(world, client, raw.run("DISCARD ALL"), SYNC)
    ask(world, other, raw.bind(name="one"), raw.execute(), SYNC)
    ask(world, other, raw.bind(name="two"), raw.execute(), SYNC)


@twin
def test_statements_after_a_rollback(world):
    """A rollback takes the table, not the statement; one that fails in DDL's wake says why."""
    client = connect(world)
    ask(world, client, raw.query("BEGIN; CREATE TABLE own (n int)"))
    ask(world, client, raw.parse("TABLE own", "own"), raw.bind(name="own"), raw.execute(), SYNC)
    ask(world, client, raw.query("ROLLBACK"))
    ask(world, client, raw.parse("SELECT 1", "own"), SYNC)
    ask(world, client, raw.query("CREATE TABLE own (n int)"))
    ask(world, client, raw.bind(name="own"), raw.describe(), raw.execute(), SYNC)
    ask(world, client, raw.query("ALTER TABLE own ADD m int"))
    ask(world, client, raw.bind(name="own"), raw.describe(), raw.execute(), SYNC)


@pytest.mark.parametrize("how", [{"timezone": "Asia/Tokyo"}, {"options": "-c timezone=Asia/Tokyo"}])
@pytest.mark.parametrize("place", PLACES)
def test_settings_begin_with_the_startup_parameters(stage, place, how):
    """Trap 9: RESET, RESET ALL and DISCARD ALL put them back, and the client is told."""

    def program(world: World) -> None:
        client = connect(world, application_name="mine", **how)
        for text in (
            "SET timezone = 'UTC'",
            "RESET timezone",
            "SET timezone = 'UTC'; SET application_name = 'other'",
            "RESET ALL",
            "SHOW timezone",
            "SHOW application_name",
            "SET timezone = 'UTC'",
            "SET timezone TO DEFAULT",
            "SET timezone = 'UTC'",
            "SELECT 1; RESET ALL",
            "BEGIN; SET timezone = 'UTC'; SAVEPOINT s; SET timezone = 'Europe/Paris'",
            "ROLLBACK TO s; SHOW timezone",
            "ROLLBACK; SHOW timezone",
            "BEGIN; SET LOCAL timezone = 'UTC'; COMMIT",
            "SHOW timezone",
            "SET timezone = 'UTC'",
            "DISCARD ALL",
            "SHOW timezone",
            "SHOW application_name",
        ):
            world.note(text)
            ask(world, client, raw.query(text))
        ask(world, client, raw.run("SET timezone = 'UTC'"), SYNC)
        ask(world, client, raw.run("RESET ALL"), raw.run("SHOW timezone"), SYNC)

    stage.compare(program, place)


@twin
def test_settings_of_two_clients(world):
    """Trap 10: each sees its own, also its application's name, statement by statement."""
    clients = [
        connect(world, application_name=name, timezone=zone)
        for name, zone in (("first", "Asia/Tokyo"), ("second", "Europe/Paris"))
    ]
    for client in clients * 2:
        ask(world, client, raw.query("SHOW application_name; SHOW timezone"))
        ask(world, client, raw.run("SELECT current_setting('application_name')"), SYNC)
    ask(world, clients[0], raw.query("SET application_name = 'third'"))
    for client in clients * 2:
        ask(world, client, raw.query("SHOW application_name"))


def test_the_application_s_name_costs_no_round_trip(stage, monkeypatch):
    """Trap 10: libpq always sends one, and clients that differ in it alone take turns at once."""
    calls = itertools.count()
    inner = Backend.run

    def counted(self: Backend, *args: Any, **kwargs: Any) -> Any:
        next(calls)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Backend, "run", counted)

    def cost(*names: str) -> int:
        with stage.test():
            conns = [
                psycopg.connect(stage.dsn, application_name=name, autocommit=True) for name in names
            ]
            for conn in conns:
                conn.execute("SELECT 1")
            before = next(calls)
            for conn in conns * 5:
                conn.execute("SELECT 1")
            after = next(calls)
            for conn in conns:
                conn.close()
        return after - before

    assert cost("one", "two", "three") == cost("one", "one", "one")


# Cancelling


@twin
def test_cancel_requests(world):
    """Trap 13: a key is its client's alone, and means nothing while that client runs nothing."""
    client, other = connect(world), connect(world, minor=2)
    for each, bystander in ((client, other), (other, client)):
        each.send(raw.query("INSERT INTO t VALUES (1); SELECT pg_sleep(60)"))
        world.wait_until_sleeping()
        bystander.cancel()
        each.cancel(b"\0" * len(each.key))
        each.cancel()
        world.noted += [m for m in each.until() if m[0] != "C"]
        each.cancel()
        ask(world, each, raw.query("SELECT count(*) FROM t"))


def test_a_stranger_s_key_cancels_nothing(stage):
    """Trap 13: what runs goes on, and a client in a transaction is not hit by another's."""
    with stage.test():
        world = World(stage, stage.conninfo())
        with world.stack:
            client, other = connect(world), connect(world)
            client.send(raw.query("SELECT pg_sleep(0.5), 'slept'"))
            world.wait_until_sleeping()
            other.cancel()
            client.cancel(b"none")
            assert [m[0] for m in client.until()] == ["T", "D", "C", "Z"]


# Names


@pytest.mark.parametrize(
    ("wrong", "sqlstate", "sentence"),
    [
        ({"user": "somebody"}, "28000", 'role "somebody" cannot join the test'),
        ({"database": "elsewhere"}, "3D000", 'not to "elsewhere"'),
        ({"replication": "true"}, "0A000", "nothing to replicate"),
        ({"replication": "database"}, "0A000", "nothing to replicate"),
    ],
)
@pytest.mark.parametrize("ends_with_test", [True, False])
def test_who_is_refused(stage: Stage, wrong, sqlstate, sentence, ends_with_test):
    """Trap 14: another user, another database and replication, by one sentence each."""
    with stage.test():
        client = RawClient(stage.conninfo(ends_with_test=ends_with_test))
        ((kind, fields), end) = client.start(**wrong)
        client.close()
        assert (kind, fields["C"], fields["S"], end) == ("E", sqlstate, "FATAL", "end")
        assert sentence in fields["M"]
        assert "\n" not in fields["M"]
        with psycopg.connect(stage.dsn) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)


def test_a_client_is_served_while_the_test_computes(stage):
    """Trap 12: this process need not wait for it, nor rest."""
    with stage.test():
        psql = subprocess.Popen(
            ["psql", "-X", "-A", "-t", "-d", stage.dsn],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert psql.stdin is not None
        psql.stdin.write("SELECT 1;\n" * 100)
        psql.stdin.close()
        turns = 0
        while psql.poll() is None:
            turns += sum(range(1000)) > 0
        assert psql.stdout is not None
        assert psql.stdout.read().split() == ["1"] * 100
        psql.stdout.close()
        assert psql.wait(PATIENCE) == 0
        assert turns
