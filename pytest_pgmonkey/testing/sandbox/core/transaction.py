"""A virtual transaction: what is sent in place of a member's BEGIN, COMMIT and ROLLBACK.

Everything that waits is a generator in psycopg's manner, to be driven by whatever door the member
came through; everything else is decided at once. See docs/isolation.md for the rules.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import pq

from ....errors import SandboxError
from ...sql.leftovers import Leftovers
from ...sql.lexer import Statement, Verb
from ...sql.modes import Modes, transaction_modes
from ...timeouts import with_shadows
from .backend import Level
from .handover import read
from .refusals import RefusedError, no_notifies
from .settings import Session, assignment, config_calls

if TYPE_CHECKING:
    from collections.abc import Generator

    from .backend import Backend

    Steps = Generator[Any, Any, Any]

_STATUS: Final = pq.TransactionStatus
_OPEN_CURSORS: Final = (
    b"SELECT quote_ident(name) FROM pg_catalog.pg_cursors WHERE NOT is_holdable AND name <> ''"
)
# Savepoints of the user's in a transaction that has none of ours would outlive its commit.
_GUARD: Final = b"SAVEPOINT _pgmonkey_guard"
_OLDER: Final = (
    "this savepoint is older than the checkpoint or the test that runs, which would be lost with it"
)
_UNGUARD: Final = b"RELEASE _pgmonkey_guard"


class VirtualTransaction:
    """The transaction of one member: how it begins, what a statement does to it, how it ends."""

    __slots__ = (
        "_guarded",
        "_kept_temporary",
        "_local",
        "_uses_cursors",
        "backend",
        "current",
        "has_modes",
        "held_cursors",
        "in_pipeline",
        "inherited",
        "leftovers",
        "modes",
        "open",
        "portal_is_open",
        "session",
        "surely_reads",
        "suspended",
        "temporary",
        "unit",
        "writes",
    )

    def __init__(self, backend: Backend, session: Session | None) -> None:
        self.backend = backend
        self.session = session
        """The member's session settings."""
        self.current = ""
        """The statement that ran last."""
        self.open = False
        self.suspended = False
        """Open, while another member uses the backend."""
        self.unit = False
        """In the transaction of one autocommit statement, or of a pipeline up to its sync."""
        self.in_pipeline = False
        """Between two syncs of a pipeline: our own commands would not be answered."""
        self.temporary: dict[str, str] = {}
        """Temporary tables with what a commit does to them."""
        self._kept_temporary: dict[str, str] = {}
        """Those of transactions before."""
        self.held_cursors: set[str] = set()
        """Names of cursors WITH HOLD that may still be open."""
        self.leftovers = Leftovers()
        self._forget()

    def _forget(self) -> None:
        self.surely_reads = True
        """Nothing that was executed can have written."""
        self.writes = False
        """Something was executed that perhaps has."""
        self.has_modes = False
        """It has modes of its own, which end with it."""
        self.modes = b""
        """The command that began it."""
        self.inherited = b"BEGIN"
        """The modes that it has from the transaction before, by AND CHAIN."""
        self.leftovers.clear()
        self.portal_is_open = False
        """One that was suspended can go on, as far as is known."""
        self._guarded = False
        self._uses_cursors = False
        self._local: dict[str, str | None] | None = None  # what SET LOCAL has hidden

    def snapshot(self) -> dict[str, Any]:
        """Give all that is noted of it, to be restored when what follows was undone."""
        names = set(self.__slots__) - {"backend", "session"}
        return {name: deepcopy(getattr(self, name)) for name in names}

    def stand_aside(self) -> None:
        """Be as one that has done nothing: what is done next is undone by itself."""
        self.leftovers.protect()
        self.suspended = self.open
        self.writes, self.surely_reads, self.has_modes = False, True, False
        self._guarded = False  # to release that guard would release what comes next with it

    def restore(self, state: dict[str, Any]) -> None:
        """Note what was noted before."""
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def has_local_settings(self) -> bool:
        """Whether SET LOCAL has set something."""
        return bool(self._local)

    def pin(self) -> None:
        """Keep the turn to the end of the transaction: its savepoints cannot be interleaved."""
        self.writes = True
        self.surely_reads = False

    # Statements

    def note(self, part: Statement) -> None:
        """Take note of a statement that is about to run, and of whether it can have written."""
        self.current = part.text
        if part.verb is Verb.QUERY and part.read_only:
            return
        self.leftovers.note(part)
        if part.verb is Verb.DEALLOCATE:
            return  # psycopg sends one after each rollback: it keeps nobody waiting
        self.surely_reads = False
        if part.verb not in (Verb.QUERY, Verb.CURSOR):
            self.writes = True

    def before(self, part: Statement, params: Any) -> Steps:
        """Take note of a statement, and do what must be done before it."""
        if part.verb is Verb.SAVEPOINT and not self.leftovers.is_inside(part):
            raise SandboxError(_OLDER)
        self.note(part)
        backend, verb = self.backend, part.verb
        if part.looks_at_timeouts:
            yield from backend.run(backend.timeouts.unpark())
        if part.advisory:
            backend.advisory = True
        if part.prepares:
            backend.prepared = True
        if verb is Verb.DDL:
            backend.note_ddl()
            if part.temporary:
                name, action = part.temporary
                self.temporary[name] = action
        elif verb is Verb.DECLARE:
            self._uses_cursors = True
            if part.holds:
                self.held_cursors.add(part.cursor)
        elif verb is Verb.SAVEPOINT and part.words[0] == "SAVEPOINT":
            yield from self.guard()
        elif verb is Verb.SET_TRANSACTION:
            yield from self._set_transaction(part)
        elif verb is Verb.SET_LOCAL:
            yield from self._remember_local(list(part.settings))
        elif verb is Verb.SET:
            self._touch(part.settings or ("role",))  # RESET ALL: something of the session
        elif verb is Verb.LISTEN and backend.refusals.moves:
            raise no_notifies()
        if part.sets_config:
            yield from self._before_set_config(part, params)

    def park_timeouts(self, part: Statement) -> Steps:
        """Let no time-out that a statement has looked at end the session."""
        if part.looks_at_timeouts and self.backend.in_transaction:
            yield from self.backend.run(self.backend.timeouts.park())

    def guard(self) -> Steps:
        """Make what the user's savepoints and modes do end at the virtual commit."""
        if not self._guarded:
            yield from self.backend.run(_GUARD)
            self._guarded = True

    def guarding(self, command: bytes) -> bytes:
        """Give a SAVEPOINT command with the guard before it, where there is none yet."""
        if self._guarded:
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
        self.has_modes = True

    # Settings

    def _touch(self, names: tuple[str, ...]) -> None:
        """Note that a statement sets something of the session, which is this member's alone."""
        if not names:
            return
        self.pin()
        session = self.session
        if session is None or not session.names:
            session = Session(session.given if session is not None else ())
            self.session = self.backend.settings_of = session
        session.touch(with_shadows(names))
        for name in with_shadows(names):
            if self._local:
                self._local.pop(name, None)

    def _remember_local(self, names: list[str]) -> Steps:
        """Read settings before SET LOCAL changes them: RELEASE does not restore them."""
        self.pin()
        if self._local is None:
            self._local = {}
        names = [name for name in with_shadows(names) if name not in self._local]
        if names:
            values = yield from read(self.backend, names)
            self._local.update(zip(names, values, strict=True))

    def _before_set_config(self, part: Statement, params: Any) -> Steps:
        calls = config_calls(part.text, params)
        self._touch(tuple(name for name, is_local in calls if not is_local))
        yield from self._remember_local([name for name, is_local in calls if is_local])

    def _default_modes(self) -> Steps:
        """Find the modes that the member's session gives to transactions that name none."""
        if self.session is None or not self.session.sets_modes:
            return Modes()
        isolation, read_only = yield from read(
            self.backend, ["default_transaction_isolation", "default_transaction_read_only"]
        )
        return Modes((isolation or "").upper().encode(), read_only == "on")

    # Transactions

    def begin_unit(self) -> Steps:
        """Begin what ends with the statement: the transaction of an autocommit connection."""
        backend = self.backend
        if self.session is None and backend.level is Level.STANDING:
            self.unit = True
            return
        modes = yield from self._default_modes()
        if backend.is_direct and not modes.read_only:
            yield from backend.begin(b"BEGIN", modes.isolation)
        else:
            yield from backend.stand()
            if modes.read_only:
                self.has_modes = True
                yield from self._only_read()
        self.unit = True

    def begin(self, command: bytes) -> Steps:
        """Begin the virtual transaction that psycopg or the user's SQL asks for."""
        if self.open:
            return None
        backend = self.backend
        own = transaction_modes(command)
        modes = own.over((yield from self._default_modes()))
        self.modes = command
        self.has_modes = bool(modes.isolation or modes.read_only)
        if backend.is_direct and not modes.read_only:
            yield from backend.begin(command, modes.isolation)
        else:
            yield from self._begin_standing(modes)
        self.open = True
        return None

    def adopt_unit(self) -> None:
        """Begin with what a pipeline has done since its last sync, as the server does."""
        self.modes = b"BEGIN"
        self.unit, self.open = False, True

    def begin_again(self, command: bytes) -> Steps:
        """Send a BEGIN inside a transaction: the server warns, and sets the modes it names."""
        modes = transaction_modes(command)
        if modes.read_only is not None:
            yield from self.guard()
        if modes != Modes():
            self.has_modes = True
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
            yield from self._only_read()

    def _only_read(self) -> Steps:
        yield from self.guard()
        yield from self.backend.run(b"SET TRANSACTION READ ONLY")

    def _check_isolation(self, modes: Modes) -> Steps:
        wanted, backend = modes.isolation, self.backend
        if wanted in (b"", backend.isolation) or wanted == b"READ COMMITTED":
            return
        if not backend.is_fresh:
            (current,) = yield from read(backend, ["transaction_isolation"])
            if current and current.upper().encode() == wanted:
                return
        raise RefusedError(
            f"isolation level {wanted.decode()} cannot be had here: the test's transaction "
            "has already begun with another",
            ". Use it in the test's first transaction, or give the test its own database with "
            '@pytest.mark.pgmonkey(isolation="clone").',
        )

    def commit(self) -> Steps:
        """Commit the virtual transaction; after an error it is rolled back, as the server does."""
        if not self.open:
            return None
        if self.suspended:
            self.close()
            return None
        if self.backend.pgconn.transaction_status == _STATUS.INERROR:
            self.rollback()
        else:
            yield from self._keep()
        return None

    def _keep(self) -> Steps:
        """Do what a real commit does, and wait until it is done."""
        if not self.surely_reads or self.has_modes:
            yield from self.end_work()
        backend = self.backend
        commands = self._before_keeping()
        try:
            if backend.level is not Level.DIRECT:
                if commands or not self.surely_reads:
                    yield from backend.keep(commands)
            elif commands:
                yield from backend.run(b"; ".join(commands))
        except psycopg.Error:
            # Undone, as a real commit that fails.
            if backend.level is Level.DIRECT:
                backend.undo_direct()
            self.close()
            raise
        if backend.level is Level.DIRECT:
            backend.level = Level.BARE
        self.close()

    def _before_keeping(self) -> list[bytes]:
        """Give the commands that undo what lasts no longer than the transaction."""
        local = self._local
        restore = [assignment(name, local[name] or "") for name in local] if local else []
        return [_UNGUARD, *restore] if self._guarded else restore

    @property
    def commits_at_once(self) -> bool:
        """Whether a commit need not tell the server anything."""
        backend = self.backend
        return not (
            backend.level is not Level.DIRECT
            or backend.deferrable is None
            or backend.deferrable
            or self._uses_cursors
            or self.temporary
            or self._guarded
            or self._local
            or backend.pgconn.transaction_status != _STATUS.INTRANS
        )

    def commit_at_once(self) -> None:
        """Commit where the server need not be told."""
        self.backend.level = Level.BARE
        self.close()

    def rollback(self) -> None:
        """Roll the virtual transaction back, without waiting for the answer."""
        if self.open:
            self.post_rollback()

    def post_rollback(self) -> None:
        if not self.suspended:
            self.backend.post_undo()
        self.temporary = dict(self._kept_temporary)
        self.close()

    def close(self) -> None:
        if self.open and self.backend.streamed_in is self:
            self.backend.streamed_in = None
        self.open = self.suspended = False
        self.unit = False
        self._forget()

    def end_statement(self) -> Steps:
        """Commit what an autocommit statement, or a pipeline up to its sync, has done."""
        # Neither in the middle of a stream nor after an error that psycopg keeps to itself.
        if self.unit and self.backend.in_transaction:
            yield from self._keep()

    def end_unit(self, status: int) -> None:
        """End an autocommit statement that has not come to its own end."""
        self.unit = False
        if self.open:
            return
        if status == _STATUS.INERROR:
            self.post_rollback()
        else:
            self._post_commit()

    def _post_commit(self) -> None:
        backend = self.backend
        commands = self._before_keeping()
        if backend.level is Level.DIRECT:
            backend.level = Level.BARE
            if commands:
                backend.post(b"; ".join(commands))
        elif commands or not self.surely_reads:
            backend.post_keep(commands)
        self.close()

    # What a commit does

    def end_work(self) -> Steps:
        """Do what a real commit does before it is one: checks, cursors, temporary tables."""
        backend = self.backend
        try:
            yield from self._check_deferred()
        except psycopg.Error:
            if self.open:
                self.post_rollback()
            raise
        if self._uses_cursors:
            (result,) = yield from backend.run(_OPEN_CURSORS)
            names = [result.get_value(i, 0) or b"" for i in range(result.ntuples)]
            if names:
                yield from backend.run(b"; ".join(b"CLOSE " + name for name in names))
        if self.temporary:
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
        columns = [f"to_regclass($$pg_temp.{name}$$)" for name in self.temporary]
        query = f"SELECT {', '.join(columns)}"
        (result,) = yield from self.backend.run(query.encode())
        found = {
            name: action
            for i, (name, action) in enumerate(self.temporary.items())
            if result.get_value(0, i) is not None
        }
        for name, action in found.items():
            verb = "DROP TABLE" if action == "DROP" else "TRUNCATE"
            yield from self.backend.run(f"{verb} pg_temp.{name}".encode())
        self.temporary = {name: action for name, action in found.items() if action != "DROP"}
        self._kept_temporary = dict(self.temporary)
