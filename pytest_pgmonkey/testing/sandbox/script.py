"""Transaction commands that the application sends as SQL, alone or among other statements.

Such a string is run statement by statement, each with the meaning that it has on a server: BEGIN,
COMMIT and ROLLBACK as the connection's own methods, and what stands outside of them in one
implicit transaction, as PostgreSQL does it for one message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg

from ...errors import SandboxError
from ..lexer import Verb
from .internals import (
    check_parameters,
    deliver_warning,
    is_execute,
    is_extended,
    note_results,
    set_results,
    tagged_result,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..lexer import Statement
    from .borrower import Borrower

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


class RefusedError(SandboxError, psycopg.NotSupportedError):
    """A rolled-back test cannot do this; the message says what to do instead."""


class Script:
    """The run of one SQL string that speaks of transactions."""

    def __init__(self, borrower: Borrower, conn: Any) -> None:
        self._borrower = borrower
        self._conn = conn
        self._implicit = False

    def run(self, cursor: Any, parts: tuple[Statement, ...], gen: Any) -> Steps:
        """Run the statements and leave their results in the cursor, as psycopg would."""
        if any(part.verb is Verb.TWO_PHASE for part in parts):
            raise RefusedError(
                "two-phase commit would end the transaction that the test is rolled back with; "
                'use @pytest.mark.pgmonkey(isolation="clone") for this test'
            )
        params = gen.gi_frame.f_locals.get("params")
        if not is_execute(gen):
            raise RefusedError("a transaction command can only be run by execute() here")
        if cursor.closed or (len(parts) > 1 and is_extended(cursor, gen)):
            return (yield from gen)  # which raises
        gen.close()
        check_parameters(cursor, parts[0].text, params)
        results = yield from self._run(parts)
        set_results(cursor, results)
        return None

    def _run(self, parts: tuple[Statement, ...]) -> Steps:
        borrower = self._borrower
        if not self._conn.autocommit:
            yield from borrower.begin(self._conn.begin_command())
        if len(parts) > 1 or not _is_usual(parts[0]):
            yield from self._check_syntax(parts)
        results: list[Any] = []
        alone = len(parts) == 1
        try:
            for part in parts:
                yield from borrower.get_ready()
                if part.verb in (Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK):
                    tag = yield from self._command(part)
                    results.append(tagged_result(tag))
                else:
                    results += yield from self._statement(part)
        except BaseException:
            if self._implicit or (alone and not borrower.open):
                yield from borrower.rollback()
            raise
        finally:
            note_results(self._conn, results)
        if self._implicit:
            yield from borrower.commit()
        return results

    def _check_syntax(self, parts: tuple[Statement, ...]) -> Steps:
        """Let the server parse the whole string, as it does before it runs any of it."""
        borrower, backend = self._borrower, self._borrower.backend
        fallible = backend.in_transaction
        if fallible:
            yield from backend.run(b"SAVEPOINT _pgmonkey_check")
        text = "; ".join(part.text for part in parts)
        try:
            yield from backend.run(_FAILS + text.encode())
        except psycopg.Error as error:
            if error.sqlstate in (_UNKNOWN_STATEMENT, _IN_FAILED_TRANSACTION):
                if fallible:
                    yield from backend.run(_UNCHECK)
                return
            if fallible and not borrower.open:
                yield from backend.run(_UNCHECK)
            raise

    def _statement(self, part: Statement) -> Steps:
        borrower = self._borrower
        if not borrower.open:
            yield from borrower.begin(b"BEGIN")
            self._implicit = True
        if self._implicit and part.verb is Verb.SAVEPOINT:
            raise no_block(part)
        yield from borrower.before(part, None)
        return (yield from borrower.backend.run(part.text.encode()))

    def _command(self, part: Statement) -> Steps:
        """Run BEGIN, COMMIT or ROLLBACK; gives its status tag."""
        borrower = self._borrower
        borrower.current = part.text
        if part.verb is Verb.BEGIN:
            yield from self._begin(part)
            return b"START TRANSACTION" if part.words[0] == "START" else b"BEGIN"
        if part.chains and (self._implicit or not borrower.open):
            raise psycopg.errors.NoActiveSqlTransaction(
                f"{part.words[0]} AND CHAIN can only be used in transaction blocks"
            )
        if self._implicit or not borrower.open:
            deliver_warning(self._conn, "25P01", "there is no transaction in progress")
        commits = part.verb is Verb.COMMIT and not borrower.failed
        modes, self._implicit = borrower.modes, False
        if part.verb is Verb.COMMIT:
            yield from borrower.commit()
        else:
            yield from borrower.rollback()
        if part.chains:
            yield from borrower.get_ready()
            yield from borrower.begin(modes)
        return b"COMMIT" if commits else b"ROLLBACK"

    def _begin(self, part: Statement) -> Steps:
        borrower = self._borrower
        command = part.text.encode()
        if not borrower.open:
            yield from borrower.begin(command)
        elif self._implicit:
            self._implicit = False
            borrower.modes = command
            if len(part.words) > 2:
                modes = command.split(None, 1)[1]
                yield from borrower.backend.run(b"SET TRANSACTION " + modes)
        else:
            # The server warns that there is one already, and sets the modes.
            yield from borrower.begin_again(command)


def _is_usual(part: Statement) -> bool:
    """Whether a transaction command is written as it must be, and needs no check."""
    return part.words in _USUAL


def discard_all(borrower: Borrower, cursor: Any) -> Steps:
    """Do what DISCARD ALL does; PostgreSQL refuses the command itself in a transaction."""
    backend = borrower.backend
    yield from borrower.begin(b"BEGIN")
    borrower.pin()
    for command in _DISCARD_ALL.split(b"; "):
        yield from backend.run(command)
    yield from borrower.commit()
    backend.forget_prepared(but=borrower)
    borrower.session = backend.settings_of = None
    results = [tagged_result(b"DISCARD ALL")]
    note_results(cursor.connection, results)
    set_results(cursor, results)


def no_block(part: Statement) -> psycopg.Error:
    """Give the server's error for a statement that only a transaction block can have."""
    word = {"ROLLBACK": "ROLLBACK TO SAVEPOINT", "RELEASE": "RELEASE SAVEPOINT"}.get(
        part.words[0], "DECLARE CURSOR" if part.verb is Verb.DECLARE else part.words[0]
    )
    return psycopg.errors.NoActiveSqlTransaction(f"{word} can only be used in transaction blocks")
