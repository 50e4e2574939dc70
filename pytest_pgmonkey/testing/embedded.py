"""A private PostgreSQL server for one test run, from binaries, gone with the run."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .guarded import GuardedProcess
from .reach import make_reachable, may_enter, unprivileged_uid
from .servers import ServerStartError, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from psycopg import Connection, sql

    from .binaries import Binaries

__all__ = ["ADMIN", "ROLE", "EmbeddedServer"]

ADMIN = "postgres"
ROLE = "pgmonkey"
ON_WINDOWS = os.name == "nt"
SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107
ROOM = 512 * 1024 * 1024

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
LOCALE_C = ["--locale=C"]

AnyServer = TypeVar("AnyServer", bound="EmbeddedServer")


class EmbeddedServer:
    """A server that listens on a Unix socket in a directory that only its user can enter.

    On Windows it listens on the loopback with a random password; that is unverified.
    """

    source = "embedded"

    def __init__(self, binaries: Binaries, *, settings: Mapping[str, str] | None = None) -> None:
        uid = unprivileged_uid()
        self.binaries = make_reachable(binaries, uid)
        self.port = _free_port() if ON_WINDOWS else "5432"
        self._password = secrets.token_urlsafe(16) if ON_WINDOWS else None
        self._settings = dict(settings or {})
        self.guarded = GuardedProcess(choose_directories(uid), uid)
        self.socket_directory = self.guarded.directories[-1]

    @classmethod
    def start(
        cls: type[AnyServer], binaries: Binaries, *, settings: Mapping[str, str] | None = None
    ) -> AnyServer:
        """Make a cluster, start its server, and make the tests' role in it."""
        server = cls(binaries, settings=settings)
        try:
            server.make_cluster()
            server.start_postmaster()
            server.make_role()
        except BaseException:
            server.stop()
            raise
        return server

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.binaries.origin} at {self.socket_directory}>"

    @property
    def description(self) -> str:
        return f"{self.source} ({self.binaries.origin})"

    @property
    def version(self) -> str:
        return self.binaries.version

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
        if self.binaries.major >= 15:
            statement += sql.SQL(" STRATEGY FILE_COPY")  # quicker than WAL_LOG without fsync
        self._execute(statement)

    def drop_database(self, name: str) -> None:
        """Drop a database with the sessions that are still in it; a missing one is fine."""
        from psycopg import sql

        self._execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )

    def stop(self) -> None:
        """Stop the server and remove all that it had; does nothing in a fork or a second time."""
        self.guarded.end()

    def make_cluster(self) -> None:
        """Make the data directory."""
        for attempt in initdb_options(self.binaries.major):
            shutil.rmtree(self.guarded.data, ignore_errors=True)
            code = self._initdb(attempt)
            if code == 0:
                return
        raise ServerStartError(
            f"initdb of {self.binaries.origin} failed with exit code {code}.{nameless_user()}",
            log=self.guarded.log(),
        )

    def start_postmaster(self) -> None:
        """Start the server on its data directory and wait until it accepts connections."""
        if not self.guarded.start(*self._command()):
            raise ServerStartError(
                f"The server of {self.binaries.origin} does not start.", log=self.guarded.log()
            )

    def make_role(self) -> None:
        """Make the role of the tests, which owns their databases and is no superuser."""
        from psycopg import sql

        statement = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
        self._execute(statement.format(sql.Identifier(ROLE), sql.Literal(self._password)))

    def _initdb(self, options: list[str]) -> int:
        command = [str(self.binaries.program("initdb")), "-D", str(self.guarded.data), *options]
        if self._password is None:
            return self.guarded.run(*command, "--auth=trust")
        file = self.guarded.home / "password"
        file.write_text(self._password, "utf-8")
        try:
            return self.guarded.run(*command, "--auth=scram-sha-256", f"--pwfile={file}")
        finally:
            file.unlink()

    def _command(self) -> list[str]:
        settings = {
            **throwaway_settings(self.binaries.major),
            "port": self.port,
            "listen_addresses": "127.0.0.1" if ON_WINDOWS else "",
            "unix_socket_directories": "" if ON_WINDOWS else str(self.socket_directory),
            **self._settings,
        }
        command = [str(self.binaries.program("postgres")), "-D", str(self.guarded.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _conninfo(self, user: str, dbname: str) -> dict[str, str]:
        host = "127.0.0.1" if ON_WINDOWS else str(self.socket_directory)
        conninfo = {"host": host, "port": self.port, "user": user, "dbname": dbname}
        return conninfo if self._password is None else {**conninfo, "password": self._password}

    def _admin(self) -> Connection[Any]:
        import psycopg
        from psycopg.conninfo import make_conninfo

        return psycopg.connect(make_conninfo(**self.admin_conninfo()), autocommit=True)

    def _execute(self, statement: sql.Composed) -> None:
        with self._admin() as conn:
            conn.execute(statement)


def nameless_user() -> str:
    """Say what to do where the user has no name, as initdb wants: usual in `docker run --user`."""
    try:
        import pwd

        pwd.getpwuid(os.geteuid())
    except ImportError:
        return ""
    except KeyError:
        uid = os.geteuid()
        return f" User {uid} has no name: add it to /etc/passwd, or run the tests as another user."
    return ""


def throwaway_settings(major: int) -> dict[str, str]:
    """Give the settings of a server whose data nobody will miss."""
    return {
        **THROWAWAY,
        **({} if ON_WINDOWS else {"dynamic_shared_memory_type": "mmap"}),
        **({"io_method": "sync"} if major >= 18 else {}),
    }


def initdb_options(major: int) -> Iterator[list[str]]:
    """Give the options of initdb to try in turn: quick, UTF-8, a locale that is never the user's.

    Before PostgreSQL 17 the locale C.UTF-8 is the operating system's, and not everywhere there.
    """
    options = ["--no-sync", "-U", ADMIN, "--encoding=UTF8", "--wal-segsize=4"]
    if major >= 14:
        options.append("--no-instructions")
    if major >= 18:
        options.append("--no-data-checksums")
    if major >= 17:
        yield [*options, *LOCALE_C, "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    else:
        yield [*options, "--locale=C.UTF-8"]
        yield [*options, *LOCALE_C]


def choose_directories(uid: int | None) -> list[Path]:
    """Choose a home for the data, in RAM where there is room, and a place for the socket.

    They are one directory, unless the home's path is too long for a Unix socket.
    """
    name = f"pgmonkey-{secrets.token_hex(4)}"
    bases = [base for base in _bases() if _is_usable(base, uid)]
    roomy = [base / name for base in bases if shutil.disk_usage(base).free >= ROOM]
    short = [base / name for base in bases if _fits_socket(base / name)]
    if not roomy or not short:
        lack = f"{ROOM >> 20} MB of room" if not roomy else "a path short enough for a Unix socket"
        raise ServerStartError(
            f"No directory for the embedded server has {lack}: looked at"
            f" {', '.join(map(str, _bases()))}. Set TMPDIR to one that has."
        )
    home = roomy[0]
    return [home] if home in short else [home, short[0]]


def _bases() -> list[Path]:
    names = ["/dev/shm", tempfile.gettempdir(), "/tmp", "/var/tmp"]
    return [Path(tempfile.gettempdir())] if ON_WINDOWS else list(map(Path, dict.fromkeys(names)))


def _is_usable(base: Path, uid: int | None) -> bool:
    return base.is_dir() and os.access(base, os.W_OK | os.X_OK) and may_enter(base, uid)


def _fits_socket(directory: Path) -> bool:
    return ON_WINDOWS or len(os.fsencode(directory / ".s.PGSQL.65535")) <= SOCKET_LIMIT


def _free_port() -> str:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])
