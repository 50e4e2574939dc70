"""The rolled-back transaction of a test process: it begins, lends, and is undone test by test."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import psycopg
from psycopg.pq import TransactionStatus

from .backend import Backend, Level
from .borrower import Borrower
from .places import caller
from .internals import check_psycopg, lend
from .lending import AsyncSandboxSource, SandboxSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...handles import AsyncHandle, Handle

logger = logging.getLogger("pytest_pgmonkey")

# What survives a ROLLBACK in the session, and would be seen by the next test.
_CLEAN_UP: Final = b"ROLLBACK; SELECT pg_catalog.pg_advisory_unlock_all(); DEALLOCATE ALL"
_STATEMENT_END: Final = 2.0
_NAMES_PER_BORROWER: Final = 1_000_000


class Sandbox:
    """Lends connections over one backend, and rolls back what was done on them.

    `conninfo` are the libpq keywords of the database; `wait_timeout` is in seconds.
    """

    def __init__(self, conninfo: Mapping[str, str], wait_timeout: float = 5.0) -> None:
        check_psycopg()
        self.conninfo: Final = dict(conninfo)
        self.wait_timeout = wait_timeout
        self._backend: Backend | None = None
        self._sources: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._borrowed = 0
        self._deferrable: list[tuple[str, bool]] | None = None
        self.spoiled = False
        """Whether something of a test was committed: the database must not be used again."""

    def take_refusals(self) -> list[str]:
        """Give, once, the waits that were refused: a thread of the application may hide them."""
        if self._backend is None or not self._backend.turn.refusals:
            return []
        refusals, self._backend.turn.refusals = self._backend.turn.refusals, []
        return refusals

    @property
    def backend(self) -> Backend:
        """The live backend; opened at its first use in the process."""
        if self._backend is None:
            self._backend = Backend(self.conninfo)
        return self._backend

    def connect(self) -> None:
        """Open the backend now, so that a server that cannot be reached shows at once."""
        _ = self.backend

    # Lending

    def source(self, handle: Handle) -> SandboxSource:
        """Give what a sync handle borrows from in the current test."""
        source: SandboxSource | None = self._sources.get(handle)
        if source is None:
            source = self._sources[handle] = SandboxSource(self, handle)
        return source

    def async_source(self, handle: AsyncHandle) -> AsyncSandboxSource:
        """Give what an async handle borrows from in the current test."""
        source: AsyncSandboxSource | None = self._sources.get(handle)
        if source is None:
            source = self._sources[handle] = AsyncSandboxSource(self, handle)
        return source

    def lend(
        self,
        cls: type[Any],
        settings: tuple[tuple[str, str], ...] = (),
        *,
        autocommit: bool = False,
        pool: object | None = None,
    ) -> Any:
        """Give a new connection over the backend."""
        backend = self.backend
        if backend.abandoned:
            self._bury(backend)
        self._borrowed += 1
        borrower = Borrower(backend, caller(), settings, self.wait_timeout)
        backend.lent[borrower] = None
        return lend(
            backend.template,
            cls,
            borrower,
            autocommit=autocommit,
            pool=pool,
            prepared_index=self._borrowed * _NAMES_PER_BORROWER,
        )

    @staticmethod
    def _bury(backend: Backend) -> None:
        while backend.abandoned:
            backend.abandoned.pop().bury()

    # Tests

    def reset(self) -> list[str]:
        """Undo what a test did and give what went wrong in it, as sentences for its report."""
        self._sources.clear()
        backend = self._backend
        if backend is None:
            return []
        problems: list[str] = []
        if backend.dead:
            self._backend = None
            return ["the server closed the test's connection while the test ran"]
        if backend.lent or backend.abandoned:
            problems = problems + self._take_back(backend)
            if self._backend is None:
                return problems
        if backend.escaped is not None:
            self.spoiled = True
            problems = [*problems, str(backend.escaped)]
        self._roll_back(backend)
        return problems

    def _take_back(self, backend: Backend) -> list[str]:
        """Close what the test did not return; a statement still running is cancelled."""
        self._bury(backend)
        holder = backend.turn.holder
        if holder is not None and holder.owns_running_statement and self._running(backend):
            place = holder.place
            if not self._cancel(backend):
                self._backend = None
                return [f"a statement on the connection borrowed at {place} still ran at the end"]
        for borrower in list(backend.lent):
            conn = borrower.wrapper()
            if conn is not None:
                borrower.close(conn, "the test that borrowed this connection has ended")
        return []

    @staticmethod
    def _running(backend: Backend) -> bool:
        return bool(backend.pgconn.transaction_status == TransactionStatus.ACTIVE)

    def _cancel(self, backend: Backend) -> bool:
        """Cancel what still runs in another thread or task; gives whether it has ended."""
        raise NotImplementedError

    def _roll_back(self, backend: Backend) -> None:
        backend.escaped = None
        backend.undo_frame()

    def close(self) -> None:
        """End the session with the server."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
