"""The rolled-back transaction of a test process: it begins, lends, and is undone test by test."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import psycopg
from psycopg.pq import TransactionStatus

from .backend import Backend
from .borrower import Borrower
from .internals import SandboxConnection, check_psycopg
from .lending import AsyncSandboxSource, SandboxSource
from .places import caller

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...handles import AsyncHandle, Handle

logger = logging.getLogger("pytest_pgmonkey")

_PATIENCE: Final = 2.0  # seconds for a statement that still runs when its test has ended
_POLL: Final = 0.001
_NAMES_PER_BORROWER: Final = 1_000_000
_ENDED: Final = "the test that borrowed this connection has ended"
_DIED: Final = "the server closed the test's connection while the test ran"


class Sandbox:
    """Lends connections over one backend, and rolls back what was done on them.

    `conninfo` are the libpq keywords of the database; `wait_timeout` is in seconds.
    """

    def __init__(self, conninfo: Mapping[str, str], wait_timeout: float = 5.0) -> None:
        check_psycopg()
        self.conninfo: Final = dict(conninfo)
        self.wait_timeout = wait_timeout
        self._backend: Backend | None = None
        self._opening = threading.Lock()
        self._sources: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._used: list[SandboxSource | AsyncSandboxSource] = []
        self._borrowed = 0
        self._scopes: list[Scope] = []
        self._in_test = False
        self._given_up: list[Backend] = []  # libpq's side must outlive who still waits on it
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
        backend = self._backend
        if backend is None:
            with self._opening:
                if self._backend is None:
                    self._backend = Backend(self.conninfo)
                backend = self._backend
        return backend

    @property
    def is_open(self) -> bool:
        """Whether there is a backend."""
        return self._backend is not None

    def connect(self, patience: float = 0.0) -> None:
        """Open the backend now, so that a server that cannot be reached shows at once.

        With patience one that recovers from a crash of its own is waited for.
        """
        deadline = time.monotonic() + patience
        while self._backend is None:
            try:
                _ = self.backend
            except psycopg.OperationalError as error:
                # Nobody listens any more; else it is in the middle of starting again.
                gone = "refused" in str(error) or "No such file" in str(error)
                if gone or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)

    # Lending

    def source(self, handle: Handle) -> SandboxSource:
        """Give what a sync handle borrows from in the current test."""
        source: SandboxSource | None = self._sources.get(handle)
        if source is None:
            source = self._sources[handle] = SandboxSource(self, handle)
        if not source.is_used:
            source.is_used = True
            self._used.append(source)
        return source

    def async_source(self, handle: AsyncHandle) -> AsyncSandboxSource:
        """Give what an async handle borrows from in the current test."""
        source: AsyncSandboxSource | None = self._sources.get(handle)
        if source is None:
            source = self._sources[handle] = AsyncSandboxSource(self, handle)
        if not source.is_used:
            source.is_used = True
            self._used.append(source)
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
        if self._scopes and not self._in_test:
            self.begin()
        return self._lend(cls, settings, autocommit=autocommit, pool=pool)

    def _lend(
        self,
        cls: type[Any],
        settings: tuple[tuple[str, str], ...] = (),
        *,
        autocommit: bool = False,
        pool: object | None = None,
    ) -> Any:
        backend = self.backend
        if not backend.lent and not backend.is_begun and backend.has_died():
            self._forget()
            backend.close()
            self.connect(_PATIENCE)
            backend = self.backend
        if backend.abandoned:
            backend.bury()
        self._borrowed += 1
        borrower = Borrower(backend, caller(), settings, self.wait_timeout)
        backend.lent[borrower] = None
        return backend.template.lend(
            cls,
            borrower,
            autocommit=autocommit,
            pool=pool,
            prepared_index=self._borrowed * _NAMES_PER_BORROWER,
        )

    # Tests

    def begin(self) -> None:
        """Begin a test: the data of wider scopes is committed, as far as one can see.

        Only needed where scopes are open; the first borrower of a test begins it otherwise.
        """
        if self._scopes and not self._in_test:
            self._narrow()
            self._in_test = True

    def reset(self) -> list[str]:
        """Undo what a test did and give what went wrong in it, as sentences for its report."""
        backend = self._backend
        for source in self._used:
            source.renew()
        self._used.clear()
        if backend is None:
            return []
        problems = self._take_back(backend) if backend.lent or backend.abandoned else []
        if self._backend is not backend:
            return problems
        if backend.behind and not backend.dead:
            self._collect(backend)
        if backend.dead:
            self._forget()
            backend.close()
            return problems or [_DIED]
        if self._in_test:
            for scope in self._scopes:
                scope.connection._borrower.interrupt()
        backend.check_escape()
        if backend.escaped is not None:
            self.spoiled = True
            self._forget()
            backend.close()
            return [*problems, str(backend.escaped)]
        if self._in_test or not self._scopes:
            backend.undo_frame()
        if self._in_test:
            self._in_test = False
            backend.pop_frame()
            for scope in self._scopes:
                scope.connection._borrower.undone()
        return problems

    @staticmethod
    def _collect(backend: Backend) -> None:
        try:
            backend.run_blocking()
        except psycopg.Error as error:
            # Only where the outer transaction has ended: that is found next.
            logger.debug("a command of the sandbox failed: %s", error)

    def _take_back(self, backend: Backend) -> list[str]:
        """Close what the test did not return; a statement still running is cancelled."""
        backend.bury()
        borrowers = [each for each in backend.lent if not each.is_scope]
        for borrower in borrowers:
            borrower.end(_ENDED)
        problems = [
            f"the connection borrowed at {waiter.place} was still waiting for the test's "
            "transaction when the test ended"
            for waiter in backend.expel_waiters()
        ]
        holder = backend.turn.holder
        if holder is not None and holder.busy:
            problems.append(
                f"a statement on the connection borrowed at {holder.place} still ran when the "
                "test ended; wait for your threads and tasks before the end of a test"
            )
            if not self._cancel(backend, holder):
                self._give_up(backend)
                return problems
        for borrower in borrowers:
            conn = borrower.wrapper()
            if conn is not None:
                borrower.close(conn, _ENDED)
        return problems

    @staticmethod
    def _cancel(backend: Backend, holder: Borrower) -> bool:
        """Cancel what another thread or task runs; gives whether it has ended."""
        task = holder.task
        if task is not None and not task.get_loop().is_running():
            return False  # nobody would fetch the answer
        deadline = time.monotonic() + _PATIENCE
        while holder.busy and time.monotonic() < deadline:
            if backend.pgconn.transaction_status == TransactionStatus.ACTIVE:
                backend.send_cancel()
            time.sleep(_POLL)
        return not holder.busy

    def _give_up(self, backend: Backend) -> None:
        """End a backend that somebody still uses, from another connection."""
        for borrower in list(backend.lent):
            borrower.disown()
        self._forget()
        self._given_up.append(backend)
        with psycopg.connect(**self.conninfo, autocommit=True) as conn:  # type: ignore[arg-type]
            version = conn.info.server_version
            wait = ", 2000" if version >= 140000 else ""
            conn.execute(f"SELECT pg_terminate_backend(%s{wait})", [backend.backend_pid])

    def _forget(self) -> None:
        """Let the next test have a new backend; what the scopes had written is gone."""
        self._backend = None
        self._in_test = False
        for scope in self._scopes:
            scope.lost = True
        self._scopes.clear()

    # Wider scopes

    def open_scope(self) -> Scope:
        """Begin data that several tests share; `scope.close()` takes it back."""
        if self._scopes:
            self._narrow()
        conn = self._lend(SandboxConnection)
        conn._borrower.is_scope = True
        scope = Scope(self, self.backend, conn)
        self._scopes.append(scope)
        return scope

    def _narrow(self) -> None:
        """Commit the open transactions of the scopes and begin what can be undone by itself."""
        for scope in reversed(self._scopes):
            if scope.connection._borrower.open:
                scope.connection.commit()
        self.backend.push_frame()

    def _close_scope(self, scope: Scope) -> None:
        while scope in self._scopes:
            self._close_innermost(self._scopes.pop())

    def _close_innermost(self, scope: Scope) -> None:
        scope.lost = True
        backend, conn = scope.backend, scope.connection
        conn.close()
        if backend.dead:
            return
        backend.undo_frame()
        if self._scopes:
            backend.pop_frame()

    def close(self) -> None:
        """End the session with the server."""
        backend = self._backend
        if backend is not None:
            self._forget()
            backend.close()
        while self._given_up:
            self._given_up.pop().close()


class Scope:
    """Data shared by the tests of a module or a class, and a connection to make it with."""

    def __init__(self, sandbox: Sandbox, backend: Backend, connection: SandboxConnection) -> None:
        self.connection: Final = connection
        self.backend: Final = backend
        self.lost = False
        """Whether its data is gone: it was closed, or the server ended the session."""
        self._sandbox: Final = sandbox

    def close(self) -> None:
        """Roll the data back."""
        self._sandbox._close_scope(self)
