"""The virtual transaction of one borrowed connection: what it sends in place of BEGIN and COMMIT.

Everything that waits is a generator in psycopg's manner, driven alike by the sync and the async
connection; everything else is decided at once. See docs/isolation.md for the rules.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg
from psycopg import pq

from ...errors import SandboxError
from .backend import REFRESH, SAVEPOINT, UNDO, EscapeError, Level
from .internals import (
    CLOSE,
    CONTROL,
    LOCAL,
    STATEMENT,
    read_operation,
    set_control_result,
    set_results,
)
from .lexer import Statement, Verb, statements
from .turns import current_task

if TYPE_CHECKING:
    import asyncio
    import weakref
    from collections.abc import Generator

    from .backend import Backend
    from .turns import Turn

    Steps = Generator[Any, Any, Any]

_STATUS: Final = pq.TransactionStatus
_CLONE_ADVICE: Final = (
    "The test's transaction, which is rolled back at its end, is in the way: give this test "
    'real transactions with @pytest.mark.pgmonkey(isolation="clone").'
)
_ADVISED: Final = frozenset({"25001", "2D000", "55P04"})
_CONTROL_VERBS: Final = frozenset({Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK, Verb.TWO_PHASE})
_PLAIN_VERBS: Final = frozenset({Verb.QUERY, Verb.WRITE})

_XIDS: Final = (
    b"SELECT count(*) FROM pg_catalog.pg_locks "
    b"WHERE locktype = 'transactionid' AND pid = pg_catalog.pg_backend_pid()"
)
# A transactional message makes the current savepoint take a transaction id if it has none yet.
_PROBE: Final = (
    _XIDS + b"; SELECT pg_catalog.pg_logical_emit_message(true, 'pgmonkey', ''); " + _XIDS
)
_DEFERRABLE: Final = (
    b"SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname), c.condeferred "
    b"FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace "
    b"WHERE c.condeferrable"
)
_OPEN_CURSORS: Final = (
    b"SELECT quote_ident(name) FROM pg_catalog.pg_cursors WHERE NOT is_holdable AND name <> ''"
)
_RESET_SESSION: Final = b"SET SESSION AUTHORIZATION DEFAULT; RESET ALL"
_DISCARD_ALL: Final = (
    b"CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; DEALLOCATE ALL; UNLISTEN *; "
    b"SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES"
)


class RefusedError(SandboxError, psycopg.NotSupportedError):
    """A rolled-back test cannot do this; the message says what to do instead."""


class Modes(NamedTuple):
    """The transaction modes of a BEGIN."""

    isolation: bytes
    read_only: bool


_ISOLATION: Final = re.compile(
    rb"ISOLATION\s+LEVEL\s+(SERIALIZABLE|REPEATABLE\s+READ|READ\s+COMMITTED|READ\s+UNCOMMITTED)",
    re.IGNORECASE,
)
_READ_ONLY: Final = re.compile(rb"READ\s+ONLY", re.IGNORECASE)


@lru_cache(maxsize=64)
def transaction_modes(command: bytes) -> Modes:
    """Read the modes of a BEGIN, START TRANSACTION or SET TRANSACTION."""
    found = _ISOLATION.search(command)
    level = b" ".join(found.group(1).upper().split()) if found else b""
    if level in (b"READ COMMITTED", b"READ UNCOMMITTED"):
        level = b""  # the default, and the same thing in PostgreSQL
    return Modes(level, _READ_ONLY.search(command) is not None)


_PACKAGE: Final = __name__.split(".", 1)[0]
_PASSED_OVER: Final = (_PACKAGE, "contextlib", "psycopg", "psycopg_pool")


class Place(NamedTuple):
    """A line of user code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file)}:{self.line}"  # noqa: PTH109 - no pathlib equivalent


def caller() -> Place:
    """Give the innermost line that belongs neither to the kit nor to psycopg."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".", 1)[0] not in _PASSED_OVER:
            break
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)


class SessionSetting(NamedTuple):
    """A statement that changed a setting of the borrower's session, to be sent again."""

    query: bytes
    params: Any
    types: Any
    formats: Any


