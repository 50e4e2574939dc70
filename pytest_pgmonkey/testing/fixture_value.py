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

    Under rollback isolation everything here works in one transaction, which is rolled back; under
    clone isolation it works in the test's own database.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def __repr__(self) -> str:
        # Pytest shows it with a failure, so it must not start anything.
        return f"<PGMonkey {redact_text(make_conninfo(**self._kit.isolation.conninfo))!r}>"

    @cached_property
    def manager(self) -> PGConnectionManager:
        """A manager. Any file or dictionary that you give it leads to the test's database."""
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
        """A configuration with which a `PGConnectionManager` in another process joins the test."""
        conninfo = self._kit.gateway.conninfo(Purpose.TEST)
        self._kit.accept(conninfo["dbname"])  # handles in this process lead there anyway
        return {"connection_settings": {**conninfo, "port": int(conninfo["port"])}}

    @property
    def config_path(self) -> Path:
        """A YAML file with `config`; it is removed at the end of the run."""
        return self._kit.files.write(self.config)

    @property
    def dsn(self) -> str:
        """The DSN with which any client in any process joins the test.

        In rollback isolation the client works in the test's transaction, in clone isolation in the
        test's database. Its connections end with the test. From the first use on, the kit listens
        on a Unix socket that only this user can reach.
        """
        return make_conninfo(**self._kit.gateway.conninfo(Purpose.TEST))

    @property
    def url(self) -> str:
        """The same address as a URL: `postgresql://user:password@127.0.0.1:port/name`.

        Validators and several drivers accept only a URL. From the first use on, the kit also
        listens on loopback, with a password that is new in each run.
        """
        return url_of(self._by_tcp)

    @property
    def peek(self) -> str:
        """The DSN with which `psql` looks at a test that stands still, for example at a breakpoint.

        It shows what the test has written so far, committed or not, and writes nothing. In clone
        isolation it shows what is committed.
        """
        return make_conninfo(**self._kit.gateway.conninfo(Purpose.PEEK))

    @property
    def env(self) -> dict[str, str]:
        """Variables with which a child process joins the test: libpq's and `DATABASE_URL`.

        Pass them together with the child's others: `env={**os.environ, **pgmonkey.env}`.
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
        """Give a block that fails unless exactly `number` queries run, in sync or async code.

        The application's queries on all connections and clients of the test count. BEGIN, COMMIT,
        savepoints, SET, and queries that drivers send on their own do not. `executemany()` and
        COPY count once. The block raises `AssertionError` at its end, with the statements by place.
        Raises `ValueError` for a number below 0.
        """
        return Budget(self._kit.record, number, exactly=True)

    def assert_max_num_queries(self, number: int) -> Budget:
        """Give a block that fails if more than `number` queries run; see `assert_num_queries`."""
        return Budget(self._kit.record, number, exactly=False)

    def checkpoint(self) -> AbstractContextManager[None]:
        """Give a block that is undone at its end: then the test's data is as it was before.

        It undoes what any connection or client wrote inside, committed or not, and restores the
        transactions and settings of connections from before. Use a plain `with` in sync and async
        tests; blocks may be nested. Raises `KitError` in clone isolation, and `SandboxError` if
        a statement or a pipeline is under way when the block begins or ends.
        """
        return self._kit.checkpoint()

    def execute(self, query: Query, params: Params | None = None) -> Cursor[Any]:
        """Run one statement in autocommit and return its cursor; for sync and async tests."""
        __tracebackhide__ = True
        return self._kit.isolation.execute(query, params)
