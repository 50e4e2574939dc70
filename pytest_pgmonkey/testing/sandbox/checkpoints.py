"""A part of a test that is undone by itself."""

from __future__ import annotations

import threading
import time
from copy import deepcopy
from typing import TYPE_CHECKING, Final

from psycopg import pq

from ...errors import SandboxError
from .core.backend import Level
from .core.turns import BusyError
from .standstill import Standstill

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .core.backend import Backend
    from .core.member import Member
    from .core.outer import OuterTransaction
    from .core.settings import Session

__all__ = ["Checkpoint"]

_PATIENCE: Final = 1.0  # seconds for what another thread or process is in the middle of
_AT_ONCE: Final = 0.05  # seconds for a statement of theirs
_AGAIN: Final = 0.005
_WAIT: Final = "let your threads and tasks come to an end before the block begins, and in it"


class Checkpoint:
    """A block after which the test's data is as it was before, whoever has written inside.

    So are the transactions and the settings of connections that were there before. Others go on,
    with nothing written. Raises SandboxError where somebody is in the middle of a statement, or
    the transaction has failed.
    """

    def __init__(self, outer: OuterTransaction) -> None:
        self._outer: Final = outer
        self._holder: Member | None = None
        self._sessions: dict[Member, Session | None] = {}
        self._copies: dict[int, tuple[Session, Session]] = {}
        self.is_over = False

    def __enter__(self) -> None:
        try:
            self._stop(Standstill, self._begin)
        except SandboxError as error:
            raise SandboxError(f"pgmonkey.checkpoint() cannot begin here: {error}") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.is_over = True
        if self not in self._outer.checkpoints:
            return  # the session was lost, or one around this has ended
        try:
            self._stop(_EndOfBlock, self._undo)
        except SandboxError as found:
            told = f"pgmonkey.checkpoint() cannot undo what was written: {found}"
            raise SandboxError(told) from error

    def _stop(self, kind: type[Standstill], act: Callable[[Backend], None]) -> None:
        """Do something while nobody does anything; who is in a pipeline gets on with it."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return kind(self._outer, _AT_ONCE, act).end()
            except BusyError as error:
                if time.monotonic() > deadline or self._is_waiting_for_itself():
                    raise SandboxError(f"{error}; {_WAIT}") from None
            time.sleep(_AGAIN)

    def _is_waiting_for_itself(self) -> bool:
        """Whether what runs is a task of this thread, which cannot go on meanwhile."""
        thread = threading.get_ident()
        return any(
            member.busy and member.task is not None and member.thread == thread
            for member in list(self._outer.backend.members)
        )

    def _begin(self, backend: Backend) -> None:
        holder: Member | None = backend.turn.seize()
        try:
            if holder is not None and holder.yielding and not holder.settle_reads():
                holder = None
            self._holder = holder
            for member in list(backend.members):
                self._keep_session(member)
                if member.open:
                    member.stand_aside()
            backend.push_frame()
            backend.mark_frame()
            self._outer.checkpoints.append(self)
        except BaseException:
            backend.unsettled = True
            raise
        finally:
            backend.turn.hand_to(None)

    def _keep_session(self, member: Member) -> None:
        """Let what is set inside be noted in a copy."""
        session = self._sessions[member] = member.transaction.session
        if session is None or not session.names:
            return
        _, copy = self._copies.setdefault(id(session), (session, deepcopy(session)))
        member.transaction.session = copy
        if member.backend.settings_of is session:
            member.backend.settings_of = copy

    def _undo(self, backend: Backend) -> None:
        checkpoints = self._outer.checkpoints
        backend.turn.seize()
        try:
            while checkpoints:
                inner = checkpoints.pop()
                inner.undo(backend)
                if inner is self:
                    break
            holder = self._former_holder(backend)
        except BaseException:
            backend.unsettled = True
            holder = None
            raise
        finally:
            backend.turn.hand_to(holder)

    def undo(self, backend: Backend) -> None:
        """Undo what was written inside, and let everybody go on as before."""
        # Locks that were taken outlive a rollback anyway; prepared statements do, too, but may be
        # of tables that there are no longer.
        kept = backend.advisory, backend.prepared, backend.stale_cursors, backend.expects_cancels
        backend.advisory, backend.prepared = False, backend.has_ddl
        backend.stale_cursors = set()
        if backend.unsettled:
            backend.heal()
        else:
            backend.undo_frame()
        backend.pop_frame()
        backend.run_blocking()
        backend.advisory |= kept[0]
        backend.prepared |= kept[1]
        backend.stale_cursors |= kept[2]
        backend.expects_cancels |= kept[3]
        self._restore_sessions(backend)
        for member in list(backend.members):
            member.empty()

    def _restore_sessions(self, backend: Backend) -> None:
        for member, session in self._sessions.items():
            member.transaction.session = session
        for session, copy in self._copies.values():
            if backend.settings_of is copy:
                backend.settings_of = session

    def _former_holder(self, backend: Backend) -> Member | None:
        """Give whose turn it was at the beginning, if it still is."""
        holder = self._holder
        if holder is not None and not holder.returned:
            return holder
        if backend.level in (Level.DIRECT, Level.STANDING):
            # A holder was closed inside, so its transaction is nobody's. If there was none: what
            # was written inside has given the savepoint before it a transaction id, and who reads
            # next would seem to have written.
            backend.post_undo()
        return None


class _EndOfBlock(Standstill):
    """What is found at the end may be anything that a rollback undoes."""

    def _hindrance(self) -> str:
        if self.backend.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            return super()._hindrance()
        return ""
