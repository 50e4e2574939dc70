"""What a server for tests is, and what servers have in common that belong to one run."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from shlex import quote
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from ...errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from psycopg import Connection

    from ...kept_databases import Kept
    from ..databases.recipe import Recipe

__all__ = ["ADMIN", "ROLE", "RUN", "OwnServer", "Server", "ServerStartError", "Worker", "new_run"]

ADMIN: Final = "postgres"
ROLE: Final = "pgmonkey"
RUN: Final = "pgmonkey_run"
# Of a server whose data nobody will miss.
THROWAWAY: Final = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "max_connections": "100",
    # A rolled-back test keeps its locks to its end.
    "max_locks_per_transaction": "256",
    "max_prepared_transactions": "64",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def scratch_name(name: str, worker: str) -> str:
    """Give the name of a database that is a worker's own."""
    return f"{name}_{worker}" if worker else name


def arguments(settings: Mapping[str, str]) -> list[str]:
    """Give the arguments of `postgres` for these settings."""
    return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]


class ServerStartError(PGMonkeyError):
    """A server for tests could not be started; `log` holds the last lines that it wrote.

    `taken` tells that another worker of the run is about to start it.
    """

    def __init__(self, problem: str, *, log: str = "", taken: bool = False) -> None:
        self.problem = problem
        self.log = log
        self.taken = taken
        super().__init__(problem, log)

    def __str__(self) -> str:
        return f"{self.problem}\n{self.log}" if self.log else self.problem


@dataclass(frozen=True)
class Worker:
    """One worker of a run."""

    name: str
    run: str
    controller: int


def new_run() -> dict[str, str | int]:
    """Give what the controller of a run tells its workers under the key RUN."""
    return {"name": secrets.token_hex(8), "controller": os.getpid()}


def worker_of(workerinput: dict[str, Any] | None) -> Worker | None:
    """Give the worker that this process is, `None` where it has a server of its own."""
    told = (workerinput or {}).get(RUN)
    if workerinput is None or told is None or os.name == "nt":
        return None
    if os.getppid() != told["controller"]:
        return None  # A worker that is no child of the controller may be on another machine.
    return Worker(workerinput["workerid"], told["name"], told["controller"])


class Server(ABC):
    """A running server that tests may use.

    `source` is where it comes from (`embedded`, `config` or `container`), `description` says so
    in the report header, `version` is the server's, such as `18.6`. `existing` names a database
    that is somebody else's, in which tests may run as it is.
    """

    # psycopg is imported by the methods that use it: the server starts meanwhile.

    source: str
    description: str
    existing: str | None = None
    _creation: ClassVar[dict[str, Any]] = {}

    @cached_property
    def version(self) -> str:
        from ..databases.commands import connect

        with connect(self.admin_conninfo()) as conn:
            return str(conn.info.parameter_status("server_version")).split(" ", 1)[0]

    @property
    @abstractmethod
    def user(self) -> str:
        """The tests' role."""

    @abstractmethod
    def conninfo(self, dbname: str) -> dict[str, str]:
        """Give libpq's keywords for the tests' role."""

    @abstractmethod
    def admin_conninfo(self, dbname: str = "") -> dict[str, str]:
        """Give libpq's keywords for the role that prepares databases."""

    @abstractmethod
    def config(self, dbname: str) -> dict[str, Any]:
        """Give a configuration as it would stand in a YAML file."""

    @abstractmethod
    def scratch_name(self, name: str) -> str:
        """Give the name of a database that is this process's own."""

    @abstractmethod
    def template(self, recipe: Recipe, load: Callable[[str], None]) -> str | None:
        """Give the database that a recipe makes, `None` where each must be loaded by itself.

        `load` is called with the name of an empty database by the first who asks.
        """

    @abstractmethod
    def kept_as(self, name: str, test: str) -> Kept:
        """Describe a test's database as it is kept under this name; raises KeptError."""

    @abstractmethod
    def stop(self) -> None:
        """Leave nothing behind; a second call does nothing."""

    @property
    def admin_dsn(self) -> str:
        """What libpq connects with as the administrator of a server of ours.

        It may create databases and roles. Raises PGMonkeyError where the server is somebody else's.
        """
        raise PGMonkeyError(
            f"{self.description}: the kit knows no administrator of a server that is not its own"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.description}>"

    @abstractmethod
    def _admin(self) -> AbstractContextManager[Connection[Any]]:
        """Give a connection of the role that prepares databases, for a block."""

    def expect_copies(self, template: str) -> None:  # noqa: B027 - only our own servers do
        """Prepare for many commands, most of which copy this database; ended by `disconnect()`.

        Each thread then keeps its connection.
        """

    def disconnect(self) -> None:  # noqa: B027 - only our own servers do
        """Close the connections of `expect_copies()`."""

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create a database for the tests' role, empty or a copy of another."""
        from ..databases.commands import create

        with self._admin() as conn:
            create(conn, name, template, **self._creation)

    def drop_database(self, name: str) -> None:
        """Drop a database of this run with the sessions that are still in it."""
        from ..databases.commands import drop

        with self._admin() as conn:
            drop(conn, name)

    def rename_database(self, name: str, new_name: str) -> None:
        """Rename a database of this run, which is no longer the run's, and end its sessions."""
        from ..databases.commands import rename

        with self._admin() as conn:
            rename(conn, name, new_name)

    def _kept(
        self, name: str, test: str, conninfo: dict[str, str], place: dict[str, Any], **more: str
    ) -> Kept:
        """Describe a kept database to which libpq's keywords lead, with no password."""
        from psycopg.conninfo import make_conninfo

        from ...kept_databases import Kept

        dsn = make_conninfo(**conninfo)
        made = datetime.now(timezone.utc).isoformat()
        facts: dict[str, Any] = {"psql": f"psql {quote(dsn)}", "place": place, **more}
        return Kept(name=name, test=test, made=made, source=self.source, dsn=dsn, **facts)

    def _load_template(
        self, conn: Connection[Any], partial: str, name: str, load: Callable[[str], None]
    ) -> None:
        """Make a template, which has its name when it is complete."""
        import psycopg

        from ..databases.commands import seal

        self.create_database(partial)
        try:
            load(partial)
            if not seal(conn, partial, name):
                self.drop_database(partial)
        except BaseException:
            with contextlib.suppress(psycopg.Error):  # the server may have gone
                self.drop_database(partial)
            raise

    # What not every server needs or can

    def outlive(self, file: Path) -> None:  # noqa: B027
        """Let the server outlive the run as long as a file is there."""

    def publish(self) -> None:  # noqa: B027
        """Let the other workers of the run use the server from now on."""

    def extension_advice(self, name: str, problem: str) -> str:  # noqa: ARG002
        """Say where an extension that cannot be created is to be had, if the kit knows."""
        return ""

    def log(self) -> str:
        """Give the last lines that the server wrote, where they can be had."""
        return ""


