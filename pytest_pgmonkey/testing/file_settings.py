"""Decides which settings of a configuration file apply in a test.

| where a handle leads | what holds |
|---|---|
| the database being prepared | nothing: its sessions are the kit's |
| a test in rollback isolation | what the file sets in its sessions |
| a test in clone isolation | all that does not say where a connection leads |

Limits of a pool, autocommit and hooks are the handle's, and hold in every test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ..config import connection_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config import ConnectionSpec

__all__ = ["in_clone", "in_preparation", "option_settings", "session_settings"]

_WHERE: Final = frozenset(
    (
        "host hostaddr port dbname user password passfile require_auth channel_binding service "
        "servicefile sslmode sslnegotiation sslcompression sslcert sslkey sslpassword sslcertmode "
        "sslrootcert sslcrl sslcrldir sslsni ssl_min_protocol_version ssl_max_protocol_version "
        "gssencmode krbsrvname gsslib gssdelegation target_session_attrs load_balance_hosts"
    ).split()
)
_OPTION: Final = re.compile(r"(?:-c\s*|--)([\w.]+)=((?:\\.|\S)*)")


def in_preparation(spec: ConnectionSpec, config: Mapping[str, Any]) -> ConnectionSpec:
    """Give what a handle connects with to a database of the test server, whose config this is."""
    return connection_spec(config, str(spec.type))


def session_settings(spec: ConnectionSpec) -> tuple[tuple[str, str], ...]:
    """Give what a file sets in its sessions, by whatever key: no connection of its own is made."""
    conninfo = spec.conninfo_dict
    settings = option_settings(conninfo.get("options", ""))
    if "application_name" in conninfo:
        settings.append(("application_name", conninfo["application_name"]))
    return (*settings, *spec.settings)


def option_settings(options: str) -> list[tuple[str, str]]:
    """Give the settings in libpq's `options`."""
    return [
        (name.replace("-", "_"), re.sub(r"\\(.)", r"\1", value))
        for name, value in _OPTION.findall(options)
    ]


def in_clone(spec: ConnectionSpec, conninfo: Mapping[str, str]) -> ConnectionSpec:
    """Give what a handle connects with to a clone, which `conninfo` leads to."""
    rest = {name: value for name, value in spec.conninfo if name not in _WHERE}
    pool = dict(spec.pool)
    # Functions that are asked for each connection say where it leads.
    pool.pop("conninfo", None)
    if callable(given := pool.pop("kwargs", {})):
        given = {}
    if keywords := {name: value for name, value in given.items() if name not in _WHERE}:
        pool["kwargs"] = type(given)(keywords)
    if spec.type.is_pool:
        # A connection costs more than a test: none is opened that nobody borrows.
        pool.setdefault("max_size", max(pool.get("min_size", 4), 1))
        pool["min_size"] = min(pool.get("min_size", 4), 1)
    return replace(
        spec,
        conninfo=tuple(sorted({**rest, **conninfo}.items())),
        pool=tuple(sorted(pool.items())),
    )
