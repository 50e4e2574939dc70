"""Session settings on a session that is shared: each borrower finds its own, and no other's.

Nothing is replayed: what a borrower's statements have set is read from the server when another
borrower takes over, so that what was rolled back is not set again.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from psycopg.pq import ExecStatus

from .backend import REFRESH, UNDO
from .internals import error_from_result

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import psycopg
    from psycopg.pq.abc import PGresult

    from .backend import Backend

_RESET: Final = (b"SET SESSION AUTHORIZATION DEFAULT", b"RESET ALL")


class WrongSettingError(Exception):
    """A setting of the file, by its place among them: refused, or (no error) overwritten."""

    def __init__(self, index: int, error: psycopg.Error | None = None) -> None:
        super().__init__(index, error)
        self.index = index
        self.error = error


class Session:
    """The settings of one borrower, as far as they differ from those of the server."""

    __slots__ = ("ended", "given", "names", "sets_modes", "values", "verified")

    def __init__(self, given: tuple[tuple[str, str], ...] = ()) -> None:
        self.given: Final = given
        self.names: set[str] = set()
        self.values: dict[str, str] = {}
        self.ended = False
        self.verified = not given
        self.sets_modes = any(name.startswith("default_transaction") for name, _ in given)

    def touch(self, names: Iterable[str]) -> None:
        """Note that a statement has perhaps set these."""
        self.names.update(names)
        if not self.sets_modes:
            self.sets_modes = any(name.startswith("default_transaction") for name in self.names)


_UNKNOWN: Final = Session()


@lru_cache(maxsize=256)
def untouched(given: tuple[tuple[str, str], ...]) -> Session | None:
    """Give the session of borrowers that have set nothing: those of one file share it."""
    return Session(given) if given else None


def change_hands(
    backend: Backend, session: Session | None, *, between: bool
) -> Generator[Any, Any, None]:
    """Put the settings of the last borrower away and this one's in force.

    `between` transactions they are set in front of the savepoint that stands, or a rollback to it
    would undo them. Raises WrongSettingError.
    """
    last, backend.settings_of = backend.settings_of, _UNKNOWN
    if last is not None and last.names and not last.ended:
        names = sorted(last.names)
        found = zip(names, (yield from read(backend, names)), strict=True)
        last.values = {name: value for name, value in found if value is not None}
    commands = [*_RESET]
    if session is not None:
        commands += [assignment(name, value) for name, value in session.given]
        # The role last: it may not be allowed to set the others.
        values = sorted(session.values.items(), key=lambda item: item[0] == "role")
        commands += [assignment(name, value) for name, value in values]
    stands = between and backend.is_begun
    if stands:
        yield from backend.stand()
        commands.append(REFRESH)
    results = yield from backend.attempt(b"; ".join(commands))
    if results[-1].status == ExecStatus.FATAL_ERROR:
        if stands and not backend.dead:
            yield from backend.run(UNDO)
        raise _refusal(session, len(results) - 1 - len(_RESET), error_from_result(results[-1]))
    # Not where statements have set others over them since.
    if session is not None and not session.verified and not session.names:
        yield from _verify(backend, session, results[len(_RESET) :])
    backend.settings_of = session


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
        if names[index] in names[index + 1 :]:
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


def assignment(name: str, value: str) -> bytes:
    """Give the statement that sets a setting for the session."""
    return b"SELECT pg_catalog.set_config(%s, %s, false)" % (literal(name), literal(value))


def literal(value: str) -> bytes:
    """Quote a string, whatever `standard_conforming_strings` says."""
    return b"E'%s'" % value.encode().replace(b"\\", b"\\\\").replace(b"'", b"\\'")


_ARGUMENT: Final = r"\s*('(?:[^']|'')*'|%(?:\(\w+\))?[sbt]|\$\d+|[\w.:]+)\s*"
_CONFIG_CALL: Final = re.compile(rf"set_config\s*\({_ARGUMENT},(.*?),{_ARGUMENT}\)", re.I | re.S)
_PLACEHOLDER: Final = re.compile(r"%[sbt]")


def config_calls(text: str, params: Any) -> list[tuple[str, bool]]:
    """Give name and locality of each `set_config` call, as far as text and parameters tell."""
    calls = []
    for call in _CONFIG_CALL.finditer(text):
        name = _argument(text, call, 1, params)
        if name:
            is_local = str(_argument(text, call, 3, params)).lower()
            calls.append((str(name).lower(), is_local in ("true", "t", "on", "1", "yes")))
    return calls


def _argument(text: str, call: re.Match[str], group: int, params: Any) -> Any:
    written = call.group(group)
    try:
        if written.startswith("%("):
            return params[written[2:-2]]
        if written.startswith("%"):
            return params[len(_PLACEHOLDER.findall(text, 0, call.start(group)))]
        if written.startswith("$"):
            return params[int(written[1:]) - 1]
    except (LookupError, TypeError):
        return None  # psycopg will say what is wrong with the parameters
    return written.strip("'").split("::")[0]
