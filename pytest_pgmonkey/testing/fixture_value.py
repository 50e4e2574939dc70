"""The value of the fixture `pgmonkey`: one test's database, by all four types."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from psycopg.conninfo import make_conninfo

from ..secrets import redact_text
from .addresses.purpose import Purpose
from .addresses.urls import url_of
from .record.budgets import Budget

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from psycopg import Cursor
    from psycopg.abc import Params, Query

    from ..handles import AsyncHandle, AsyncPoolHandle, Handle, PoolHandle
    from ..manager import PGConnectionManager
    from .kit import Kit


class PGMonkey:
    """The value of the fixture `pgmonkey`: the test's database.

    In rollback isolation everything here works in one transaction that is rolled back, and in
    clone isolation in a database of the test's own.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def __repr__(self) -> str:
        # Pytest shows it with a failure: nothing is started for it.
        return f"<PGMonkey {redact_text(make_conninfo(**self._kit.isolation.conninfo))!r}>"

    @cached_property
    def manager(self) -> PGConnectionManager:
        """A manager; whatever file or dictionary it is given leads to the test's database."""
        return self._kit.handles.manager()

    @cached_property
    def normal(self) -> Handle:
        """The handle of type `normal`."""
        return cast("Handle", self._kit.handles.make("normal"))

    @cached_property
    def pool(self) -> PoolHandle:
        """The handle of type `pool`."""
        return cast("PoolHandle", self._kit.handles.make("pool"))

    @cached_property
    def async_(self) -> AsyncHandle:
        """The handle of type `async`."""
        return cast("AsyncHandle", self._kit.handles.make("async"))

    @cached_property
    def async_pool(self) -> AsyncPoolHandle:
        """The handle of type `async_pool`."""
        return cast("AsyncPoolHandle", self._kit.handles.make("async_pool"))

    @property
    def config(self) -> dict[str, Any]:
        """A configuration that leads a `PGConnectionManager` in another process to the test."""
        conninfo = self._kit.gateway.conninfo(Purpose.TEST)
        self._kit.accept(conninfo["dbname"])  # in this process its handles are led there anyway
        return {"connection_settings": {**conninfo, "port": int(conninfo["port"])}}

    @property
    def config_path(self) -> Path:
        """The same as a YAML file, which is removed with the run."""
        return self._kit.files.write(self.config)

    @property
    def dsn(self) -> str:
        """What any client connects with, in any process: it joins the test.

        In rollback isolation it works in the test's transaction, in clone isolation in the test's
        database. Its connections end with the test. From the first use on the kit listens on a
        Unix socket that this user alone can reach.
        """
        return make_conninfo(**self._kit.gateway.conninfo(Purpose.TEST))

    @property
    def url(self) -> str:
        """The same as `postgresql://user:password@127.0.0.1:port/name`.

        Validators and several drivers take nothing else. From the first use on the kit listens on
        loopback, too, with a password that is made for this run.
        """
        return url_of(self._by_tcp)

    @property
    def peek(self) -> str:
        """What `psql` connects with to look at the test while it stands still, at a breakpoint say.

        It reads what the test has written so far, committed or not, and writes nothing. In clone
        isolation it reads what is committed.
        """
        return make_conninfo(**self._kit.gateway.conninfo(Purpose.PEEK))

    @property
    def env(self) -> dict[str, str]:
        """Variables that lead a child process to the test: libpq's own, and `DATABASE_URL`.

        Give them with what the child needs besides: `env={**os.environ, **pgmonkey.env}`.
        """
        by_tcp = self._by_tcp
        return {
            "PGHOST": by_tcp["host"],
            "PGPORT": by_tcp["port"],
            "PGUSER": by_tcp["user"],
            "PGPASSWORD": by_tcp["password"],
            "PGDATABASE": by_tcp["dbname"],
            "DATABASE_URL": url_of(by_tcp),
        }

    @property
    def _by_tcp(self) -> dict[str, str]:
        return self._kit.gateway.conninfo_by_tcp(Purpose.TEST)

    def assert_num_queries(self, number: int) -> Budget:
        """Give a block in which exactly so many queries run, in sync and async code alike.

        Queries of the application count, by whichever connection or client of the test: not BEGIN,
        COMMIT, savepoints and SET, nor what drivers ask by themselves. `executemany()` and COPY
        count once. At its end it raises `AssertionError`, with the statements by place, where the
        number differs.
        """
        return Budget(self._kit.record, number, exactly=True)

    def assert_max_num_queries(self, number: int) -> Budget:
        """Give a block in which at most so many queries run; see `assert_num_queries`."""
        return Budget(self._kit.record, number, exactly=False)

    def checkpoint(self) -> AbstractContextManager[None]:
        """Give a block after which the test's data is as it was before.

        What any connection or client has written inside is undone, committed or not; so are
        transactions and settings of connections that were there before. Use it with `with` in sync
        and async tests; blocks may be nested. Raises `KitError` in clone isolation, and
        `SandboxError` at its beginning or its end where a statement or a pipeline is under way.
        """
        return self._kit.checkpoint()

    def execute(self, query: Query, params: Params | None = None) -> Cursor[Any]:
        """Run one statement in autocommit, from sync and async tests alike; gives its cursor."""
        __tracebackhide__ = True
        return self._kit.isolation.execute(query, params)
