"""The server that `--pgmonkey-config` names: its database, or scratch databases beside it."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import sql

from ..errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..config import ConnectionSpec
    from .template import Recipe

__all__ = ["ConfiguredServer", "ScratchError"]

_NAME: Final = re.compile(r"pgmonkey_([0-9a-f]{12})([0-9a-f]{8})(?:_\w+)?")


class ScratchError(PGMonkeyError):
    """A scratch database cannot be made on the configured server."""


def _checksum(run: str) -> str:
    return hashlib.sha256(f"pytest-pgmonkey {run}".encode()).hexdigest()[:8]


def _lock_key(run: str) -> int:
    """Give the advisory lock that a living run holds; positive, 60 bits."""
    return int(hashlib.sha256(run.encode()).hexdigest()[:15], 16)


class ConfiguredServer:
    """A server that somebody else runs; nothing that we did not create is ever dropped on it.

    Scratch databases are named after their run, which proves by an advisory lock that it lives;
    those of dead runs are dropped when the next run makes its own.
    """

    source = "config"

    def __init__(self, spec: ConnectionSpec, config: Mapping[str, Any], origin: str) -> None:
        self.spec = spec
        self.description = f"config {origin}"
        self._config = config
        self._run = secrets.token_hex(6)
        self._lock: psycopg.Connection[Any] | None = None
        self._made: list[str] = []

    @property
    def version(self) -> str:
        """The server's version; connects."""
        with self._connect() as conn:
            return str(conn.info.parameter_status("server_version")).split(" ", 1)[0]

    @property
    def existing(self) -> str:
        """The database that the file names."""
        return self.spec.dbname or "postgres"

    def conninfo(self, dbname: str) -> dict[str, str]:
        return {**self.spec.conninfo_dict, "dbname": dbname}

    def admin_conninfo(self, dbname: str = "") -> dict[str, str]:
        return self.conninfo(dbname or self.existing)

    def config(self, dbname: str) -> dict[str, Any]:
        settings = {**self._config["connection_settings"], "dbname": dbname}
        return {**self._config, "connection_settings": settings}

    def scratch_name(self, name: str) -> str:
        """Give the name of a scratch database, which tells its run."""
        return f"pgmonkey_{self._run}{_checksum(self._run)}_{name}"

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create a scratch database of this run, or a copy of another; raises ScratchError."""
        conn = self._sweep()
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        try:
            conn.execute(statement)
        except psycopg.errors.InsufficientPrivilege:
            if template is not None:
                raise
            raise ScratchError(
                f"{self.description}: its role may not create databases, and a schema needs one: "
                "ALTER ROLE … CREATEDB, or test in the database as it is, with "
                "--pgmonkey-database=existing and no schema"
            ) from None
        self._made.append(name)

    def drop_database(self, name: str) -> None:
        """Drop a database that this run has made."""
        if name in self._made and self._lock is not None:
            self._made.remove(name)
            self._drop(self._lock, name)

    def template(self, recipe: Recipe, load: Callable[[str], None]) -> None:
        """Have the schema loaded into each database."""

    def publish(self) -> None:
        """The server is everybody's already."""

    def log(self) -> str:
        """Give nothing: the log is its owner's."""
        return ""

    def stop(self) -> None:
        """Drop what this run has made."""
        for name in list(self._made):
            self.drop_database(name)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.Connection.connect(
            **self.spec.conninfo_dict,  # type: ignore[arg-type]
            autocommit=True,
        )

    def _sweep(self) -> psycopg.Connection[Any]:
        """Drop, once, the scratch databases of runs that are dead, and only those."""
        if self._lock is not None:
            return self._lock
        conn = self._lock = self._connect()
        conn.execute("SELECT pg_advisory_lock(%s)", [_lock_key(self._run)])
        rows = conn.execute(
            "SELECT datname FROM pg_catalog.pg_database WHERE datname LIKE 'pgmonkey\\_%%' "
            "AND pg_catalog.pg_has_role(datdba, 'USAGE')"
        )
        for (name,) in rows.fetchall():
            found = _NAME.fullmatch(name)
            if found and _checksum(found[1]) == found[2] and found[1] != self._run:
                self._sweep_one(conn, name, found[1])
        return conn

    def _sweep_one(self, conn: psycopg.Connection[Any], name: str, run: str) -> None:
        key = _lock_key(run)
        taken = conn.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone()
        if taken is None or not taken[0]:
            return
        try:
            self._drop(conn, name)
        except psycopg.Error:
            # Another run may sweep at the same time, or somebody be connected: the next tries.
            return
        finally:
            conn.execute("SELECT pg_advisory_unlock(%s)", [key])

    @staticmethod
    def _drop(conn: psycopg.Connection[Any], name: str) -> None:
        conn.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )
