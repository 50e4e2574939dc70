"""The one PostgreSQL session of a test process: commands sent ahead, savepoints, frames."""

from __future__ import annotations

import os
import weakref
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import psycopg
from psycopg import pq

from ....errors import SandboxError
from .driver import error_from_result, execute
from .turns import Turn

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from psycopg.pq.abc import PGconn, PGresult

    from .places import Place
    from .settings import Session

    Steps = Generator[Any, Any, Any]

SAVEPOINT: Final = b"SAVEPOINT _pgmonkey"
REFRESH: Final = b"RELEASE _pgmonkey; SAVEPOINT _pgmonkey"
UNDO: Final = b"ROLLBACK TO _pgmonkey"
_DEFERRABLE: Final = (
    b"SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname), c.condeferred "
    b"FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace "
    b"WHERE c.condeferrable"
)

_STATUS: Final = pq.TransactionStatus
_BAD: Final = pq.ConnStatus.BAD
_FATAL: Final = pq.ExecStatus.FATAL_ERROR
_COPY: Final = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)


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

    def bury(self) -> None:
        """Roll back what it left open when it was dropped."""


class Frame(NamedTuple):
    """What is rolled back at once: a test, or a wider scope as far as it goes by itself."""

    level: Level
    settings_before: Session | None
    deferrable_before: list[tuple[str, bool]] | None
    changed: bool


