"""What is done to a whole database before it is renamed or copied, on any server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["rename", "seal"]

_END_SESSIONS: Final = """\
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE datname = %s AND pid <> pg_catalog.pg_backend_pid()
AND pg_catalog.pg_has_role(usesysid, 'USAGE')
"""


def rename(conn: Connection[Any], name: str, new_name: str) -> None:
    """Rename a database after its sessions have been ended."""
    old, new = sql.Identifier(name), sql.Identifier(new_name)
    _close_off(conn, name)
    conn.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(old, new))
    conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(new))


def seal(conn: Connection[Any], loaded: str, name: str) -> bool:
    """Turn a loaded database into a template; gives `False` where another was quicker.

    Nobody may connect to it from then on: a template that has sessions cannot be copied.
    """
    names = {"loaded": sql.Identifier(loaded), "name": sql.Identifier(name)}
    _close_off(conn, loaded)
    try:
        conn.execute(sql.SQL("ALTER DATABASE {loaded} RENAME TO {name}").format(**names))
    except psycopg.errors.DuplicateDatabase:
        return False
    return True


def _close_off(conn: Connection[Any], name: str) -> None:
    """Let nobody connect to a database any more, and end the sessions that are in it.

    A schema step may have left one open, as SQLAlchemy's engines do; a test may have left
    something running, which would connect anew at once.
    """
    conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
    conn.execute(_END_SESSIONS, [name])
