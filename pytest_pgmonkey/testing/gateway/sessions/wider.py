"""A transaction that a client has begun outside of a test, such as a class's set-up.

The tests that follow see its work and cannot end it. It is never real: it ends with a rollback.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from ....errors import SandboxError
from ...sandbox.core.member import CLOSED
from .joined import JoinedSession

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ...sandbox.core.outer import OuterTransaction, Scope
    from ..protocol.client import Client

    Steps = Generator[Any, Any, Any]

__all__ = ["Scopes", "WiderSession"]

_PATIENCE: Final = 0.5  # seconds for a statement that still runs when a test begins or ends
_AFTER_CANCEL: Final = 2.0
_NOT_IN_A_TEST: Final = (
    "this transaction was begun outside of the test, and its data is there for other tests: none "
    "of them can end it"
)
_NEVER_REAL: Final = (
    "what a transaction writes outside of a test is there for the tests that run while it is open, "
    "and is never committed. Write what every test shall see inside `with "
    "pgmonkey_database.unblock():`"
)


class Scopes(Protocol):
    """Who opens and closes scopes that are wider than a test."""

    def widen(self, make: Callable[[OuterTransaction], WiderSession]) -> WiderSession | None:
        """Give a new session, `None` where a test has begun meanwhile, or nothing is prepared."""

    def leave(self, scope: Scope[Any]) -> None:
        """Close a scope, at the end of the test where one runs."""


class WiderSession(JoinedSession):
    """What a client works in from a transaction's first write to its end, tests included."""

    def __init__(self, client: Client, outer: OuterTransaction, scopes: Scopes) -> None:
        super().__init__(client, outer, lambda: True)
        self._outer: Final = outer
        self._scopes: Final = scopes
        self._command: Final = self._begun
        self._wrote = False
        self._ended = False
        self._left = False
        # Tests begin and end in another thread, between two statements.
        self.lock: Final = threading.RLock()
        self.member.keeper = self
        self.scope: Final = outer.add_scope(self.member, _Connection(self))

    # The client's thread

    @property
    def is_over(self) -> bool:
        return self._ended or self._left or self.scope.lost or super().is_over

    def close(self) -> None:
        if self._left:
            return
        self._left = True
        if self._outer.in_test and self.member.open:
            self._operate(self._undo())
        self._scopes.leave(self.scope)

    def _undo(self) -> Steps:
        self.member.transaction.rollback()
        yield from ()

    def before_end(self, *, commits: bool) -> Steps:
        """Refuse the end of the transaction in a test, and what would keep its work."""
        if self._outer.in_test:
            raise SandboxError(_NOT_IN_A_TEST)
        self._ended = True
        if not commits:
            return
        transaction = self.member.transaction
        if self._wrote or (yield from self.member.has_written()):
            transaction.rollback()
            raise SandboxError(_NEVER_REAL)
        transaction.suspended = True  # nothing is left to be committed

    def _goes_on(self) -> bool:
        return False

    def _run(self, steps: Steps) -> None:
        member = self.member
        with self.lock:
            while member.turn.holder is not member:  # a test has begun or ended meanwhile
                member.claim_turn(self._backend.root.wait)
            super()._run(steps)

    def _tell_ready(self) -> None:
        if self._ended:
            self.close()  # before the client goes on: it may begin a test
        super()._tell_ready()

    # The tests' thread

    def hold(self) -> bool:
        """Have no statement of the client's run until `release`; gives whether none does."""
        if self.lock.acquire(timeout=_PATIENCE):
            return True
        self.cancel()
        return self.lock.acquire(timeout=_AFTER_CANCEL)

    def release(self) -> None:
        """Let the client go on; its transaction is begun anew with its next statement."""
        if not (self.member.open or self._ended):
            self._begun = self._command
        self.lock.release()

    def narrow(self) -> None:
        """Let a test see what was written, and undo by itself what is written in it."""
        member, wait = self.member, self._backend.root.wait
        self._wrote = True
        if member.failed:
            self._ended = True  # it cannot go on
        if member.turn.holder is not member:
            member.claim_turn(wait)
        member.start()
        try:
            wait(self._committed())
        finally:
            member.after()

    def _committed(self) -> Steps:
        yield from self.member.get_ready()
        yield from self.member.transaction.commit()


class _Connection:
    """A session as the connection of its scope."""

    def __init__(self, session: WiderSession) -> None:
        self.session: Final = session

    def commit(self) -> None:
        self.session.narrow()

    def close(self) -> None:
        self.session.member.leave(CLOSED)
