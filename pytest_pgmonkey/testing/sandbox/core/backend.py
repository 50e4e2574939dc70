"""The one PostgreSQL session of a test process: commands sent ahead, savepoints, frames."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import psycopg
from psycopg import pq

from ....errors import SandboxError
from ...timeouts import NAMES, Timeouts
from .draining import drain
from .driver import error_from_result, execute, limited
from .refusals import Refusals
from .settings import UNKNOWN, Session
from .turns import Turn

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from psycopg.pq.abc import PGconn, PGresult

    from .places import Origin

    Steps = Generator[Any, Any, Any]

SAVEPOINT: Final = b"SAVEPOINT _pgmonkey"
UNDO: Final = b"ROLLBACK TO _pgmonkey"
_BASE: Final = b"SAVEPOINT _pgmonkey_base"
_REBASE: Final = b"RELEASE _pgmonkey_base"
# Each costs whoever looks at a row of the test's own a comparison.
_MOST_NESTED: Final = 32
_DEFERRABLE: Final = (
    b"SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname), c.condeferred "
    b"FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace "
    b"WHERE c.condeferrable"
)

_HELD_CURSORS: Final = b"SELECT quote_ident(name) FROM pg_catalog.pg_cursors WHERE is_holdable"

_STATUS: Final = pq.TransactionStatus
_OK: Final = pq.ConnStatus.OK
_FATAL: Final = pq.ExecStatus.FATAL_ERROR
_CANCELED: Final = b"57014"
_PATIENCE: Final = 2.0  # seconds for what a test has left in the middle
_OWN_PATIENCE: Final = 30.0  # seconds for a command of our own between two tests


class Level(Enum):
    """How deep the session stands in the current frame."""

    NONE = auto()  # nothing has been done in it
    DIRECT = auto()  # the only work in it is one virtual transaction, without a savepoint
    BARE = auto()  # committed work, and no savepoint after it yet
    STANDING = auto()  # a savepoint stands after the committed work


class EscapeError(SandboxError):
    """The outer transaction has ended although the test is still running."""


class Client(Protocol):
    """What uses the session through a door: a psycopg connection, for one."""

    def deliver_notice(self, result: PGresult) -> None:
        """Take a notice that one of its statements has caused."""

    def forget_prepared(self) -> None:
        """Forget prepared statements that the server no longer has."""


class SessionUser(Protocol):
    """A member, as its session knows it."""

    steady: bool

    @property
    def client(self) -> Client | None:
        """What uses it, `None` where that is gone."""

    def discard(self) -> None:
        """Roll back what it left open when it was dropped."""


class Look(Protocol):
    """A look at the test's data from outside, while nobody in the test does anything."""

    status: int | None
    """The transaction status of the session before; `None` as long as it is what it was."""

    @property
    def is_ours(self) -> bool:
        """Whether it is the running thread that looks."""

    def give_way(self) -> None:
        """End, and wait for that."""


class Frame(NamedTuple):
    """What is rolled back at once: a test, or a wider scope as far as it goes by itself."""

    level: Level
    settings_before: Session | None
    deferrable_before: list[tuple[str, bool]] | None
    changed: bool
    nested: int


