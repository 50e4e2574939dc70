"""Extensions of the test database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ...errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["ExtensionError", "create_extensions"]


class ExtensionError(PGMonkeyError):
    """The server does not have an extension, or refuses to create it."""


def create_extensions(
    conn: psycopg.Connection[Any],
    names: Iterable[str],
    server: str,
    advice: Callable[[str, str], str],
) -> None:
    """Create extensions and what they need; raises ExtensionError.

    `server` describes the server, `advice` is asked for with the name and what went wrong.
    """
    for name in names:
        statement = sql.SQL("CREATE EXTENSION IF NOT EXISTS {} CASCADE")
        try:
            conn.execute(statement.format(sql.Identifier(name)))
        except psycopg.Error as error:
            problem = error.diag.message_primary or str(error)
            text = f"extension {name!r} on {server}: {problem}.{advice(name, problem)}"
            raise ExtensionError(text) from None
