"""What a client is told when it connects, as a real server would tell it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg

from ...file_settings import option_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_REPORTED: Final = (
    "server_version server_encoding client_encoding application_name in_hot_standby is_superuser "
    "default_transaction_read_only session_authorization DateStyle IntervalStyle TimeZone "
    "integer_datetimes standard_conforming_strings scram_iterations search_path"
).split()
_NO_SETTINGS: Final = ("user", "database", "replication", "application_name", "options")

Settings = tuple[tuple[str, str], ...]


class Greeting(NamedTuple):
    """What the server reports to a new connection with some settings."""

    reported: dict[str, str]
    pid: int


def wanted_settings(parameters: Mapping[str, str]) -> Settings:
    """Give the session settings that a client asks for as it connects."""
    settings = [(k, v) for k, v in parameters.items() if k not in _NO_SETTINGS]
    found = (*option_settings(parameters.get("options", "")), *settings)
    return tuple((k, v) for k, v in found if (k, _plain(v)) != ("client_encoding", "utf8"))


def with_settings(options: str, settings: Settings) -> str:
    """Add settings to libpq's `options`."""
    return " ".join(filter(None, [options, *(f"-c {n}={_escaped(v)}" for n, v in settings)]))


def _escaped(value: str) -> str:
    return "".join("\\" + char if char in " \\\t\n" else char for char in value)


def _plain(value: str) -> str:
    return value.strip("'\"").replace("-", "").lower()


class Greetings:
    """What connections with various settings are told; each kind is asked of the server once."""

    def __init__(self, conninfo: Callable[[], Mapping[str, str]]) -> None:
        self._conninfo: Final = conninfo
        self._lock = threading.Lock()
        self._found: dict[Settings, Greeting] = {}

    def of(self, settings: Settings) -> Greeting:
        """Give the greeting; raises psycopg.Error where the server refuses a setting."""
        with self._lock:
            if settings not in self._found:
                self._found[settings] = self._ask(settings)
            return self._found[settings]

    def _ask(self, settings: Settings) -> Greeting:
        keywords: Any = self._conninfo()
        with psycopg.connect(**keywords, autocommit=True) as conn:
            for name, value in settings:
                conn.execute("SELECT pg_catalog.set_config(%s, %s, false)", [name, value])
            found = {name: conn.info.parameter_status(name) for name in _REPORTED}
            pid = conn.info.backend_pid
        return Greeting({name: value for name, value in found.items() if value is not None}, pid)
