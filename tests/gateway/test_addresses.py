"""What leads into a test: URLs with a password, variables and files for other processes."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import asyncpg
import psycopg
import psycopg2
import pytest
from helpers.remains import NEEDS_PROC, processes_of
from helpers.waiting import PATIENCE, until, wait_until
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from gateway import raw
from gateway.clients import PLACES, World
from gateway.raw import RawClient
from pytest_pgmonkey import PGMonkeyError
from pytest_pgmonkey.config import connection_spec
from pytest_pgmonkey.testing.addresses.config_files import ConfigFiles
from pytest_pgmonkey.testing.addresses.purpose import Purpose
from pytest_pgmonkey.testing.addresses.urls import url_of
from pytest_pgmonkey.testing.gateway.entrance.entrance import Entrance
from pytest_pgmonkey.testing.gateway.gateway import Gateway
from pytest_pgmonkey.testing.servers.configured import ConfiguredServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.clients import Stage

HANDSHAKE = "pytest_pgmonkey.testing.gateway.protocol.client._HANDSHAKE"
ROWS = "SELECT n, x FROM t ORDER BY n"
# Plugins that no project here needs, and that take longer than its tests.
QUICK = tuple(f"-pno:{name}" for name in ("hypothesispytest", "anyio", "django", "pytest_cov"))


# URLs


@pytest.mark.parametrize(
    "conninfo",
    [
        {"host": "127.0.0.1", "port": "5432", "user": "u", "password": "p", "dbname": "d"},
        {"host": "h", "user": "a@b:c/d?e#f", "password": "%20 &=+[]ü€'\"", "dbname": "x/y?z #1"},
        {"host": "/dev/shm/pgmonkey-1a", "port": "5433", "user": "u", "dbname": "d"},
        {"host": "/tmp/a b&c=d", "dbname": "d", "options": "-c lock_timeout=5 -c a.b=x\\ y"},
        {"host": "::1", "port": "5432", "user": "u", "password": "p", "dbname": "d"},
        {"host": "a,b", "port": "1,2", "user": "u", "dbname": "d"},
        {"host": "h", "dbname": "d", "sslmode": "disable", "application_name": "an app"},
        {"user": "u", "dbname": "d"},
        {"dbname": "d"},
    ],
    ids=["plain", "odd", "socket", "odd socket", "IPv6", "hosts", "more", "no host", "name"],
)
def test_a_url_says_what_its_keywords_say(conninfo):
    """libpq reads the same from both, whatever characters they hold."""
    assert conninfo_to_dict(url_of(conninfo)) == conninfo


def test_a_url_without_what_is_empty():
    """An empty keyword is left out: it would mean something else than its absence."""
    assert url_of({"host": "h", "port": "", "user": "u", "password": "", "dbname": "d"}) == (
        "postgresql://u@h/d"
    )
    assert url_of({"host": "h", "dbname": "d"}, "postgresql+asyncpg") == "postgresql+asyncpg://h/d"


# Drivers, which connect by a URL


class ByPsycopg:
    """A connection in autocommit."""

    ended: tuple[type[Exception], ...] = (psycopg.OperationalError,)

    def __init__(self, url: str) -> None:
        self.conn: Any = psycopg.connect(url, autocommit=True)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        cursor = self.conn.cursor()
        cursor.execute(query)
        return [tuple(row) for row in cursor.fetchall()] if cursor.description else []

    def close(self) -> None:
        self.conn.close()


class ByPsycopg2(ByPsycopg):
    ended = (psycopg2.OperationalError, psycopg2.InterfaceError)

    def __init__(self, url: str) -> None:
        self.conn = psycopg2.connect(url)
        self.conn.autocommit = True


class ByPg8000(ByPsycopg):
    """It takes the parts of a URL, as applications take them apart."""

    def __init__(self, url: str) -> None:
        dbapi = pytest.importorskip("pg8000.dbapi")
        self.ended = (dbapi.Error,)
        parts = urlsplit(url)
        self.conn = dbapi.connect(
            parts.username,
            parts.hostname,
            parts.path[1:],
            parts.port,
            unquote(str(parts.password)),
        )
        self.conn.autocommit = True

    def close(self) -> None:
        with suppress(*self.ended):  # it says goodbye to a server that has gone
            super().close()


class ByAsyncpg(ByPsycopg):
    ended = (asyncpg.PostgresError, asyncpg.InterfaceError)

    def __init__(self, url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.conn = self.loop.run_until_complete(asyncpg.connect(url))

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.loop.run_until_complete(self.conn.fetch(query))]

    def close(self) -> None:
        self.loop.run_until_complete(self.conn.close())
        self.loop.close()


@pytest.fixture(
    params=[ByPsycopg, ByPsycopg2, ByAsyncpg, ByPg8000],
    ids=["psycopg", "psycopg2", "asyncpg", "pg8000"],
)
def driver(request: pytest.FixtureRequest) -> type[ByPsycopg]:
    found: type[ByPsycopg] = request.param
    return found


def tcp(stage: Stage, purpose: Purpose = Purpose.TEST) -> dict[str, str]:
    """What leads into the running test by TCP, or into whatever test runs."""
    return stage.gateway.conninfo_by_tcp(purpose)


@pytest.mark.parametrize("place", PLACES)
def test_a_driver_joins_by_the_url_of_a_test(stage, driver, place):
    """It sees and leaves what others see, up to the test's end, which is its own."""
    with stage.test(place):
        client = driver(url_of(tcp(stage)))
        with psycopg.connect(stage.dsn, autocommit=True) as other:
            other.execute("INSERT INTO t VALUES (1, 'other')")
            client.ask("INSERT INTO t VALUES (2, 'client')")
            expected = [(1, "other"), (2, "client")]
            assert client.ask(ROWS) == other.execute(ROWS).fetchall() == expected
            client.ask("BEGIN")
            client.ask("DELETE FROM t")
            client.ask("ROLLBACK")
            assert client.ask(ROWS) == expected
        name = stage.names[place]
        assert client.ask("SELECT current_database()::text") == [(name,)]
        assert urlsplit(url_of(tcp(stage))).path == f"/{name}"
    with pytest.raises(client.ended):
        client.ask("SELECT 1")
    client.close()