class Backend:
    """One PGconn shared by all members of a test.

    A command that needs no answer is posted: sent without waiting, and its answer collected
    before the next one. So a rollback costs no round trip.
    """

    def __init__(
        self,
        conninfo: Mapping[str, str],
        *,
        reads_only: bool = False,
        refusals: Refusals | None = None,
    ) -> None:
        self._begin: Final = b"BEGIN READ ONLY" if reads_only else b"BEGIN"
        self.reads_only: Final = reads_only
        """Whether the outer transaction can write nothing, whatever is set in it."""
        self.root: Final[psycopg.Connection[Any]] = psycopg.Connection.connect(
            **conninfo,  # type: ignore[arg-type]
            autocommit=True,
        )
        self.pgconn: Final[PGconn] = self.root.pgconn
        self.backend_pid: Final = self.pgconn.backend_pid
        self.pgconn.notice_handler = self._on_notice
        self.pgconn.notify_handler = None  # Notifications are never delivered.
        self.forked = False
        self._posted: bytes | None = None
        self._backlog: list[bytes] = []
        self.refusals: Final = refusals or Refusals()
        self.turn = Turn(self.refusals)
        self.members: dict[Any, None] = {}
        self.look: Look | None = None
        self.abandoned: list[SessionUser] = []
        # The current frame, and those around it.
        self.level = Level.NONE
        self.frames: list[Frame] = []
        self.isolation = b""
        self.settings_of: Session | None = None
        self._settings_before: Session | None = None
        self.deferrable: list[tuple[str, bool]] | None = None
        self._deferrable_before: list[tuple[str, bool]] | None = None
        self._changed = False  # whether there was DDL in the current frame
        self._nested = 0  # savepoints of commits in the current frame
        # What outlives a rollback, to be undone after the test.
        self.advisory, self._functions_prepare, server_pid, self.timeouts = self._look_around()
        self.is_pooled: Final = server_pid != self.backend_pid
        """Whether a pooler stands between, which has sessions of its own."""
        if self.timeouts.differ:
            self.run_blocking(self.timeouts.park())
        self.prepared = self._functions_prepare
        self.stale_cursors: set[str] = set()
        """Cursors WITH HOLD, in lower case, of members that have returned."""
        self.escaped: EscapeError | None = None
        self.lost = ""
        """What was rolled back unasked, as a sentence for the test's report."""
        self.expects_cancels = False
        """Whether somebody has cancelled, or can be about to, from outside."""
        self.cancels_under_way = 0
        """Cancel requests of ours that were sent, and are not yet known to have arrived."""
        self.past_libpq = False
        """Whether a door exchanges messages with the server that libpq does not see."""
        self.streamed = False
        """Whether libpq can still be in the single-row mode of a `stream()`."""
        self.streamed_in: object = None
        """The transaction of that stream, as long as it has not ended."""
        self.unsettled = False
        """Whether one of our own lines was interrupted, so that our notes may be wrong."""
        self.last_origin: Origin | None = None
        self.last_statement = ""
        _backends.add(self)

    def _look_around(self) -> tuple[bool, bool, int, Timeouts]:
        """Find what no statement shows: whether functions take advisory locks, or prepare.

        Gives who answers, and the time-outs of a new session, as well.
        """
        (result,) = self.run_blocking(
            b"SELECT coalesce(pg_catalog.bool_or(prosrc ILIKE '%advisory%' "
            b"OR to_jsonb(p)->>'prosqlbody' IS NOT NULL), false), "
            b"coalesce(pg_catalog.bool_or(prosrc ILIKE '%prepare%'), false), "
            b"pg_catalog.pg_backend_pid(), "
            + b", ".join(b"pg_catalog.current_setting('%s', true)" % n.encode() for n in NAMES)
            + b" FROM pg_catalog.pg_proc p "
            b"WHERE pronamespace NOT IN ('pg_catalog'::pg_catalog.regnamespace, "
            b"'information_schema'::pg_catalog.regnamespace)"
        )
        locks, prepares, pid, *values = (result.get_value(0, i) for i in range(3 + len(NAMES)))
        found = zip(NAMES, values, strict=True)
        timeouts = Timeouts({name: value.decode() for name, value in found if value})
        return locks == b"t", prepares == b"t", int(pid or 0), timeouts

    @property
    def dead(self) -> bool:
        """Whether the session is gone: `reset_start()` by hand begins another in its place."""
        return bool(self.pgconn.status != _OK)

    def has_died(self) -> bool:
        """Find whether the server has ended the session since it was last used."""
        try:
            # What it says in parting comes first, the end of the file by the second reading.
            self.pgconn.consume_input()
            self.pgconn.consume_input()
        except psycopg.OperationalError:
            return True
        return self.dead

    @property
    def behind(self) -> bool:
        """Whether answers must be collected before the next command."""
        return self._posted is not None

    @property
    def status(self) -> int:
        """The transaction status of the session, as whoever does not look sees it."""
        while True:
            look = self.look
            status: int = self.pgconn.transaction_status
            if look is not None and look.status is not None and not look.is_ours:
                return look.status
            if look is self.look:
                return status

    @property
    def is_running(self) -> bool:
        """Whether the server is at a statement."""
        return self.past_libpq or self.pgconn.transaction_status == _STATUS.ACTIVE

    @property
    def in_transaction(self) -> bool:
        """Whether the session is in a transaction that has not failed."""
        return bool(self.pgconn.transaction_status == _STATUS.INTRANS)

    @property
    def is_begun(self) -> bool:
        """Whether there must be an outer transaction."""
        return self.level is not Level.NONE or any(
            frame.level is not Level.NONE for frame in self.frames
        )

    @property
    def is_fresh(self) -> bool:
        """Whether the outer transaction is yet to begin."""
        return self.level is Level.NONE and not self.frames

    @property
    def is_direct(self) -> bool:
        """Whether the next virtual transaction can be the outer one itself.

        Not where cancel requests are expected: the next SAVEPOINT could lose what it commits.
        """
        return self.is_fresh and not (self.expects_cancels or self.reads_only)

    def _on_notice(self, result: PGresult) -> None:
        holder: SessionUser | None = self.turn.holder
        client = holder.client if holder is not None else None
        if client is not None:
            client.deliver_notice(result)

    # Commands of our own

    def post(self, command: bytes) -> None:
        """Send a command now and collect its answer later; it must not mind being repeated."""
        if self._posted is not None:
            self._backlog.append(command)
        elif not self.dead:
            # Noted first: what an interruption keeps from being sent is sent when it is collected.
            self._posted = command
            try:
                # What does not fit into the socket at once is sent when the answer is collected.
                self.pgconn.send_query(command)
            except psycopg.OperationalError:
                self._posted = None
                if self.dead:
                    raise
                # Something was interrupted; the end of the test undoes all of it.
                self.unsettled = True

    def collect(self) -> Steps:
        """Fetch the answers of what was posted; raises the first error among them."""
        pgconn, command = self.pgconn, self._posted
        pgconn.consume_input()
        results = yield from execute(pgconn)
        if command is not None and (not results or self.is_canceled(results)):
            results = yield from self.repeat(command)
        self._posted = None
        backlog, self._backlog = self._backlog, []
        try:
            _raise_first(results)
        except psycopg.Error:
            # They are such as cannot fail, as long as the outer transaction is there.
            if not self.dead and self.escaped is None:
                self.note_escape(self.last_origin, self.last_statement)
            raise
        if backlog:
            _raise_first((yield from self.repeat(b"; ".join(backlog))))

    def run(self, command: bytes) -> Generator[Any, Any, list[PGresult]]:
        """Send commands of our own and wait for their answers."""
        results = yield from self.attempt(command)
        _raise_first(results)
        return results

    def attempt(self, command: bytes) -> Generator[Any, Any, list[PGresult]]:
        """Send commands of our own and give their answers, an error being the last of them."""
        self.pgconn.send_query(command)
        results: list[PGresult] = yield from execute(self.pgconn)
        return results

    def undo(self) -> Steps:
        """Roll back to the savepoint that stands."""
        _raise_first((yield from self.repeat(UNDO)))

    def repeat(self, command: bytes) -> Generator[Any, Any, list[PGresult]]:
        """Run a command until no cancel request hits it that has come too late."""
        results = yield from self.attempt(command)
        while self.is_canceled(results):
            results = yield from self.attempt(command)
        return results

    def is_canceled(self, results: list[PGresult]) -> bool:
        """Whether a cancel request, or a time-out of the server, has ended the last command."""
        if not results or results[-1].status != _FATAL:
            return False
        canceled = results[-1].error_field(pq.DiagnosticField.SQLSTATE) == _CANCELED
        self.expects_cancels |= canceled
        return canceled

    def run_blocking(self, command: bytes = b"") -> list[PGresult]:
        """Collect what was posted, then run a command, from code outside any member.

        Raises TimeoutError where the server does not answer.
        """
        if self._posted is not None:
            self.root.wait(limited(self.collect(), _OWN_PATIENCE))
        if not command:
            return []
        return self.root.wait(limited(self.run(command), _OWN_PATIENCE))

    # The outer transaction and its savepoints

    def begin(self, command: bytes, isolation: bytes) -> Steps:
        """Begin the outer transaction as the virtual one that is asked for."""
        self._settings_before = self.settings_of
        _raise_first((yield from self.repeat(command)))
        self.level, self.isolation = Level.DIRECT, isolation

    def stand(self, modes: bytes = b"") -> Steps:
        """Make sure that a fresh savepoint stands after the committed work."""
        if self.level is not Level.STANDING:
            command = self._standing_command(modes)
            results = yield from self.attempt(command)
            while self.is_canceled(results) and not self.is_begun:
                yield from self.repeat(b"ROLLBACK")
                results = yield from self.attempt(command)
            if self.is_canceled(results):
                self.note_loss()
            _raise_first(results)
            self.stands(modes)

    def _standing_command(self, modes: bytes) -> bytes:
        """Give the command after which a fresh savepoint stands in the current frame."""
        return b"; ".join([*self._marks(modes), SAVEPOINT])

    def _marks(self, modes: bytes = b"") -> list[bytes]:
        """Give the commands with which the frames begin in which nothing was done yet."""
        levels = [frame.level for frame in self.frames] + [self.level]
        return [
            self._begin + modes if depth == 0 else b"SAVEPOINT " + _mark(depth)
            for depth, level in enumerate(levels)
            if level is Level.NONE
        ]

    def stands(self, modes: bytes = b"") -> None:
        """Note that the savepoint stands."""
        if self.level is Level.NONE:
            self._settings_before = self.settings_of
            if not self.frames or self.frames[0].level is Level.NONE:
                self.isolation = modes.removeprefix(b" ISOLATION LEVEL ")
        self._have_marks()
        self.level = Level.STANDING

    def _have_marks(self) -> None:
        self.frames = [
            frame._replace(level=Level.BARE) if frame.level is Level.NONE else frame
            for frame in self.frames
        ]

    def keep(self, before: list[bytes]) -> Steps:
        """Make what was done since the savepoint stay, whatever is rolled back afterwards.

        Commands that come `before` belong to it. Where one of them fails it is all undone, and the
        error raised: a cancel request from outside may come in between, as in a real commit.
        """
        _raise_first((yield from self.attempt_keep(before)))

    def attempt_keep(self, before: list[bytes]) -> Generator[Any, Any, list[PGresult]]:
        """Do the same and give the answers, an error being the last of them.

        Savepoints are nested, and seldom released: so a cancel request that hits one of them undoes
        nothing that was kept before.
        """
        rebases = self._nested >= _MOST_NESTED and not self.expects_cancels
        commands = [*before, _REBASE] if rebases else [*before]
        if rebases or not self._nested:
            commands.append(_BASE)
        results = yield from self.attempt(b"; ".join([*commands, SAVEPOINT]))
        if results[-1].status != _FATAL:
            self._nested = 1 if rebases else self._nested + 1
            return results
        if rebases and len(results) > len(before) + 1:
            self._nested = 0
            self.note_loss()
        if not self.is_canceled(results):
            self.check_escape()
        if self.pgconn.transaction_status == _STATUS.INERROR:
            yield from self.undo()
        return results

    def post_keep(self, before: list[bytes]) -> None:
        """Do the same without waiting, where nobody can be told any more."""
        commands = [*before] if self._nested else [*before, _BASE]
        self._nested += 1
        self.post(b"; ".join([*commands, SAVEPOINT]))

    def undo_direct(self) -> None:
        """Roll back the virtual transaction that is the outer one."""
        self.restore_frame()
        self.post(b"ROLLBACK")

    def post_undo(self) -> None:
        """Roll back the virtual transaction that is open."""
        if self.level is Level.DIRECT:
            self.undo_direct()
        else:
            self.post(UNDO)

    def restore_frame(self) -> None:
        """Note that all work of the current frame was undone."""
        self.level = Level.NONE
        self._nested = 0
        self.settings_of = self._settings_before
        if self._changed:
            self.deferrable, self._changed = self._deferrable_before, False

    def push_frame(self) -> None:
        """Begin a narrower scope: what follows can be undone by itself."""
        self.frames.append(
            Frame(
                self.level,
                self._settings_before,
                self._deferrable_before,
                self._changed,
                self._nested,
            )
        )
        self.level = Level.NONE
        self._nested = 0
        self._settings_before = self.settings_of
        self._deferrable_before = self.deferrable
        self._changed = False

    def mark_frame(self) -> None:
        """Have the savepoint stand before anybody's settings change hands in the new frame."""
        if self.is_begun:
            # The marks of frames around it, too: inside it they would be undone with it.
            self.run_blocking(b"; ".join(self._marks()))
            self._have_marks()
            self.level = Level.BARE

    def undo_frame(self) -> None:
        """Post the end of all work of the current frame."""
        self.expects_cancels = False
        self.stale_cursors.clear()
        worked = self.level is not Level.NONE
        if worked:
            self.restore_frame()
        rest = self._after_rollback() if self.advisory or self.prepared else []
        if worked and self.frames:
            # The release last: until then the whole can be repeated.
            mark = _mark(len(self.frames))
            self.post(b"; ".join([b"ROLLBACK TO " + mark, *rest, b"RELEASE " + mark]))
        elif worked or rest:
            self.post(b"; ".join([b"ROLLBACK", *rest] if worked else rest))

    def pop_frame(self) -> None:
        """Go back to the wider scope."""
        frame = self.frames.pop()
        self.level, self._settings_before, self._deferrable_before = frame[:3]
        self._changed, self._nested = frame.changed, frame.nested

    def _after_rollback(self) -> list[bytes]:
        commands = []
        if self.advisory:
            commands.append(b"SELECT pg_catalog.pg_advisory_unlock_all()")
        if self.prepared:
            commands.append(b"DEALLOCATE ALL")
            self.prepared = self._functions_prepare
            self.forget_prepared()
        return commands

    # The catalogue

    def note_ddl(self) -> None:
        """Note that constraints may have come or gone."""
        self.deferrable = None
        self._changed = True

    @property
    def has_ddl(self) -> bool:
        """Whether there was DDL in the current frame."""
        return self._changed

    def find_deferrable(self) -> Steps:
        """Give the deferrable constraints, each with whether it is initially deferred."""
        if self.deferrable is None:
            (result,) = yield from self.run(_DEFERRABLE)
            self.deferrable = [
                ((result.get_value(i, 0) or b"").decode(), result.get_value(i, 1) == b"t")
                for i in range(result.ntuples)
            ]
            if not self._changed:
                self._deferrable_before = self.deferrable
        return self.deferrable

    def close_cursors(self) -> Steps:
        """Close the cursors of members that have returned, as their connections would have."""
        stale, self.stale_cursors = self.stale_cursors, set()
        (result,) = yield from self.run(_HELD_CURSORS)
        found = [result.get_value(i, 0) or b"" for i in range(result.ntuples)]
        names = [name for name in found if name.decode().strip('"').lower() in stale]
        if names:
            yield from self.run(b"; ".join(b"CLOSE " + name for name in names))

    # Ends

    def check_escape(self) -> None:
        """Find an outer transaction that has ended although a test has worked in it."""
        idle = self.pgconn.transaction_status == _STATUS.IDLE
        if idle and not self.behind and self.is_begun and self.escaped is None:
            self.note_escape(self.last_origin, self.last_statement)

    def note_escape(self, origin: Origin | None, statement: str) -> None:
        """Keep the error that names who ended the outer transaction."""
        self.escaped = EscapeError(
            f"the test's transaction was ended from inside, by or after {statement[:200]!r} on "
            f"{origin}; what the test had written may be committed"
        )

    def note_loss(self) -> None:
        """Keep that a cancel request has undone what a virtual commit had kept."""
        self.lost = (
            "a cancel request from outside hit the sandbox between two transactions, and what the "
            "test had committed before is rolled back"
        )

    def send_cancel(self) -> None:
        """Ask the server to cancel what runs; the answer goes to whom it belongs."""
        self.cancels_under_way += 1
        with suppress(psycopg.Error):  # what is wrong with the session shows at its next use
            self.root.cancel_safe(timeout=_PATIENCE)
        self.cancels_under_way -= 1

    def free_turn(self) -> None:
        """Take the turn from whoever was interrupted with it, as far as the test goes."""
        turn = self.turn
        if turn.preempted is None and (turn.holder is None or turn.holder.is_scope):
            return
        self.turn = Turn(self.refusals)
        for member in list(self.members):
            member.turn = self.turn

    def cancel_waiting(self) -> list[Any]:
        """Refuse those who wait for their turn, and give them."""
        waiting = self.turn.cancel_waiting()
        if waiting:
            self.turn = self.turn.renewed()
        return waiting

    def end_look(self) -> None:
        """Have nobody look from outside any more."""
        while (look := self.look) is not None:
            look.give_way()

    def discard_abandoned(self) -> None:
        """Roll back what connections left open that were dropped unclosed."""
        while self.abandoned:
            self.abandoned.pop().discard()

    def interrupt(self) -> None:
        """End what was left in the middle: a statement, a COPY, a stream, a pipeline."""
        self._posted, self._backlog = None, []
        self.cancels_under_way += 1
        at_rest = self.dead or drain(self.root, _PATIENCE)
        self.cancels_under_way -= 1
        if not at_rest:
            # Nobody can use it any more: libpq would mix up whose answers come.
            self.lost = "what the test had left running did not end, so its session was ended"
            self.pgconn.finish()

    def heal(self) -> None:
        """Undo the current frame, whatever our notes say of it.

        Raises psycopg.Error or TimeoutError where that does not succeed.
        """
        self.root.wait(limited(self._undo_all(), _OWN_PATIENCE))
        self.unsettled = False

    def _undo_all(self) -> Steps:
        status, mark = self.pgconn.transaction_status, _mark(len(self.frames))
        undo = b"ROLLBACK TO %s; RELEASE %s" % (mark, mark)
        if self.frames and status == _STATUS.INTRANS:
            # The savepoint may be there or not; where it is not, nothing was done either.
            results = yield from self.attempt(b"SAVEPOINT _pgmonkey_try; " + undo)
            if results[-1].status == _FATAL:
                yield from self.run(b"ROLLBACK TO _pgmonkey_try; RELEASE _pgmonkey_try")
        elif status != _STATUS.IDLE:
            yield from self.run(undo if self.frames else b"ROLLBACK")
        self.restore_frame()
        self.settings_of = UNKNOWN
        self.deferrable = None
        self.expects_cancels = False
        self.advisory = self.prepared = True  # perhaps
        yield from self.run(b"; ".join(self._after_rollback()))

    def leave_pipeline(self) -> None:
        """End pipeline mode, in which everything was answered."""
        try:
            self.pgconn.exit_pipeline_mode()
        except psycopg.OperationalError:
            self.interrupt()

    def forget_prepared(self, but: object = None) -> None:
        """Let all members but one forget prepared statements that the server no longer has."""
        for member in list(self.members):
            if member is not but and (client := member.client) is not None:
                client.forget_prepared()

    def close(self) -> None:
        """End the session."""
        self.root.close()


_backends: weakref.WeakSet[Backend] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for backend in list(_backends):
        backend.forked = True
        for member in list(backend.members):
            member.steady = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _mark(depth: int) -> bytes:
    return b"_pgmonkey_%d" % depth


def _raise_first(results: list[PGresult]) -> None:
    for result in results:
        if result.status == _FATAL:
            raise error_from_result(result)
