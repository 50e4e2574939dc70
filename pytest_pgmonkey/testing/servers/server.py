"""What a server for tests is, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..databases.recipe import Recipe

__all__ = ["KeptAddress", "Server", "ServerStartError", "settings_of", "url_of"]


class ServerStartError(PGMonkeyError):
    """A server for tests could not be started; `log` holds the last lines that it wrote."""

    def __init__(self, problem: str, *, log: str = "") -> None:
        self.problem = problem
        self.log = log
        super().__init__(problem, log)

    def __str__(self) -> str:
        return f"{self.problem}\n{self.log}" if self.log else self.problem


@dataclass(frozen=True)
class KeptAddress:
    """How a kept database is reached after its run: by people, and by `pgmonkey kept`."""

    dsn: str
    psql: str
    place: dict[str, Any]
    note: str = ""

    @classmethod
    def of(cls, conninfo: dict[str, str], place: dict[str, Any], note: str = "") -> KeptAddress:
        """Make the address of a database that libpq's keywords lead to."""
        from shlex import quote

        from psycopg.conninfo import make_conninfo

        dsn = make_conninfo(**conninfo)
        return cls(dsn, f"psql {quote(dsn)}", place, note)


class Server(Protocol):
    """A running server that tests may use.

    `source` is where it comes from (`embedded`, `config` or `container`), `description` says so
    in the report header, `version` is the server's, such as `18.6`. `existing` names a database
    that is somebody else's, in which tests may run as it is.
    """

    @property
    def source(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def existing(self) -> str | None: ...

    def conninfo(self, dbname: str) -> dict[str, str]:
        """Give libpq's keywords for the tests' role."""

    def admin_conninfo(self, dbname: str = "postgres") -> dict[str, str]:
        """Give libpq's keywords for the role that prepares databases."""

    def config(self, dbname: str) -> dict[str, Any]:
        """Give a configuration as it would stand in a YAML file."""

    def scratch_name(self, name: str) -> str:
        """Give the name of a database that is this process's own."""

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create a database for the tests' role, empty or a copy of another."""

    def drop_database(self, name: str) -> None:
        """Drop a database of this run with the sessions that are still in it."""

    def address_after_run(self, name: str) -> KeptAddress:
        """Tell how a kept database is reached, with no password; raises KeptError."""

    def outlive(self, file: Path) -> None:
        """Let the server outlive the run as long as a file is there."""

    def rename_database(self, name: str, new_name: str) -> None:
        """Rename a database of this run, which is no longer the run's, and end its sessions."""

    def template(self, recipe: Recipe, load: Callable[[str], None]) -> str | None:
        """Give the database that a recipe makes, `None` where each must be loaded by itself.

        `load` is called with the name of an empty database by the first who asks.
        """

    def publish(self) -> None:
        """Let the other workers of the run use the server from now on."""

    def extension_advice(self, name: str, problem: str) -> str:
        """Say where an extension that cannot be created is to be had, if the kit knows."""

    def log(self) -> str:
        """Give the last lines that the server wrote, where they can be had."""

    def stop(self) -> None:
        """Leave nothing behind; a second call does nothing."""


def settings_of(conninfo: dict[str, str]) -> dict[str, Any]:
    """Turn libpq's keywords into the sections of a configuration."""
    return {
        "connection_settings": {
            key: int(value) if key == "port" else value for key, value in conninfo.items()
        }
    }


def url_of(conninfo: dict[str, str]) -> str:
    """Turn libpq's keywords into a URL: `postgresql://user@host/name`."""
    from urllib.parse import quote, urlencode

    rest = dict(conninfo)
    user, password = rest.pop("user", ""), rest.pop("password", None)
    host, port, dbname = rest.pop("host", ""), rest.pop("port", ""), rest.pop("dbname", "")
    login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    address = host
    if host.startswith("/") or "," in host or not host:
        # A socket's directory cannot stand where a host name does.
        rest = {"host": host, **({"port": port} if port else {}), **rest}
        address = port = ""
    elif ":" in host:
        address = f"[{host}]"
    address += f":{port}" if port else ""
    query = f"?{urlencode({k: v for k, v in rest.items() if v}, quote_via=quote)}" if rest else ""
    at = "@" if login else ""
    return f"postgresql://{login}{at}{address}/{quote(dbname, safe='')}{query}"