def test_a_driver_stays_by_the_url_of_a_session(stage, driver):
    """It goes from test to test, and only reads in between."""
    client = driver(url_of(tcp(stage, Purpose.SESSION)))
    for place in ("test", "clone", "test"):
        assert client.ask(ROWS) == []
        with pytest.raises(Exception, match="outside of a test"):
            client.ask("INSERT INTO t VALUES (0)")
        with stage.test(place):
            client.ask(f"INSERT INTO t VALUES (1, '{place}')")
            assert client.ask(ROWS) == [(1, place)]
            assert client.ask("SELECT current_database()::text") == [(stage.names[place],)]
    client.close()


def test_a_pool_stays_by_the_url_of_a_session(stage):
    """None of its connections is lost between tests."""
    with ConnectionPool(url_of(tcp(stage, Purpose.SESSION)), min_size=2, max_size=2) as pool:
        pool.wait(PATIENCE)
        for place in ("test", "clone", "test"):
            with stage.test(place), pool.connection() as one, pool.connection() as other:
                with one.transaction():
                    one.execute("INSERT INTO t VALUES (1, 'pool')")
                assert other.execute(ROWS).fetchall() == [(1, "pool")]
            pool.check()
        assert "connections_lost" not in pool.get_stats()
        assert pool.get_stats()["connections_num"] == 2


def test_a_url_is_where_the_connection_is(stage):
    """Its parts are what libpq connects with, and validators accept it."""
    pydantic = pytest.importorskip("pydantic")
    with stage.test():
        url = url_of(tcp(stage))
        parts = urlsplit(url)
        assert parts.scheme == "postgresql"
        assert parts.hostname == "127.0.0.1"
        assert not parts.query
        with psycopg.connect(url) as conn:
            info = conn.info
            assert (info.host, info.hostaddr) == (parts.hostname, parts.hostname)
            assert (info.port, info.user) == (parts.port, parts.username)
            assert (info.password, info.dbname) == (parts.password, parts.path[1:])
        (host,) = pydantic.TypeAdapter(pydantic.PostgresDsn).validate_python(url).hosts()
        assert host["password"] == parts.password == stage.gateway.entrance.password
        assert (host["host"], host["port"]) == (parts.hostname, parts.port)


def test_psql_connects_by_a_url(stage):
    """It asks for TLS and goes on without it; where TLS is a must, it says that there is none."""
    with stage.test():
        url = url_of(tcp(stage))

        def psql(query: str = "") -> subprocess.CompletedProcess[str]:
            command = ["psql", "-X", "-w", "-A", "-t", "-c", "SELECT 'here'", "-d", url + query]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )

        assert psql("?sslmode=prefer").stdout == "here\n"
        refused = psql("?sslmode=require")
        assert refused.returncode == 2
        assert "does not support SSL" in refused.stderr


