"""Session settings on a session that is shared: each borrower finds its own, and no other's.

Nothing is replayed: what a borrower's statements have set is read from the server when another
borrower takes over, so that what was rolled back is not set again.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import psycopg

from .backend import REFRESH, UNDO

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from .backend import Backend

RESET: Final = b"SET SESSION AUTHORIZATION DEFAULT; RESET ALL"


class Session:
    """The settings of one borrower, as far as they differ from those of the server."""

    __slots__ = ("ended", "given", "names", "sets_modes", "values")

    def __init__(self, given: tuple[tuple[str, str], ...] = ()) -> None:
        self.given: Final = given
        self.names: set[str] = set()
        self.values: dict[str, str] = {}
        self.ended = False
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
    would undo them.
    """
    last, backend.settings_of = backend.settings_of, _UNKNOWN
    if last is not None and last.names and not last.ended:
        names = sorted(last.names)
        found = zip(names, (yield from read(backend, names)), strict=True)
        last.values = {name: value for name, value in found if value is not None}
    commands = [RESET]
    if session is not None:
        commands += [assignment(name, value) for name, value in session.given]
        # The role last: it may not be allowed to set the others.
        values = sorted(session.values.items(), key=lambda item: item[0] == "role")
        commands += [assignment(name, value) for name, value in values]
    if between and backend.is_begun:
        yield from backend.stand()
        commands.append(REFRESH)
        try:
            yield from backend.run(b"; ".join(commands))
        except psycopg.Error:
            yield from backend.run(UNDO)
            raise
    else:
        yield from backend.run(b"; ".join(commands))
    backend.settings_of = session


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
