"""The virtual transaction of one borrowed connection: what it sends in place of BEGIN and COMMIT.

Everything that waits is a generator in psycopg's manner, driven alike by the sync and the async
connection; everything else is decided at once. See docs/isolation.md for the rules.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ...errors import SandboxError
from .backend import REFRESH, SAVEPOINT, UNDO, Level
from .internals import (
    CLOSE,
    CONTROL,
    DECLARE,
    LOCAL,
    STATEMENT,
    has_prepared,
    holds,
    read_operation,
    register_control,
)
from .lexer import DECLARATIONS, Statement, Verb, plain_statement, statements
from .modes import Modes, transaction_modes
from .script import RefusedError, Script, discard_all, no_block
from .sessions import Session, assignment, change_hands, config_calls, read, untouched
from .turns import current_task

if TYPE_CHECKING:
    import asyncio
    import weakref
    from collections.abc import Generator

    from .backend import Backend
    from .places import Place
    from .turns import Turn

    Steps = Generator[Any, Any, Any]

_STATUS: Final = pq.TransactionStatus
_IN_BLOCK: Final = (_STATUS.INTRANS, _STATUS.INERROR)
_CLONE_ADVICE: Final = (
    "The test's transaction, which is rolled back at its end, is in the way: give this test "
    'real transactions with @pytest.mark.pgmonkey(isolation="clone").'
)
_ADVISED: Final = frozenset({"25001", "2D000", "55P04"})
_CONTROL_VERBS: Final = frozenset({Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK, Verb.TWO_PHASE})
_BLOCK_VERBS: Final = frozenset({Verb.SAVEPOINT, Verb.DECLARE})
_GUARDED: Final = frozenset({"SAVEPOINT", "SET"})

_XIDS: Final = (
    b"SELECT count(*) FROM pg_catalog.pg_locks "
    b"WHERE locktype = 'transactionid' AND pid = pg_catalog.pg_backend_pid()"
)
# A transactional message makes the current savepoint take a transaction id if it has none yet.
_PROBE: Final = (
    _XIDS + b"; SELECT pg_catalog.pg_logical_emit_message(true, 'pgmonkey', ''); " + _XIDS
)
_OPEN_CURSORS: Final = (
    b"SELECT quote_ident(name) FROM pg_catalog.pg_cursors WHERE NOT is_holdable AND name <> ''"
)
# Savepoints of the user's in a transaction that has none of ours would outlive its commit.
_GUARD: Final = b"SAVEPOINT _pgmonkey_guard"
_UNGUARD: Final = b"RELEASE _pgmonkey_guard"


class Borrower:
    """One borrowed connection as the shared backend sees it."""

    __slots__ = (
        "_guarded",
        "_in_section",
        "_local",
        "_place",
        "_streaming",
        "_suspended",
        "_temporary",
        "_unit",
        "_uses_cursors",
        "_writes",
        "backend",
        "busy",
        "current",
        "ended",
        "is_scope",
        "modes",
        "open",
        "returned",
        "session",
        "special",
        "steady",
        "surely_reads",
        "task",
        "thread",
        "timeout",
        "turn",
        "wrapper",
        "yielding",
    )

    def __init__(
        self,
        backend: Backend,
        place: Place,
        settings: tuple[tuple[str, str], ...] = (),
        timeout: float = 5.0,
    ) -> None:
        self.backend = backend
        self._place = place
        self.timeout = timeout
        self.turn: Turn = backend.turn
        self.wrapper: weakref.ref[Any] = lambda: None  # type: ignore[assignment]
        self.session: Session | None = untouched(settings)
        self.ended = ""
        self.returned = self.is_scope = self.busy = False
        self.thread = 0
        self.task: asyncio.Task[object] | None = None
        self.current = ""
        self._in_section = self._streaming = self._unit = False
        self.open = self._suspended = False
        self._temporary: list[tuple[str, str]] = []
        self._forget_transaction()

    def _forget_transaction(self) -> None:
        self.yielding = self.steady = False
        self._writes = False
        self.surely_reads = True
        self.special = False
        self.modes = b""
        self._guarded = False
        self._uses_cursors = False
        self._local: dict[str, str | None] | None = None

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
            real = _STATUS(self.backend.pgconn.transaction_status)
            if real == _STATUS.ACTIVE or self.open:
                return real
            return _STATUS.IDLE
        return _STATUS.INTRANS if self.open else _STATUS.IDLE

    @property
    def failed(self) -> bool:
        """Whether its transaction is aborted, and waits for its end."""
        return self.open and self.status == _STATUS.INERROR

    @property
    def owns_running_statement(self) -> bool:
        """Whether a cancel request would reach a statement of this borrower."""
        return not self.returned and self.turn.holder is self and not self.backend.behind

    def pin(self) -> None:
        """Keep the turn to the end of the transaction: its savepoints cannot be interleaved."""
        self._writes = True
        self.surely_reads = False

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
        backend = self.backend
        if (
            self.open
            and not self._suspended
            and not backend.behind
            and backend.settings_of is self.session
            and len(parts) == 1
            and parts[0].plain
        ):
            self._note(parts[0])
            return gen
        if kind is DECLARE:
            kind, parts = STATEMENT, DECLARATIONS[holds(obj)]
        return self._steps(conn, kind, parts, obj, gen)

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
            else:
                # Our own commands come first, and must not be before the transaction.
                yield from self.begin(conn.begin_command())
        params = gen.gi_frame.f_locals.get("params") if parts else None
        for part in parts:
            yield from self.before(part, params)

    def _stream_on(self, gen: Any) -> Steps:
        """Run an operation, and what a commit does where it ends an autocommit statement."""
        result = yield from gen
        if self._unit and not self.surely_reads and not self._is_active:
            yield from self._end_work()
        return result

    @property
    def _is_active(self) -> bool:
        return bool(self.backend.pgconn.transaction_status == _STATUS.ACTIVE)

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

    def get_ready(self) -> Steps:
        """Bring the backend to where this borrower left it."""
        backend = self.backend
        if backend.behind:
            yield from backend.collect()
        if backend.settings_of is not self.session:
            between = not self.open or self._suspended
            yield from change_hands(backend, self.session, between=between)
        if self._suspended:
            self._suspended = False
            if self.open:
                yield from backend.stand()

    def _begin_unit(self) -> Steps:
        """Begin what ends with the statement: the transaction of an autocommit connection."""
        backend = self.backend
        if self.session is None and backend.level is Level.STANDING:
            self._unit = True
            return
        modes = yield from self._default_modes()
        if backend.is_fresh and not modes.read_only:
            yield from backend.begin(b"BEGIN", modes.isolation)
        else:
            yield from backend.stand()
            if modes.read_only:
                self.special = True
                yield from backend.run(b"SET TRANSACTION READ ONLY")
        self._unit = True

    def _note(self, part: Statement) -> None:
        self.current = part.text
        if part.verb is not Verb.QUERY:
            self._writes = True
            self.surely_reads = False
        elif not part.read_only:
            self.surely_reads = False

    def before(self, part: Statement, params: Any) -> Steps:
        """Take note of a statement, and do what must be done before it."""
        self._note(part)
        backend, verb = self.backend, part.verb
        if part.advisory:
            backend.advisory = True
        if verb is Verb.DDL:
            backend.note_ddl()
            if part.temporary:
                self._temporary.append(part.temporary)
        elif verb is Verb.DECLARE:
            self._uses_cursors = True
        elif verb is Verb.SAVEPOINT and part.words[0] == "SAVEPOINT":
            yield from self.guard()
        elif verb is Verb.SET_TRANSACTION:
            yield from self._set_transaction(part)
        elif verb is Verb.SET_LOCAL:
            yield from self._remember_local(list(part.settings))
        elif verb is Verb.SET:
            self._touch(part.settings or ("role",))  # RESET ALL: something of the session
        elif verb in (Verb.DEALLOCATE, Verb.DISCARD):
            backend.forget_prepared()
        elif verb is Verb.PREPARE:
            backend.prepared = True
        if part.sets_config:
            yield from self._before_set_config(part, params)

    def guard(self) -> Steps:
        """Make what the user's savepoints and modes do end at the virtual commit."""
        if self.backend.level is Level.DIRECT and not self._guarded:
            yield from self.backend.run(_GUARD)
            self._guarded = True

    def _set_transaction(self, part: Statement) -> Steps:
        backend = self.backend
        modes = transaction_modes(part.text.encode())
        if modes.isolation and backend.level is Level.DIRECT and not self._guarded:
            yield from backend.run(b"SET TRANSACTION ISOLATION LEVEL " + modes.isolation)
            backend.isolation = modes.isolation
        if modes.read_only is not None:
            yield from self.guard()
        self.special = True

    # Settings

    def _touch(self, names: tuple[str, ...]) -> None:
        """Note that a statement sets something of the session, which is this borrower's alone."""
        if not names:
            return
        self.pin()
        session = self.session
        if session is None or not session.names:
            session = Session(session.given if session is not None else ())
            self.session = self.backend.settings_of = session
        session.touch(names)
        for name in names if self._local else ():
            self._local.pop(name, None)

    def _remember_local(self, names: list[str]) -> Steps:
        """Read settings before SET LOCAL changes them: RELEASE does not restore them."""
        self.pin()
        if self._local is None:
            self._local = {}
        names = [name for name in names if name not in self._local]
        if names:
            values = yield from read(self.backend, names)
            self._local.update(zip(names, values, strict=True))

    def _before_set_config(self, part: Statement, params: Any) -> Steps:
        calls = config_calls(part.text, params)
        self._touch(tuple(name for name, is_local in calls if not is_local))
        yield from self._remember_local([name for name, is_local in calls if is_local])

    def _default_modes(self) -> Steps:
        """Find the modes that the borrower's session gives to transactions that name none."""
        if self.session is None or not self.session.sets_modes or self._in_section:
            return Modes()
        isolation, read_only = yield from read(
            self.backend, ["default_transaction_isolation", "default_transaction_read_only"]
        )
        return Modes(isolation.upper().encode(), read_only == "on")

    # Transactions

    def _refuse_outside(self, conn: Any, parts: tuple[Statement, ...]) -> None:
        """Refuse, as the server would, what needs a transaction block where there is none."""
        if self.open or not conn.autocommit or len(parts) != 1:
            return
        (part,) = parts
        if part.verb is Verb.SAVEPOINT or (part.verb is Verb.DECLARE and not part.holds):
            raise no_block(part)

    def begin(self, command: bytes) -> Steps:
        """Begin the virtual transaction that psycopg or the user's SQL asks for."""
        if self.open:
            return None
        backend = self.backend
        own = transaction_modes(command)
        modes = own.over((yield from self._default_modes()))
        self.modes = command
        self.special = bool(modes.isolation or modes.read_only)
        if backend.is_fresh and not modes.read_only and not self._in_section:
            yield from backend.begin(command, modes.isolation)
        elif self._in_section:
            yield from self._begin_in_section(modes)
        else:
            yield from self._begin_standing(modes)
        self.open = True
        return None

    def begin_again(self, command: bytes) -> Steps:
        """Send a BEGIN inside a transaction: the server warns, and sets the modes it names."""
        modes = transaction_modes(command)
        if modes.read_only is not None:
            yield from self.guard()
        if modes != Modes():
            self.special = True
            self.modes += b" " + command
        yield from self.backend.run(command)

    def _begin_standing(self, modes: Modes) -> Steps:
        backend = self.backend
        if backend.is_fresh and modes.isolation:
            yield from backend.stand(b" ISOLATION LEVEL " + modes.isolation)
        else:
            yield from self._check_isolation(modes)
            yield from backend.stand()
        if modes.read_only:
            yield from backend.run(b"SET TRANSACTION READ ONLY")

    def _check_isolation(self, modes: Modes) -> Steps:
        wanted, backend = modes.isolation, self.backend
        if wanted in (b"", backend.isolation) or wanted == b"READ COMMITTED":
            return
        if not backend.is_fresh and not self._in_section:
            (current,) = yield from read(backend, ["transaction_isolation"])
            if current and current.upper().encode() == wanted:
                return
        raise RefusedError(
            f"isolation level {wanted.decode()} cannot be had here: the test's transaction "
            "has already begun with another. Use it in the test's first transaction, or "
            'give the test its own database with @pytest.mark.pgmonkey(isolation="clone").'
        )

    def commit(self) -> Steps:
        """Commit the virtual transaction; after an error it is rolled back, as the server does."""
        self._check_not_streaming()
        if not self.open:
            return None
        if self._suspended:
            self._close_transaction()
            return None
        if self._in_section:
            return (yield from self._commit_section())
        if self.backend.pgconn.transaction_status == _STATUS.INERROR:
            return (yield from self.rollback())
        if not self.surely_reads or self.special:
            yield from self._end_work()
        self._post_commit()
        return None

    def commit_at_once(self) -> bool:
        """Commit where nothing need be asked of the server; gives whether that was so."""
        backend = self.backend
        if (
            not self.steady
            or backend.deferrable is None
            or backend.deferrable
            or self._uses_cursors
            or self._temporary
            or backend.pgconn.transaction_status != _STATUS.INTRANS
        ):
            return False
        self._post_commit()
        self.turn.leave(self)
        return True

    def rollback_at_once(self) -> bool:
        """Roll back where the transaction is this borrower's turn; gives whether it was."""
        if not self.steady or self.backend.pgconn.transaction_status not in _IN_BLOCK:
            return False
        self._post_rollback()
        self.turn.leave(self)
        return True

    def _check_not_streaming(self) -> None:
        if self._streaming:
            raise psycopg.OperationalError("another command is already in progress")

    def _post_commit(self) -> None:
        backend = self.backend
        local = self._local
        restore = [assignment(name, local[name] or "") for name in local] if local else []
        if backend.level is Level.DIRECT:
            backend.level = Level.BARE
            commands = [_UNGUARD, *restore] if self._guarded else restore
            if commands:
                backend.post(b"; ".join(commands))
        elif restore:
            backend.post(b"; ".join([b"RELEASE _pgmonkey", *restore, SAVEPOINT]))
        elif not self.surely_reads or self.special:
            backend.post(REFRESH)
        self._close_transaction()

    def rollback(self) -> Steps:
        """Roll the virtual transaction back, without waiting for the answer."""
        self._check_not_streaming()
        if self.open and self._in_section:
            yield from self._rollback_section()
        elif self.open:
            self._post_rollback()
        return None

    def _post_rollback(self) -> None:
        backend = self.backend
        if not self._suspended:
            if backend.level is Level.DIRECT:
                backend.undo_direct()
            else:
                backend.post(UNDO)
        self._close_transaction()

    def _close_transaction(self) -> None:
        self.open = self._suspended = False
        # What follows in a section is again one unit, settled at its end.
        self._unit = self._in_section
        self._forget_transaction()

    def _end_work(self) -> Steps:
        """Do what a real commit does before it is one: checks, cursors, temporary tables."""
        backend = self.backend
        try:
            yield from self._check_deferred()
        except psycopg.Error:
            if self.open:
                self._post_rollback()
            raise
        if self._uses_cursors:
            (result,) = yield from backend.run(_OPEN_CURSORS)
            names = [result.get_value(i, 0) or b"" for i in range(result.ntuples)]
            if names:
                yield from backend.run(b"; ".join(b"CLOSE " + name for name in names))
        if self._temporary:
            yield from self._clear_temporary()

    def _check_deferred(self) -> Steps:
        backend = self.backend
        deferrable = yield from backend.find_deferrable()
        if not deferrable:
            return
        yield from backend.run(b"SET CONSTRAINTS ALL IMMEDIATE")
        again = ["SET CONSTRAINTS ALL DEFERRED"]
        immediate = [name for name, deferred in deferrable if not deferred]
        if immediate:
            again.append(f"SET CONSTRAINTS {', '.join(immediate)} IMMEDIATE")
        yield from backend.run("; ".join(again).encode())

    def _clear_temporary(self) -> Steps:
        """Carry out ON COMMIT; a table may be gone, or never have come to be."""
        columns = [f"to_regclass($$pg_temp.{name}$$)" for name, _ in self._temporary]
        query = f"SELECT {', '.join(columns)}"
        (result,) = yield from self.backend.run(query.encode())
        found = [
            table for i, table in enumerate(self._temporary) if result.get_value(0, i) is not None
        ]
        for name, action in found:
            verb = "DROP TABLE" if action == "DROP" else "TRUNCATE"
            yield from self.backend.run(f"{verb} pg_temp.{name}".encode())
        self._temporary = [table for table in found if table[1] != "DROP"]

    # Sections: pipeline mode, in which our own commands cannot be answered

    def enter_section(self) -> Steps:
        """Bring the backend to a state in which a pipeline needs none of our answers."""
        if not self.open:
            yield from self.backend.stand()
            self._unit = True
        self.pin()
        self.steady = False
        self._in_section = True

    def begin_section(self, command: bytes) -> Steps:
        """Enter a section of psycopg's own, in which a transaction begins anyway."""
        yield from self.begin(command)
        self.pin()
        self.steady = False
        self._in_section = True

    def _begin_in_section(self, modes: Modes) -> Steps:
        yield from self._check_isolation(modes)
        if modes.read_only:
            yield from self.wrapper().real_command(b"SET TRANSACTION READ ONLY")

    def _commit_section(self) -> Steps:
        conn = self.wrapper()
        if self.backend.level is Level.DIRECT:
            self.backend.level = Level.STANDING
        else:
            yield from conn.real_command(b"RELEASE _pgmonkey")
        yield from conn.real_command(SAVEPOINT)
        self._close_transaction()

    def _rollback_section(self) -> Steps:
        conn = self.wrapper()
        if self.backend.level is Level.DIRECT:
            yield from conn.real_command(b"ROLLBACK")
            yield from conn.real_command(b"BEGIN")
            yield from conn.real_command(SAVEPOINT)
            self.backend.level = Level.STANDING
        else:
            yield from conn.real_command(UNDO)
        self._close_transaction()

    def leave_section(self, conn: Any) -> None:
        """End a pipeline: its work is one unit."""
        self._in_section = False
        failed = self.backend.pgconn.transaction_status == _STATUS.INERROR
        if self._unit and failed and not conn.autocommit:
            self.open = True  # as on a connection of its own: aborted until it is rolled back
        self.after(conn)

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

    def after(self, conn: Any) -> None:
        """Settle an operation: keep the turn, pass it on, and find out about escapes."""
        self.busy = False
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

    def _end_unit(self, status: int) -> None:
        self._unit = False
        if self.open:
            return
        if status == _STATUS.INERROR:
            self._post_rollback()
        else:
            self._post_commit()

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
        if self.returned:
            return
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
