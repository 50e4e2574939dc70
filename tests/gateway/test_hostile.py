"""Clients that misbehave, or end in the middle: they end alone, and the test goes on."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.waiting import PATIENCE, until

from gateway import raw
from gateway.clients import PLACES, World
from gateway.raw import FLUSH, SYNC, RawClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.clients import Stage


@pytest.fixture(params=PLACES)
def world(stage: Stage, request: pytest.FixtureRequest) -> Iterator[World]:
    """A running test, in whose middle a good client has a transaction of its own.

    What that client sees and does is checked at the end.
    """
    with stage.test(request.param):
        world = World(stage, stage.conninfo())
        with world.stack:
            good = psycopg.connect(world.dsn, autocommit=True)
            world.stack.callback(good.close)
            good.execute("INSERT INTO t VALUES (1, 'good')")
            yield world
            found = good.execute("SELECT * FROM t WHERE n < 100 ORDER BY n").fetchall()
            assert found == [(1, "good")]
            with good.transaction():
                good.execute("INSERT INTO t VALUES (2)")
            with psycopg.connect(world.dsn) as another:
                assert another.execute("SELECT count(*) FROM t").fetchone() == (2,)


def client_of(world: World) -> RawClient:
    client = RawClient(world.conninfo)
    world.stack.callback(client.close)
    assert client.start()[-1] == ("Z", b"I")
    return client


def ended(client: RawClient) -> list[Any]:
    """Give the SQLSTATEs of what a client is told before its end."""
    try:
        answers = client.until("")
    except TimeoutError:
        pytest.fail("the gateway did not end it")
    assert answers[-1] == "end"
    return [answer[1]["C"] for answer in answers[:-1] if answer[0] == "E"]


# Garbage


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"x" * 500,
        b"\0" * 64,
        b"\xff" * 64,
        struct.pack("!II", 8, 3 << 16),
        struct.pack("!II", 9, 3 << 16) + b"x",
        struct.pack("!II", 13, 3 << 16) + b"user\0",
        raw.startup(3 << 16, {"user": "x"})[:-1] + b"x",
        struct.pack("!II", 15, 3 << 16) + b"\xff\xfe\0x\0\0\0",
        raw.startup(4 << 16, {"user": "x"}),
        struct.pack("!II", 0x7FFFFFFF, 3 << 16),
        struct.pack("!III", 12, 80877102, 7),
    ],
    ids=[
        "HTTP", "TLS", "zeros", "ones", "no user", "no end", "half a pair", "no terminator",
        "no UTF-8", "protocol 4", "2 GB", "half a cancel request",
    ],
)  # fmt: skip
def test_garbage_at_the_start(world, first):
    """It is refused with an error, or the socket is closed."""
    client = RawClient(world.conninfo)
    world.stack.callback(client.close)
    client.send(first)
    client.sock.shutdown(socket.SHUT_WR)
    try:
        while client.sock.recv(65536):
            pass
    except ConnectionResetError:
        pass


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        b"Q" + struct.pack("!I", 0x7FFFFFFF) + b"SELECT 1",
        b"Q" + struct.pack("!I", 0xFFFFFFFF) + b"SELECT 1",
        b"Q" + struct.pack("!I", 3),
        b"S" + struct.pack("!I", 1_000_000) + b"x" * 100,
        b"p" + struct.pack("!I", 0x7FFFFFFF),
        b"d" + struct.pack("!I", 0x7FFFFFFF) + b"x" * 100,
        b"z" + struct.pack("!I", 4),
    ],
    ids=["zeros", "HTTP", "2 GB", "4 GB", "short", "long Sync", "password", "COPY", "unknown"],
)
@pytest.mark.parametrize("inside", ["", "BEGIN; INSERT INTO t VALUES (666)"])
def test_garbage_in_a_session(world, garbage, inside):
    """The client is told 08P01 and ended, and what it had open is rolled back."""
    client = client_of(world)
    client.ask(raw.query(inside))
    client.send(garbage)
    assert ended(client) == ["08P01"]


@pytest.mark.parametrize(
    "message",
    [
        raw.message("B", b"x"),
        raw.message("P", b"x"),
        raw.message("P", b"\0SELECT 1"),
        raw.message("D", b"S"),
        raw.message("D", b""),
        raw.message("C", b"X\0"),
        raw.message("D", b"X\0"),
        raw.message("E", b"\0"),
        raw.message("E", b"x"),
        raw.parse("SELECT $1::text") + raw.message("B", b"\0\0\0\0\0\1\0\0\xff\xff"),
        raw.parse("SELECT 1") + raw.message("B", b"\0\0\0\7"),
        raw.message("F", b"x"),
        raw.message("Q", b"SELECT 1"),
    ],
    ids=[
        "Bind", "Parse", "Parse without end", "Describe", "empty Describe", "Close of nothing",
        "Describe of nothing", "short Execute", "Execute", "Bind with half a value",
        "Bind with too few formats", "call", "Query without end",
    ],
)  # fmt: skip
def test_messages_that_are_broken_inside(world, message):
    """The client gets an error or is ended, as on a server; nobody else notices."""
    client = client_of(world)
    client.send(message, SYNC)
    answers = client.until("ZE")
    assert answers[-1] == "end" or answers[-1][0] == "E"
    assert answers[-1] == "end" or answers[-1][1]["C"] in ("08P01", "22021", "42601", "26000")


def test_texts_that_are_not_in_utf_8(world):
    """They are refused by the server, with its error, and the client goes on."""
    client = client_of(world)
    for message in (
        raw.message("Q", b"SELECT '\xff'\0"),
        raw.message("P", b"\0SELECT '\xff'\0\0\0") + SYNC,
        raw.message("P", b"\xff\0SELECT 1\0\0\0") + SYNC,
        raw.message("Q", b"BEGIN; SELECT '\xff'; COMMIT\0"),
    ):
        client.send(message)
        answers = client.until()
        assert answers[-1][0] == "Z"
    assert client.ask(raw.query("ROLLBACK; SELECT 1"))[-1] == ("Z", b"I")


def test_half_a_message(world):
    """Nobody waits for the rest of it: others go on, and its client's end is its end."""
    client = client_of(world)
    client.send(raw.query("INSERT INTO t VALUES (3)")[:-3])
    with psycopg.connect(world.dsn) as conn:
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (1,)
    client.close()


