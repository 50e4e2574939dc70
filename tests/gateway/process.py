"""A test process inside the one that runs, and clients of its gateway."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.waiting import wait_until
from psycopg.conninfo import make_conninfo

from gateway import raw
from gateway.clients import SCHEMA
from gateway.raw import RawClient
from pytest_pgmonkey import sources
from pytest_pgmonkey.testing.addresses.purpose import Purpose
from pytest_pgmonkey.testing.addresses.urls import url_of
from pytest_pgmonkey.testing.fixture_value import PGMonkey
from pytest_pgmonkey.testing.interception import Interception
from pytest_pgmonkey.testing.kit import Kit
from pytest_pgmonkey.testing.options import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TAKEN = "SELECT n FROM t ORDER BY n"
INSERT = "INSERT INTO t VALUES ({})"


class Told(Exception):  # noqa: N818 - it is what a client is told
    """An error of the server's, as a client hears of it."""

    def __init__(self, sqlstate: str | None, text: str) -> None:
        super().__init__(f"{sqlstate}: {text}")
        self.sqlstate = sqlstate
        self.text = text


class Client:
    """Asks, statement by statement; `open` begins a transaction and works in it."""

    def open(self, *queries: str) -> None:
        for query in ("BEGIN", *queries):
            self.ask(query)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def numbers(self) -> list[int]:
        return [int(n) for (n,) in self.ask(TAKEN)]


class Raw(Client):
    """Simple queries."""

    def __init__(self, process: Process) -> None:
        self.socket = RawClient(process.conninfo)
        self.socket.start()
        self.status = b"I"

    @property
    def is_open(self) -> bool:
        return self.status in (b"T", b"E")

    def say(self, *data: bytes) -> list[Any]:
        """Send messages, and give what is answered without descriptions of rows."""
        answers = self.socket.ask(*data)
        self.status = answers[-1][1]
        return [each for each in answers if each[0] not in "T1nt2"]

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        return self.rows(self.say(raw.query(query)))

    @staticmethod
    def rows(answers: list[Any]) -> list[tuple[Any, ...]]:
        for kind, body in answers:
            if kind == "E":
                raise Told(body["C"], body["M"])
        return [
            tuple(None if value is None else value.decode() for value in body)
            for kind, body in answers
            if kind == "D"
        ]

    def codes(self, *data: bytes) -> list[str]:
        """Send messages, and give the tags and SQLSTATEs that are answered, and the status."""
        answers = self.say(*data)
        found = [b["C"] if k == "E" else b[0] for k, b in answers if k in "CE"]
        return [*found, self.status.decode()]

    def run(self, query: str) -> list[str]:
        return self.codes(raw.query(query))

    def close(self) -> None:
        self.socket.close()


class Process:
    """A kit whose tests begin and end as its user says, and what is really in its database."""

    def __init__(self, path: Path) -> None:
        schema = path / "schema.sql"
        schema.write_text(SCHEMA, "utf-8")
        given = {"source": "embedded"}
        options = resolve(
            lambda o: given.get(o.name), lambda _: None, {}, rootdir=path, called_from=path
        )
        interception = Interception({}, lambda: True, everything=True)
        self.stack = ExitStack()
        self._before, sources.interceptor = sources.interceptor, interception
        self.kit = Kit(options, interception, pytest.fail)
        try:
            self.database = self.kit.prepare([schema])
            self.conninfo = self.kit.gateway.conninfo(Purpose.SESSION)
            self.by_tcp = self.kit.gateway.conninfo_by_tcp(Purpose.SESSION)
        except BaseException:
            self.close()
            raise
        self.dsn = make_conninfo(**self.conninfo)
        self.url = url_of(self.by_tcp)
        self.at_first = self.real()

    def close(self) -> None:
        self.kit.close()
        sources.interceptor = self._before

    @contextmanager
    def test(
        self, isolation: str = "rollback", problems: list[str] | None = None, refused: int = 0
    ) -> Iterator[PGMonkey]:
        """A test that runs for a block; its report tells of so many waits."""
        self.kit.begin(isolation)
        ended = False
        try:
            yield PGMonkey(self.kit)
            ended = True
        finally:
            failures, refusals = self.kit.end()
            if ended:
                assert failures == (problems or [])
                assert len(refusals) == refused, refusals

    def numbers(self) -> list[int]:
        """Give the rows that a new test finds."""
        with self.test() as test:
            return numbers(test)

    def real(self, query: str = "") -> list[Any]:
        """Give what is in the database for everybody, or what a query finds there."""
        tables = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        with psycopg.connect(self.database.dsn, autocommit=True) as conn:
            if query:
                return conn.execute(query).fetchall()  # type: ignore[arg-type]
            found: list[Any] = conn.execute(f"{tables} ORDER BY 1").fetchall()  # type: ignore[arg-type]
            return found + [conn.execute(f"SELECT * FROM {t}").fetchall() for t in ("t", "late")]  # type: ignore[arg-type]

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Let those who join meanwhile wait for another's turn for no longer."""
        outer: Any = self.kit._rollback.leads_to
        before, outer.wait_timeout = outer.wait_timeout, seconds
        try:
            yield
        finally:
            outer.wait_timeout = before

    @property
    def sessions(self) -> list[Any]:
        """The wider transactions that are known."""
        return self.kit._rollback._wider

    @property
    def _open(self) -> int:
        return sum(not (each._left or each.scope.lost) for each in self.sessions)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Have a client go in the block, and wait until it is known to have gone."""
        before = self._open
        yield
        assert wait_until(lambda: self._open < before)

    def until_busy(self) -> None:
        """Wait until a client with a wider transaction is in the middle of a statement."""
        assert wait_until(lambda: any(each.member.busy for each in self.sessions))

    def client(self, kind: Callable[[Process], Any]) -> Any:
        """Give a client that is closed with the test."""
        client = kind(self)
        self.stack.callback(client.close)
        return client

    def raw(self) -> Raw:
        client: Raw = self.client(Raw)
        return client

    def psycopg(self, **options: Any) -> psycopg.Connection[Any]:
        conn = psycopg.connect(self.dsn, **options)
        self.stack.callback(conn.close)
        return conn


def numbers(conn: Any) -> list[int]:
    return [n for (n,) in conn.execute(TAKEN)]
