"""What a rolled-back test cannot do and a clone could, and what to do instead.

Nothing else decides what counts as a refusal, whichever door it came through.
"""

from __future__ import annotations

import re
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
_MARK: Final = '; use @pytest.mark.pgmonkey(isolation="clone") for this test'
_WAIT_ADVICE: Final = (
    "Commit or leave that block first, or give the test real concurrent transactions with "
    '@pytest.mark.pgmonkey(isolation="clone").'
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


# Where a transaction of the application's own is open, a clone objects as well.
_IN_NO_BLOCK: Final = frozenset({"25001", "2D000"})
_SETS: Final = re.compile(r"\s*SET\b", re.IGNORECASE)
_MOVED_PATIENCE: Final = 0.5


class RefusedError(SandboxError, psycopg.NotSupportedError):
    """A rolled-back test cannot do this; the message says what to do instead."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}{advice}")
        self.what: Final = what


class WaitRefusedError(SandboxError, psycopg.OperationalError):
    """Waiting for another member's transaction cannot help, or took too long."""


class Refusals:
    """What a test was refused that a clone would serve."""

    def __init__(self) -> None:
        self.moves = False
        """Whether a test that is refused anything runs again in a clone."""
        self.first = ""
        self._waits: list[str] = []

    def begin(self, *, moves: bool) -> None:
        """Begin a test: nothing was refused yet, whatever clients were between tests."""
        self.moves, self.first, self._waits = moves, "", []

    def note(self, what: str) -> None:
        """Take note of one."""
        self.first = self.first or what

    def patience(self, timeout: float) -> float:
        """Give the seconds of a wait: a test that moves need not wait for what a clone serves."""
        if not self.moves:
            return timeout
        return 0.0 if self.first else min(timeout, _MOVED_PATIENCE)

    def wait(self, what: str, *, counts: bool = True) -> WaitRefusedError:
        """Give the error of a wait that is refused; a thread of the application may hide it.

        Where it does not count, the test has ended for who waits.
        """
        message = f"{what}. {_WAIT_ADVICE}"
        if counts:
            self.note(what)
            self._waits.append(message)
        return WaitRefusedError(message)

    def take_waits(self) -> list[str]:
        """Give, once, the waits that were refused."""
        waits, self._waits = self._waits, []
        return waits


def advice(sqlstate: str | None, statement: str, *, in_block: bool) -> str:
    """Give a line of advice where the surrounding transaction is what PostgreSQL objects to.

    `in_block` tells whether the application has begun one itself.
    """
    if in_block and sqlstate in _IN_NO_BLOCK and not _SETS.match(statement):
        return ""
    return _ADVICE.get(sqlstate or "", "")


def explain(error: psycopg.Error, line: str) -> None:
    """Add a line of advice to an error."""
    if line and error.args and line not in str(error.args[0]):
        error.args = (f"{error.args[0]}\n{line}", *error.args[1:])


def explanation(error: psycopg.Error) -> str:
    """Give the line of advice that was added to an error, if any was."""
    told = str(error.args[0]) if error.args else ""
    return next((line for line in _ADVICE.values() if line in told), "")


def no_block(part: Statement) -> psycopg.Error:
    """Give the server's error for a statement that only a transaction block can have."""
    word = _SHOWN.get(part.words[0], part.words[0])
    if part.verb is Verb.DECLARE:
        word = "DECLARE CURSOR"  # psycopg's server-side cursors show the query alone
    return psycopg.errors.NoActiveSqlTransaction(f"{word} can only be used in transaction blocks")


def no_two_phase() -> RefusedError:
    """Refuse a two-phase commit."""
    return RefusedError(
        "two-phase commit would end the transaction that the test is rolled back with", _MARK
    )


def no_notifies() -> RefusedError:
    """Refuse to wait for notifications."""
    return RefusedError(
        "notifications are sent at a real commit, and a rolled-back test has none", _MARK
    )
