"""Rollback isolation: a test in one transaction of the prepared database, which is undone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import psycopg

from .isolation import KitError
from .sandbox import Sandbox
from .sandbox.psycopg_door.connections import SandboxConnection
from .sequences import Sequences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .gateway.sessions.wider import WiderSession
    from .sandbox.core.outer import OuterTransaction, Scope
    from .sandbox.core.places import Left
    from .sandbox.core.refusals import Refusals

__all__ = ["RollbackIsolation"]

_PATIENCE: Final = 10.0
_DATA_GONE: Final = (
    "the data of pgmonkey_module or pgmonkey_class is gone: the session that it was written in has "
    "ended since"
)
_TEST: Final = "test"
_SCOPE: Final = "scope"  # that is about to be opened


class RollbackIsolation:
    """The isolation in which the tests of a process run, one after the other.

    `remake` makes the database anew after something was committed in it, or raises SpoiledError
    with the failures that it is given; `log` gives the server's last lines. In an existing database
    nothing is ever changed for good.
    """

    def __init__(
        self,
        conninfo: dict[str, str],
        wait_timeout: float,
        remake: Callable[[list[str]], None],
        log: Callable[[], str],
        *,
        is_existing: bool = False,
    ) -> None:
        self._database = conninfo
        self._wait_timeout = wait_timeout
        self._remake = remake
        self._log = log
        self._sandbox = Sandbox(conninfo, wait_timeout)
        self._sequences = Sequences(self._sandbox, is_existing=is_existing)
        # No call of ours stands between a handle and the sandbox: every borrower would pay for it.
        self.source: Final = self._sandbox.source
        self.async_source: Final = self._sandbox.async_source
        self._pooled = False
        self._lost = ""
        self._shared: list[Scope[SandboxConnection]] = []
        self._wider: list[WiderSession] = []

    def connect(self) -> None:
        """Connect now, so that an unreachable server shows at once."""
        self._sandbox.connect()
        self._pooled = self._sandbox.backend.is_pooled

    def close(self) -> None:
        """End the session with the server; the next test opens another."""
        self._sandbox.close()

    @property
    def conninfo(self) -> dict[str, str]:
        """Keywords for libpq that lead to the prepared database, past the test's transaction.

        Such a connection would wait forever for the test's locks. So it gets the time limit of
        the test's own connections.
        """
        options = self._database.get("options", "")
        # PgBouncer refuses options that it does not know.
        if "lock_timeout" in options or self._pooled:
            return self._database
        limit = max(1, round(self._wait_timeout * 1000))
        return {**self._database, "options": f"{options} -c lock_timeout={limit}".lstrip()}

    @property
    def refusals(self) -> Refusals:
        """What the test was refused although a clone could do it."""
        return self._sandbox.refusals

    @property
    def left(self) -> list[Left]:
        """The connections that the last test did not return."""
        return self._sandbox.left

    @property
    def leads_to(self) -> OuterTransaction:
        """The transaction that clients of the gateway join."""
        return self._sandbox

    def execute(self, query: Any, params: Any) -> psycopg.Cursor[Any]:
        """Run one statement in autocommit, in the test's transaction."""
        __tracebackhide__ = True
        conn: Any = self._sandbox.lend(SandboxConnection, autocommit=True)
        try:
            cursor: psycopg.Cursor[Any] = conn.execute(query, params)
            return cursor
        finally:
            conn.close()

    def open_scope(self, *, restarts: bool = False) -> Scope[SandboxConnection]:
        """Give a connection whose work the tests of a scope see; sequences may restart for it."""
        with self._holding():
            if restarts:
                self._restart_for(_SCOPE)
            scope = self._sandbox.open_scope()
        self._sequences.rename(_SCOPE, scope)
        self._shared.append(scope)
        return scope

    def close_scope(self, scope: Scope[SandboxConnection]) -> None:
        """Roll back what was made with it."""
        self._shared.remove(scope)
        with self._holding():
            scope.close()
            self._sequences.leave(scope)
            if self._sequences.are_locked:
                self._sequences.settle()

    def widen(
        self, make: Callable[[OuterTransaction], WiderSession], *, restarts: bool = False
    ) -> WiderSession:
        """Make a client's transaction a scope, whose work the tests see until it ends."""
        with self._holding():
            if restarts and not self.is_shared:
                self._sequences.bring_back()
            self._sandbox.make_room()
            session = make(self._sandbox)
            self._wider.append(session)
            return session

    def leave(self, scope: Scope[Any], *, in_test: bool) -> None:
        """Close the scope of a client's transaction: now, or at the end of the running test."""
        if in_test:
            scope.is_left = True
            return
        with self._holding():
            self._sandbox.leave_scope(scope)
        self._forget_wider()

    def _forget_wider(self) -> None:
        self._wider = [each for each in self._wider if not each.scope.lost]

    @property
    def has_wider(self) -> bool:
        """Whether a client's transaction is open that was begun outside of a test."""
        return any(not session.scope.lost for session in self._wider)

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Keep clients with a wider transaction from doing anything meanwhile.

        Raises KitError where one cannot be kept from it.
        """
        held = []
        try:
            for session in self._wider:
                if not session.hold():
                    raise KitError(
                        f"{session.member.name} is in the middle of a statement, in a transaction "
                        "that was begun outside of the test, and cannot be stopped"
                    )
                held.append(session)
            yield
        finally:
            for session in held:
                session.release()

    def begin(self, *, restarts: bool = False) -> None:
        """Begin a test; the first connection that it borrows begins the transaction.

        Where it `restarts`, sequences stand where they are to, or where wider scopes have left
        them. Raises KitError where the role may not do that.
        """
        if self._lost or self._shared or self._wider:
            self._begin_special(restarts=restarts)
        elif restarts:
            with self._clean_after_errors():
                self._restart_for(_TEST)

    def _begin_special(self, *, restarts: bool) -> None:
        self.check_server()
        with self._holding(), self._clean_after_errors():
            self._sandbox.begin()
            self._forget_wider()
            if any(scope.lost for scope in self._shared):
                raise KitError(_DATA_GONE)
            if restarts:
                self._restart_for(_TEST)

    @contextmanager
    def _clean_after_errors(self) -> Iterator[None]:
        """Leave nothing open or unread, because no end of a test follows."""
        try:
            yield
        except BaseException:
            self._sandbox.reset()
            raise

    # Sequences

    def note_sequences(self) -> None:
        """Note where sequences stand, for tests that ask for it, if that is not yet known."""
        if not self._sequences.are_known and not self.is_shared:
            self.check_server()
            with self._clean_after_errors():
                self._sequences.note()

    def forget_sequences(self) -> None:
        """Forget that, because data was written that stays."""
        self._sequences.forget()

    def put_sequences_back(self) -> None:
        """Put sequences back there for outside connections, unless somebody works in a scope."""
        if self._sequences.are_known and not self.is_shared:
            with self._clean_after_errors():
                self._sequences.bring_back()

    def _restart_for(self, inside: object) -> None:
        if self.is_shared:
            self._sequences.enter(inside)
        else:
            self._sequences.bring_back()

    def check_server(self) -> None:
        """Raise KitError if the server has ended; the first error shows the server's log."""
        if self._lost:
            told, self._lost = self._lost, self._lost.partition("\n")[0]
            raise KitError(told)

    def end(self) -> tuple[list[str], list[str]]:
        """Roll the test back; return its failures, and the waits that were refused.

        Raises SpoiledError where something was committed that cannot be undone.
        """
        sandbox = self._sandbox
        refusals = sandbox.take_refusals()
        failures = self._reset_with_wider() if self._wider else self._reset()
        if sandbox.spoiled:
            sandbox.close()
            sandbox.spoiled = False
            self._remake(failures)
            self._sequences.forget()
        elif not sandbox.is_open:
            self._reopen()
        return failures, refusals

    @property
    def is_shared(self) -> bool:
        """Whether the test runs inside data that other tests share."""
        return bool(self._shared or self._wider)

    def make_real(self) -> tuple[list[str], list[str]]:
        """End the test as `end` does, but keep what it has committed in the database.

        Raises PGMonkeyError, psycopg.Error or TimeoutError where that cannot be.
        """
        self._sandbox.forget_sources()
        return self._sandbox.make_real(), self._sandbox.take_refusals()

    def _reset(self) -> list[str]:
        failures = self._sandbox.reset()
        try:
            self._sequences.leave(_TEST)
        except KitError as error:
            failures.append(str(error))
        return failures

    def _reset_with_wider(self) -> list[str]:
        with self._holding():
            failures = self._reset()
            self._sandbox.close_left()
        self._forget_wider()
        return failures

    def _reopen(self) -> None:
        """Connect again, or remember why no further test can run: one line for each is enough."""
        try:
            self._sandbox.connect(_PATIENCE)
        except psycopg.OperationalError as error:
            last_words = filter(None, [f"the server has ended: {error}", self._log()])
            self._lost = "\n".join(last_words)