class Borrower:
    """One borrowed connection as the shared backend sees it."""

    __slots__ = (
        "_backend",
        "_deferred_by_user",
        "_in_section",
        "_local",
        "_log",
        "_place",
        "_settings",
        "_streaming",
        "_suspended",
        "_temporary",
        "_unit",
        "_uses_cursors",
        "_writes",
        "closed_because",
        "current",
        "open",
        "pending",
        "returned",
        "session",
        "special",
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
        self._backend = backend
        self._place = place
        self._settings = settings
        self.timeout = timeout
        self.turn: Turn = backend.turn
        self.wrapper: weakref.ref[Any] = lambda: None  # type: ignore[assignment]
        self.session: object | None = self if settings else None
        self._log: list[SessionSetting] = []
        self.closed_because = "the connection is closed"
        self.returned = False
        self.thread = 0
        self.task: asyncio.Task[object] | None = None
        self.current = ""
        self._in_section = self._streaming = self._unit = False
        self.open = self._suspended = False
        self._forget_transaction()

    def _forget_transaction(self) -> None:
        self.yielding = False
        self._writes = False
        self.surely_reads = True
        self.special = False
        self._uses_cursors = False
        self._local: dict[str, str | None] = {}
        self._temporary: list[tuple[str, str]] = []
        self.pending: list[SessionSetting] = []

    # What others ask

    @property
    def place(self) -> str:
        """Where it was borrowed, as `file:line`."""
        return str(self._place)

    @property
    def status(self) -> pq.TransactionStatus:
        """The transaction status that application code expects to see."""
        if self.returned or self._backend.dead:
            return _STATUS.UNKNOWN
        if self.turn.holder is self and not self._backend.behind:
            real = _STATUS(self._backend.pgconn.transaction_status)
            if real == _STATUS.ACTIVE or self.open:
                return real
            return _STATUS.IDLE
        return _STATUS.INTRANS if self.open else _STATUS.IDLE

    @property
    def owns_running_statement(self) -> bool:
        """Whether a cancel request would reach a statement of this borrower."""
        return not self.returned and self.turn.holder is self and not self._backend.behind

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
        backend = self._backend
        try:
            if backend.behind:
                yield from backend.collect()
            if backend.level is Level.DIRECT:
                results = yield from backend.run(_XIDS)
                wrote = results[0].get_value(0, 0) != b"0"
            else:
                results = yield from backend.run(_PROBE)
                wrote = results[0].get_value(0, 0) == results[2].get_value(0, 0)
                if not wrote:
                    yield from backend.run(UNDO)
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

    # Operations

    def plan(self, conn: Any, gen: Any) -> tuple[str, Any, Any, Any] | None:
        """Judge an operation before it runs; `None` if it does not touch the backend."""
        if self._backend.pid != os.getpid():
            gen.close()
            raise SandboxError(
                "a forked process cannot use the test's connection; let it open its own, "
                'in a test with @pytest.mark.pgmonkey(isolation="clone")'
            )
        if self.returned:
            gen.close()
            raise psycopg.OperationalError(self.closed_because)
        kind, sql, obj = read_operation(gen)
        if kind is LOCAL:
            return None
        if getattr(gen, "gi_code", None) in _OWN_OPERATIONS:
            kind = CONTROL
        return kind, sql, obj, gen

    def steps(self, conn: Any, planned: tuple[str, Any, Any, Any]) -> Steps:
        """Give the generator to run: psycopg's own, or the same with our commands around it."""
        kind, sql, obj, gen = planned
        self.thread = threading.get_ident()
        self.task = current_task()
        parts = statements(_text(sql, conn)) if kind is STATEMENT else ()
        if self._streaming:
            return gen
        if self._in_section:
            self._check_section(parts)
            return gen
        backend = self._backend
        if (
            self.open
            and not self._suspended
            and not backend.behind
            and backend.settings_of is self.session
            and len(parts) == 1
            and parts[0].verb in _PLAIN_VERBS
            and not parts[0].sets_config
        ):
            self._note(parts[0])
            return gen
        return self._steps(conn, kind, parts, obj, gen)

    def _steps(
        self, conn: Any, kind: str, parts: tuple[Statement, ...], obj: Any, gen: Any
    ) -> Steps:
        yield from self._get_ready()
        if kind is CONTROL:
            return (yield from gen)
        if kind is CLOSE and not self.open and not obj_withhold(gen):
            gen.close()
            return None
        if any(part.verb in _CONTROL_VERBS for part in parts):
            gen.close()
            return (yield from self._control(conn, obj, parts))
        if len(parts) == 1 and parts[0].verb is Verb.DISCARD and parts[0].words[1:] == ("ALL",):
            if conn._autocommit and not self.open:
                gen.close()
                return (yield from self._discard_all(conn, obj))
        self._refuse_outside(conn, parts)
        if not self.open and (conn._autocommit or kind is not STATEMENT):
            yield from self._begin_unit()
        elif not self.open and self._must_stand(parts):
            yield from self.begin(conn._get_tx_start_command())
        for part in parts:
            yield from self._before(part, obj)
        result = yield from gen
        self._remember_settings(parts, obj)
        if self._unit and self._writes:
            yield from self._end_work()
        return result

    def _must_stand(self, parts: tuple[Statement, ...]) -> bool:
        """Whether our own queries come first, which must not be before the transaction."""
        return any(part.verb is Verb.SET_LOCAL or part.sets_config for part in parts)

    def _get_ready(self) -> Steps:
        """Bring the backend to where this borrower left it."""
        backend = self._backend
        if backend.behind:
            yield from backend.collect()
        if backend.settings_of is not self.session:
            yield from self._restore_session()
        if self._suspended:
            self._suspended = False
            if self.open and (command := backend.stand()):
                yield from backend.run(command)

    def _begin_unit(self) -> Steps:
        """Begin what ends with the statement: the transaction of an autocommit connection."""
        backend = self._backend
        self._forget_transaction()
        if backend.level is Level.NONE and not backend.scopes and not self._in_section:
            yield from backend.run(b"BEGIN")
            backend.level, backend.isolation = Level.DIRECT, b""
        elif command := backend.stand():
            yield from backend.run(command)
        self._unit = True

    def _note(self, part: Statement) -> None:
        self.current = part.text
        if part.verb is not Verb.QUERY:
            self._writes = True
            self.surely_reads = False
        elif not part.read_only:
            self.surely_reads = False

    def _before(self, part: Statement, cursor: Any) -> Steps:
        self._note(part)
        verb = part.verb
        if verb is Verb.DDL:
            self._backend.deferrable = None
            if part.on_commit and (name := _temporary_table(part.text)):
                self._temporary.append((name, part.on_commit))
        elif verb is Verb.DECLARE:
            self._uses_cursors = True
        elif verb is Verb.SET_LOCAL:
            yield from self._remember_local(_setting_name(part.text))
        elif verb is Verb.SET:
            self._local.pop(_setting_name(part.text), None)
        elif verb in (Verb.DEALLOCATE, Verb.DISCARD):
            self._backend.forget_prepared()
        if part.sets_config and (names := _local_config_names(part.text, cursor)):
            self.pin()
            for name in names:
                yield from self._remember_local(name)

    def _remember_local(self, name: str) -> Steps:
        """Read a setting before SET LOCAL changes it: RELEASE does not restore it."""
        self.special = True
        if name in self._local or not name:
            return
        query = b"SELECT pg_catalog.current_setting(%s, true)" % _literal(name)
        results = yield from self._backend.run(query)
        value = results[0].get_value(0, 0)
        self._local[name] = None if value is None else value.decode()

    def _remember_settings(self, parts: tuple[Statement, ...], cursor: Any) -> None:
        """Note session settings: they are this borrower's, and others must not see them."""
        if any(part.verb is Verb.SET or (part.sets_config and not self._local) for part in parts):
            query = getattr(cursor, "_query", None)
            if query is not None:
                self.pin()
                self.pending.append(
                    SessionSetting(query.query, query.params, query.types, query.formats)
                )

    def _refuse_outside(self, conn: Any, parts: tuple[Statement, ...]) -> None:
        """Refuse, as the server would, what needs a transaction block where there is none."""
        if self.open or not conn._autocommit:
            return
        for part in parts:
            if part.verb is Verb.SAVEPOINT and len(parts) == 1:
                word = "ROLLBACK TO SAVEPOINT" if part.words[0] == "ROLLBACK" else part.words[0]
                word = "RELEASE SAVEPOINT" if word == "RELEASE" else word
                raise psycopg.errors.NoActiveSqlTransaction(
                    f"{word} can only be used in transaction blocks"
                )
            if part.verb is Verb.DECLARE and "HOLD" not in part.words and len(parts) == 1:
                raise psycopg.errors.NoActiveSqlTransaction(
                    "DECLARE CURSOR can only be used in transaction blocks"
                )

    # Transactions

    def begin(self, command: bytes) -> Steps:
        """Begin the virtual transaction that psycopg or the user's SQL asks for."""
        if self.open:
            return None
        backend = self._backend
        modes = transaction_modes(command)
        self.special = bool(modes.isolation or modes.read_only)
        fresh = backend.level is Level.NONE and not backend.scopes and not self._in_section
        if fresh and not modes.read_only:
            yield from backend.run(command)
            backend.level, backend.isolation = Level.DIRECT, modes.isolation
            self.open = True
            return None
        self._check_isolation(modes, fresh)
        ahead = backend.stand()
        if fresh and modes.isolation:
            ahead = b"BEGIN ISOLATION LEVEL %s; %s" % (modes.isolation, SAVEPOINT)
            backend.isolation = modes.isolation
        if modes.read_only:
            ahead = b"; ".join(filter(None, (ahead, b"SET TRANSACTION READ ONLY")))
        if self._in_section:
            if ahead:
                yield from self.wrapper().real_command(ahead)
        elif ahead:
            yield from backend.run(ahead)
        self.open = True
        return None

    def _check_isolation(self, modes: Modes, fresh: bool) -> None:
        wanted = modes.isolation
        if wanted and not fresh and wanted != self._backend.isolation:
            raise RefusedError(
                f"isolation level {wanted.decode()} cannot be had here: the test's transaction "
                "has already begun with another. Use it in the test's first transaction, or "
                'give the test its own database with @pytest.mark.pgmonkey(isolation="clone").'
            )

    def commit(self) -> Steps:
        """Commit the virtual transaction; after an error it is rolled back, as the server does."""
        if not self.open:
            return None
        if self._suspended:
            self._close_transaction()
            return None
        if self._in_section:
            return (yield from self._commit_section())
        if self._backend.pgconn.transaction_status == _STATUS.INERROR:
            return (yield from self.rollback())
        if not self.surely_reads or self.special:
            yield from self._end_work()
        self._post_commit()
        return None

    def _post_commit(self) -> None:
        backend = self._backend
        self._keep_settings()
        restore = self._restore_local()
        if backend.level is Level.DIRECT:
            backend.level = Level.BARE
            if restore:
                backend.post(restore)
        elif restore:
            backend.post(b"RELEASE _pgmonkey; %s; %s" % (restore, SAVEPOINT))
        elif not self.surely_reads or self.special:
            backend.post(REFRESH)
        self._close_transaction()

    def rollback(self) -> Steps:
        """Roll the virtual transaction back, without waiting for the answer."""
        if self.open and self._in_section:
            yield from self._rollback_section()
        elif self.open:
            self._post_rollback()
        return None

    def _post_rollback(self) -> None:
        backend = self._backend
        if not self._suspended:
            if backend.level is Level.DIRECT:
                backend.post(b"ROLLBACK")
                backend.level = Level.NONE
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
        backend = self._backend
        if self._writes or not self.surely_reads:
            yield from self._check_deferred()
        if self._uses_cursors:
            results = yield from backend.run(_OPEN_CURSORS)
            names = [results[0].get_value(i, 0) or b"" for i in range(results[0].ntuples)]
            if names:
                yield from backend.run(b"; ".join(b"CLOSE " + name for name in names))
        for name, action in self._temporary:
            statement = "DROP TABLE IF EXISTS" if action == "DROP" else "TRUNCATE"
            yield from backend.run(f"{statement} pg_temp.{name}".encode())

    def _check_deferred(self) -> Steps:
        backend = self._backend
        if backend.deferrable is None:
            (result,) = yield from backend.run(_DEFERRABLE)
            backend.deferrable = [
                ((result.get_value(i, 0) or b"").decode(), result.get_value(i, 1) == b"t")
                for i in range(result.ntuples)
            ]
        if not backend.deferrable:
            return
        try:
            yield from backend.run(b"SET CONSTRAINTS ALL IMMEDIATE")
        except psycopg.Error:
            if self.open:
                self._post_rollback()
            raise
        again = ["SET CONSTRAINTS ALL DEFERRED"]
        immediate = [name for name, deferred in backend.deferrable if not deferred]
        if immediate:
            again.append(f"SET CONSTRAINTS {', '.join(immediate)} IMMEDIATE")
        yield from backend.run("; ".join(again).encode())

    # Raw SQL that speaks of transactions

    def _control(self, conn: Any, cursor: Any, parts: tuple[Statement, ...]) -> Steps:
        if any(part.verb is Verb.TWO_PHASE for part in parts):
            raise RefusedError(
                "two-phase commit would end the transaction that the test is rolled back with; "
                'use @pytest.mark.pgmonkey(isolation="clone") for this test'
            )
        if not hasattr(cursor, "_query") or getattr(cursor, "_name", None):
            raise RefusedError("a transaction command cannot be run by this kind of cursor")
        if len(parts) == 1:
            tag = yield from self._control_command(parts[0])
            set_control_result(cursor, tag, self._backend.pgconn)
            return None
        return (yield from self._script(conn, cursor, parts))

    def _control_command(self, part: Statement) -> Steps:
        """Run BEGIN, COMMIT or ROLLBACK as the connection's own methods do; gives its tag."""
        self.current = part.text
        modes = part.text.encode()
        if part.verb is Verb.BEGIN:
            yield from self.begin(b"BEGIN" if part.words[0] != "START" else modes)
            if part.words[0] == "BEGIN" and len(part.words) > 1 and not self.open:
                yield from self.begin(modes)
            return b"START TRANSACTION" if part.words[0] == "START" else b"BEGIN"
        failed = self.status == _STATUS.INERROR
        commits = part.verb is Verb.COMMIT and not failed
        if part.verb is Verb.COMMIT:
            yield from self.commit()
        else:
            yield from self.rollback()
        if part.chains:
            yield from self._get_ready()
            yield from self.begin(b"BEGIN")
        return b"COMMIT" if commits else b"ROLLBACK"

    def _script(self, conn: Any, cursor: Any, parts: tuple[Statement, ...]) -> Steps:
        """Run a string of several statements, transaction commands among them, one by one."""
        results: list[Any] = []
        for part in parts:
            yield from self._get_ready()
            if part.verb in _CONTROL_VERBS:
                yield from self._control_command(part)
                results.append(self._backend.pgconn.make_empty_result(pq.ExecStatus.COMMAND_OK))
                continue
            implicit = not self.open
            if implicit:
                yield from self.begin(conn._get_tx_start_command())
            yield from self._before(part, cursor)
            results += yield from self._backend.run(part.text.encode())
            if implicit and conn._autocommit:
                yield from self.commit()
        set_results(cursor, results)
        return None

    def _discard_all(self, conn: Any, cursor: Any) -> Steps:
        """Do what DISCARD ALL does; PostgreSQL refuses the command itself in a transaction."""
        yield from self._begin_unit()
        self.pin()
        for command in _DISCARD_ALL.split(b"; "):
            yield from self._backend.run(command)
        self._backend.forget_prepared()
        self._log.clear()
        self._settings = ()
        self.session = None
        self._backend.settings_of = None
        set_control_result(cursor, b"DISCARD ALL", self._backend.pgconn)

    # Session settings

    def _keep_settings(self) -> None:
        if self.pending:
            self._log += self.pending
            self.session = self._backend.settings_of = self

    def _restore_local(self) -> bytes:
        return b"; ".join(
            b"SELECT pg_catalog.set_config(%s, %s, false)" % (_literal(name), _literal(value or ""))
            for name, value in self._local.items()
        )

    def _restore_session(self) -> Steps:
        """Put the session settings of the last borrower away and this one's in force."""
        backend = self._backend
        standing = backend.level is Level.STANDING and not self.open
        yield from backend.run(
            b"RELEASE _pgmonkey; " + _RESET_SESSION if standing else _RESET_SESSION
        )
        if self._settings:
            yield from backend.run(
                b"; ".join(
                    b"SELECT pg_catalog.set_config(%s, %s, false)" % (_literal(n), _literal(v))
                    for n, v in self._settings
                )
            )
        for setting in self._log:
            yield from backend.send_again(setting)
        if standing:
            yield from backend.run(SAVEPOINT)
        backend.settings_of = self.session

    # Sections: pipeline mode, in which our own commands cannot be answered

    def enter_section(self) -> Steps:
        """Bring the backend to a state in which a pipeline needs none of our answers."""
        if not self.open:
            self._forget_transaction()
            if command := self._backend.stand():
                yield from self._backend.run(command)
            self._unit = True
        self.pin()
        self._in_section = True

    def begin_section(self, command: bytes) -> Steps:
        """Enter a section of psycopg's own, in which a transaction begins anyway."""
        yield from self.begin(command)
        self.pin()
        self._in_section = True

    def _commit_section(self) -> Steps:
        conn = self.wrapper()
        if self._backend.level is Level.DIRECT:
            self._backend.level = Level.STANDING
        else:
            yield from conn.real_command(b"RELEASE _pgmonkey")
        yield from conn.real_command(SAVEPOINT)
        self._close_transaction()

    def _rollback_section(self) -> Steps:
        conn = self.wrapper()
        if self._backend.level is Level.DIRECT:
            yield from conn.real_command(b"ROLLBACK")
            yield from conn.real_command(b"BEGIN")
            yield from conn.real_command(SAVEPOINT)
            self._backend.level = Level.STANDING
        else:
            yield from conn.real_command(UNDO)
        self._close_transaction()

    def leave_section(self, conn: Any) -> None:
        """End a pipeline: its work is one unit."""
        self._in_section = False
        failed = self._backend.pgconn.transaction_status == _STATUS.INERROR
        if self._unit and failed and not conn._autocommit:
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
                self._backend.deferrable = None

    # The end of an operation

    def after(self, conn: Any) -> None:
        """Settle an operation: keep the turn, pass it on, and find out about escapes."""
        backend = self._backend
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
        elif not self._writes and not self.special and status == _STATUS.INTRANS:
            self.yielding = True
            self.turn.offer(self)
        else:
            self.yielding = False

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
        self._backend.level = Level.NONE
        self._close_transaction()
        self._unit = False
        self._backend.escaped = EscapeError(
            f"the test's transaction was ended from inside, by {self.current[:200]!r} on the "
            f"connection borrowed at {self.place}; what the test had written is now committed"
        )

    def explain(self, error: psycopg.Error) -> None:
        """Add a line of advice where the surrounding transaction is what PostgreSQL objects to."""
        if error.sqlstate in _ADVISED and error.args and _CLONE_ADVICE not in str(error.args[0]):
            error.args = (f"{error.args[0]}\n{_CLONE_ADVICE}", *error.args[1:])

    def close(self, conn: Any, because: str = "the connection is closed") -> None:
        """Return the connection: roll back what is open, and let nobody use it again."""
        if self.returned:
            return
        self._backend.lent.pop(self, None)
        if self._streaming:
            self._backend.interrupt()
            self._streaming = False
        if self._unit:
            self._end_unit(_STATUS.INERROR)
        elif self.open:
            self._post_rollback()
        conn._closed = True
        self.closed_because = because
        self.returned = True
        self.turn.leave(self)

    def abandon(self) -> None:
        """Note that a connection was dropped unclosed; called by the collector, so no I/O."""
        self.returned = True
        self._backend.abandoned.append(self)

    def bury(self) -> None:
        """Roll back what an abandoned connection left open."""
        self._backend.lent.pop(self, None)
        if self.open:
            self._post_rollback()
        self.turn.leave(self)


_OWN_OPERATIONS: Final = frozenset(
    (Borrower.enter_section.__code__, Borrower.begin_section.__code__)
)


def obj_withhold(gen: Any) -> bool:
    """Whether the server-side cursor that an operation closes outlives its transaction."""
    return bool(gen.gi_frame.f_locals["self"]._withhold)


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


def _literal(value: str) -> bytes:
    return b"E'%s'" % value.encode().replace(b"\\", b"\\\\").replace(b"'", b"\\'")


_SET_NAME: Final = re.compile(
    r"\s*(?:SET|RESET)\s+(?:LOCAL\s+|SESSION\s+(?!AUTHORIZATION|CHARACTERISTICS))?"
    r"(TIME\s+ZONE|SESSION\s+AUTHORIZATION|[\w.\"$]+)",
    re.IGNORECASE,
)
_SPECIAL_NAMES: Final = {
    "time zone": "timezone",
    "session authorization": "session_authorization",
    "schema": "search_path",
    "names": "client_encoding",
}


def _setting_name(text: str) -> str:
    found = _SET_NAME.match(text)
    if not found:
        return ""
    name = " ".join(found.group(1).lower().replace('"', "").split())
    return _SPECIAL_NAMES.get(name, name)


_TEMPORARY: Final = re.compile(
    r"TEMP(?:ORARY)?\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?(?:pg_temp\s*\.\s*)?(\"[^\"]+\"|[\w$]+)",
    re.IGNORECASE,
)


def _temporary_table(text: str) -> str:
    found = _TEMPORARY.search(text)
    return found.group(1) if found else ""


_CONFIG_CALL: Final = re.compile(r"set_config\s*\(\s*(?:'([^']+)'|(%s|%\(\w+\)s|\$\d+))", re.I)
_CONFIG_IS_LOCAL: Final = re.compile(r",\s*(?:true|'t'|'true'|'on'|'1')\s*\)", re.IGNORECASE)


def _local_config_names(text: str, _cursor: Any) -> list[str]:
    """Give the settings that `set_config(name, value, true)` changes, where the text tells."""
    if not _CONFIG_IS_LOCAL.search(text):
        return []
    return [name.lower() for name, _ in _CONFIG_CALL.findall(text) if name]
