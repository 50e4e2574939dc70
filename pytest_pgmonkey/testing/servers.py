"""What a server for tests is, wherever it comes from."""

from __future__ import annotations

from typing import Any, Protocol

from ..errors import PGMonkeyError

__all__ = ["Server", "ServerStartError", "settings_of"]


class ServerStartError(PGMonkeyError):
    """A server for tests could not be started; `log` holds the last lines that it wrote."""

    def __init__(self, problem: str, *, log: str = "") -> None:
        self.problem = problem
        self.log = log
        super().__init__(problem, log)

    def __str__(self) -> str:
        return f"{self.problem}\n{self.log}" if self.log else self.problem


class Server(Protocol):
    """A running server that tests may use.

    `source` is where it comes from (`embedded`, `config` or `container`), `description` says so
    in the report header, `version` is the server's, such as `18.6`.
    """

    @property
    def source(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def version(self) -> str: ...

    def conninfo(self, dbname: str) -> dict[str, str]:
        """Give libpq's keywords for the tests' role."""

    def admin_conninfo(self, dbname: str = "postgres") -> dict[str, str]:
        """Give libpq's keywords for the role that prepares databases."""

    def config(self, dbname: str) -> dict[str, Any]:
        """Give a configuration as it would stand in a YAML file."""

    def stop(self) -> None:
        """Leave nothing behind; a second call does nothing."""


def settings_of(conninfo: dict[str, str]) -> dict[str, Any]:
    """Turn libpq's keywords into the sections of a configuration."""
    return {
        "connection_settings": {
            key: int(value) if key == "port" else value for key, value in conninfo.items()
        }
    }