# Cancel requests


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("connect", [psycopg.connect, psycopg2.connect], ids=["3", "2"])
def test_a_statement_is_cancelled_by_tcp(stage, connect, place):
    """Also by psycopg2, which holds the GIL until the request has been taken."""
    with stage.test(place):
        conn = connect(url_of(tcp(stage)))
        failed: list[Any] = []

        def work() -> None:
            try:
                conn.cursor().execute("SELECT pg_sleep(60)")
            except (psycopg.Error, psycopg2.Error) as error:
                failed.append(error.diag.sqlstate)

        thread = threading.Thread(target=work)
        thread.start()
        World(stage, tcp(stage)).wait_until_sleeping()
        conn.cancel()
        thread.join(PATIENCE)
        assert failed == ["57014"]
        conn.close()


# The password


class TCPClient(RawClient):
    """A raw client on loopback; `conninfo` says where it leads."""

    def __init__(self, conninfo: dict[str, str]) -> None:
        self.conninfo = conninfo
        address = conninfo["host"], int(conninfo["port"])
        self.sock = socket.create_connection(address, PATIENCE)

    def begin(self, **parameters: str) -> None:
        """Connect up to where the password is asked for."""
        who = {"user": self.conninfo["user"], "database": self.conninfo["dbname"]}
        self.send(raw.startup(3 << 16, {**who, **parameters}))
        assert self.read() == ("R", struct.pack("!I", 3))

    def say(self, password: str) -> list[Any]:
        self.send(raw.message("p", password.encode() + b"\0"))
        return self.until("ZE")

    def end(self) -> list[str]:
        """Give the SQLSTATEs of what it is told before its end."""
        answers = self.until("")
        assert answers[-1] == "end"
        return [answer[1]["C"] for answer in answers[:-1] if answer[0] == "E"]


@pytest.fixture
def make_client(stage: Stage) -> Iterator[Callable[..., TCPClient]]:
    """A function that makes clients by TCP, which end with the test."""
    made = []

    def make(purpose: Purpose = Purpose.SESSION) -> TCPClient:
        made.append(TCPClient(tcp(stage, purpose)))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture(params=PLACES)
def undisturbed(stage: Stage, request: pytest.FixtureRequest) -> Iterator[None]:
    """A running test in whose middle another client has a transaction of its own.

    What that client has written is there at the end, and others still come in.
    """
    with stage.test(request.param), psycopg.connect(url_of(tcp(stage))) as good:
        good.execute("INSERT INTO t VALUES (1, 'good')")
        yield
        good.commit()
        with psycopg.connect(url_of(tcp(stage))) as another:
            assert another.execute(ROWS).fetchall() == [(1, "good")]


def served() -> int:
    """How many clients have a thread that serves them."""
    return sum(thread.name == "pgmonkey-client" for thread in threading.enumerate())


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("wrong", ["", "wrong", "x" * 5000, "pässword", "{0}x", "x{0}", "{1}"])
def test_a_wrong_password_is_refused(stage, make_client, caplog, wrong):
    """28P01, and nothing that is told or logged has a password in it."""
    caplog.set_level(0)
    right = stage.gateway.entrance.password
    client = make_client()
    client.begin()
    wrong = wrong.format(right, right[:-1])
    ((kind, error),) = client.say(wrong)
    assert (kind, error["C"], error["S"]) == ("E", "28P01", "FATAL")
    assert error["M"] == f'password authentication failed for user "{client.conninfo["user"]}"'
    assert client.end() == []
    assert right not in caplog.text


def test_no_password_at_all(stage):
    """Drivers are asked for one, and say so."""
    with stage.test():
        conninfo = tcp(stage)
        del conninfo["password"]
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(**conninfo)

        async def connect() -> None:
            keywords: dict[str, Any] = {**conninfo, "database": conninfo.pop("dbname")}
            del keywords["dbname"]
            await asyncpg.connect(**keywords)

        with pytest.raises(asyncpg.InvalidPasswordError):
            asyncio.run(connect())


def test_who_knows_no_password_learns_nothing_else(stage, make_client):
    """Neither the user's name nor the database's is looked at before the password."""
    right = stage.gateway.entrance.password
    for parameters, state in (({"user": "nobody"}, "28000"), ({"database": "nowhere"}, "3D000")):
        for password, expected in (("wrong", "28P01"), (right, state)):
            client = make_client()
            client.begin(**parameters)
            assert client.say(password)[-1][1]["C"] == expected


