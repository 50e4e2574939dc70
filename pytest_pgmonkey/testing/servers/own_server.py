"""The databases of a server that belongs to one run, whatever it runs in."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .server import settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection, sql

    from ..databases.recipe import Recipe

__all__ = ["ADMIN", "ROLE", "THROWAWAY", "OwnServer"]

ADMIN = "postgres"
ROLE = "pgmonkey"
# Of a server whose data nobody will miss.
THROWAWAY = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# What ALTER DATABASE … SET has set is not in the files that CREATE DATABASE copies.
COPY_SETTINGS = """\
INSERT INTO pg_catalog.pg_db_role_setting
SELECT copy.oid, setrole, setconfig
FROM pg_catalog.pg_db_role_setting, pg_catalog.pg_database AS copy, pg_catalog.pg_database AS model
WHERE copy.datname = %s AND model.datname = %s AND setdatabase = model.oid
"""


class OwnServer(ABC):
    """A server on which the superuser prepares databases that the tests' role owns."""

    existing = None
    _alone = True

    @property
    @abstractmethod
    def version(self) -> str:
        """The server's version, such as `18.6`."""

    @property
    @abstractmethod
    def major(self) -> int:
        """The first number of the version."""

    @abstractmethod
    def _conninfo(self, user: str, dbname: str) -> dict[str, str]:
        """Give libpq's keywords for a role."""

    @abstractmethod
    def stop(self) -> None:
        """Leave nothing behind; a second call does nothing."""

    def conninfo(self, dbname: str) -> dict[str, str]:
        return self._conninfo(ROLE, dbname)

    def admin_conninfo(self, dbname: str = "postgres") -> dict[str, str]:
        return self._conninfo(ADMIN, dbname)

    def config(self, dbname: str) -> dict[str, Any]:
        return settings_of(self.conninfo(dbname))

    def scratch_name(self, name: str) -> str:
        """Give the name of a database for tests; the whole server is the run's own."""
        return name

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create a database that the tests' role owns."""
        from psycopg import sql

        statement = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(ROLE), sql.Identifier(template or "template1")
        )
        if self.major >= 15:
            statement += sql.SQL(" STRATEGY FILE_COPY")  # quicker than WAL_LOG without fsync
        with self._admin() as conn:
            conn.execute(statement)
            if template is not None:
                conn.execute(COPY_SETTINGS, [name, template])

    def drop_database(self, name: str) -> None:
        """Drop a database with the sessions that are still in it; a missing one is fine."""
        from psycopg import sql

        self._execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )

    def rename_database(self, name: str, new_name: str) -> None:
        """Rename a database and end its sessions."""
        from ..databases.renaming import rename

        with self._admin() as conn:
            rename(conn, name, new_name)

    def template(self, recipe: Recipe, load: Callable[[str], None]) -> str:
        """Give the database that a recipe makes, loaded by the first who asks.

        It has its name when it is complete; `load` is called with another.
        """
        with self._admin() as conn:
            conn.execute("SELECT pg_catalog.pg_advisory_lock(%s)", [recipe.lock])
            found = conn.execute(
                "SELECT FROM pg_catalog.pg_database WHERE datname = %s", [recipe.name]
            ).fetchone()
            if found is None:
                self._load_template(conn, recipe, load)
        if found is None and self._alone:
            self._save_template(recipe)
        return recipe.name

    def extension_advice(self, name: str, problem: str) -> str:  # noqa: ARG002 - not every server can
        """Give nothing: what an image holds is its maker's business."""
        return ""

    def log(self) -> str:
        """Give the last lines that the server wrote, where they can be had."""
        return ""

    def publish(self) -> None:
        """Let others use the server from now on, who expect it not to be stopped and started."""
        self._alone = False

    def _load_template(
        self, conn: Connection[Any], recipe: Recipe, load: Callable[[str], None]
    ) -> None:
        import psycopg

        from ..databases.renaming import seal

        partial = f"{recipe.name}_partial"
        self.create_database(partial)
        try:
            load(partial)
        except BaseException:
            with contextlib.suppress(psycopg.Error):  # the server may have gone
                self.drop_database(partial)
            raise
        seal(conn, partial, recipe.name)

    def _save_template(self, recipe: Recipe) -> None:  # noqa: B027 - not every server can
        """Save the server's data with a template for later runs, where that can be done."""

    def _make_role(self, password: str | None) -> None:
        """Make the role of the tests, which owns their databases and is no superuser."""
        from psycopg import sql

        statement = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
        self._execute(statement.format(sql.Identifier(ROLE), sql.Literal(password)))

    def _admin(self) -> Connection[Any]:
        import psycopg
        from psycopg.conninfo import make_conninfo

        return psycopg.connect(make_conninfo(**self.admin_conninfo()), autocommit=True)

    def _execute(self, statement: sql.Composed) -> None:
        with self._admin() as conn:
            conn.execute(statement)
