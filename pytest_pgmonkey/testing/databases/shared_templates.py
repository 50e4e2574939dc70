"""Template databases that stay on a server which somebody else runs, for the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import sql

from ...config import connection_spec
from .advisory_locks import claim

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from psycopg import Connection

    from .recipe import Recipe

__all__ = [
    "checksum",
    "exists",
    "note_use",
    "remove_unused",
    "template_name",
]

FORMAT: Final = 1
LIMIT: Final = 6
_NAME: Final = re.compile(r"pgmonkey_template_([0-9a-f]{24})([0-9a-f]{8})")
_OWN: Final = "pg_catalog.pg_get_userbyid(datdba) = current_user"
# What else the result of a schema depends on: the server's build, the role and its settings, what
# a new database has from the start, and which versions of extensions there are.
_FACTS: Final = """\
SELECT pg_catalog.version(), current_user,
ARRAY(
    SELECT setconfig::text FROM pg_catalog.pg_db_role_setting LEFT JOIN pg_catalog.pg_roles
    ON pg_roles.oid = setrole
    WHERE setdatabase = 0 AND (setrole = 0 OR rolname = current_user) ORDER BY setrole
),
(
    SELECT pg_catalog.concat_ws(' ', encoding, datcollate, datctype)
    FROM pg_catalog.pg_database WHERE datname = 'template1'
),
ARRAY(
    SELECT name || ' ' || default_version
    FROM pg_catalog.pg_available_extensions ORDER BY name
)
"""


def checksum(text: str) -> str:
    """Give what proves that a name with this text in it is one of ours."""
    return hashlib.sha256(f"pytest-pgmonkey {text}".encode()).hexdigest()[:8]


def template_name(conn: Connection[Any], recipe: Recipe, config: Mapping[str, Any]) -> str:
    """Name the database that a recipe makes on this server, for this role and configuration."""
    settings = [config.get("sync_settings"), config.get("async_settings")]
    options = connection_spec(config, "normal").conninfo_dict.get("options")
    row = conn.execute(_FACTS).fetchone()
    text = json.dumps([FORMAT, recipe.digest, row, settings, options], default=str, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    return f"pgmonkey_template_{digest}{checksum(digest)}"


def exists(conn: Connection[Any], name: str) -> bool:
    """Whether there is such a database of ours; another role may have made one to deceive us."""
    query = f"SELECT FROM pg_catalog.pg_database WHERE datname = %s AND {_OWN}"
    return conn.execute(query, [name]).fetchone() is not None


def note_use(conn: Connection[Any], name: str) -> None:
    """Note on a template that it was used now: it stays longer than others."""
    row = conn.execute(
        "SELECT 'schema of tests (pytest-pgmonkey), last used ' || "
        "(pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')::text || ' UTC'"
    ).fetchone()
    text = sql.Literal(row[0] if row else "")
    # Another run may do so at the same moment, which is as good.
    with contextlib.suppress(psycopg.Error):
        conn.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(name), text))


def remove_unused(conn: Connection[Any], but: Collection[str]) -> None:
    """Remove the templates of this role used least recently, as far as no living run uses them."""
    rows = conn.execute(
        "SELECT datname FROM pg_catalog.pg_database "
        f"WHERE datname LIKE 'pgmonkey\\_template\\_%' AND {_OWN} "
        "ORDER BY pg_catalog.shobj_description(oid, 'pg_database') DESC NULLS LAST, datname"
    ).fetchall()
    others = [name for (name,) in rows if name not in but and _is_ours(name)]
    for name in others[LIMIT - len(but) :]:
        with claim(conn, name) as unused, contextlib.suppress(psycopg.Error):
            if unused:
                conn.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))


def _is_ours(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and checksum(found[1]) == found[2]