def test_a_unix_socket_asks_for_no_password(stage):
    """Who can reach it is known to be the user; one that is given does no harm."""
    with stage.test():
        client = RawClient(stage.conninfo())
        assert client.start()[0] == ("R", struct.pack("!I", 0))
        client.close()
        with psycopg.connect(stage.dsn, password="wrong") as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("garbage", "told"),
    [
        (raw.query("SELECT 1"), ["08P01"]),
        (raw.SYNC, ["08P01"]),
        (raw.TERMINATE, ["08P01"]),
        (b"\0" * 64, ["08P01"]),
        (b"GET / HTTP/1.1\r\n\r\n", ["08P01"]),
        (b"p" + struct.pack("!I", 0), ["08P01"]),
        (b"p" + struct.pack("!I", 3), ["08P01"]),
        (b"p" + struct.pack("!I", 0x7FFFFFFF), ["08P01"]),
        (b"p" + struct.pack("!I", 0xFFFFFFFF), ["08P01"]),
        (b"p" + struct.pack("!I", 100) + b"half", []),
        (b"p", []),
        (b"", []),
        (raw.message("p"), ["08P01"]),
        (raw.message("p", b"\xff\xfe\0"), ["28P01"]),
    ],
    ids=[
        "Query", "Sync", "Terminate", "zeros", "HTTP", "length 0", "length 3", "2 GB", "4 GB",
        "half of it", "a byte", "nothing", "empty", "no UTF-8",
    ],
)  # fmt: skip
def test_garbage_instead_of_the_password(make_client, garbage, told):
    """The client is told what was wrong, if it was anything, and ended."""
    client = make_client()
    client.begin()
    client.send(garbage)
    if not told:
        client.sock.shutdown(socket.SHUT_WR)  # it has nothing more to say
    assert client.end() == told


def test_statements_that_come_with_the_password_are_answered(stage, make_client):
    """A client may send all that it has to say at once."""
    client = make_client()
    client.begin()
    password = raw.message("p", stage.gateway.entrance.password.encode() + b"\0")
    client.send(password, raw.query("SELECT 7"), raw.TERMINATE)
    assert ("D", [b"7"]) in client.until("D")


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("said", [b"", b"p", b"p\0\0\0\x20half"], ids=["nothing", "p", "half"])
def test_a_client_that_never_says_the_password(make_client, monkeypatch, said):
    """The others go on, and it is sent away when its time is up."""
    until(lambda: served() == 1)  # the good client; those of earlier tests have gone
    with monkeypatch.context() as patch:
        patch.setattr(HANDSHAKE, 0.5)
        client = make_client()
        client.begin()
    client.send(said)
    assert served() == 2
    assert client.end() == []
    until(lambda: served() == 1)


@pytest.mark.parametrize("place", PLACES)
def test_a_test_that_ends_while_a_password_is_waited_for(stage, make_client, place):
    """The test's own clients end with it; one of the session may still say it."""
    with stage.test(place):
        own, lasting = make_client(Purpose.TEST), make_client(Purpose.SESSION)
        own.begin()
        lasting.begin()
    assert own.end() == ["57P01"]
    with stage.test(place):
        assert lasting.say(stage.gateway.entrance.password)[-1] == ("Z", b"I")
        assert lasting.ask(raw.query("INSERT INTO t VALUES (1)"))[-1] == ("Z", b"I")


# Other clients by TCP


def test_an_error_names_a_client_by_its_application(stage):
    """The process at the other end of a TCP connection is not known, so none is told."""
    with stage.test(), stage.waiting(0.1):
        url = url_of(tcp(stage))
        with (
            psycopg.connect(url, application_name="first") as first,
            psycopg.connect(url, application_name="second") as second,
        ):
            first.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
                second.execute("INSERT INTO t VALUES (2)")
            assert "'first'" in str(caught.value)
            assert "'second'" in str(caught.value)
            assert "process" not in str(caught.value)
            second.rollback()
        assert len(stage.rollback.leads_to.take_refusals()) == 1


@pytest.mark.usefixtures("undisturbed")
def test_a_connection_that_is_reset(stage, make_client):
    """What its client had open is rolled back, and its turn goes to the next."""
    # The good client of the fixture has the turn in a rolled-back test.
    client = make_client(Purpose.TEST)
    client.begin()
    client.say(stage.gateway.entrance.password)
    client.send(raw.query("BEGIN; INSERT INTO t VALUES (666)"))
    linger = struct.pack("ii", 1, 0)  # the kernel sends a reset when the socket is closed
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close()


def test_a_client_by_tcp_that_stops_reading(stage, make_client):
    """The end of a test does not wait for it."""
    for place in PLACES:
        with stage.test(place):
            client = make_client(Purpose.TEST)
            client.begin()
            client.say(stage.gateway.entrance.password)
            client.send(raw.query("SELECT repeat('x', 1000) FROM generate_series(1, 50000)"))
            client.exactly(1000)
            problems = stage.end()
            assert all("still ran when the test ended" in problem for problem in problems)
            stage.begin(place)


# Where it listens


