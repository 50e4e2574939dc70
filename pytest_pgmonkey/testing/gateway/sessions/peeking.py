"""A look at what the running test has written, from outside and while the test stands still.

It reads inside the open transaction, under a savepoint that is read-only and always rolled back.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any, Final

from ....errors import SandboxError
from ...sandbox.core.member import Member
from ...sandbox.core.outer import OuterTransaction
from ...sandbox.core.refusals import no_two_phase
from ...sandbox.core.statements import CONTROL
from ...sandbox.core.turns import Turn
from ...sandbox.standstill import Standstill
from ...sql.lexer import Verb
from .joined import JoinedSession

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from ...sandbox.core.backend import Backend
    from ...sql.lexer import Statement
    from ..protocol.client import Client

    Steps = Generator[Any, Any, Any]

__all__ = ["CloneLookSession", "PeekSession", "why_not"]

_PATIENCE: Final = 0.2  # seconds for a statement of the test's
_AGAIN: Final = 0.005
_READS: Final = b"BEGIN READ ONLY"
# Neither is undone by ROLLBACK TO, or a read-only transaction does it all the same.
_EFFECTS: Final = re.compile(
    r"\b(pg_(try_)?advisory_\w+|txid_current|pg_current_xact_id|pg_logical_emit_message)"
    r'"?\s*(/\*.*?\*/\s*)*\(',
    re.IGNORECASE | re.DOTALL,
)
_ALONE: Final = "send BEGIN, COMMIT and ROLLBACK by themselves: a look at a test has none of them"
_NOT_HERE: Final = "{} is not for a look at a test, which only reads"


class Look(Standstill):
    """The time in which somebody looks: no member's operation begins, and its next one ends it.

    Raises SandboxError where nothing can be read.
    """

    def __init__(self, outer: OuterTransaction, client: Client | None = None) -> None:
        self._client: Final = client
        self._sending: Final = threading.Lock()
        self._can_be_cancelled = False
        self._is_framed = False
        self._before: tuple[Any, ...] = ()
        self._refused = ""
        try:
            super().__init__(outer, _PATIENCE, self._begin)
        except SandboxError as error:
            raise SandboxError(f"the test's data cannot be read now: {error}") from None

    def _begin(self, backend: Backend) -> None:
        # What the end of a look would undo with it is the test's.
        self._before = backend.advisory, backend.prepared, backend.stale_cursors
        self._refused = backend.refusals.first
        backend.advisory, backend.prepared, backend.stale_cursors = False, False, set()
        self._is_framed = backend.is_begun
        if self._is_framed:
            backend.push_frame()

    def allow_cancel(self) -> None:
        """Let what is sent from now on be cancelled: the savepoint stands."""
        self._can_be_cancelled = True

    def cancel(self) -> None:
        """Cancel what is looked up; never what undoes it."""
        with self._sending:
            if self._can_be_cancelled and self.backend.is_running:
                self.backend.send_cancel()

    def give_way(self) -> None:
        """Have it ended and wait for that; called by whoever goes on with the test."""
        while not self.over.wait(_AGAIN):
            self.cancel()
            if self._client is not None:
                self._client.cut_off()  # it takes nothing of what it has asked for

    def close(self) -> None:
        """Undo everything."""
        with self._sending:
            self._can_be_cancelled = False
        backend = self.backend
        backend.advisory = False
        try:
            if not backend.dead:
                backend.undo_frame()
                if self._is_framed:
                    backend.pop_frame()
                backend.run_blocking()
        except BaseException:
            backend.unsettled = True
            raise
        finally:
            advisory, prepared, stale_cursors = self._before
            backend.advisory |= advisory
            backend.prepared |= prepared
            backend.stale_cursors |= stale_cursors
            backend.refusals.first = self._refused
            self.end()


def why_not(outer: OuterTransaction) -> str:
    """Tell why nothing can be read just now; empty where it can."""
    try:
        Look(outer).close()
    except SandboxError as error:
        return str(error)
    return ""


class _LookingSession(JoinedSession):
    """What a client works in that only looks; each of its statements is a look of its own.

    So are those of a transaction block, or its locks would be in the way of the test.
    """

    _in_block = False

    def script(self, parts: tuple[Statement, ...], text: str) -> Steps:  # noqa: ARG002
        if len(parts) != 1:
            raise SandboxError(_ALONE)
        (part,) = parts
        if part.verb is Verb.TWO_PHASE:
            raise no_two_phase()
        self._in_block = part.verb is Verb.BEGIN or part.chains
        word = part.words[0]
        begins = "START TRANSACTION" if word == "START" else "BEGIN"
        ends = "COMMIT" if part.verb is Verb.COMMIT else "ROLLBACK"
        self.tag((begins if part.verb is Verb.BEGIN else ends).encode())
        yield from ()

    def get_ready(self, parts: tuple[Statement, ...]) -> Steps:
        for part in parts:
            if not _only_reads(part):
                raise SandboxError(_NOT_HERE.format(part.words[0] if part.words else "that"))
        yield from super().get_ready(parts)

    def _at_once(self, raw: bytes, part: Statement) -> bool:  # noqa: ARG002
        return False  # nothing begins before the look does

    def _tell_ready(self) -> None:
        self._exchange.tell_changed()
        self._client.tell_ready(ord("T" if self._in_block else "I"))


class PeekSession(_LookingSession):
    """A look at what the test has written in its open transaction."""

    def __init__(
        self, client: Client, outer: OuterTransaction, still_leads: Callable[[], bool]
    ) -> None:
        super().__init__(client, outer, still_leads)
        self._outer: Final = outer
        self._look: Look | None = None
        # It takes no turn.
        self._session: Final = self.member.transaction.session
        self.member.turn = _NoTurn(self.member)

    def _join(self, outer: OuterTransaction) -> Member:
        # It is none of the members, who would end the look of somebody else.
        return Member(outer.backend, self._client.origin, self._client.settings)

    @property
    def is_over(self) -> bool:
        return not self._still_leads() or self._outer.backend is not self._backend

    def close(self) -> None:
        """There is nothing to close."""

    def cancel(self) -> None:
        look = self._look
        if look is not None:
            look.cancel()

    def _query(self, raw: bytes, parts: tuple[Statement, ...], text: str) -> Steps:
        if len(parts) == 1 and parts[0].words[:2] == ("DEALLOCATE", "ALL"):
            self._client.statements.clear()  # the test's own stay
            self.tag(b"DEALLOCATE ALL")
        else:
            yield from super()._query(raw, parts, text)

    def _operate(self, steps: Steps) -> bool:
        try:
            self._look = look = Look(self._outer, self._client)
        except SandboxError as error:
            steps.close()
            self._exchange.release()
            self._client.out += self._report(error)
            return False
        try:
            return super()._operate(self._looking(steps, look))
        finally:
            self.member.transaction.close()
            self._look = None
            look.close()
            self._backend.prepared |= self.has_prepared

    def _looking(self, steps: Steps, look: Look) -> Steps:
        transaction = self.member.transaction
        # Its settings are set under the savepoint, and undone with it.
        transaction.session = self._backend.settings_of
        yield from transaction.begin(_READS)
        transaction.session = self._session
        look.allow_cancel()
        yield from steps


class CloneLookSession(_LookingSession):
    """A look at a test's own database. `database` are libpq's keywords of it."""

    def __init__(
        self, client: Client, database: Mapping[str, str], still_leads: Callable[[], bool]
    ) -> None:
        self._own: Final = OuterTransaction(database, reads_only=True)
        super().__init__(client, self._own, still_leads)

    def _operate(self, steps: Steps) -> bool:
        succeeded = super()._operate(steps)
        if not self._backend.dead:
            self._backend.undo_frame()
            self._backend.run_blocking()
        return succeeded

    def end(self) -> None:
        """End the session from another thread: its database is dropped next."""
        self._own.abandon()

    def close(self) -> None:
        super().close()
        self._own.close()


class _NoTurn(Turn):
    """The turn of one who has it whenever nobody else is at anything."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.holder = member

    def leave(self, member: object) -> None: ...
    def offer(self, member: object) -> None: ...


def _only_reads(part: Statement) -> bool:
    """Whether a statement has no effect that stays, as far as its text tells."""
    if part.verb is Verb.SET:
        return "transaction_read_only" not in part.settings
    copies = part.words[:1] == ("COPY",)
    reads = part.verb in (Verb.QUERY, *CONTROL) or copies
    return reads and not _EFFECTS.search(part.text)
