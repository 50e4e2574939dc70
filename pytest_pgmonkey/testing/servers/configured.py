"""The server that `--pgmonkey-config` names: its database, or scratch databases beside it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

import psycopg

from ...errors import PGMonkeyError
from ...judge import TLS_FILES
from ...secrets import is_sensitive
from ..databases.advisory_locks import claim, exclusive, lock_shared, unlock_shared
from ..databases.commands import SettingError, connect, drop
from ..databases.shared_templates import (
    checksum,
    exists,
    note_use,
    remove_unused,
    template_name,
)
from .server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from ...config import ConnectionSpec
    from ...kept_databases import Kept
    from ..databases.recipe import Recipe
    from .server import Worker

__all__ = ["ConfiguredServer", "ScratchError"]

_NAME: Final = re.compile(r"pgmonkey_([0-9a-f]{12})([0-9a-f]{8})(?:_\w+)?")
_PATIENT: Final = """\
SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_session_timeout')
"""


class ScratchError(PGMonkeyError):
    """A scratch database cannot be made on the configured server."""


class ConfiguredServer(Server):
    """A server that somebody else runs; nothing that we did not create is ever dropped on it.

    Scratch databases are named after their run, which proves by an advisory lock that it lives;
    those of dead runs are dropped when the next run makes its own. The workers of a run count as
    runs of their own, and share what is named after the run that they are of.
    """

    source = "config"

    def __init__(
        self,
        spec: ConnectionSpec,
        config: Mapping[str, Any],
        worker: Worker | None = None,
        read_with: Mapping[str, bool] | None = None,
    ) -> None:
        """Take what a file says, and how it was read: `pgmonkey kept` reads it again."""
        self.spec = spec
        self.description = f"config {spec.origin}"
        self.existing: str = spec.dbname or "postgres"
        self._place = {"file": spec.origin, "options": dict(read_with or {})}
        self._config = config
        self._run = secrets.token_hex(6)
        self._common = hashlib.sha256(worker.run.encode()).hexdigest()[:12] if worker else None
        self._templates: dict[Recipe, str] = {}
        self._lock: psycopg.Connection[Any] | None = None
        self._made: set[str] = set()

    @property
    def user(self) -> str:
        given = self.spec.conninfo_dict.get("user")
        if given:
            return given
        defaults = {each.keyword: each.val or b"" for each in psycopg.pq.Conninfo.get_defaults()}
        return defaults[b"user"].decode()

    def conninfo(self, dbname: str) -> dict[str, str]:
        return {**self.spec.conninfo_dict, "dbname": dbname}

    def admin_conninfo(self, dbname: str = "") -> dict[str, str]:
        return self.conninfo(dbname or self.existing)

    def config(self, dbname: str) -> dict[str, Any]:
        settings = {**self._config["connection_settings"], "dbname": dbname}
        return {**self._config, "connection_settings": settings}

    def scratch_name(self, name: str) -> str:
        """Give the name of a scratch database, which tells its run."""
        return _scratch_name(self._run, name)

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create a scratch database of this run, or a copy of another; raises ScratchError."""
        self._made.add(name)
        try:
            super().create_database(name, template)
        except psycopg.errors.InsufficientPrivilege:
            if template is not None and template not in self._templates.values():
                raise
            raise ScratchError(
                f"{self.description}: its role may not create databases, and a schema needs one: "
                "ALTER ROLE … CREATEDB, or test in the database as it is, with "
                "--pgmonkey-database=existing and no schema"
            ) from None
        except SettingError as error:
            self.drop_database(name)
            raise ScratchError(
                f"{self.description}: its role cannot give a copy of the database {template!r} "
                f"the setting {error}; set it for the role instead (ALTER ROLE … SET)"
            ) from None

    def drop_database(self, name: str) -> None:
        """Drop a database that this run has made."""
        if name in self._made:
            self._made.discard(name)
            super().drop_database(name)

    def rename_database(self, name: str, new_name: str) -> None:
        """Rename a database that this run has made, which no sweep knows from then on."""
        if name in self._made:
            super().rename_database(name, new_name)
            self._made.discard(name)

    def kept_as(self, name: str, test: str) -> Kept:
        """Tell how a database is reached, with what people may read of the file."""
        conninfo = self.conninfo(name)
        shown = {k: v for k, v in conninfo.items() if not is_sensitive(k) or k in TLS_FILES}
        note = f"psql asks for what {self.spec.origin} holds" if shown != conninfo else ""
        return self._kept(name, test, shown, self._place, note=note)

    def template(self, recipe: Recipe, load: Callable[[str], None]) -> str | None:
        """Give the database that a recipe makes; it stays for later runs if that is lasting.

        Another is made once for all workers of a run, `None` where this process has no others.
        """
        if not recipe.lasting and self._common is None:
            return None
        conn = self._sweep()
        name = self._templates.get(recipe)
        if name is None and recipe.lasting:
            name = template_name(conn, recipe, self._config)
            lock_shared(conn, name)  # from here on no other run removes it
        name = name or _scratch_name(str(self._common), f"schema_{recipe.digest[:16]}")
        self._templates[recipe] = name
        if not exists(conn, name):
            with exclusive(conn, f"load {name}"):
                if not exists(conn, name):
                    self._load_template(conn, self.scratch_name("loading"), name, load)
            if recipe.lasting:
                remove_unused(conn, but=self._templates.values())
        if recipe.lasting:
            note_use(conn, name)
        return name

    def stop(self) -> None:
        """Drop what this run has made; the next one's sweep has what cannot be dropped now."""
        conn = self._lock
        if conn is None:
            return
        with contextlib.suppress(psycopg.OperationalError):
            for name in list(self._made):
                self.drop_database(name)
            self._drop_common(conn)
        conn.close()
        self._lock = None

    def _admin(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        return contextlib.nullcontext(self._sweep())

    def _sweep(self) -> psycopg.Connection[Any]:
        """Drop, once, the scratch databases of runs that are dead, and only those."""
        if self._lock is not None:
            return self._lock
        conn = connect(self.admin_conninfo())
        try:
            self._refuse_pooler(conn)
            # It lives as long as the run, and waits while another loads the same schema.
            conn.execute(_PATIENT)
            own = {self._run, self._common or self._run}
            for run in own:
                lock_shared(conn, run)
            for name, run in _scratch_databases(conn):
                if run not in own:
                    self._sweep_one(conn, name, run)
        except BaseException:
            conn.close()
            raise
        self._lock = conn
        return conn

    def _refuse_pooler(self, conn: psycopg.Connection[Any]) -> None:
        """Refuse a server whose sessions are not ours: advisory locks would prove nothing.

        Another run would drop our databases, or we those of another.
        """
        row = conn.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
        if row != (conn.info.backend_pid,):
            raise ScratchError(
                f"{self.description} leads through a connection pooler such as PgBouncer, behind "
                "which scratch databases and clones are not safe: name the server's own host and "
                "port in the configuration for tests, or test in the database as it is, with "
                "--pgmonkey-database=existing and rollback isolation"
            )

    def _sweep_one(self, conn: psycopg.Connection[Any], name: str, run: str) -> None:
        # Another run may sweep at the same time, or somebody be connected: the next tries.
        with claim(conn, run) as dead, contextlib.suppress(psycopg.Error):
            if dead:
                drop(conn, name)

    def _drop_common(self, conn: psycopg.Connection[Any]) -> None:
        """Drop what the workers of this run share, if this is the last of them."""
        if self._common is None:
            return
        unlock_shared(conn, self._common)
        for name, run in _scratch_databases(conn):
            if run == self._common:
                self._sweep_one(conn, name, run)


def _scratch_name(run: str, name: str) -> str:
    return f"pgmonkey_{run}{checksum(run)}_{name}"


def _scratch_databases(conn: psycopg.Connection[Any]) -> Iterator[tuple[str, str]]:
    """Give the scratch databases that the role may drop, each with the run that it is of."""
    rows = conn.execute(
        "SELECT datname FROM pg_catalog.pg_database WHERE datname LIKE 'pgmonkey\\_%' "
        "AND pg_catalog.pg_has_role(datdba, 'USAGE')"
    )
    for (name,) in rows.fetchall():
        found = _NAME.fullmatch(name)
        if found and checksum(found[1]) == found[2]:
            yield name, found[1]