def tcp_addresses(pids: set[int]) -> list[tuple[str, int]]:
    """The addresses at which processes listen by TCP, each with its port."""
    sockets = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(fd.readlink().name)
            except OSError:  # it was closed meanwhile
                continue
    found = []
    for family, size in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                host, port = local.split(":")
                words = struct.unpack(f"!{size // 4}I", bytes.fromhex(host))
                packed = struct.pack(f"={size // 4}I", *words)
                kind = socket.AF_INET if size == 4 else socket.AF_INET6
                found.append((socket.inet_ntop(kind, packed), int(port, 16)))
    return found


@pytest.fixture
def gateway(stage: Stage) -> Iterator[Gateway]:
    """A gateway of the test's own, outside of any test, which leads `other` to its database."""
    conninfo = stage.server.conninfo(stage.names["real"])
    entrance = Entrance(conninfo["user"], conninfo["dbname"], lambda: gateway)
    gateway = Gateway(lambda: None, lambda: conninfo, lambda: conninfo, entrance, ["other"])
    yield gateway
    gateway.close()


def is_refused(port: int) -> bool:
    """Whether nobody listens on loopback at this port."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


@NEEDS_PROC
def test_nobody_listens_by_tcp_before_somebody_asks(gateway):
    """Then on loopback alone, on two ports, which are gone with the gateway."""
    directory = Path(gateway.conninfo(Purpose.SESSION)["host"])
    porter = processes_of(directory)
    assert len(porter) == 1
    before = tcp_addresses({os.getpid()})  # plugins of pytest's listen, too
    with psycopg.connect(**gateway.conninfo(Purpose.SESSION)) as conn:
        conn.execute("SELECT 1")
    assert tcp_addresses(porter) == []
    ports = [int(gateway.conninfo_by_tcp(Purpose(n))["port"]) for n in (0, 1)]
    assert len(set(ports)) == 2
    assert sorted(tcp_addresses(porter)) == sorted(("127.0.0.1", port) for port in ports)
    assert tcp_addresses({os.getpid()}) == before
    with psycopg.connect(url_of(gateway.conninfo_by_tcp(Purpose.SESSION))) as conn:
        conn.execute("SELECT 1")
    gateway.close()
    assert all(map(is_refused, ports))
    assert not processes_of(directory)


def test_whoever_asks_first_all_get_the_same_address(gateway):
    """Also where several threads ask at the same time."""
    barrier, found = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait(PATIENCE)
        found.append(url_of(gateway.conninfo_by_tcp(Purpose.SESSION)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(found) == 8
    assert len(set(found)) == 1


def test_each_gateway_has_a_password_of_its_own(stage, gateway):
    """That of another is refused."""
    conninfo = gateway.conninfo_by_tcp(Purpose.SESSION)
    other = stage.gateway.entrance.password
    assert len({conninfo["password"], other}) == 2
    assert min(map(len, (conninfo["password"], other))) >= 20
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**{**conninfo, "password": other})


def test_the_gateway_ends_while_a_password_is_waited_for(gateway):
    """It does not wait for the client, which is told why."""
    client = TCPClient(gateway.conninfo_by_tcp(Purpose.SESSION))
    client.begin()
    gateway.close()
    assert client.end() == ["57P01"]
    client.close()


def test_no_password_in_what_is_shown(gateway):
    """Neither of the gateway nor of where its clients come in."""
    password = gateway.conninfo_by_tcp(Purpose.SESSION)["password"]
    assert password not in f"{gateway!r} {gateway.entrance!r} {gateway.entrance}"


# Other names of the database


@pytest.mark.parametrize("by_tcp", [True, False])
def test_another_name_of_the_database(gateway, by_tcp):
    """One that is mapped leads to the same database, others are refused with the advice."""
    address = gateway.conninfo_by_tcp if by_tcp else gateway.conninfo
    conninfo = address(Purpose.SESSION)
    for name in ("other", conninfo["dbname"]):
        with psycopg.connect(**{**conninfo, "dbname": name}) as conn:
            found = conn.execute("SELECT current_database()").fetchone()
            assert found == (conninfo["dbname"],)
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(**{**conninfo, "dbname": "third"})
    assert f'connect to "{conninfo["dbname"]}", not to "third"' in str(caught.value)
    assert "pgmonkey_map = third = primary" in str(caught.value)
    client = (TCPClient if by_tcp else RawClient)({**conninfo, "dbname": "third"})
    if isinstance(client, TCPClient):
        client.begin()
        answer = client.say(conninfo["password"])
    else:
        answer = client.start()
    assert answer[0][1]["C"] == "3D000"
    client.close()


# The administrator


def test_the_administrator_of_a_server_of_ours(pg_server):
    """It may create what the tests' role may not."""
    with psycopg.connect(pg_server.admin_dsn, autocommit=True) as conn:
        conn.execute("CREATE ROLE made_by_admin LOGIN")
        try:
            conn.execute("CREATE DATABASE made_by_admin OWNER made_by_admin")
            conninfo = {**pg_server.conninfo("made_by_admin"), "user": "made_by_admin"}
            with psycopg.connect(**conninfo) as made:
                assert made.execute("SELECT current_user::text").fetchone() == ("made_by_admin",)
        finally:
            conn.execute("DROP DATABASE IF EXISTS made_by_admin")
            conn.execute("DROP ROLE made_by_admin")


