"""Transaction commands that the application sends as SQL, alone or among other statements.

Such a string is run statement by statement, each with the meaning that it has on a server: BEGIN,
COMMIT and ROLLBACK as the virtual transaction's own, and what stands outside of them in one
implicit transaction, as PostgreSQL does it for one message. What becomes of the results is the
door's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import psycopg

from ... import passage
from ...sql.lexer import Verb
from .refusals import no_block
from .statements import Door

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...sql.lexer import Statement
    from .member import Member

    Steps = Generator[Any, Any, Any]

_DISCARD_ALL: Final = (
    b"CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; DEALLOCATE ALL; UNLISTEN *; "
    b"SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES"
)
# Fails when it is run: what follows it is parsed and nothing more.
_FAILS: Final = b"DEALLOCATE _pgmonkey_check; "
_UNCHECK: Final = b"ROLLBACK TO _pgmonkey_check; RELEASE _pgmonkey_check"
_UNKNOWN_STATEMENT: Final = "26000"
_IN_FAILED_TRANSACTION: Final = "25P02"
_USUAL: Final = frozenset(
    (word, *noise, *chain)
    for word in ("BEGIN", "COMMIT", "END", "ROLLBACK", "ABORT")
    for noise in ((), ("WORK",), ("TRANSACTION",))
    for chain in ((), ("AND", "CHAIN"), ("AND", "NO", "CHAIN"))
    if not (word == "BEGIN" and chain)
) | {("START", "TRANSACTION")}


class ScriptDoor(Door, Protocol):
    """Runs a script's statements and takes their results."""

    @property
    def operation(self) -> object:
        """What the application called; the passage sees it with each statement."""

    def run(self, text: str) -> Steps:
        """Send one statement and keep its results; gives them."""

    def tag(self, tag: bytes) -> None:
        """Keep the status tag of a command that was not sent as it is."""


class Script:
    """The run of one SQL string that speaks of transactions."""

    def __init__(self, member: Member, door: ScriptDoor) -> None:
        self._member = member
        self._door = door
        self._implicit = False
        self.is_at_end = False
        """Whether all has run, and only a commit of its own is left."""

    def run(self, parts: tuple[Statement, ...], text: str = "") -> Steps:
        """Run the statements of a string; the door has their results."""
        member, transaction = self._member, self._member.transaction
        if transaction.unit:
            # What a pipeline has done since its sync is the implicit transaction.
            transaction.adopt_unit()
            self._implicit = True
        if not self._door.autocommit:
            yield from transaction.begin(self._door.begin_command())
        if len(parts) > 1 or not _is_usual(parts[0]):
            yield from self._check_syntax(text or "; ".join(part.text for part in parts))
        alone = len(parts) == 1
        try:
            for part in parts:
                yield from member.get_ready()
                yield from passage.passing(part, self._door.operation, self._run(part))
        except BaseException:
            if self._implicit or (alone and not transaction.open):
                member.rollback()
            raise
        if self._implicit:
            self.is_at_end = True
            yield from member.commit()

    def _run(self, part: Statement) -> Steps:
        if part.verb not in (Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK):
            return (yield from self._statement(part))
        self._door.tag((yield from self._command(part)))
        return None

    @staticmethod
    def shift(error: psycopg.Error) -> int:
        """Give what must be added to a position that an error names in a checked string."""
        return -len(_FAILS) if error.diag.statement_position else 0

    def _check_syntax(self, text: str) -> Steps:
        """Let the server parse the whole string, as it does before it runs any of it."""
        transaction, backend = self._member.transaction, self._member.backend
        fallible = backend.in_transaction
        if fallible:
            yield from backend.run(b"SAVEPOINT _pgmonkey_check")
        try:
            yield from backend.run(_FAILS + text.encode(errors="surrogateescape"))
        except psycopg.Error as error:
            if error.sqlstate in (_UNKNOWN_STATEMENT, _IN_FAILED_TRANSACTION):
                if fallible:
                    yield from backend.run(_UNCHECK)
                return
            if fallible and not transaction.open:
                yield from backend.run(_UNCHECK)
            raise

    def _statement(self, part: Statement) -> Steps:
        transaction = self._member.transaction
        if not transaction.open:
            yield from transaction.begin(b"BEGIN")
            self._implicit = True
        if self._implicit and part.verb is Verb.SAVEPOINT:
            raise no_block(part)
        yield from self._member.before(part, None)
        results = yield from self._door.run(part.text)
        yield from transaction.park_timeouts(part)
        return results

    def _command(self, part: Statement) -> Steps:
        """Run BEGIN, COMMIT or ROLLBACK; gives its status tag."""
        member, transaction = self._member, self._member.transaction
        transaction.current = part.text
        if part.verb is Verb.BEGIN:
            yield from self._begin(part)
            return b"START TRANSACTION" if part.words[0] == "START" else b"BEGIN"
        if part.chains and (self._implicit or not transaction.open):
            raise psycopg.errors.NoActiveSqlTransaction(
                f"{part.words[0]} AND CHAIN can only be used in transaction blocks"
            )
        if self._implicit or not transaction.open:
            self._door.warn("25P01", "there is no transaction in progress")
        commits = part.verb is Verb.COMMIT and not member.failed
        if member.keeper is not None and transaction.open:
            yield from member.keeper.before_end(commits=commits)
        # An error takes back what its own BEGIN has set, as in PostgreSQL.
        modes = transaction.inherited if member.failed else transaction.modes
        self._implicit = False
        if part.verb is Verb.COMMIT:
            yield from member.commit()
        else:
            member.rollback()
        if part.chains:
            yield from member.get_ready()
            yield from transaction.begin(modes)
            transaction.inherited = modes
        return b"COMMIT" if commits else b"ROLLBACK"

    def _begin(self, part: Statement) -> Steps:
        transaction = self._member.transaction
        command = part.text.encode()
        if not transaction.open:
            yield from transaction.begin(command)
        elif self._implicit:
            self._implicit = False
            transaction.modes = command
            if len(part.words) > 2:
                modes = command.split(None, 1)[1]
                yield from transaction.backend.run(b"SET TRANSACTION " + modes)
        else:
            # The server warns that there is one already, and sets the modes.
            yield from transaction.begin_again(command)


def _is_usual(part: Statement) -> bool:
    """Whether a transaction command is written as it must be, and needs no check."""
    return part.words in _USUAL


def discard_all(member: Member) -> Steps:
    """Do what DISCARD ALL does; PostgreSQL refuses the command itself in a transaction."""
    backend, transaction = member.backend, member.transaction
    yield from transaction.begin(b"BEGIN")
    transaction.pin()
    for command in _DISCARD_ALL.split(b"; "):
        yield from backend.run(command)
    for command in backend.timeouts.after_reset():
        yield from backend.run(command)
    yield from member.commit()
    backend.forget_prepared(but=member)
    transaction.session = backend.settings_of = None
