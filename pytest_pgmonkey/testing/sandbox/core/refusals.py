"""What a rolled-back test cannot do, and what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import psycopg

from ....errors import SandboxError
from ...sql.lexer import Verb

if TYPE_CHECKING:
    from ...sql.lexer import Statement

_SHOWN: Final = {
    "ROLLBACK": "ROLLBACK TO SAVEPOINT",
    "RELEASE": "RELEASE SAVEPOINT",
    "LOCK": "LOCK TABLE",
}
_CLONE_ADVICE: Final = (
    "The test's transaction, which is rolled back at its end, is in the way: give this test "
    'real transactions with @pytest.mark.pgmonkey(isolation="clone").'
)
_LOCKS_ADVICE: Final = (
    "A rolled-back test keeps each lock that it has taken to its end, those of dropped tables too: "
    'give it real transactions with @pytest.mark.pgmonkey(isolation="clone"), or raise '
    "max_locks_per_transaction where the server is yours."
)
_ADVICE: Final = {
    **dict.fromkeys(("25001", "2D000", "55P04"), _CLONE_ADVICE),
    "53200": _LOCKS_ADVICE,
}


class RefusedError(SandboxError, psycopg.NotSupportedError):
    """A rolled-back test cannot do this; the message says what to do instead."""


def advice(sqlstate: str | None) -> str:
    """Give a line of advice where the surrounding transaction is what PostgreSQL objects to."""
    return _ADVICE.get(sqlstate or "", "")


def explain(error: psycopg.Error) -> None:
    """Add the advice to an error."""
    line = advice(error.sqlstate)
    if line and error.args and line not in str(error.args[0]):
        error.args = (f"{error.args[0]}\n{line}", *error.args[1:])


def no_block(part: Statement) -> psycopg.Error:
    """Give the server's error for a statement that only a transaction block can have."""
    word = _SHOWN.get(part.words[0], part.words[0])
    if part.verb is Verb.DECLARE:
        word = "DECLARE CURSOR"  # psycopg's server-side cursors show the query alone
    return psycopg.errors.NoActiveSqlTransaction(f"{word} can only be used in transaction blocks")


def no_two_phase() -> RefusedError:
    """Refuse a two-phase commit."""
    return RefusedError(
        "two-phase commit would end the transaction that the test is rolled back with; "
        'use @pytest.mark.pgmonkey(isolation="clone") for this test'
    )


def no_notifies() -> RefusedError:
    """Refuse to wait for notifications."""
    return RefusedError(
        "notifications are sent at a real commit, and a rolled-back test has none; "
        'use @pytest.mark.pgmonkey(isolation="clone") for this test'
    )