def test_the_administrator_of_somebody_else_s_server(pg_server, database):
    """The kit knows none."""
    config = pg_server.config(database)
    server = ConfiguredServer(connection_spec(config, "normal", origin="server.yaml"), config)
    with pytest.raises(PGMonkeyError, match=r"server\.yaml: the kit knows no administrator"):
        _ = server.admin_dsn


# Files


def test_a_file_is_the_user_s_alone_and_removed():
    """Equal configurations share one; after its end a new one can be had."""
    files = ConfigFiles()
    try:
        one, other = files.write({"a": 1}), files.write({"a": 2})
        assert files.write({"a": 1}) == one != other
        for path in (one, other):
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700
        files.remove()
        files.remove()
        assert not one.parent.exists()
        assert files.write({"a": 1}).read_text("utf-8") == "a: 1\n"
    finally:
        files.remove()


# In runs of pytest


@pytest.fixture
def run(run: Callable[..., Any]) -> Callable[..., Any]:
    """Run pytest without the plugins that take longer than the tests of a project."""
    return lambda *args: run(*QUICK, *args)


CHILD = """
    import psycopg

    with psycopg.connect("") as conn:
        print([name for (name,) in conn.execute("SELECT name FROM item ORDER BY id")])
        conn.execute("INSERT INTO item (name) VALUES ('child')")
"""
MANAGER_CHILD = """
    import asyncio
    import sys
    from pytest_pgmonkey import PGConnectionManager

    manager = PGConnectionManager()
    INSERT = "INSERT INTO item (name) VALUES (%s)"

    for type_ in ("normal", "pool"):
        with manager.get_database_connection(sys.argv[1], type_) as conn:
            conn.execute(INSERT, [type_])

    async def work():
        for type_ in ("async", "async_pool"):
            handle = await manager.get_database_connection(sys.argv[1], type_)
            async with handle as conn:
                await conn.execute(INSERT, [type_])
        await manager.aclose()

    asyncio.run(work())
    with manager.get_database_connection(sys.argv[1], "normal") as conn:
        print([name for (name,) in conn.execute("SELECT name FROM item ORDER BY id")])
    manager.close()
"""


def test_children_join_by_variables_and_files(project, run):
    """They see what the test has written, and what they commit is rolled back with it."""
    project.makepyfile(child=CHILD, manager_child=MANAGER_CHILD)
    project.makepyfile(
        """
        import os, subprocess, sys
        import pytest, yaml
        from pathlib import Path
        from app import add, names
        from pytest_pgmonkey import PGConnectionManager

        def run(*command, **env):
            done = subprocess.run(
                command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
            )
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout.strip()

        BOTH = [
            pytest.param(name, marks=pytest.mark.pgmonkey(isolation=name))
            for name in ("rollback", "clone")
        ]

        @pytest.mark.parametrize("isolation", BOTH)
        def test_variables(pgmonkey, isolation):
            add("test")
            env = pgmonkey.env
            names_of = ("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "DATABASE_URL")
            assert tuple(env) == names_of
            assert env["DATABASE_URL"] == pgmonkey.url
            assert pgmonkey.url == "postgresql://{2}:{3}@{0}:{1}/{4}".format(*env.values())
            assert run(sys.executable, "child.py", **env) == "['test']"
            query = "SELECT name FROM item ORDER BY id"
            assert run("psql", "-X", "-w", "-A", "-t", "-c", query, **env) == "test\\nchild"
            by_url = run("psql", "-X", "-w", "-A", "-t", "-c", query, "-d", env["DATABASE_URL"])
            assert by_url == "test\\nchild"
            assert names() == ["child", "test"]

        @pytest.mark.parametrize("isolation", BOTH)
        def test_a_file(pgmonkey, isolation):
            add("test")
            path = pgmonkey.config_path
            found = run(sys.executable, "manager_child.py", str(path))
            expected = ["test", "normal", "pool", "async", "async_pool"]
            assert found == str(expected)
            assert names() == sorted(expected)

        def test_the_file_is_the_user_s_alone(pgmonkey):
            path = pgmonkey.config_path
            assert path.stat().st_mode & 0o777 == 0o600
            assert yaml.safe_load(path.read_text()) == pgmonkey.config
            assert pgmonkey.config_path == path
            Path("told.txt").write_text(f"{path} {pgmonkey.url}")

        def test_nothing_has_stayed(pgmonkey):
            assert names() == []
        """
    )
    run("-v").assert_outcomes(passed=6)
    path, url = (project.path / "told.txt").read_text().split()
    assert not Path(path).exists()
    assert not Path(path).parent.exists()
    assert is_refused(urlsplit(url).port or 0)


