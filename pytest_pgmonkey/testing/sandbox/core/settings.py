"""The session settings of each member, and what a statement says of settings; asks no server."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    import psycopg


class WrongSettingError(Exception):
    """A setting of the file, by its place among them: refused, or (no error) overwritten."""

    def __init__(self, index: int, error: psycopg.Error | None = None) -> None:
        super().__init__(index, error)
        self.index = index
        self.error = error


class Session:
    """The settings of one member, as far as they differ from those of the server."""

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


#: Of a backend between two members.
UNKNOWN: Final = Session()


@lru_cache(maxsize=256)
def untouched(given: tuple[tuple[str, str], ...]) -> Session | None:
    """Give the session of members that have set nothing: those of one file share it."""
    return Session(given) if given else None


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
