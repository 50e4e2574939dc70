"""A borrowed connection as the one backend sees it: its turn, its operations, and its end."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ...connecting import setting_overwritten, setting_refused
from ...errors import SandboxError
from ..lexer import DECLARATIONS, Statement, Verb, plain_statement, statements
from .backend import UNDO, Level
from .internals import (
    CLOSE,
    CONTROL,
    DECLARE,
    LOCAL,
    STATEMENT,
    deliver_warning,
    has_prepared,
    holds,
    read_operation,
    register_control,
)
from .script import RefusedError, Script, discard_all, no_block
from .sessions import WrongSettingError, change_hands, untouched
from .transaction import VirtualTransaction
from .turns import current_task

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Generator

    from ...config import ConnectionSpec
    from .backend import Backend
    from .places import Place

    Steps = Generator[Any, Any, Any]

_STATUS: Final = pq.TransactionStatus
_STATUSES: Final = tuple(sorted(_STATUS))
_CLONE_ADVICE: Final = (
    "The test's transaction, which is rolled back at its end, is in the way: give this test "
    'real transactions with @pytest.mark.pgmonkey(isolation="clone").'
)
_ADVISED: Final = frozenset({"25001", "2D000", "55P04"})
_CONTROL_VERBS: Final = frozenset({Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK, Verb.TWO_PHASE})
_ONLY_IN_BLOCKS: Final = {
    Verb.SET_LOCAL: "SET LOCAL",
    Verb.SET_TRANSACTION: "SET TRANSACTION",
    Verb.SET_CONSTRAINTS: "SET CONSTRAINTS",
}
_BLOCK_VERBS: Final = frozenset({Verb.SAVEPOINT, Verb.DECLARE})

_XIDS: Final = (
    b"SELECT count(*) FROM pg_catalog.pg_locks "
    b"WHERE locktype = 'transactionid' AND pid = pg_catalog.pg_backend_pid()"
)
# A transactional message makes the current savepoint take a transaction id if it has none yet.
_PROBE: Final = (
    _XIDS + b"; SELECT pg_catalog.pg_logical_emit_message(true, 'pgmonkey', ''); " + _XIDS
)


class Borrower(VirtualTransaction):
    """One borrowed connection as the shared backend sees it."""

    __slots__ = (
        "_place",
        "ended",
        "is_scope",
        "returned",
        "slots",
        "spec",
        "task",
        "thread",
        "timeout",
        "wrapper",
    )

    def __init__(
        self,
        backend: Backend,
        place: Place,
        settings: tuple[tuple[str, str], ...] = (),
        timeout: float = 5.0,
    ) -> None:
        super().__init__(backend, untouched(settings))
        self._place = place
        self.timeout = timeout
        self.wrapper: weakref.ref[Any] = _NO_WRAPPER
        self.ended = ""
        """Why every further operation is refused."""
        self.returned = False
        self.is_scope = False
        self.slots: Any = None
        """What is to be freed when it comes back to a pool."""
        self.spec: ConnectionSpec | None = None
        """The configuration whose settings its session has."""
        self.thread = 0
        self.task: asyncio.Task[object] | None = None

    def real_command(self, command: bytes) -> Steps:
        """Queue a command of ours in the connection's pipeline."""
        conn: Any = self.wrapper()
        return (yield from conn.real_command(command))

    # What others ask

    @property
    def place(self) -> str:
        """Where it was borrowed, as `file:line`."""
        return str(self._place)

    @property
    def status(self) -> pq.TransactionStatus:
        """The transaction status that application code expects to see."""
        if self.returned or self.backend.dead:
            return _STATUS.UNKNOWN
        if self.turn.holder is self and not self.backend.behind:
            real: pq.TransactionStatus = _STATUSES[self.backend.pgconn.transaction_status]
            if real == _STATUS.ACTIVE or self.open:
                return real
            return _STATUS.IDLE
        return _STATUS.INTRANS if self.open else _STATUS.IDLE

    @property
    def is_idle(self) -> bool:
        """Whether nothing is open or running that a commit or a rollback would end."""
        return not (self.ended or self.backend.forked) and self.status == _STATUS.IDLE

    @property
    def failed(self) -> bool:
        """Whether its transaction is aborted, and waits for its end."""
        return self.open and self.status == _STATUS.INERROR

    @property
    def owns_running_statement(self) -> bool:
        """Whether a cancel request would reach a statement of this borrower."""
        return not self.returned and self.turn.holder is self and not self.backend.behind

    # The turn

    def wait_for_turn(self) -> None:
        """Block until the backend is this borrower's."""
        self.turn.wait(self, self.timeout)

    async def wait_for_turn_async(self) -> None:
        """Wait in the running loop until the backend is this borrower's."""
        await self.turn.wait_async(self, self.timeout)

    def displace(self) -> Steps:
        """Find whether the displaced holder has only read; gives whether the turn is ours."""
        backend = self.backend
        try:
            wrote = yield from self._probe()
        except BaseException:
            self.turn.give_back(self)
            raise
        if wrote:
            self.turn.give_back(self)
            return False
        if backend.level is Level.DIRECT:
            backend.level = Level.BARE
        displaced = self.turn.keep_displaced()
        if isinstance(displaced, Borrower):
            displaced._suspended = displaced.open
        return True

    def _probe(self) -> Steps:
        """Find whether the open virtual transaction has a transaction id, so has written."""
        backend = self.backend
        if backend.behind:
            yield from backend.collect()
        if backend.level is Level.DIRECT:
            results = yield from backend.run(_XIDS)
            return results[0].get_value(0, 0) != b"0"
        results = yield from backend.run(_PROBE)
        wrote = results[0].get_value(0, 0) == results[2].get_value(0, 0)
        if not wrote:
            yield from backend.run(UNDO)
        return wrote

    # Operations

    def plan(self, gen: Any) -> tuple[str, Any, Any, Any] | None:
        """Judge an operation before it runs; `None` if it does not touch the backend."""
        if self.backend.forked:
            gen.close()
            raise SandboxError(
                "a forked process cannot use the test's connection; let it open its own, "
                'in a test with @pytest.mark.pgmonkey(isolation="clone")'
            )
        if self.ended:
            gen.close()
            raise psycopg.OperationalError(self.ended)
        kind, sql, obj = read_operation(gen)
        if kind is LOCAL:
            return None
        return kind, sql, obj, gen

    def passes(self, query: Any) -> bool:
        """Whether a statement can go as it is, in a transaction that keeps the turn anyway."""
        if type(query) is not str or (part := plain_statement(query)) is None:
            return False
        self.busy = True
        self.thread = threading.get_ident()
        self.task = current_task()
        self.current = part.text
        return True

    def steps(self, conn: Any, planned: tuple[str, Any, Any, Any]) -> Steps:
        """Give the generator to run: psycopg's own, or the same with our commands around it."""
        gen: Steps
        kind, sql, obj, gen = planned
        self.busy = True
        self.thread = threading.get_ident()
        self.task = current_task()
        if self._streaming:
            return self._stream_on(gen) if self._unit and not self.surely_reads else gen
        parts = statements(_text(sql, conn)) if kind is STATEMENT else ()
        if self._in_section:
            self._check_section(parts)
            return gen
        if len(parts) == 1 and parts[0].plain and not obj.closed:
            shortcut = self._shortcut(conn, gen)
            if shortcut is not None:
                self._note(parts[0])
                return shortcut
        if kind is DECLARE:
            kind, parts = STATEMENT, DECLARATIONS[holds(obj)]
        return self._steps(conn, kind, parts, obj, gen)

    def _shortcut(self, conn: Any, gen: Steps) -> Steps | None:
        """Give what runs a plain statement where there is little or nothing to do before it."""
        backend = self.backend
        if self._suspended or backend.settings_of is not self.session:
            return None
        if not self.open:
            if self.session is not None and self.session.sets_modes:
                return None
            if conn.autocommit:
                # A commit that does more than end it would have to ask the server.
                if (
                    backend.level is not Level.STANDING
                    or backend.deferrable != []
                    or self._temporary
                ):
                    return None
                self._unit = True
            elif conn.begin_command() != b"BEGIN":
                return None
            elif backend.is_fresh:
                return self._begin_outer(gen)
            elif backend.level is Level.STANDING:
                self.modes, self.open = b"BEGIN", True
            else:
                return None
        return self._after_collecting(gen) if backend.behind else gen

    def _begin_outer(self, gen: Steps) -> Steps:
        backend = self.backend
        if backend.behind:
            yield from backend.collect()
        yield from backend.begin(b"BEGIN", b"")
        self.modes, self.open = b"BEGIN", True
        return (yield from gen)

    def _after_collecting(self, gen: Steps) -> Steps:
        yield from self.backend.collect()
        return (yield from gen)

    def _steps(
        self, conn: Any, kind: str, parts: tuple[Statement, ...], obj: Any, gen: Any
    ) -> Steps:
        yield from self.get_ready()
        if kind is CONTROL:
            return (yield from gen)
        if kind is CLOSE and not self.open and not holds(obj):
            gen.close()
            return None
        if len(parts) == 1 and parts[0].plain:
            if not self.open and conn.autocommit:
                yield from self._begin_unit()
            self._note(parts[0])
        elif (instead := self._replacement(conn, parts, obj, gen)) is not None:
            return (yield from instead)
        else:
            yield from self._prepare(conn, kind, parts, gen)
        return (yield from self._stream_on(gen))

    def _replacement(
        self, conn: Any, parts: tuple[Statement, ...], obj: Any, gen: Any
    ) -> Steps | None:
        """Give what is to run in place of an operation, if anything."""
        if self._is_script(conn, parts):
            return Script(self, conn).run(obj, parts, gen)
        if self._discards_all(conn, parts):
            gen.close()
            return discard_all(self, obj)
        if parts and obj.closed:
            return gen  # type: ignore[no-any-return] # which raises, in front of any BEGIN
        self._refuse_outside(conn, parts)
        return None

    def _prepare(self, conn: Any, kind: str, parts: tuple[Statement, ...], gen: Any) -> Steps:
        """Begin what an operation needs, and run what comes before it."""
        if not self.open:
            if conn.autocommit or kind is not STATEMENT:
                yield from self._begin_unit()
                if len(parts) == 1 and (name := _ONLY_IN_BLOCKS.get(parts[0].verb)):
                    message = f"{name} can only be used in transaction blocks"
                    deliver_warning(conn, "25P01", message)
            else:
                # Our own commands come first, and must not be before the transaction.
                yield from self.begin(conn.begin_command())
        params = gen.gi_frame.f_locals.get("params") if parts else None
        for part in parts:
            yield from self.before(part, params)

    def _stream_on(self, gen: Any) -> Steps:
        """Run an operation, and what a commit does where it ends an autocommit statement."""
        result = yield from gen
        # Neither in the middle of a stream nor after an error that psycopg keeps to itself.
        if self._unit and not self.surely_reads and self.backend.in_transaction:
            yield from self._end_work()
        return result

    def _is_script(self, conn: Any, parts: tuple[Statement, ...]) -> bool:
        """Whether the statements must be run one by one, for what they do to transactions."""
        if any(part.verb in _CONTROL_VERBS for part in parts):
            return True
        implicit = len(parts) > 1 and conn.autocommit and not self.open
        return implicit and any(part.verb in _BLOCK_VERBS for part in parts)

    def _discards_all(self, conn: Any, parts: tuple[Statement, ...]) -> bool:
        # Inside a transaction PostgreSQL refuses it, here as everywhere.
        return (
            len(parts) == 1
            and parts[0].words == ("DISCARD", "ALL")
            and conn.autocommit
            and not self.open
        )

    def _refuse_outside(self, conn: Any, parts: tuple[Statement, ...]) -> None:
        """Refuse, as the server would, what needs a transaction block where there is none."""
        if self.open or not conn.autocommit or len(parts) != 1:
            return
        (part,) = parts
        if part.verb is Verb.SAVEPOINT or (part.verb is Verb.DECLARE and not part.holds):
            raise no_block(part)

    def get_ready(self) -> Steps:
        """Bring the backend to where this borrower left it."""
        backend = self.backend
        if backend.behind:
            yield from backend.collect()
        if backend.settings_of is not self.session:
            between = not self.open or self._suspended
            try:
                yield from change_hands(backend, self.session, between=between)
            except WrongSettingError as wrong:
                raise self._blame(wrong) from None
        if self._suspended:
            self._suspended = False
            if self.open:
                yield from backend.stand()

    def _blame(self, wrong: WrongSettingError) -> Exception:
        """Give the error that production gives where it applies the settings of a file."""
        spec, session, error = self.spec, self.session, wrong.error
        assert spec is not None
        assert session is not None
        # In front of its section's stand those that psycopg sends when it connects.
        index = wrong.index - (len(session.given) - len(spec.settings))
        if error is None:
            return setting_overwritten(spec, session.given[wrong.index][0])
        if index < 0:
            return error
        return setting_refused(spec, spec.settings[index][0], error) or error

    # Sections

    def leave_section(self, conn: Any) -> None:
        """End a pipeline: its work is one unit."""
        self._in_section = False
        failed = self.backend.pgconn.transaction_status == _STATUS.INERROR
        if self._unit and failed and not conn.autocommit:
            self.open = True  # as on a connection of its own: aborted until it is rolled back
        self.after()

    def _check_section(self, parts: tuple[Statement, ...]) -> None:
        for part in parts:
            self._note(part)
            if part.verb in _CONTROL_VERBS:
                raise RefusedError(
                    "a transaction command in SQL cannot be run in pipeline mode in a "
                    "rolled-back test; use commit(), rollback() or transaction()"
                )
            if part.verb is Verb.DDL:
                self.backend.note_ddl()

    # The end of an operation

    def after(self) -> None:
        """Settle an operation: keep the turn, pass it on, and find out about escapes."""
        try:
            self._settle()
        finally:
            # Not before: the end of a test waits until nobody sends anything any more.
            self.busy = False

    def _settle(self) -> None:
        backend = self.backend
        if self._in_section:
            return
        behind = backend.behind
        status = backend.pgconn.transaction_status
        if status == _STATUS.ACTIVE and not behind:
            self._streaming = True
            return
        self._streaming = False
        if status == _STATUS.UNKNOWN:
            self._close_transaction()
            self.turn.leave(self)
            return
        if status == _STATUS.IDLE and not behind and backend.level is not Level.NONE:
            self._escaped()
        if self._unit:
            self._end_unit(status)
        if not self.open:
            self.turn.leave(self)
        elif self._writes or self.special or status != _STATUS.INTRANS:
            self.steady = not behind
        else:
            self.yielding = True
            self.turn.offer(self)

    def _escaped(self) -> None:
        """Report that the outer transaction has ended: what the test did is committed for good."""
        self.backend.level = Level.NONE
        self._close_transaction()
        self._unit = False
        self.backend.note_escape(self._place, self.current)

    def explain(self, error: psycopg.Error) -> None:
        """Add a line of advice where the surrounding transaction is what PostgreSQL objects to."""
        if error.sqlstate in _ADVISED and error.args and _CLONE_ADVICE not in str(error.args[0]):
            error.args = (f"{error.args[0]}\n{_CLONE_ADVICE}", *error.args[1:])

    # The end of the loan

    def close(self, conn: Any, because: str = "the connection is closed") -> None:
        """Return the connection: roll back what is open, and let nobody use it again."""
        if self.returned or (self.ended and self.ended != because):
            return  # where the test has ended, its reset closes it
        self.busy = True
        try:
            self._give_back(conn, because)
        finally:
            self.busy = False

    def _give_back(self, conn: Any, because: str) -> None:
        backend = self.backend
        backend.lent.pop(self, None)
        if self.current:
            backend.last_place, backend.last_statement = self._place, self.current
        if self.open and self.turn.holder is self:
            backend.check_escape()
        self._abort()
        if self.session is not None and self.session.names:
            self.session.ended = True
        backend.prepared |= has_prepared(conn)
        conn.mark_closed()
        self.ended = because
        self.returned = True
        self.steady = False
        self.turn.leave(self)

    def interrupt(self) -> None:
        """End a COPY or a stream that was left in the middle."""
        if self._streaming:
            self.backend.interrupt()
            self._streaming = False

    def undone(self) -> None:
        """Forget a transaction that was rolled back with the test around it."""
        self._unit = False
        self._close_transaction()
        self.turn.leave(self)

    def end(self, because: str) -> None:
        """Refuse every further operation."""
        self.ended = self.ended or because
        self.steady = False

    def disown(self) -> None:
        """Forget a backend that is no longer the sandbox's."""
        self.end("the connection is closed")
        self.returned = True

    def abandon(self) -> None:
        """Note that a connection was dropped unclosed; called by the collector, so no I/O."""
        self.ended = "the connection is closed"
        self.returned = True
        self.backend.abandoned.append(self)

    def bury(self) -> None:
        """Roll back what an abandoned connection left open."""
        self.backend.lent.pop(self, None)
        self.backend.prepared = True  # perhaps
        self._abort()
        self.turn.leave(self)

    def _abort(self) -> None:
        """Roll back whatever is unfinished."""
        self.interrupt()
        if self._unit:
            self._end_unit(_STATUS.INERROR)
        elif self.open:
            self._post_rollback()


class _Nothing:
    """Stands for a connection that is not there yet."""


_NO_WRAPPER: Final[weakref.ref[Any]] = weakref.ref(_Nothing())

register_control(Borrower.enter_section)
register_control(Borrower.begin_section)


def _text(sql: Any, conn: Any) -> str:
    """Give the SQL of a query in any of the forms that psycopg takes."""
    if type(sql) is str:
        return sql
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    if isinstance(sql, psycopg.sql.Composable):
        return sql.as_string(conn)
    strings = getattr(sql, "strings", None)  # a template string, from Python 3.14 on
    return " $1 ".join(strings) if strings is not None else str(sql)