def test_a_manager_in_the_test_s_own_process(project, run):
    """It joins by what leads there, as by the application's own configuration beside it."""
    project.makepyfile(
        """
        import pytest
        from pytest_pgmonkey import PGConnectionManager

        def work(pgmonkey, what):
            config = getattr(pgmonkey, what)
            pgmonkey.execute("INSERT INTO item (name) VALUES ('test')")
            with PGConnectionManager() as manager:
                get = manager.get_database_connection
                if what == "config":
                    get = manager.get_database_connection_from_dict
                for type_ in ("normal", "pool"):
                    with get(config, type_) as conn:
                        conn.execute("INSERT INTO item (name) VALUES (%s)", [type_])
            expected = [("test",), ("normal",), ("pool",)]
            assert pgmonkey.execute("SELECT name FROM item ORDER BY id").fetchall() == expected

        @pytest.mark.parametrize("what", ["config", "config_path"])
        def test_alone(pgmonkey, what):
            work(pgmonkey, what)

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("what", ["config", "config_path"])
        def test_alone_in_a_clone(pgmonkey, what):
            work(pgmonkey, what)

        @pytest.mark.parametrize("isolation", [
            pytest.param(name, marks=pytest.mark.pgmonkey(isolation=name))
            for name in ("rollback", "clone")
        ])
        def test_beside_the_application(pgmonkey, isolation):
            from app import names
            work(pgmonkey, "config")
            assert names() == ["normal", "pool", "test"]
        """
    )
    run("-v").assert_outcomes(passed=6)


def test_what_leads_to_a_test_leads_its_own_process_there(project, run):
    """Drivers join by it; in a clone by its name."""
    project.makepyfile(
        """
        import psycopg, pytest
        from urllib.parse import urlsplit
        from app import add, names

        INSERT = "INSERT INTO item (name) VALUES (%s)"
        kept = {}

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("n", [1, 2])
        def test_a_clone_goes_by_its_name(pgmonkey, pgmonkey_database, pgmonkey_url, n):
            (name,) = pgmonkey.execute("SELECT current_database()::text").fetchone()
            assert name != pgmonkey_database.name
            assert urlsplit(pgmonkey.url).path == f"/{name}"
            assert pgmonkey.config["connection_settings"]["dbname"] == name
            assert pgmonkey.env["PGDATABASE"] == name
            assert f"dbname={name}" in pgmonkey.dsn.split()
            for address in (pgmonkey.url, pgmonkey.dsn, pgmonkey_url):
                with psycopg.connect(address) as conn:
                    conn.execute(INSERT, ["x"])
                    assert conn.execute("SELECT current_database()::text").fetchone() == (name,)
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (3,)

        @pytest.mark.parametrize("n", [1, 2])
        def test_joined_by_the_session_s_url_alone(pgmonkey_url, n):
            if n == 1:
                kept["conn"] = psycopg.connect(pgmonkey_url, autocommit=True)
            assert kept["conn"].execute("SELECT count(*) FROM item").fetchone() == (0,)
            kept["conn"].execute(INSERT, ["x"])

        @pytest.mark.pgmonkey(isolation="clone")
        def test_the_same_connection_in_a_clone(pgmonkey):
            add("x")
            with kept.pop("conn") as conn:
                assert conn.execute("SELECT name FROM item").fetchall() == [("x",)]

        def test_opens_one_by_its_own_url(pgmonkey):
            kept["own"] = psycopg.connect(pgmonkey.url)
            kept["url"] = pgmonkey.url
            kept["own"].execute(INSERT, ["x"])

        def test_finds_it_ended(pgmonkey):
            with kept["own"] as conn, pytest.raises(psycopg.errors.AdminShutdown, match="test has"):
                conn.execute("SELECT 1")
            assert names() == []

        def test_without_a_database():
            with pytest.raises(psycopg.OperationalError, match="none runs"):
                psycopg.connect(kept["url"])

        def test_the_administrator(pgmonkey_server, pgmonkey):
            with psycopg.connect(pgmonkey_server.admin_dsn, autocommit=True) as conn:
                conn.execute("CREATE ROLE reporter LOGIN")
                conn.execute("CREATE DATABASE reports OWNER reporter")
            with psycopg.connect(**{**pgmonkey_server.conninfo("reports"), "user": "reporter"}):
                pass
            pgmonkey.execute("GRANT SELECT ON item TO reporter")
        """
    )
    run("-v").assert_outcomes(passed=9)