class Backend:
    """One PGconn shared by all members of a test.

    A command that needs no answer is posted: sent without waiting, and its answer collected
    before the next one. So a commit costs no round trip.
    """

    def __init__(self, conninfo: Mapping[str, str]) -> None:
        self.root: Final[psycopg.Connection[Any]] = psycopg.Connection.connect(
            **conninfo,  # type: ignore[arg-type]
            autocommit=True,
        )
        self.pgconn: Final[PGconn] = self.root.pgconn
        self.backend_pid: Final = self.pgconn.backend_pid
        self.pgconn.notice_handler = self._on_notice
        self.pgconn.notify_handler = None  # Notifications are never delivered.
        self.forked = False
        self.turn = Turn()
        self.members: dict[Any, None] = {}
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
        # What outlives a rollback, to be undone after the test.
        self.advisory, server_pid = self._look_around()
        self.is_pooled: Final = server_pid != self.backend_pid
        """Whether a pooler stands between, which has sessions of its own."""
        self.prepared = False
        self.escaped: EscapeError | None = None
        self.last_place: Place | None = None
        self.last_statement = ""
        _backends.add(self)
        self._awaiting = False
        self._backlog: list[bytes] = []

    def _look_around(self) -> tuple[bool, int]:
        """Find whether functions take advisory locks, which no statement shows, and who answers."""
        (result,) = self.run_blocking(
            b"SELECT EXISTS (SELECT FROM pg_catalog.pg_proc p "
            b"WHERE (prosrc ILIKE '%advisory%' OR to_jsonb(p)->>'prosqlbody' IS NOT NULL) "
            b"AND pronamespace NOT IN ('pg_catalog'::pg_catalog.regnamespace, "
            b"'information_schema'::pg_catalog.regnamespace)), pg_catalog.pg_backend_pid()"
        )
        return result.get_value(0, 0) == b"t", int(result.get_value(0, 1) or 0)

    @property
    def dead(self) -> bool:
        """Whether the session is gone."""
        return bool(self.pgconn.status == _BAD)

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
        return self._awaiting

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
        """Whether the next virtual transaction can be the outer one itself."""
        return self.level is Level.NONE and not self.frames

    def _on_notice(self, result: PGresult) -> None:
        holder: SessionUser | None = self.turn.holder
        client = holder.client if holder is not None else None
        if client is not None:
            client.deliver_notice(result)

    # Commands of our own

    def post(self, command: bytes) -> None:
        """Send a command now and collect its answer later."""
        if self._awaiting:
            self._backlog.append(command)
        elif not self.dead:
            # What does not fit into the socket at once is sent when the answer is collected.
            self.pgconn.send_query(command)
            self._awaiting = True

    def collect(self) -> Steps:
        """Fetch the answers of what was posted; raises the first error among them."""
        pgconn = self.pgconn
        pgconn.consume_input()
        results = yield from execute(pgconn)
        self._awaiting = False
        try:
            _raise_first(results)
        except psycopg.Error:
            # They are such as cannot fail, as long as the outer transaction is there.
            if not self.dead and self.escaped is None:
                self.note_escape(self.last_place, self.last_statement)
            raise
        finally:
            if self._backlog:
                commands, self._backlog = self._backlog, []
                yield from self.run(b"; ".join(commands))

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

    def run_blocking(self, command: bytes = b"") -> list[PGresult]:
        """Collect what was posted, then run a command, from code outside any member."""
        if getattr(self, "_awaiting", False):
            self.root.wait(self.collect())
        return self.root.wait(self.run(command)) if command else []

    # The outer transaction and its savepoints

    def begin(self, command: bytes, isolation: bytes) -> Steps:
        """Begin the outer transaction as the virtual one that is asked for."""
        self._settings_before = self.settings_of
        yield from self.run(command)
        self.level, self.isolation = Level.DIRECT, isolation

    def stand(self, modes: bytes = b"") -> Steps:
        """Make sure that a fresh savepoint stands after the committed work."""
        if self.level is not Level.STANDING:
            command = self._standing_command(modes)
            yield from self.run(command)
            self.stands(modes)

    def _standing_command(self, modes: bytes) -> bytes:
        """Give the command after which a fresh savepoint stands in the current frame."""
        commands = []
        levels = [frame.level for frame in self.frames] + [self.level]
        for depth, level in enumerate(levels):
            if level is Level.NONE:
                commands.append(b"BEGIN" + modes if depth == 0 else b"SAVEPOINT " + _mark(depth))
        return b"; ".join([*commands, SAVEPOINT])

    def stands(self, modes: bytes = b"") -> None:
        """Note that the savepoint stands."""
        if self.level is Level.NONE:
            self._settings_before = self.settings_of
            if not self.frames or self.frames[0].level is Level.NONE:
                self.isolation = modes.removeprefix(b" ISOLATION LEVEL ")
        self.frames = [
            frame._replace(level=Level.BARE) if frame.level is Level.NONE else frame
            for frame in self.frames
        ]
        self.level = Level.STANDING

    def undo_direct(self) -> None:
        """Roll back the virtual transaction that is the outer one."""
        self.post(b"ROLLBACK")
        self.restore_frame()

    def restore_frame(self) -> None:
        """Note that all work of the current frame was undone."""
        self.level = Level.NONE
        self.settings_of = self._settings_before
        if self._changed:
            self.deferrable, self._changed = self._deferrable_before, False

    def push_frame(self) -> None:
        """Begin a narrower scope: what follows can be undone by itself."""
        self.frames.append(
            Frame(self.level, self._settings_before, self._deferrable_before, self._changed)
        )
        self.level = Level.NONE
        self._settings_before = self.settings_of
        self._deferrable_before = self.deferrable
        self._changed = False

    def undo_frame(self) -> None:
        """Post the end of all work of the current frame."""
        commands = []
        if self.level is not Level.NONE:
            mark = _mark(len(self.frames))
            undo = b"ROLLBACK TO %s; RELEASE %s" % (mark, mark) if self.frames else b"ROLLBACK"
            commands.append(undo)
            self.restore_frame()
        if self.advisory or self.prepared:
            commands += self._after_rollback()
        if commands:
            self.post(b"; ".join(commands))

    def pop_frame(self) -> None:
        """Go back to the wider scope."""
        frame = self.frames.pop()
        self.level, self._settings_before, self._deferrable_before, self._changed = frame

    def _after_rollback(self) -> list[bytes]:
        commands = []
        if self.advisory:
            commands.append(b"SELECT pg_catalog.pg_advisory_unlock_all()")
        if self.prepared:
            commands.append(b"DEALLOCATE ALL")
            self.prepared = False
            self.forget_prepared()
        return commands

    # The catalogue

    def note_ddl(self) -> None:
        """Note that constraints may have come or gone."""
        self.deferrable = None
        self._changed = True

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

    # Ends

    def check_escape(self) -> None:
        """Find an outer transaction that has ended although a test has worked in it."""
        idle = self.pgconn.transaction_status == _STATUS.IDLE
        if idle and not self._awaiting and self.is_begun and self.escaped is None:
            self.note_escape(self.last_place, self.last_statement)

    def note_escape(self, place: Place | None, statement: str) -> None:
        """Keep the error that names who ended the outer transaction."""
        self.escaped = EscapeError(
            f"the test's transaction was ended from inside, by or after {statement[:200]!r} on "
            f"the connection borrowed at {place}; what the test had written may be committed"
        )

    def send_cancel(self) -> None:
        """Ask the server to cancel what runs; the answer goes to whom it belongs."""
        self.pgconn.get_cancel().cancel()

    def expel_waiters(self) -> list[Any]:
        """Refuse those who wait for their turn, and give them."""
        waiting = self.turn.expel()
        if waiting:
            self.turn = self.turn.renewed()
        return waiting

    def bury(self) -> None:
        """Roll back what connections left open that were dropped unclosed."""
        while self.abandoned:
            self.abandoned.pop().bury()

    def interrupt(self) -> None:
        """End a COPY or a stream that its member left in the middle."""
        pgconn = self.pgconn
        try:
            pgconn.get_cancel().cancel()
            result = pgconn.get_result()
            while result is not None:
                if result.status == pq.ExecStatus.COPY_IN:
                    pgconn.put_copy_end(b"the connection was closed")
                elif result.status in _COPY:
                    while pgconn.get_copy_data(0)[0] > 0:
                        pass
                result = pgconn.get_result()
        except psycopg.Error:
            # What is wrong with the session shows at its next use.
            return

    def forget_prepared(self, but: object = None) -> None:
        """Let all members but one forget prepared statements that the server no longer has."""
        for member in self.members:
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
