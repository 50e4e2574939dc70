"""The outer transaction of a test process: members join it, and it is undone test by test."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import psycopg

from ....errors import SandboxError
from .backend import Backend, Level
from .draining import is_at_rest
from .member import Member
from .places import Left, Peer
from .refusals import Refusals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .places import Origin

logger = logging.getLogger("pytest_pgmonkey")

_PATIENCE: Final = 2.0  # seconds for a statement that still runs when its test has ended
_CLIENT_PATIENCE: Final = 0.5
_POLL: Final = 0.001
_ENDED: Final = "the test that borrowed this connection has ended"
_LEFT_OPEN: Final = (
    "pgmonkey.checkpoint() was still open when the test ended: use it as `with "
    "pgmonkey.checkpoint():`"
)
_NOT_REAL: Final = "its session was lost, or something was left in the middle"
_DIED: Final = "the server closed the test's connection while the test ran"


class ScopeConnection(Protocol):
    """The connection with which the data of a wider scope is made."""

    def commit(self) -> None: ...
    def close(self) -> None: ...


C = TypeVar("C", bound=ScopeConnection)


class Checkpoint(Protocol):
    """A part of a test that is undone by itself."""

    is_over: bool
    """Whether its block has ended, even where nothing could be undone."""

    def undo(self, backend: Backend) -> None:
        """Undo what was written inside."""


class OuterTransaction:
    """The transaction that is rolled back with a test, and the session in which it is.

    `conninfo` are the libpq keywords of the database; `wait_timeout` is in seconds. With
    `reads_only` nothing can be written in it. Doors let members join it, and know how their clients
    are served.
    """

    def __init__(
        self, conninfo: Mapping[str, str], wait_timeout: float = 5.0, *, reads_only: bool = False
    ) -> None:
        self.conninfo: Final = dict(conninfo)
        self.wait_timeout = wait_timeout
        self._reads_only = reads_only
        self.refusals: Final = Refusals()
        self._backend: Backend | None = None
        self._opening = threading.Lock()
        # Nobody joins while a test is undone. Reentrant: a signal may ask for a connection.
        self.joining: Final = threading.RLock()
        self._scopes: list[Scope[Any]] = []
        self.checkpoints: Final[list[Checkpoint]] = []
        self._in_test = False
        self._resetting = False  # also where the reset of a test was interrupted
        self.left: list[Left] = []
        """What the test that has ended last has not returned."""
        self._given_up: list[Backend] = []  # libpq's side must outlive who still waits on it
        self.spoiled = False
        """Whether something of a test was committed: the database must not be used again."""

    def take_refusals(self) -> list[str]:
        """Give, once, the waits that were refused: a thread of the application may hide them."""
        return self.refusals.take_waits()

    @property
    def backend(self) -> Backend:
        """The live backend; opened at its first use in the process."""
        backend = self._backend
        if backend is None:
            with self._opening:
                if self._backend is None:
                    self._backend = Backend(
                        self.conninfo, reads_only=self._reads_only, refusals=self.refusals
                    )
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

    # Members

    def join(self, origin: Origin, settings: tuple[tuple[str, str], ...] = ()) -> Member:
        """Give a new member, which comes from there and has these session settings."""
        with self.joining:
            return self._join(origin, settings)

    def live(self) -> Backend:
        """Give the backend, anew where the server has ended it since the last test.

        Only while nobody can join.
        """
        if self.backend.forked:
            return self.backend  # refuses whatever is asked of it: all that comes is the parent's
        if self._resetting:
            self._replace(self.backend)
        backend = self.backend
        backend.end_look()
        if not backend.members and not backend.is_begun and backend.has_died():
            self._forget()
            backend.close()
            self.connect(_PATIENCE)
            backend = self.backend
        return backend

    def _join(self, origin: Origin, settings: tuple[tuple[str, str], ...]) -> Member:
        backend = self.live()
        if backend.abandoned and not backend.forked:
            backend.discard_abandoned()
        member = Member(backend, origin, settings, self.wait_timeout)
        backend.members[member] = None
        return member

    # Tests

    def begin(self) -> None:
        """Begin a test: the data of wider scopes is committed, as far as one can see.

        Only needed where scopes are open; the first member of a test begins it otherwise. Where
        their session has ended, they are lost.
        """
        if self._scopes and not self._in_test and not self.backend.forked:
            with self.joining:
                backend = self.backend
                backend.end_look()
                if backend.has_died():
                    self._replace(backend)
                    return
                self._narrow()
                self._in_test = True

    def reset(self) -> list[str]:
        """Undo what a test did and give what went wrong in it, as sentences for its report.

        Afterwards the session is proved clean, or there is none.
        """
        with self.joining:
            if self._backend is not None:
                self._backend.end_look()
            return self._reset()

    def make_real(self) -> list[str]:
        """End a test so that what it has committed stays, and give what went wrong in it.

        The session ends with it. Raises SandboxError where something could not be committed, and
        psycopg.Error or TimeoutError where the server has refused it.
        """
        with self.joining:
            backend = self.backend
            backend.end_look()
            problems = self._take_back(backend)
            if self._backend is not backend:
                raise SandboxError(_NOT_REAL)
            self._come_to_rest(backend)
            if backend.unsettled or backend.dead or self.checkpoints:
                raise SandboxError(_NOT_REAL)
            if backend.level in (Level.DIRECT, Level.STANDING):
                backend.post_undo()  # what somebody has not committed
            if backend.is_begun:
                backend.run_blocking(b"COMMIT")
            self._forget()
            backend.close()
            return problems

    def _reset(self) -> list[str]:
        backend = self._backend
        if backend is None:
            return []
        if self._resetting:
            return self._replace(backend)
        self._resetting = True
        self.left = []
        backend.pgconn.untrace()  # its file may be closed with the test
        problems = self._take_back(backend) if backend.members or backend.abandoned else []
        if self._backend is backend:
            self._come_to_rest(backend)
            problems += self._end_checkpoints(backend)
            problems += self._undo_test(backend, problems)
        self._resetting = False
        return problems

    @staticmethod
    def _come_to_rest(backend: Backend) -> None:
        """Have nothing unread, and nobody who holds the turn."""
        backend.free_turn()
        if backend.behind and not (backend.unsettled or backend.dead):
            try:
                backend.run_blocking()
            except (psycopg.Error, TimeoutError) as error:
                # Where the outer transaction has ended, that is found next.
                logger.debug("a command of the sandbox failed: %s", error)
                backend.unsettled = True
        if backend.unsettled or not is_at_rest(backend.pgconn):
            backend.unsettled = True
            backend.interrupt()

    def _end_checkpoints(self, backend: Backend) -> list[str]:
        """Undo what was written in those that the test has left open."""
        backend.check_escape()
        told = [_LEFT_OPEN for checkpoint in self.checkpoints if not checkpoint.is_over]
        while self.checkpoints:
            self.checkpoints.pop()
            if not backend.dead and backend.escaped is None:
                self._undo_frame(backend)
                backend.pop_frame()
        return told[:1]

    def _undo_test(self, backend: Backend, problems: list[str]) -> list[str]:
        if backend.dead:
            told = self._replace(backend)
            return told if backend.lost or not problems else []
        if self._in_test:
            for scope in self._scopes:
                scope.member.interrupt()
        backend.check_escape()
        if backend.escaped is not None:
            self.spoiled = True
            self._forget()
            backend.close()
            return [str(backend.escaped)]
        if self._in_test or not self._scopes:
            self._undo_frame(backend)
        if self._in_test:
            self._in_test = False
            backend.pop_frame()
            for scope in self._scopes:
                scope.member.undone()
        if backend.cancels_under_way and not self._scopes:
            # One whose sender was interrupted would hit a statement of the next test.
            self._give_up(backend)
            return []
        return self._replace(backend) if backend.lost else []

    @staticmethod
    def _undo_frame(backend: Backend) -> None:
        if not backend.unsettled:
            backend.undo_frame()
            return
        try:
            backend.heal()
        except (psycopg.Error, TimeoutError) as error:
            backend.lost = f"the test's session could not be cleaned, and was ended: {error}"

    def _replace(self, backend: Backend) -> list[str]:
        """Let the next test have another backend; gives why, as sentences."""
        self._resetting = False
        if backend.lost:
            self._give_up(backend)
            return [backend.lost]
        self._forget()
        backend.close()
        # psycopg closes a session whose task is cancelled again while it cancels the statement,
        # which goes on with its locks: the next test would wait for them.
        self._terminate(backend)
        return [_DIED]

    def _take_back(self, backend: Backend) -> list[str]:
        """Close what the test did not return; a statement still running is cancelled."""
        backend.discard_abandoned()
        # A client may leave meanwhile, in a thread of its own.
        members = [each for each in list(backend.members) if not each.is_scope]
        self.left = [Left(each.origin, each.has_changes) for each in members]
        for member in members:
            member.end(_ENDED)
        problems = [
            f"{waiter.name} was still waiting for the test's transaction when the test ended"
            for waiter in backend.cancel_waiting()
        ]
        holder: Member | None = backend.turn.holder
        if holder is not None and isinstance(holder.origin, Peer):
            _wait_for(holder)
        if holder is not None and holder.busy and not _is_running(holder):
            holder.busy, backend.unsettled = False, True
        elif holder is not None and holder.busy:
            if not holder.is_foreign:  # a test cannot wait for another process
                problems.append(
                    f"a statement on {holder.name} still ran when the test ended; wait for your "
                    "threads and tasks before the end of a test"
                )
            if not self._cancel(backend, holder):
                self._give_up(backend)
                return problems
        self._come_to_rest(backend)
        for member in members:
            if member.client is not None:
                self._close(member)
        return problems

    @staticmethod
    def _close(member: Member) -> None:
        try:
            member.close(_ENDED)
        except psycopg.Error as error:
            logger.debug("a connection could not be taken back: %s", error)
            member.backend.unsettled = True

    @staticmethod
    def _cancel(backend: Backend, holder: Member) -> bool:
        """Cancel what another thread or task runs; gives whether it has ended."""
        task = holder.task
        if task is not None and not task.get_loop().is_running():
            return False  # nobody would fetch the answer
        deadline = time.monotonic() + _PATIENCE
        while holder.busy and time.monotonic() < deadline:
            if backend.is_running:
                backend.send_cancel()
            time.sleep(_POLL)
        return not holder.busy

    def _give_up(self, backend: Backend) -> None:
        """End a backend that somebody still uses, from another connection."""
        for member in list(backend.members):
            member.disown()
        self._given_up.append(backend)
        self._forget()
        self._terminate(backend)

    def _terminate(self, backend: Backend) -> None:
        """Have the server end a session, and wait until it has."""
        conninfo: Any = {"connect_timeout": "10", **self.conninfo}
        try:
            with psycopg.connect(**conninfo, autocommit=True) as conn:
                version = conn.info.server_version
                wait = ", 2000" if version >= 140000 else ""
                conn.execute(f"SELECT pg_terminate_backend(%s{wait})", [backend.backend_pid])
        except psycopg.OperationalError as error:
            # The next test says what is wrong with the server.
            logger.debug("the session %d could not be ended: %s", backend.backend_pid, error)

    def _forget(self) -> None:
        """Let the next test have a new backend; what the scopes had written is gone."""
        self._backend = None
        self._in_test = False
        for scope in self._scopes:
            scope.lost = True
        self._scopes.clear()
        self.checkpoints.clear()

    # Wider scopes

    @property
    def in_test(self) -> bool:
        """Whether a test runs in what the open scopes have written."""
        return self._in_test

    def make_room(self) -> None:
        """Let what comes next be a scope of its own, inside those that are open."""
        if self._scopes:
            with self.joining:
                self.backend.end_look()
                self._narrow()

    def add_scope(self, member: Member, connection: C) -> Scope[C]:
        """Take a member's work for that of a scope, whose connection this is."""
        member.is_scope = True
        scope = Scope(self, member, connection)
        self._scopes.append(scope)
        return scope

    def _narrow(self) -> None:
        """Begin what can be undone by itself, in what the scopes have written."""
        for scope in reversed(self._scopes):
            if scope.member.open:
                scope.connection.commit()
        self.backend.push_frame()

    def leave_scope(self, scope: Scope[Any]) -> None:
        """Have a scope closed as soon as no test and no other scope is inside it."""
        scope.is_left = True
        self.close_left()

    def close_left(self) -> None:
        """Close what was left, where no test runs."""
        with self.joining:
            while self._scopes and self._scopes[-1].is_left and not self._in_test:
                self._scopes[-1].member.backend.end_look()
                self._close_innermost(self._scopes.pop())

    def is_innermost(self, scope: Scope[Any]) -> bool:
        """Whether no other scope was opened inside this one."""
        return bool(self._scopes) and self._scopes[-1] is scope

    def _close_scope(self, scope: Scope[Any]) -> None:
        with self.joining:
            while scope in self._scopes:
                scope.member.backend.end_look()
                self._close_innermost(self._scopes.pop())
            self.close_left()

    def _close_innermost(self, scope: Scope[Any]) -> None:
        scope.lost = True
        backend = scope.member.backend
        scope.connection.close()
        if backend.dead:
            self._replace(backend)
            return
        backend.undo_frame()
        if self._scopes:
            backend.pop_frame()
            for outer in self._scopes:
                outer.member.come_back()

    def abandon(self) -> None:
        """End the session from a thread other than the one that uses and closes it."""
        backend = self._backend
        if backend is not None:
            self._give_up(backend)

    def close(self) -> None:
        """End the session with the server."""
        backend = self._backend
        if backend is not None:
            self._forget()
            backend.close()
        while self._given_up:
            self._given_up.pop().close()


class Scope(Generic[C]):
    """Data shared by the tests of a module or a class, and a connection to make it with."""

    def __init__(self, outer: OuterTransaction, member: Member, connection: C) -> None:
        self.member: Final = member
        self.connection: Final = connection
        self.is_left = False
        """Whether nobody needs it any more."""
        self.lost = False
        """Whether its data is gone: it was closed, or the server ended the session."""
        self._outer: Final = outer

    def close(self) -> None:
        """Roll the data back."""
        self._outer._close_scope(self)


def _wait_for(member: Member) -> None:
    """Let a client of the gateway come to the end of its statement, or of its leaving."""
    deadline = time.monotonic() + _CLIENT_PATIENCE
    while member.busy and time.monotonic() < deadline:
        time.sleep(_POLL)


def _is_running(member: Member) -> bool:
    """Whether somebody is in the middle of an operation, rather than was thrown out of it."""
    if member.task is not None:
        return not member.task.done()
    if member.thread == threading.get_ident():
        return False  # this thread would be there, not here
    return any(thread.ident == member.thread for thread in threading.enumerate())