@NEEDS_PROC
def test_a_run_listens_by_tcp_only_when_it_is_asked_for_a_url(project, run):
    """No other address needs it, and to show what a test is given needs none at all."""
    imports = "import socket, struct\nfrom pathlib import Path\n"
    project.makepyfile(ports=f"{imports}{inspect.getsource(tcp_addresses)}")
    project.makepyfile(
        """
        import os
        from pathlib import Path
        from ports import tcp_addresses
        from app import add

        def family():
            '''This process and its children: server, guardians, porter.'''
            found = {os.getpid()}
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = stat.read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[1]) == os.getpid():
                    found.add(int(stat.parent.name))
            return found

        BEFORE = tcp_addresses(family())

        def listening():
            return [address for address in tcp_addresses(family()) if address not in BEFORE]

        def test_shown(pgmonkey, pgmonkey_server, pgmonkey_database):
            add("x")
            before = family()
            repr([pgmonkey, pgmonkey_server, pgmonkey_database])
            assert family() == before
            assert listening() == []

        def test_other_addresses(pgmonkey, pgmonkey_dsn):
            assert pgmonkey.dsn and pgmonkey.config and pgmonkey.config_path
            assert listening() == []

        def test_a_url(pgmonkey):
            assert pgmonkey.url
            found = listening()
            assert {host for host, port in found} == {"127.0.0.1"}
            assert len(found) == 2

        def test_others(pgmonkey_url, pgmonkey):
            ports = {int(pgmonkey.env["PGPORT"]), int(pgmonkey_url.split(":")[3].split("/")[0])}
            assert {port for host, port in listening()} == ports
        """
    )
    run("-v").assert_outcomes(passed=4)


def test_a_report_shows_no_password(project, run):
    """Not where a test fails with all that it was given, nor in what is logged."""
    project.makepyfile(
        """
        import logging
        from pathlib import Path
        import psycopg, pytest

        @pytest.fixture
        def conn(pgmonkey):
            with psycopg.connect(pgmonkey.url) as conn:
                yield conn

        def test_fails(pgmonkey, pgmonkey_server, pgmonkey_database, conn):
            Path("password.txt").write_text(pgmonkey.env["PGPASSWORD"])
            logging.info("logged %s", pgmonkey)
            print(pgmonkey, repr(pgmonkey), f"{pgmonkey.config}")
            assert pgmonkey == pgmonkey_database

        def test_is_refused(pgmonkey, conn):
            conn.execute("SELECT nothing")

        @pytest.mark.pgmonkey(isolation="rollback")
        def test_waits(pgmonkey, conn):
            conn.execute("CREATE TABLE a ()")
            pgmonkey.execute("CREATE TABLE b ()")
        """
    )
    shown = ("-vv", "--showlocals", "--full-trace", "--log-level=DEBUG", "--setup-show")
    result = run(*shown, "--pgmonkey-wait-timeout=0.1", "--junitxml=report.xml")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["*logged <PGMonkey *"])
    password = (project.path / "password.txt").read_text()
    report = (project.path / "report.xml").read_text()
    assert len(password) > 20
    assert password not in f"{result.stdout.str()}{result.stderr.str()}{report}"


@NEEDS_PROC
def test_nothing_is_left_of_a_run_that_is_killed(project):
    """Neither an address by TCP, nor the file, nor the process that has listened."""
    project.makepyfile(
        """
        import os, signal

        def test_waits(pgmonkey, pgmonkey_url):
            with open("told.partial", "w") as file:
                for told in (pgmonkey.config_path, pgmonkey.dsn, pgmonkey.url, pgmonkey_url):
                    print(told, file=file)
            os.rename("told.partial", "told.txt")
            signal.pause()
        """
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *QUICK]
    with subprocess.Popen(command, cwd=project.path, stdout=subprocess.DEVNULL) as process:
        try:
            told = project.path / "told.txt"
            assert wait_until(lambda: told.exists() or process.poll() is not None)
            path, dsn, *urls = told.read_text().splitlines()
            directory = Path(str(conninfo_to_dict(dsn)["host"]))
            ports = [urlsplit(url).port or 0 for url in urls]
            assert Path(path).stat().st_mode & 0o777 == 0o600
            for address in (dsn, *urls):
                psycopg.connect(address).close()
        finally:
            process.kill()
    assert wait_until(lambda: not (Path(path).parent.exists() or directory.exists()))
    assert wait_until(lambda: all(map(is_refused, ports)))
    assert wait_until(lambda: not processes_of(directory))
