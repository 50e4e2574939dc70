"""What the statements of an operation need around them, whichever door they come through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from ...sql.lexer import Verb
from .backend import Level
from .refusals import no_block

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...sql.lexer import Statement
    from .member import Member

    Steps = Generator[Any, Any, Any]
    Parts = tuple[Statement, ...]

CONTROL: Final = frozenset({Verb.BEGIN, Verb.COMMIT, Verb.ROLLBACK, Verb.TWO_PHASE})
_ONLY_IN_BLOCKS: Final = {
    Verb.SET_LOCAL: "SET LOCAL",
    Verb.SET_TRANSACTION: "SET TRANSACTION",
    Verb.SET_CONSTRAINTS: "SET CONSTRAINTS",
}
_SESSION_VERBS: Final = frozenset({Verb.SET, Verb.DEALLOCATE, Verb.DISCARD})
_BLOCK_VERBS: Final = frozenset({Verb.SAVEPOINT, Verb.DECLARE})


class Door(Protocol):
    """What a client says of its transactions, and how it is warned."""

    @property
    def autocommit(self) -> bool:
        """Whether no transaction begins by itself."""

    def begin_command(self) -> bytes:
        """Give the BEGIN with the client's own modes."""

    def warn(self, sqlstate: str, message: str) -> None:
        """Warn of what the server would warn of."""


def speak_of_transactions(parts: Parts) -> bool:
    """Whether any of the statements begins or ends one."""
    return any(part.verb in CONTROL for part in parts)


def is_in_place(member: Member) -> bool:
    """Whether the backend is where the member left it, but for answers to be collected."""
    backend, transaction = member.backend, member.transaction
    return not (
        transaction.suspended
        or backend.settings_of is not transaction.session
        or backend.stale_cursors
    )


def begins_at_once(member: Member, part: Statement) -> bool:
    """Whether a plain statement in autocommit needs nothing before it."""
    backend, transaction = member.backend, member.transaction
    session = transaction.session
    return (
        backend.level is Level.STANDING
        and not (session is not None and session.sets_modes)
        # A commit that does more than end it would have to ask the server.
        and (part.read_only or (backend.deferrable == [] and not transaction.temporary))
    )


def is_script(member: Member, parts: Parts, *, autocommit: bool) -> bool:
    """Whether the statements must be run one by one, for what they do to transactions."""
    if speak_of_transactions(parts):
        return True
    if len(parts) < 2:
        return False
    if member.failed:
        return True  # until one of them is a ROLLBACK TO, nothing can be done before them
    implicit = autocommit and not member.transaction.open
    return implicit and any(part.verb in _BLOCK_VERBS for part in parts)


def writes_in_block(parts: Parts, *, is_open: bool) -> bool:
    """Whether any of the statements may write, or be undone, inside a transaction block."""
    for part in parts:
        if part.verb in CONTROL:
            is_open = part.verb is Verb.BEGIN
        elif is_open and not (part.read_only or part.verb in _SESSION_VERBS):
            return True
    return False


def discards_all(member: Member, parts: Parts, *, autocommit: bool) -> bool:
    """Whether they are a DISCARD ALL outside of a transaction, in which PostgreSQL refuses it."""
    return (
        len(parts) == 1
        and parts[0].words == ("DISCARD", "ALL")
        and autocommit
        and not member.transaction.open
    )


def refuse_outside(member: Member, parts: Parts, *, autocommit: bool) -> None:
    """Refuse, as the server would, what needs a transaction block where there is none."""
    if member.transaction.open or not autocommit or len(parts) != 1:
        return
    (part,) = parts
    opens_cursor = part.verb is Verb.DECLARE and not part.holds
    if part.verb is Verb.SAVEPOINT or opens_cursor or part.words[0] == "LOCK":
        raise no_block(part)


def warn_outside(member: Member, parts: Parts, door: Door) -> None:
    """Warn, as the server would, of what has no effect where there is no transaction block."""
    if not member.transaction.open and len(parts) == 1:
        name = _ONLY_IN_BLOCKS.get(parts[0].verb)
        if name:
            door.warn("25P01", f"{name} can only be used in transaction blocks")


def prepare(
    member: Member, parts: Parts, params: Any, door: Door, *, by_user: bool = True
) -> Steps:
    """Begin what an operation needs, and run what comes before its statements.

    `by_user` is false where it is the driver's own: for that no transaction begins by itself.
    """
    transaction = member.transaction
    if not transaction.open and not transaction.unit:
        if door.autocommit or not by_user:
            yield from transaction.begin_unit()
            warn_outside(member, parts, door)
        else:
            # Our own commands come first, and must not be before the transaction.
            yield from transaction.begin(door.begin_command())
    for part in parts:
        yield from member.before(part, params)


def park(member: Member, parts: Parts) -> Steps:
    """Let no time-out that the statements have looked at end the session afterwards."""
    for part in parts:
        yield from member.transaction.park_timeouts(part)
