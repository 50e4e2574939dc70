"""Commands on whole databases, the same on every server."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import sql

from ...errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from psycopg import Connection

__all__ = [
    "ExtensionError",
    "SettingError",
    "connect",
    "create",
    "create_extensions",
    "drop",
    "is_alive",
    "rename",
    "seal",
    "write_catalog_cache",
]

_END_SESSIONS: Final = """\
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
WHERE datname = %s AND pid <> pg_catalog.pg_backend_pid()
AND pg_catalog.pg_has_role(usesysid, 'USAGE')
"""
_HAS_CATALOG_CACHE: Final = """\
SELECT FROM pg_catalog.pg_database
WHERE datname = %s
AND (pg_catalog.pg_stat_file('base/' || oid || '/pg_internal.init', true)).size IS NOT NULL
"""
_SETTINGS: Final = """\
SELECT rolname, setconfig
FROM pg_catalog.pg_db_role_setting LEFT JOIN pg_catalog.pg_roles ON pg_roles.oid = setrole
WHERE setdatabase = (SELECT oid FROM pg_catalog.pg_database WHERE datname = %s)
ORDER BY setrole
"""
# Those whose value the server keeps as a list of quoted names.
_LISTS: Final = frozenset(
    (
        "local_preload_libraries search_path session_preload_libraries shared_preload_libraries "
        "temp_tablespaces unix_socket_directories"
    ).split()
)


class ExtensionError(PGMonkeyError):
    """The server does not have an extension, or refuses to create it."""


class SettingError(Exception):
    """A setting of a database cannot be given to its copy."""


def connect(conninfo: Mapping[str, Any], *, autocommit: bool = True) -> Connection[Any]:
    """Connect by libpq's keywords."""
    return psycopg.Connection.connect(autocommit=autocommit, **conninfo)


def is_alive(conn: Connection[Any]) -> bool:
    """Whether a connection in autocommit still has its session: tests may have ended all."""
    try:
        conn.execute("")
    except psycopg.OperationalError:
        return False
    return True


def create(
    conn: Connection[Any],
    name: str,
    template: str | None = None,
    *,
    owner: str = "",
    unlogged: bool = False,
) -> None:
    """Create a database, empty or a copy of another with its settings; raises SettingError.

    With `unlogged` files are copied, which is quicker where nobody waits for a disk.
    """
    statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if owner:
        statement += sql.SQL(" OWNER {}").format(sql.Identifier(owner))
    if template is not None:
        statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
    if unlogged and conn.info.server_version >= 150000:
        statement += sql.SQL(" STRATEGY FILE_COPY")
    conn.execute(statement)
    if template is not None:
        _copy_settings(conn, template, name)


def drop(conn: Connection[Any], name: str) -> None:
    """Drop a database with the sessions that are still in it; a missing one is fine."""
    conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def roll_back_prepared(conn: Connection[Any]) -> None:
    """Roll back what two-phase commits have left in a database, which cannot be dropped else."""
    for (gid,) in conn.execute(
        "SELECT gid FROM pg_catalog.pg_prepared_xacts "
        "WHERE database = pg_catalog.current_database()"
    ).fetchall():
        conn.execute(sql.SQL("ROLLBACK PREPARED {}").format(gid))


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


def write_catalog_cache(conn: Connection[Any], template: str, conninfo: Mapping[str, Any]) -> None:
    """Have a template's `pg_internal.init` written, which its copies take over.

    A server removes these files when it starts, and a database's first session writes it anew:
    that takes as long as all else that is done to connect. Needs a superuser.
    """
    if conn.execute(_HAS_CATALOG_CACHE, [template]).fetchone() is not None:
        return
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    conn.execute(allow.format(sql.Identifier(template), True))
    try:
        connect(conninfo).close()
    finally:
        conn.execute(allow.format(sql.Identifier(template), False))


def _close_off(conn: Connection[Any], name: str) -> None:
    """Let nobody connect to a database any more, and end the sessions that are in it.

    A schema step may have left one open, as SQLAlchemy's engines do; a test may have left
    something running, which would connect anew at once.
    """
    conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
    conn.execute(_END_SESSIONS, [name])


def create_extensions(
    conn: Connection[Any],
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


def _copy_settings(conn: Connection[Any], model: str, copy: str) -> None:
    """Give a database what ALTER … SET has set in another.

    CREATE DATABASE does not copy that, and only a superuser may write it into the catalogue.
    """
    for role, settings in conn.execute(_SETTINGS, [model]).fetchall():
        for setting in settings:
            name, _, value = setting.partition("=")
            try:
                conn.execute(_set(copy, role, name, value))
            except psycopg.Error as error:
                of = f"role {role!r} in " if role else ""
                raise SettingError(f"{name} of {of}it: {error.diag.message_primary}") from None


def _set(database: str, role: str | None, name: str, value: str) -> sql.Composed:
    whose = sql.SQL("ALTER DATABASE {}").format(sql.Identifier(database))
    if role is not None:
        whose = sql.SQL("ALTER ROLE {} IN DATABASE {}").format(
            sql.Identifier(role), sql.Identifier(database)
        )
    values = sql.SQL(", ").join(map(sql.Literal, _values(name, value)))
    # An extension's setting has a name of two parts.
    return sql.SQL("{} SET {} TO {}").format(whose, sql.Identifier(*name.split(".")), values)


def _values(name: str, value: str) -> Iterator[str]:
    if name not in _LISTS:
        yield value
        return
    for part in re.findall(r'"(?:[^"]|"")*"|[^,\s]+', value):
        yield part[1:-1].replace('""', '"') if part.startswith('"') else part
