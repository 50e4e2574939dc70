"""A member of the test's transaction: whose turn it is, when it is ready, and how its loan ends.

A member came through a door. It knows nothing of the door but its `Client`, which is what uses
the member: a psycopg connection, for one.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

import psycopg
from psycopg import pq

from ...sql.lexer import Verb
from .backend import Client, Level
from .handover import change_hands
from .places import Peer
from .refusals import RefusedError, advice, explain
from .settings import UNKNOWN, WrongSettingError, untouched
from .transaction import VirtualTransaction
from .turns import current_task

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator

    from ...sql.lexer import Statement
    from .backend import Backend
    from .places import Origin
    from .turns import Turn

    Steps = Generator[Any, Any, Any]

logger = logging.getLogger("pytest_pgmonkey")

_STATUS: Final = pq.TransactionStatus
_STATUSES: Final = tuple(sorted(_STATUS))
_CANCELED: Final = "57014"
_IN_BLOCK: Final = (_STATUS.INTRANS, _STATUS.INERROR)

_XIDS: Final = (
    b"SELECT count(*) FROM pg_catalog.pg_locks "
    b"WHERE locktype = 'transactionid' AND pid = pg_catalog.pg_backend_pid()"
)
# A transactional message makes the current savepoint take a transaction id if it has none yet.
_PROBE: Final = (
    _XIDS + b"; SELECT pg_catalog.pg_logical_emit_message(true, 'pgmonkey', ''); " + _XIDS
)


class MemberClient(Client, Protocol):
    """What a member asks of the one that uses it."""

    @property
    def has_prepared(self) -> bool:
        """Whether its driver has prepared statements in the session."""

    def mark_closed(self, *, broken: bool) -> None:
        """Be closed from now on: by its user, or because the session is gone."""

    def begin_anew(self, command: bytes) -> None:
        """Go on in a transaction that was undone, which this command had begun.

        The command is empty where nothing is to be begun any more.
        """

    def blame(self, wrong: WrongSettingError) -> Exception:
        """Give the error of a setting that is wrong in the client's configuration."""


class Keeper(Protocol):
    """Who has a say in the end of a transaction that tests depend on."""

    def before_end(self, *, commits: bool) -> Steps:
        """Raise SandboxError where it may not be ended, or not so."""


