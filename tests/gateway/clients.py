"""Programs of real clients that run twice: over the gateway and on a real server, equally.

A program is a function of a `World`; what its client observes is noted, and must be the same in
both places.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import asyncpg
import psycopg
import psycopg2
import pytest
import sqlalchemy.exc
from helpers.waiting import until
from psycopg.conninfo import make_conninfo
from sandbox import twins

from pytest_pgmonkey.testing.addresses.purpose import Purpose
from pytest_pgmonkey.testing.gateway.entrance.entrance import Entrance
from pytest_pgmonkey.testing.gateway.gateway import Gateway
from pytest_pgmonkey.testing.rollback import RollbackIsolation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

SCHEMA = (
    twins.SCHEMA
    + """
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE TYPE pair AS (a int, b mood);
CREATE TABLE typed (id int PRIMARY KEY, pairs pair[], m mood);
"""
)
TABLES = ("t", "late", "soon", "typed")

#: Where a program runs over the gateway: in a rolled-back test, and in one with a clone.
PLACES = ("test", "clone")


def error_facts(error: BaseException) -> Any:
    """Give what must be equal of an error."""
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        orig: Any = error.orig
        return type(error).__name__, error_facts(orig.__cause__ or orig)
    if isinstance(error, (psycopg.Error, psycopg2.Error)) and error.diag.sqlstate:
        diag = error.diag
        return (
            diag.sqlstate,
            diag.severity,
            diag.message_primary,
            diag.message_detail,
            diag.message_hint,
            diag.statement_position,
            diag.constraint_name,
            diag.context,
        )
    if isinstance(error, asyncpg.PostgresError):
        found: Any = error
        return found.sqlstate, found.message, found.detail, found.position, found.constraint_name
    if isinstance(error, (psycopg.Error, psycopg2.Error, sqlalchemy.exc.SQLAlchemyError)):
        return type(error).__name__, str(error)
    return type(error).__name__


def difference(on_server: list[Any], over_gateway: list[Any]) -> str:
    """Say where two runs of a program parted."""
    lines: list[str] = []
    for real, ours in zip_longest(on_server, over_gateway, fillvalue="nothing"):
        if real != ours:
            return "\n".join([*lines[-12:], f"server:  {real}", f"gateway: {ours}"])
        lines.append(f"both:    {real}")
    return "\n".join(lines)


class World:
    """One of the places in which a program runs."""

    def __init__(self, stage: Stage, conninfo: dict[str, str]) -> None:
        self.stage = stage
        self.conninfo = conninfo
        self.dsn = make_conninfo(**conninfo)
        self.noted: list[Any] = []
        self.stack = ExitStack()

    @property
    def asyncpg_keywords(self) -> dict[str, Any]:
        keywords: dict[str, Any] = dict(self.conninfo)
        keywords["database"] = keywords.pop("dbname")
        return keywords

    def note(self, *values: Any) -> None:
        self.noted.append(values[0] if len(values) == 1 else values)

    @contextmanager
    def noting(self, *kinds: type[BaseException]) -> Iterator[None]:
        """Note the error that leaves the block."""
        known = (psycopg.Error, psycopg2.Error, asyncpg.PostgresError, asyncpg.InterfaceError)
        try:
            yield
        except (*known, sqlalchemy.exc.SQLAlchemyError, *kinds) as error:
            self.note("error", error_facts(error))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Expect an error of a pipeline: which one psycopg raises depends on its timing."""
        with pytest.raises(psycopg.Error):
            yield

    # psycopg, sync

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """Give a psycopg connection that is closed with the program."""
        conn = psycopg.connect(self.dsn, **options)
        self.stack.callback(conn.close)
        conn.add_notice_handler(lambda diag: self.note("notice", diag.message_primary))
        return conn

    def run(self, conn: psycopg.Connection[Any], query: Any, params: Any = None, **how: Any) -> Any:
        """Execute, and note status tag, row count, rows and the transaction's status."""
        rows = None
        with self.noting():
            cursor = conn.execute(query, params, **how)
            rows = cursor.fetchall() if cursor.description else None
            self.note(query, cursor.statusmessage, cursor.rowcount, rows)
        self.note(conn.info.transaction_status.name)
        return rows

    def run2(self, conn: Any, query: str, params: Any = None) -> Any:
        """Execute with psycopg2, and note the same."""
        rows = None
        with self.noting(), conn.cursor() as cursor:
            cursor.execute(query, params)
            rows = cursor.fetchall() if cursor.description else None
            self.note(query, cursor.statusmessage, cursor.rowcount, rows)
        for notice in conn.notices:
            self.note("notice", notice)
        conn.notices.clear()
        self.note(conn.get_transaction_status())
        return rows

    async def arun(self, conn: Any, query: str, *params: Any) -> Any:
        """Fetch with asyncpg, and note rows and whether a transaction is open."""
        rows = None
        with self.noting():
            rows = [tuple(row) for row in await conn.fetch(query, *params)]
            self.note(query, rows)
        self.note(conn.is_in_transaction())
        return rows

    # Others look on

    def wait_until_sleeping(self) -> None:
        """Wait until the server runs a client's `pg_sleep`."""
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state = 'active' "
            "AND query LIKE '%%pg_sleep(%%' AND wait_event = 'PgSleep'"
        )
        name = [self.conninfo["dbname"]]
        until(lambda: self.stage.admin.execute(query, name).fetchall()[0][0], 30)


