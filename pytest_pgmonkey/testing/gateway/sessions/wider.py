"""A transaction that a client has begun outside of a test, such as a class's set-up.

The tests that follow see its work and cannot end it. It is never real: it ends with a rollback.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from ....errors import SandboxError
from ...sandbox.core.member import CLOSED
from ...sql.lexer import Verb
from ..protocol import wire
from .joined import JoinedSession

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ...sandbox.core.outer import OuterTransaction, Scope
    from ...sql.lexer import Statement
    from ..protocol.client import Client
    from ..protocol.wire import Message

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
_NOT_INNERMOST: Final = (
    "another transaction was begun outside of a test after this one, and is still open: nothing "
    "can be done here before it has ended"
)
_BY_ITSELF: Final = (
    "send the end of a transaction that was begun outside of a test by itself: what follows it "
    "could write, and would be lost"
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
        self._watches = True
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
        if self._outer.in_test and self.member.open and not self._ended:
            self._operate(self._undo())
        self._scopes.leave(self.scope)

    def _undo(self) -> Steps:
        self.member.transaction.rollback()
        yield from ()

    def _is_dealt_with(self, parts: tuple[Statement, ...], *_: Message) -> bool:
        """Refuse what follows the transaction's end in the same message, if it could write.

        And everything while another scope is open inside.
        """
        if parts and not (self._outer.in_test or self._outer.is_innermost(self.scope)):
            self._client.out += wire.failure("57P03", _NOT_INNERMOST)
            return True
        ends = [i for i, part in enumerate(parts) if part.verb in (Verb.COMMIT, Verb.ROLLBACK)]
        if not ends or self._outer.in_test:
            return False
        follow = parts[ends[0] + 1 :]
        if parts[ends[0]].chains or not all(part.read_only for part in follow):
            self._client.out += wire.failure("57P03", _BY_ITSELF)
            return True
        return False

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

    def get_ready(self, parts: tuple[Statement, ...]) -> Steps:
        left = self.member.transaction.leftovers
        for part in parts:
            undoes = part.verb is Verb.SAVEPOINT and not left.is_inside(part)
            if undoes and self._outer.in_test:
                raise SandboxError(_NOT_IN_A_TEST)
        yield from super().get_ready(parts)

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
        self.member.must_stop = True
        self.cancel()
        self._client.cut_off()  # where it takes nothing of what it has asked for
        held = self.lock.acquire(timeout=_AFTER_CANCEL)
        self.member.must_stop = False
        return held

    def release(self) -> None:
        """Let the client go on."""
        self.lock.release()

    def narrow(self) -> None:
        """Let a test work in what was written, and undo by itself what it does."""
        member, transaction = self.member, self.member.transaction
        if not self._wrote and not member.failed:
            self._wrote = transaction.writes or self._has_written()
        if member.failed or not self._wrote:
            self._end_early()
        else:
            member.stand_aside()

    def _has_written(self) -> bool:
        """Find whether functions have written."""
        left = self.member.transaction.leftovers
        return left.may_be_there and bool(self._in_turn(self.member.has_written()))

    def _end_early(self) -> None:
        """Leave a transaction that has failed, or that has only read and can go on in the test."""
        member = self.member
        if not member.failed:
            self._client.begun = member.transaction.modes
        self._ended = True
        self.scope.is_left = True
        self._in_turn(self._undo())

    def _in_turn(self, steps: Steps) -> Any:
        member, wait = self.member, self._backend.root.wait
        if member.turn.holder is not member:
            member.claim_turn(wait)
        member.start()
        try:
            return wait(steps)
        finally:
            member.after()


class _Connection:
    """A session as the connection of its scope."""

    def __init__(self, session: WiderSession) -> None:
        self.session: Final = session

    def commit(self) -> None:
        self.session.narrow()

    def close(self) -> None:
        self.session.member.leave(CLOSED)