def test_silence_at_the_start(world):
    """A client that connects and says nothing keeps nobody waiting."""
    for _ in range(5):
        world.stack.callback(RawClient(world.conninfo).close)


# Clients that do not read


@pytest.mark.parametrize("inside", ["", "BEGIN"])
def test_a_client_that_asks_for_much_and_goes(world, inside):
    """Its statement is cancelled, and the turn is given on."""
    client = client_of(world)
    client.ask(raw.query(inside))
    client.send(raw.query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)"))
    client.exactly(1000)
    client.close()


def test_a_client_that_sends_without_end_and_goes(world):
    """Thousands of statements in a pipeline, without a Sync."""
    client = client_of(world)
    client.send(raw.run("SELECT repeat('x', 1000)") * 2000, FLUSH)
    client.exactly(1000)
    client.close()


def test_a_client_that_stops_reading_and_a_test_that_ends(stage):
    """The end of a test does not wait for it, nor does the next test."""
    for place in PLACES:
        with stage.test(place):
            client = RawClient(stage.conninfo())
            client.start()
            client.send(raw.query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)"))
            client.exactly(1000)
            problems = stage.end()
            assert all("still ran when the test ended" in problem for problem in problems)
            stage.begin(place)
        client.close()


# Clients that are killed

VICTIM = """
import sys
sys.path[:0] = {path!r}
from gateway import raw
client = raw.RawClient({conninfo!r})
client.start()
{work}
print("ready", flush=True)
sys.stdin.read()
"""
BEGUN = "client.ask(raw.query('BEGIN; INSERT INTO t VALUES (66)'))\n"
COPYING = """
client.send({first})
client.until("G")
client.send(raw.copy_data("66\\tcopied\\n") * 100)
"""


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (BEGUN, False),
        (BEGUN + "client.ask(raw.query('SELECT 1/0'))", False),
        (BEGUN + "client.send(raw.run('SELECT 1'), raw.FLUSH)\nclient.until('C')", False),
        (COPYING.format(first="raw.query('COPY t FROM STDIN')"), False),
        (BEGUN + COPYING.format(first="raw.query('COPY t FROM STDIN')"), False),
        (COPYING.format(first="raw.run('COPY t FROM STDIN'), raw.FLUSH"), False),
        ("client.send(raw.query('COPY (SELECT repeat($$x$$, 1000) FROM generate_series(1, 200000))"
         " TO STDOUT'))\nclient.until('d')", False),
        ("client.send(raw.query('INSERT INTO t VALUES (66); SELECT pg_sleep(60)'))", True),
        ("client.send(raw.run('SELECT pg_sleep(60)'), raw.SYNC)", True),
        (BEGUN + "client.ask(raw.parse('SELECT generate_series(1, 9)'), raw.bind(portal='p'), "
         "raw.execute('p', 1), raw.SYNC)", False),
    ],
    ids=[
        "in a transaction", "in a failed one", "in a pipeline", "in a COPY",
        "in a COPY in a transaction", "in an extended COPY", "in a COPY out", "in a statement",
        "in an extended statement", "with a portal",
    ],
)  # fmt: skip
def test_a_client_that_is_killed(world, work, waits):
    """What it has not committed is gone, and the others go on at once."""
    code = VICTIM.format(path=sys.path, conninfo=dict(world.conninfo), work=work)
    victim = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert victim.stdout is not None
    assert victim.stdin is not None
    with victim.stdin, victim.stdout:
        assert victim.stdout.readline() == b"ready\n"
        if waits:
            world.wait_until_sleeping()
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(PATIENCE)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_client_that_half_closes(world, in_time):
    """Its last statement is still answered."""
    client = client_of(world)
    client.send(raw.query("SELECT 1"))
    if in_time:
        assert client.until()[-1] == ("Z", b"I")
    client.sock.shutdown(socket.SHUT_WR)
    while client.sock.recv(65536):
        pass


def test_many_clients_at_once(stage):
    """Threads connect, write, fail, and go; all of what they committed is there."""
    with stage.test():
        errors: list[BaseException] = []

        def work(n: int) -> None:
            try:
                for round_ in range(5):
                    with psycopg.connect(stage.dsn) as conn:
                        conn.execute("INSERT INTO t VALUES (%s)", [1000 + n * 10 + round_])
                        with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
                            conn.execute("INSERT INTO t VALUES (%s)", [1000 + n * 10 + round_])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert errors == []
        count = stage.rollback.execute("SELECT count(*) FROM t", None).fetchone()
        assert count == (40,)


def test_nothing_is_left_of_clients(stage):
    """Neither threads nor sockets, once they have gone."""

    def threads() -> int:
        return sum(each.name == "pgmonkey-client" for each in threading.enumerate())

    def descriptors() -> int:
        found = Path("/proc/self/fd")
        return len(list(found.iterdir())) if found.is_dir() else 0

    with stage.test():
        until(lambda: threads() == 0)
        before = descriptors()
        for _ in range(20):
            with psycopg.connect(stage.dsn) as conn:
                conn.execute("SELECT 1")
            RawClient(stage.conninfo()).close()
        until(lambda: threads() == 0)
        until(lambda: descriptors() <= before)
