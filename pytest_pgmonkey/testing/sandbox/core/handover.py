"""The backend changes hands: each member finds its own session settings, and no other's.

Nothing is replayed: what a member's statements have set is read from the server when another
member takes over, so that what was rolled back is not set again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from psycopg.pq import ExecStatus

from ...timeouts import NAMES
from .driver import error_from_result
from .settings import UNKNOWN, Session, WrongSettingError, assignment, literal

if TYPE_CHECKING:
    from collections.abc import Generator

    import psycopg
    from psycopg.pq.abc import PGresult

    from .backend import Backend

_RESET: Final = (b"SET SESSION AUTHORIZATION DEFAULT", b"RESET ALL")


def change_hands(
    backend: Backend, session: Session | None, *, between: bool
) -> Generator[Any, Any, None]:
    """Put the settings of the last member away and this one's in force.

    `between` transactions they are set in front of the savepoint that stands, or a rollback to it
    would undo them. Raises WrongSettingError.
    """
    last, backend.settings_of = backend.settings_of, UNKNOWN
    if last is not None and last.names and not last.ended:
        names = sorted(last.names)
        found = zip(names, (yield from read(backend, names)), strict=True)
        last.values = {name: value for name, value in found if value is not None}
    commands = [*_RESET]
    if session is not None:
        commands += [assignment(name, value) for name, value in session.given]
        commands += backend.timeouts.after_reset(name for name, _ in session.given)
        # The role last: it may not be allowed to set the others.
        values = sorted(session.values.items(), key=lambda item: item[0] == "role")
        commands += [assignment(name, value) for name, value in values]
    else:
        commands += backend.timeouts.after_reset()
    results = yield from _send(backend, commands, between=between)
    if results[-1].status == ExecStatus.FATAL_ERROR:
        raise _refusal(session, len(results) - 1 - len(_RESET), error_from_result(results[-1]))
    # Not where statements have set others over them since.
    if session is not None and not session.verified and not session.names:
        yield from _verify(backend, session, results[len(_RESET) :])
    backend.settings_of = session


def _send(
    backend: Backend, commands: list[bytes], *, between: bool
) -> Generator[Any, Any, list[PGresult]]:
    """Send commands and give their answers; what a cancel request hits is sent again."""
    results: list[PGresult]
    if not backend.is_begun:
        return (yield from backend.repeat(b"; ".join(commands)))
    if not between:
        return (yield from backend.attempt(b"; ".join(commands)))
    yield from backend.stand()
    results = yield from backend.attempt_keep(commands)
    while backend.is_canceled(results):
        results = yield from backend.attempt_keep(commands)
    return results


def _refusal(session: Session | None, index: int, error: psycopg.Error) -> Exception:
    of_file = session is not None and 0 <= index < len(session.given)
    return WrongSettingError(index, error) if of_file else error


def _verify(
    backend: Backend, session: Session, results: list[PGresult]
) -> Generator[Any, Any, None]:
    """Find out, once, whether the settings of a file leave each other in force."""
    names = [name for name, _ in session.given]
    current = yield from read(backend, names)
    for index, now in enumerate(current):
        # By the same name twice: the section's setting goes over one of the connection's options.
        if names[index] in names[index + 1 :] or names[index] in NAMES:
            continue
        if now is None or now.encode() != results[index].get_value(0, 0):
            raise WrongSettingError(index)
    session.verified = True


def read(backend: Backend, names: list[str]) -> Generator[Any, Any, list[str | None]]:
    """Give the current values of settings; `None` for one that does not exist."""
    columns = [b"pg_catalog.current_setting(%s, true)" % literal(name) for name in names]
    (result,) = yield from backend.run(b"SELECT " + b", ".join(columns))
    values = [result.get_value(0, i) for i in range(len(names))]
    return [None if value is None else value.decode() for value in values]