AnyServer = TypeVar("AnyServer", bound="OwnServer")


class OwnServer(Server):
    """A server of the run's own, whose superuser prepares databases that the tests' role owns.

    With a worker it is the whole run's, and each process has databases of its own.
    """

    _creation: ClassVar = {"owner": ROLE, "unlogged": True}
    _alone = True
    _stays_connected = False

    def __init__(self, worker: Worker | None, description: str) -> None:
        self._worker = worker
        self._standing: dict[int, Connection[Any]] = {}  # by thread: commands take long
        self.description = f"{self.source} {description}"

    @classmethod
    def start(cls: type[AnyServer], *args: Any, **kwargs: Any) -> AnyServer:
        """Start a server with the tests' role, all or nothing; raises ServerStartError."""
        server = cls(*args, **kwargs)
        try:
            server.bring_up()
        except BaseException:
            server.stop()
            raise
        return server

    @abstractmethod
    def bring_up(self) -> None:
        """Start the server, and make the tests' role."""

    @abstractmethod
    def _conninfo(self, user: str, dbname: str) -> dict[str, str]:
        """Give libpq's keywords for a role."""

    @abstractmethod
    def _publish_to(self, worker: Worker) -> None:
        """Let the other workers of a run find the server, which ends with their controller."""

    def _save_template(self, recipe: Recipe) -> None:
        """Save the server's data with a template for later runs, where that can be done."""

    @property
    def user(self) -> str:
        return ROLE

    def conninfo(self, dbname: str) -> dict[str, str]:
        return self._conninfo(ROLE, dbname)

    def admin_conninfo(self, dbname: str = "") -> dict[str, str]:
        return self._conninfo(ADMIN, dbname or ADMIN)

    @property
    def admin_dsn(self) -> str:
        from psycopg.conninfo import make_conninfo

        return make_conninfo(**self.admin_conninfo())

    def config(self, dbname: str) -> dict[str, Any]:
        conninfo = self.conninfo(dbname)
        return {"connection_settings": {**conninfo, "port": int(conninfo["port"])}}

    def scratch_name(self, name: str) -> str:
        return scratch_name(name, self._worker.name if self._worker else "")

    def template(self, recipe: Recipe, load: Callable[[str], None]) -> str:
        from ..databases.advisory_locks import exclusive

        with self._admin() as conn, exclusive(conn, recipe.name):
            query = "SELECT FROM pg_catalog.pg_database WHERE datname = %s"
            found = conn.execute(query, [recipe.name]).fetchone()
            if found is None:
                self._load_template(conn, f"{recipe.name}_partial", recipe.name, load)
        if found is None and self._alone:
            self._save_template(recipe)
        return recipe.name

    def publish(self) -> None:
        if self._alone and self._worker is not None:
            self._publish_to(self._worker)
        self._alone = False  # others expect it not to be stopped and started

    def _make_role(self, password: str | None) -> None:
        """Make the role of the tests, which owns their databases and is no superuser."""
        from psycopg import sql

        statement = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
        with self._admin() as conn:
            conn.execute(statement.format(sql.Identifier(ROLE), sql.Literal(password)))

    def expect_copies(self, template: str) -> None:
        from ..databases.advisory_locks import exclusive
        from ..databases.commands import write_catalog_cache

        self._stays_connected = True  # to connect takes as long as to copy a small database
        with self._admin() as conn, exclusive(conn, f"catalog cache of {template}"):
            write_catalog_cache(conn, template, self.admin_conninfo(template))

    def disconnect(self) -> None:
        self._stays_connected = False
        while self._standing:
            _, conn = self._standing.popitem()
            conn.close()

    def _admin(self) -> AbstractContextManager[Connection[Any]]:
        from ..databases.commands import connect, is_alive

        if not self._stays_connected:
            return connect(self.admin_conninfo())
        thread = threading.get_ident()
        conn = self._standing.get(thread)
        if conn is None or not is_alive(conn):
            conn = self._standing[thread] = connect(self.admin_conninfo())
        return contextlib.nullcontext(conn)
