"""The virtual transaction of a borrowed connection: what it sends in place of BEGIN and COMMIT.

Everything that waits is a generator in psycopg's manner, driven alike by the sync and the async
connection; everything else is decided at once. See docs/isolation.md for the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ..lexer import Statement, Verb
from .backend import REFRESH, SAVEPOINT, UNDO, Level
from .modes import Modes, transaction_modes
from .script import RefusedError
from .sessions import Session, assignment, config_calls, read

if TYPE_CHECKING:
    from collections.abc import Generator

    from .backend import Backend
    from .turns import Turn

    Steps = Generator[Any, Any, Any]

_STATUS: Final = pq.TransactionStatus
_IN_BLOCK: Final = (_STATUS.INTRANS, _STATUS.INERROR)
_OPEN_CURSORS: Final = (
    b"SELECT quote_ident(name) FROM pg_catalog.pg_cursors WHERE NOT is_holdable AND name <> ''"
)
# Savepoints of the user's in a transaction that has none of ours would outlive its commit.
_GUARD: Final = b"SAVEPOINT _pgmonkey_guard"
_UNGUARD: Final = b"RELEASE _pgmonkey_guard"


class VirtualTransaction:
    """What a borrower knows of its transaction, and how that begins and ends."""

    __slots__ = (
        "_guarded",
        "_in_section",
        "_local",
        "_streaming",
        "_suspended",
        "_temporary",
        "_unit",
        "_uses_cursors",
        "_writes",
        "backend",
        "busy",
        "current",
        "modes",
        "open",
        "session",
        "special",
        "steady",
        "surely_reads",
        "turn",
        "yielding",
    )

    def __init__(self, backend: Backend, session: Session | None) -> None:
        self.backend = backend
        self.turn: Turn = backend.turn
        self.session = session
        self.current = ""
        """The statement that ran last."""
        self.open = False
        """In a virtual transaction."""
        self.busy = False
        """In an operation."""
        self._suspended = False  # open, while another uses the backend
        self._unit = False  # in the transaction of one autocommit statement
        self._in_section = False  # in pipeline mode
        self._streaming = False  # in the middle of a COPY or a stream
        self._temporary: list[tuple[str, str]] = []
        self._forget_transaction()

    def _forget_transaction(self) -> None:
        self.yielding = False
        """Between two statements of a transaction that has perhaps only read."""
        self.steady = False
        """Between two statements of a transaction that keeps the turn."""
        self.surely_reads = True
        """Nothing that was executed can have written."""
        self.special = False
        """It has modes of its own, which end with it."""
        self.modes = b""
        """The command that began it."""
        self._writes = False
        self._guarded = False
        self._uses_cursors = False
        self._local: dict[str, str | None] | None = None  # what SET LOCAL has hidden

    def real_command(self, command: bytes) -> Steps:
        """Queue a command of ours in a pipeline."""
        raise NotImplementedError

    def pin(self) -> None:
        """Keep the turn to the end of the transaction: its savepoints cannot be interleaved."""
        self._writes = True
        self.surely_reads = False

    # Statements

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
            # Its own connection forgets them, or does not, as psycopg's release has it.
            backend.forget_prepared(but=self)
        elif verb is Verb.PREPARE:
            backend.prepared = True
        if part.sets_config:
            yield from self._before_set_config(part, params)

    def guard(self) -> Steps:
        """Make what the user's savepoints and modes do end at the virtual commit."""
        if self.backend.level is Level.DIRECT and not self._guarded:
            yield from self.backend.run(_GUARD)
            self._guarded = True

    def guarding(self, command: bytes) -> bytes:
        """Give a SAVEPOINT command with the guard before it, where there is none yet."""
        if self.backend.level is not Level.DIRECT or self._guarded:
            return command
        self._guarded = True
        return _GUARD + b"; " + command

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
        for name in names:
            if self._local:
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
        return Modes((isolation or "").upper().encode(), read_only == "on")

    # Transactions

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
        self.busy = True
        self._post_commit()
        self.turn.leave(self)
        self.busy = False
        return True

    def rollback_at_once(self) -> bool:
        """Roll back where the transaction is this borrower's turn; gives whether it was."""
        if not self.steady or self.backend.pgconn.transaction_status not in _IN_BLOCK:
            return False
        self.busy = True
        self._post_rollback()
        self.turn.leave(self)
        self.busy = False
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

    def _end_unit(self, status: int) -> None:
        self._unit = False
        if self.open:
            return
        if status == _STATUS.INERROR:
            self._post_rollback()
        else:
            self._post_commit()

    # What a commit does

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
        elif self.backend.in_transaction:
            yield from self.guard()
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
            yield from self.real_command(b"SET TRANSACTION READ ONLY")

    def _commit_section(self) -> Steps:
        if self.backend.level is Level.DIRECT:
            self.backend.level = Level.STANDING
            if self._guarded:
                yield from self.real_command(_UNGUARD)
        else:
            yield from self.real_command(b"RELEASE _pgmonkey")
        yield from self.real_command(SAVEPOINT)
        self._close_transaction()

    def _rollback_section(self) -> Steps:
        if self.backend.level is Level.DIRECT:
            yield from self.real_command(b"ROLLBACK")
            yield from self.real_command(b"BEGIN")
            yield from self.real_command(SAVEPOINT)
            self.backend.level = Level.STANDING
        else:
            yield from self.real_command(UNDO)
        self._close_transaction()
