"""What a server for tests is, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import PGMonkeyError

if TYPE_CHECKING:
    from .binaries import Binaries
    from .options import Options

__all__ = ["Choice", "Server", "ServerStartError", "choose", "settings_of"]


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


@dataclass(frozen=True)
class Choice:
    """A source of servers and why it was chosen: a file, binaries, or a container image."""

    source: str
    why: str
    binaries: Binaries | None = None
    name: str = ""

    @property
    def description(self) -> str:
        """What the report header says of it; may run a program that tells its version."""
        if self.binaries is None:
            return f"{self.source} {self.name}"
        return f"PostgreSQL {self.binaries.version}, {self.source} ({self.binaries.origin})"


def choose(options: Options) -> Choice:
    """Choose among the sources; starts nothing, raises PGMonkeyError where there is none."""
    given = options.given
    if options.config is not None:
        return Choice("config", given["config"], name=str(options.config))
    if options.source == "container":
        return _container(options, given["source"])
    if options.source == "auto" and options.image is not None:
        return _container(options, given["image"])
    from .binaries import BinariesNotFoundError, find_binaries

    why = given.get("bindir") or given.get("source") or "no config given"
    try:
        return Choice("embedded", why, find_binaries(options.bindir))
    except BinariesNotFoundError as missing:
        if options.source == "embedded" or options.bindir is not None:
            raise
        return _last_resort(options, str(missing))


def _last_resort(options: Options, missing: str) -> Choice:
    from .container import engine_problem

    if problem := engine_problem():
        raise ServerStartError(
            "There is no PostgreSQL server for the tests.\n"
            "config: none was given. Name a YAML file with --pgmonkey-config.\n"
            f"embedded: {missing}\n"
            f"container: {problem}"
        )
    return _container(options, "no config given, no server binaries found")


def _container(options: Options, why: str) -> Choice:
    from .container import DEFAULT_IMAGE

    return Choice("container", why, name=options.image or DEFAULT_IMAGE)


def settings_of(conninfo: dict[str, str]) -> dict[str, Any]:
    """Turn libpq's keywords into the sections of a configuration."""
    return {
        "connection_settings": {
            key: int(value) if key == "port" else value for key, value in conninfo.items()
        }
    }