class Member:
    """One user of the shared backend: its turn, its operations, and its end."""

    __slots__ = (
        "_aside",
        "_client",
        "backend",
        "busy",
        "ended",
        "is_scope",
        "keeper",
        "must_stop",
        "origin",
        "pipelined",
        "returned",
        "steady",
        "streaming",
        "task",
        "thread",
        "timeout",
        "transaction",
        "turn",
        "yielding",
    )

    def __init__(
        self,
        backend: Backend,
        origin: Origin,
        settings: tuple[tuple[str, str], ...] = (),
        timeout: float = 5.0,
    ) -> None:
        self.backend = backend
        self.turn: Turn = backend.turn
        self.transaction = VirtualTransaction(backend, untouched(settings))
        self.origin = origin
        self.timeout = timeout
        self._client: Callable[[], MemberClient | None] = _nobody
        self.busy = False
        """In an operation."""
        self.streaming = False
        """In the middle of a COPY or a stream."""
        self.pipelined = False
        """In a pipeline, whether the backend is in pipeline mode just now or not."""
        self.yielding = False
        """Between two statements of a transaction that has perhaps only read."""
        self.steady = False
        """Between two statements of a transaction that keeps the turn."""
        self.ended = ""
        """Why every further operation is refused."""
        self.returned = False
        self.is_scope = False
        self.keeper: Keeper | None = None
        self.must_stop = False
        """Whether what it is in the middle of must end: a test begins or ends."""
        self._aside: list[tuple[int, dict[str, Any]]] = []
        self.thread = 0
        self.task: asyncio.Task[object] | None = None

    def serve(self, client: Callable[[], MemberClient | None]) -> None:
        """Belong to a client, given as a weak reference: a lost connection must be collected."""
        self._client = client

    # What others ask

    @property
    def client(self) -> MemberClient | None:
        """What uses this member, `None` where that is gone."""
        return self._client()

    @property
    def name(self) -> str:
        """What it is in messages: the connection borrowed at a place, or that of a client."""
        return str(self.origin)

    @property
    def is_foreign(self) -> bool:
        """Whether its client is in another process."""
        return isinstance(self.origin, Peer) and self.origin.pid != os.getpid()

    @property
    def open(self) -> bool:
        """In a virtual transaction."""
        return self.transaction.open

    @property
    def has_changes(self) -> bool:
        """Whether a transaction is open that has perhaps written."""
        return self.transaction.open and self.transaction.writes

    @property
    def status(self) -> pq.TransactionStatus:
        """The transaction status that application code expects to see."""
        if self.returned or self.backend.dead:
            return _STATUS.UNKNOWN
        if self.turn.holder is self and not self.backend.behind:
            real: pq.TransactionStatus = _STATUSES[self.backend.status]
            if real == _STATUS.ACTIVE or self.transaction.open:
                return real
            return _STATUS.IDLE
        return _STATUS.INTRANS if self.transaction.open else _STATUS.IDLE

    @property
    def is_idle(self) -> bool:
        """Whether nothing is open or running that a commit or a rollback would end."""
        return not (self.ended or self.backend.forked) and self.status == _STATUS.IDLE

    @property
    def failed(self) -> bool:
        """Whether its transaction is aborted, and waits for its end."""
        return self.transaction.open and self.status == _STATUS.INERROR

    @property
    def owns_running_statement(self) -> bool:
        """Whether a cancel request would reach a statement of this member."""
        return not self.returned and self.turn.holder is self and not self.backend.behind

    # The turn

    def wait_for_turn(self) -> None:
        """Block until the backend is this member's."""
        self.turn.wait(self, self.timeout)

    def claim_turn(self, drive: Callable[[Steps], Any]) -> None:
        """Block until the turn is had, also from a holder that has only read.

        `drive` runs what that takes.
        """
        self.discard_abandoned()
        while True:
            if self.turn.holder is not self:
                self.wait_for_turn()
            if self.turn.preempted is None:
                return
            self.occupy()
            try:
                has_turn = drive(self.preempt())
            finally:
                self.busy = False
            if has_turn:
                return

    def discard_abandoned(self) -> None:
        """Roll back what connections left open that were dropped unclosed."""
        if self.backend.abandoned:
            self.occupy()
            try:
                self.backend.discard_abandoned()
            finally:
                self.busy = False

    async def wait_for_turn_async(self) -> None:
        """Wait in the running loop until the backend is this member's."""
        await self.turn.wait_async(self, self.timeout)

    def preempt(self) -> Steps:
        """Find whether the preempted holder has only read; gives whether the turn is ours."""
        backend = self.backend
        try:
            # One that came back to its turn and did nothing with it is suspended as before.
            suspended = self.turn.preempted.transaction.suspended
            wrote = not suspended and (yield from self.has_written())
        except BaseException:
            self.turn.give_back(self)
            raise
        if wrote and self.turn.give_back(self):
            return False
        preempted: Member | None = self.turn.keep_preempted()
        if wrote and preempted is not None:
            preempted.transaction.post_rollback()  # it was closed meanwhile
            return True
        if backend.level is Level.DIRECT:
            backend.level = Level.BARE
        if preempted is not None:
            preempted.transaction.suspended = preempted.transaction.open
        return True

    def settle_reads(self) -> bool:
        """Find whether a transaction has written that is perhaps to be preempted.

        One that has not is suspended.
        """
        backend = self.backend
        wrote = bool(backend.root.wait(self.has_written()))
        if not wrote:
            if backend.level is Level.DIRECT:
                backend.level = Level.BARE
            self.transaction.suspended = True
        return wrote

    def has_written(self) -> Steps:
        """Find whether the open virtual transaction has a transaction id, so has written.

        One that has not is undone: there was nothing to undo.
        """
        backend = self.backend
        if backend.behind:
            yield from backend.collect()
        if backend.level is Level.DIRECT:
            results = yield from backend.run(_XIDS)
            return results[0].get_value(0, 0) != b"0"
        results = yield from backend.run(_PROBE)
        wrote = results[0].get_value(0, 0) == results[2].get_value(0, 0)
        if not wrote:
            yield from backend.undo()
        return wrote

    # Operations: `start`, then perhaps `get_ready` and `before`, and `after` in any case

    def start(self) -> None:
        """Begin an operation: the turn is this member's."""
        self.occupy()
        while self.turn.holder is not self and not self.ended:
            self.busy = False
            self.claim_turn(self.backend.root.wait)  # a checkpoint has taken it
            self.occupy()

    def occupy(self) -> None:
        """Have nobody look from outside meanwhile, whose turn it ever is."""
        self._be_busy()
        self.thread = threading.get_ident()
        self.task = current_task()

    def _be_busy(self) -> None:
        if self.busy:
            return  # what was decided meanwhile must hold: a standstill waits for the end of it
        self.busy = True
        # Whoever looks from outside has asked whether anybody is busy, after they said so here.
        while (look := self.backend.look) is not None and not look.is_ours:
            self.busy = False
            look.give_way()
            self.busy = True

    def get_ready(self) -> Steps:
        """Bring the backend to where this member left it."""
        backend, transaction = self.backend, self.transaction
        if backend.behind:
            yield from backend.collect()
        if backend.stale_cursors and backend.in_transaction:
            yield from backend.close_cursors()
        if backend.settings_of is not transaction.session:
            between = not transaction.open or transaction.suspended
            try:
                yield from change_hands(backend, transaction.session, between=between)
            except WrongSettingError as wrong:
                client = self.client
                if client is None:
                    raise
                raise client.blame(wrong) from None
        if transaction.suspended:
            transaction.suspended = False
            if transaction.open:
                yield from backend.stand()

    def before(self, part: Statement, params: Any) -> Steps:
        """Take note of a statement, and do what must be done before it."""
        if part.verb in (Verb.DEALLOCATE, Verb.DISCARD):
            # Its own client forgets them, or does not, as its driver's release has it.
            self.backend.forget_prepared(but=self)
        yield from self.transaction.before(part, params)

    def commit(self) -> Steps:
        """Commit the virtual transaction."""
        self._check_not_streaming()
        return self.transaction.commit()

    def rollback(self) -> None:
        """Roll the virtual transaction back, without waiting for the answer."""
        self._check_not_streaming()
        self.transaction.rollback()

    def _check_not_streaming(self) -> None:
        if self.streaming:
            raise psycopg.OperationalError("another command is already in progress")

    def commit_at_once(self) -> bool:
        """Commit where the server need not be told; gives whether that was so."""
        if not self.steady or not self.transaction.commits_at_once:
            return False
        self._be_busy()
        if not self.steady:  # any more
            self.busy = False
            return False
        self.transaction.commit_at_once()
        self._release()
        return True

    def rollback_at_once(self) -> bool:
        """Roll back where the transaction is this member's turn; gives whether it was."""
        if not self.steady or self.backend.pgconn.transaction_status not in _IN_BLOCK:
            return False
        self._be_busy()
        if not self.steady:
            self.busy = False
            return False
        self.transaction.post_rollback()
        self._release()
        return True

    def _release(self) -> None:
        self.steady = False
        self.turn.leave(self)
        self.busy = False

    def explain(self, error: psycopg.Error) -> None:
        """Say more in an error that the surrounding transaction has caused."""
        if isinstance(error, RefusedError):
            self.refuse(error)
        explain(error, self.advise(error.sqlstate, error.diag.message_primary or str(error)))
        if error.sqlstate == _CANCELED:
            self.backend.expects_cancels = True

    def refuse(self, error: RefusedError) -> RefusedError:
        """Take note of an error that tells of a refusal."""
        self.backend.refusals.note(error.what)
        return error

    def advise(self, sqlstate: str | None, message: str) -> str:
        """Give a line of advice on an error that the surrounding transaction has caused."""
        transaction = self.transaction
        line = advice(sqlstate, transaction.current, in_block=transaction.open)
        if line:
            self.backend.refusals.note(message)
        return line

    def after(self) -> None:
        """Settle an operation: keep the turn, pass it on, and find out about escapes."""
        try:
            self._settle()
        except BaseException:
            self.backend.unsettled = True
            raise
        finally:
            # Not before: the end of a test waits until nobody sends anything any more.
            self.busy = False

    def _settle(self) -> None:
        backend, transaction = self.backend, self.transaction
        if transaction.in_pipeline and not backend.dead:
            self.steady = False
            return
        behind = backend.behind
        status = backend.pgconn.transaction_status
        if status == _STATUS.ACTIVE and not behind:
            self.streaming = backend.streamed = True
            backend.streamed_in = transaction
            return
        self.streaming = self.steady = self.yielding = False
        if status == _STATUS.UNKNOWN:
            transaction.in_pipeline = False
            transaction.close()
            self.turn.leave(self)
            return
        if status == _STATUS.IDLE and not behind and backend.level is not Level.NONE:
            self._escaped()
        if transaction.unit:
            transaction.end_unit(status)
        if not transaction.open:
            self.turn.leave(self)
        elif transaction.writes or transaction.has_modes or status != _STATUS.INTRANS:
            self.steady = not (behind or self.pipelined)
        else:
            self.yielding = True
            self.turn.offer(self)

    def _escaped(self) -> None:
        """Report that the outer transaction has ended: what the test did is committed for good."""
        self.backend.level = Level.NONE
        self.transaction.close()
        self.transaction.unit = False
        self.backend.note_escape(self.origin, self.transaction.current)

    # The end of the loan

    def leave(self, because: str) -> None:
        """Return the loan from a thread of its own, in which the test may end meanwhile."""
        self.occupy()  # who ends the test waits until this is no longer busy
        try:
            if not self.ended:
                self.close(because)
        finally:
            self.busy = False

    def close(self, because: str) -> None:
        """Return the loan: roll back what is open, and let nobody use it again."""
        if self.returned or (self.ended and self.ended != because):
            return  # where the test has ended, its reset closes it
        if self.backend.forked:
            logger.warning(
                "a forked process cannot close %s: it is its parent's, and stays open",
                self.name,
            )
            return
        self._be_busy()
        try:
            self._give_back(because)
        except BaseException:
            self.backend.unsettled = True
            raise
        finally:
            # Not before: the end of a test waits for members that are busy.
            self.backend.members.pop(self, None)
            self.busy = False

    def _give_back(self, because: str) -> None:
        backend, transaction = self.backend, self.transaction
        if transaction.current:
            backend.last_origin, backend.last_statement = self.origin, transaction.current
        if transaction.open and self.turn.holder is self:
            backend.check_escape()
        self._abort()
        backend.stale_cursors |= transaction.held_cursors
        session = transaction.session
        if session is not None and session.names:
            session.ended = True
        client = self.client
        if client is not None:
            backend.prepared |= client.has_prepared
            client.mark_closed(broken=backend.dead)
        self.ended = because
        self.returned = True
        self.steady = False
        self.turn.leave(self)

    def leave_pipeline(self) -> None:
        """End pipeline mode, in which everything was answered."""
        self.transaction.in_pipeline = False
        self.backend.leave_pipeline()

    def interrupt(self) -> None:
        """End a COPY, a stream or a pipeline that was left in the middle."""
        if self.streaming or self.transaction.in_pipeline:
            self.streaming = self.transaction.in_pipeline = False
            self.backend.interrupt()

    def stand_aside(self) -> None:
        """Let others work in what the open transaction has written, until `undone`."""
        transaction = self.transaction
        transaction.in_pipeline = False
        self._aside.append((len(self.backend.frames), transaction.snapshot()))
        if transaction.has_local_settings:
            self.backend.settings_of = UNKNOWN  # they are for nobody else
        # In the test it has written nothing yet, and need not keep the turn.
        transaction.stand_aside()
        self.streaming = self.steady = self.yielding = False
        self.turn.leave(self)

    def empty(self) -> None:
        """Go on as before it stood aside; with nothing written, where it began afterwards."""
        client, transaction = self.client, self.transaction
        if self.come_back():
            if client is not None:
                client.begin_anew(b"")  # it is open: a BEGIN that was put off is void
        else:
            if transaction.open and client is not None:
                client.begin_anew(transaction.modes)
            transaction.close()
        self.steady = self.yielding = False

    def undone(self) -> None:
        """Forget what was rolled back with the test around it."""
        if not self.come_back():
            self.transaction.unit = False
            self.transaction.close()
        self.steady = self.yielding = False
        self.turn.leave(self)

    def come_back(self) -> bool:
        """Go on as before it stood aside, where what came inside is over; gives whether it did."""
        is_back, depth = False, len(self.backend.frames)
        while self._aside and self._aside[-1][0] >= depth:
            self.transaction.restore(self._aside.pop()[1])
            is_back = True
        if is_back and self.transaction.has_local_settings and self.backend.settings_of is UNKNOWN:
            self.backend.settings_of = self.transaction.session
        return is_back

    def end(self, because: str) -> None:
        """Refuse every further operation."""
        self.ended = self.ended or because
        self.steady = False

    def disown(self) -> None:
        """Forget a backend that is no longer the test's."""
        self.end(CLOSED)
        self.returned = True

    def abandon(self) -> None:
        """Note that the client was dropped unclosed; called by the collector, so no I/O."""
        self.ended = CLOSED
        self.returned = True
        self.backend.abandoned.append(self)

    def discard(self) -> None:
        """Roll back what an abandoned client left open."""
        self.backend.members.pop(self, None)
        self.backend.prepared = True  # perhaps
        self.backend.stale_cursors |= self.transaction.held_cursors
        self._abort()
        self.turn.leave(self)

    def _abort(self) -> None:
        """Roll back whatever is unfinished, unless another member has the session by now."""
        if not self.turn.hold(self):
            return
        self.interrupt()
        if self.transaction.unit:
            self.transaction.end_unit(_STATUS.INERROR)
        elif self.transaction.open:
            self.transaction.post_rollback()


CLOSED: Final = "the connection is closed"


def _nobody() -> MemberClient | None:
    return None
