"""Clone isolation: a database of the test's own, with production's real connections and commits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ...handles import make_handle
from ..file_settings import in_clone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...connecting import Connector
    from ...handles import AsyncHandle, Handle
    from ..isolation import Left, Loans
    from ..servers.server import Server
    from .clones import Clones

__all__ = ["CloneIsolation"]


class _Lent:
    """A production handle's connections, lent to the handle that the application holds."""

    def __init__(self, twin: Handle, loans: Loans) -> None:
        self._twin = twin
        self.loans: Final = loans

    def getconn(self, timeout: float | None = None) -> Any:
        return self.loans.note(*self._twin._borrow(timeout))

    def putconn(self, conn: Any) -> None:
        self.loans.end(conn).putconn(conn)

    def close(self) -> None:
        self._twin.disconnect()

    @property
    def is_gone(self) -> bool:
        return self._twin._gone

    @property
    def pool(self) -> Any:
        source = self._twin._source
        if source is not None and source.unopened:
            source.open()
        return self._twin.pool


class _AsyncLent:
    """The same for an async handle."""

    def __init__(self, twin: AsyncHandle, loans: Loans) -> None:
        self._twin = twin
        self.loans: Final = loans

    async def getconn(self, timeout: float | None = None) -> Any:
        return self.loans.note(*await self._twin._borrow(timeout))

    async def putconn(self, conn: Any) -> None:
        await self.loans.end(conn).putconn(conn)

    async def close(self) -> None:
        await self._twin.disconnect()

    @property
    def is_gone(self) -> bool:
        return self._twin._gone

    @property
    def pool(self) -> Any:
        pool: Any = self._twin.pool
        with suppress(RuntimeError):  # where no loop runs
            source: Any = self._twin._source_in(asyncio.get_running_loop())
            if source.unopened:
                source.open_at_once()
        return pool


class CloneIsolation:
    """What one test runs in: a clone, which handles reach through production's own sources.

    `connector` opens their connections, of which `loans` keeps account; `retire` takes the
    isolation of a test that has ended, and gives its clone back at some time.
    """

    def __init__(
        self,
        clones: Clones,
        server: Server,
        connector: type[Connector],
        loans: Callable[[], Loans],
        retire: Callable[[CloneIsolation], None],
    ) -> None:
        self._clones = clones
        self._server = server
        self._connector = connector
        self._loans = loans
        self._retire = retire
        self._twins: dict[Any, Any] = {}
        self._lent: dict[Any, Any] = {}
        self._connection: psycopg.Connection[Any] | None = None
        self._clean = False
        self.left: list[Left] = []
        """What the test has not returned, once it has ended."""

    def begin(self) -> None:
        """Take a clone."""
        self.name = self._clones.take()
        self.conninfo = self._server.conninfo(self.name)
        self._before = self._clones.mark()

    def source(self, handle: Handle) -> Any:
        """Give what a sync handle borrows from; `None` to a handle of our own."""
        return self._find(handle, _Lent)

    def async_source(self, handle: AsyncHandle) -> Any:
        """Give what an async handle borrows from; `None` to a handle of our own."""
        return self._find(handle, _AsyncLent)

    def _find(self, handle: Any, kind: Any) -> Any:
        if handle in self._lent:
            return self._lent[handle]
        if handle in self._twins:
            return None
        spec = in_clone(handle.spec, self.conninfo)
        twin = make_handle(spec, handle._connector.hook, connector=self._connector)
        self._twins[twin] = handle
        self._lent[handle] = kind(twin, self._loans())
        return self._lent[handle]

    @property
    def leads_to(self) -> dict[str, str]:
        """The database in which the gateway's clients have their own sessions."""
        return self.conninfo

    def execute(self, query: Any, params: Any) -> psycopg.Cursor[Any]:
        """Run one statement in autocommit."""
        __tracebackhide__ = True
        return self._own_connection().execute(query, params)

    def _own_connection(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = self._connector.sync_class.connect(
                **self.conninfo,  # type: ignore[arg-type]
                autocommit=True,
            )
        return self._connection

    def end(self) -> tuple[list[str], list[str]]:
        """Close what the test has opened."""
        self.left = [left for lent in self._lent.values() for left in lent.loans.left]
        for twin in self._twins:
            twin._end_all()
            twin._connector.forget_proofs()
        try:
            self._clean = self._clones.settle(self.name, self._before) and not self.left
            if self._connection is not None:
                self._connection.close()
        except psycopg.Error:
            # The test has ended the server's side, or the server itself: the clone goes.
            self._clean = False
        self._retire(self)
        return [], []

    def give_back(self) -> None:
        """Give the clone back, for another test if nothing was written in it."""
        self._clones.give_back(self.name, clean=self._clean)
