"""The option `env`: environment variables that give an application the tests' address."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from .urls import url_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["PARTS", "Variable", "read_variable", "values"]

#: What a variable may hold, besides a URL with a scheme of one's own (`url:SCHEME`).
PARTS: Final = ("url", "dsn", "host", "port", "user", "password", "dbname")
_LINE: Final = re.compile(r"([A-Za-z_]\w*)(?:\s*=\s*(\S+))?")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


class Variable(NamedTuple):
    """An environment variable, and the part of an address that it holds."""

    name: str
    part: str
    scheme: str = ""


def read_variable(line: str) -> Variable | None:
    """Read `NAME`, `NAME = url`, `NAME = url:SCHEME`, `NAME = host`…; else give `None`."""
    found = _LINE.fullmatch(line.strip())
    if found is None:
        return None
    name, word = found[1], found[2] or "url"
    part, colon, scheme = word.partition(":")
    if part not in PARTS or (colon and (part != "url" or not _SCHEME.fullmatch(scheme))):
        return None
    return Variable(name, part, scheme or "postgresql")


def values(
    variables: Iterable[Variable],
    dsn: Callable[[], str],
    by_tcp: Callable[[], Mapping[str, str]],
) -> dict[str, str]:
    """Give the variables' values; ask only for addresses that they need."""
    found = {}
    for variable in variables:
        if variable.part == "dsn":
            found[variable.name] = dsn()
        elif variable.part == "url":
            found[variable.name] = url_of(by_tcp(), variable.scheme)
        else:
            found[variable.name] = by_tcp()[variable.part]
    return found