class _Clone:
    """What the gateway is told of a test with a database of its own."""

    def __init__(self, conninfo: dict[str, str]) -> None:
        self.leads_to = conninfo


class Stage:
    """A gateway before three databases with the same schema.

    One is for rolled-back tests, one stands for a clone, and one is used past the gateway.
    """

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.names = {
            place: f"{place}_{secrets.token_hex(6)}" for place in ("test", "clone", "real")
        }
        for name in self.names.values():
            server.create_database(name)
        self.admin: Any = psycopg.connect(**server.conninfo("postgres"), autocommit=True)  # type: ignore[arg-type]
        self.admins: dict[str, psycopg.Connection[Any]] = {
            place: psycopg.connect(**server.conninfo(name), autocommit=True)  # type: ignore[arg-type]
            for place, name in self.names.items()
        }
        for admin in self.admins.values():
            admin.execute(SCHEMA)
        self.remakes: list[list[str]] = []
        self.rollback = RollbackIsolation(
            server.conninfo(self.names["test"]), 10.0, self.remakes.append, server.log
        )
        self.rollback.connect()
        self.clone = _Clone(server.conninfo(self.names["clone"]))
        self.leading: Any = None
        self.gateway = Gateway(
            lambda: self.leading,
            lambda: self.rollback.conninfo,
            lambda: server.conninfo("postgres"),
            Entrance(server.conninfo("x")["user"], self.names["test"], lambda: self.gateway),
        )
        self._outcomes: dict[Any, list[Any]] = {}
        self._catalogs: dict[str, list[Any]] = {}

    def close(self) -> None:
        self.gateway.close()
        self.rollback.close()
        for admin in (self.admin, *self.admins.values()):
            admin.close()
        for name in self.names.values():
            self.server.drop_database(name)

    # Tests, as the kit begins and ends them

    def begin(self, place: str = "test") -> None:
        self.gateway.end_sessions()
        if place == "test":
            self.rollback.begin()
            self.leading = self.rollback
        else:
            self.leading = self.clone

    def end(self) -> list[str]:
        """End the test; gives what its report would tell."""
        before, self.leading = self.leading, None
        try:
            self.gateway.end_sessions()
            failures, refusals = self.rollback.end() if before is self.rollback else ([], [])
        finally:
            self.gateway.end_clients()
        return failures + refusals

    @contextmanager
    def test(self, place: str = "test", problems: list[str] | None = None) -> Iterator[Stage]:
        """A test that runs for a block, and leaves nothing behind."""
        before = self.persisted()
        self.begin(place)
        try:
            yield self
        finally:
            found = self.end()
            if place == "clone":
                self.renew("clone")
        after = self.persisted()
        assert (found, after) == (problems or [], before), (found, after)

    def conninfo(self, *, ends_with_test: bool = True) -> dict[str, str]:
        purpose = Purpose.TEST if ends_with_test else Purpose.SESSION
        return self.gateway.conninfo(purpose)

    @property
    def dsn(self) -> str:
        """What leads into the running test."""
        return make_conninfo(**self.conninfo())

    @property
    def session_dsn(self) -> str:
        """What leads into whatever test runs."""
        return make_conninfo(**self.conninfo(ends_with_test=False))

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Let members wait for another's turn for no longer, for a block."""
        outer: Any = self.rollback.leads_to
        before, outer.wait_timeout = outer.wait_timeout, seconds
        try:
            yield
        finally:
            outer.wait_timeout = before

    def until_waiting(self) -> None:
        """Wait until somebody waits for another's turn."""
        turn: Any = self.rollback.leads_to.backend.turn
        until(lambda: turn.waiting)

    def renew(self, place: str) -> None:
        """Make a database anew, from which others are sent away."""
        admin = self.admins[place]
        admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        if self._catalog(place) == self._catalogs.get(place):
            admin.execute(f"TRUNCATE {', '.join(TABLES)}")  # type: ignore[arg-type]
        else:
            admin.execute("DROP OWNED BY CURRENT_USER; " + SCHEMA)  # type: ignore[arg-type]
            self._catalogs[place] = self._catalog(place)

    def _catalog(self, place: str) -> list[Any]:
        """Give what changes with the definition of anything in a database."""
        namespace = "'public'::regnamespace"
        return (
            self.admins[place]
            .execute(  # type: ignore[arg-type]
                f"SELECT oid FROM pg_class WHERE relnamespace = {namespace} UNION ALL "
                f"SELECT oid FROM pg_proc WHERE pronamespace = {namespace} UNION ALL "
                f"SELECT attrelid FROM pg_attribute JOIN pg_class c ON c.oid = attrelid "
                f"WHERE relnamespace = {namespace} AND NOT attisdropped UNION ALL "
                "SELECT oid FROM pg_largeobject_metadata ORDER BY 1"
            )
            .fetchall()
        )

    def persisted(self) -> list[Any]:
        """Give what others see of the rolled-back tests' database."""
        admin = self.admins["test"]
        query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        found: list[Any] = admin.execute(f"{query} ORDER BY 1").fetchall()
        return found + [admin.execute(f"SELECT * FROM {t}").fetchall() for t in TABLES]  # type: ignore[arg-type]

    # Running programs

    def outcome(self, program: Any, conninfo: dict[str, str]) -> list[Any]:
        world = World(self, conninfo)
        try:
            if asyncio.iscoroutinefunction(program):
                asyncio.run(program(world))
            else:
                program(world)
        finally:
            world.stack.close()
            gc.collect()
        return world.noted

    def on_server(self, program: Any) -> list[Any]:
        """Give what a program notes on a real server, where it runs once."""
        if program not in self._outcomes:
            conninfo = self.server.conninfo(self.names["real"])
            try:
                self._outcomes[program] = self.outcome(program, conninfo)
            finally:
                self.renew("real")
        return self._outcomes[program]

    def compare(self, program: Any, place: str) -> None:
        with self.test(place):
            over_gateway = self.outcome(program, self.conninfo())
        on_server = self.on_server(program)
        if on_server != over_gateway:
            raise AssertionError(difference(on_server, over_gateway))


def twin(program: Any) -> Callable[..., None]:
    """Make a test of a program: it runs on a server, and in each place over the gateway."""

    @pytest.mark.parametrize("place", PLACES)
    def test(stage: Stage, place: str) -> None:
        stage.compare(program, place)

    test.__name__ = program.__name__
    test.__doc__ = program.__doc__
    return test
