"""What postgresql.conf and pg_hba.conf must say for the clients of one configuration."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

#: What a server keeps for superusers unless it is told otherwise.
RESERVED = 3
INSISTING = ("require", "verify-ca", "verify-full")
SAME_HOST = "samehost"
TIMEOUTS = (
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "statement_timeout",
    "transaction_timeout",
)


@dataclass(frozen=True)
class Client:
    """What a configuration and its user say of the clients, as far as it concerns the server."""

    database: str
    user: str
    #: Over a Unix socket.
    local: bool
    #: On the server's own machine, as far as can be told.
    loopback: bool
    insists_on_tls: bool
    timeouts: Mapping[str, str]
    #: The larger `max_size` of the file's pools.
    largest_pool: int = 1
    processes: int = 1
    #: Where they connect from, `None` where nobody has said so.
    address: Network | None = None
    clientcert: str | None = None


@dataclass(frozen=True)
class Entry:
    """One line of postgresql.conf."""

    name: str
    value: str
    why: str = ""

    def __str__(self) -> str:
        value = self.value
        if not re.fullmatch(r"\d+|on|off", value):
            value = "'{}'".format(value.replace("'", "''"))
        return f"{self.name} = {value}"


@dataclass(frozen=True)
class HbaLine:
    """One line of pg_hba.conf; without an address where nobody has said from where clients come."""

    type: str
    database: str
    user: str
    address: str | None
    method: str = "scram-sha-256"
    options: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        return self.type == "local" or self.address is not None

    def __str__(self) -> str:
        words = [self.type, _hba_name(self.database), _hba_name(self.user)]
        if self.type != "local":
            words.append(self.address or "CLIENT_ADDRESS")
        return "  ".join([*words, self.method, *self.options])


_KEYWORDS = frozenset({"all", "sameuser", "samerole", "samegroup", "replication"})


def _hba_name(name: str) -> str:
    if re.fullmatch(r"[\w.-]+", name) and name not in _KEYWORDS:
        return name
    return '"{}"'.format(name.replace('"', '""'))


@dataclass(frozen=True)
class Advice:
    """All entries for one configuration."""

    client: Client
    settings: tuple[Entry, ...]
    hba: HbaLine


# --- the client ---


def client_of(config: Mapping[str, Any], conninfo: Mapping[str, str], file: str) -> Client:
    """Judge who connects, given libpq's keywords with its defaults filled in.

    Raises ConfigError where a value would be more than a part of a line in the server's files.
    """
    listed = conninfo.get("host", "").strip(",") or conninfo.get("hostaddr", "")
    hosts = [host for host in listed.split(",") if host]
    user = _one_line(conninfo.get("user", ""), "connection_settings.user", file)
    return Client(
        database=_one_line(conninfo.get("dbname") or user, "connection_settings.dbname", file),
        user=user,
        local=all(host.startswith(("/", "@")) for host in hosts),
        loopback=bool(hosts) and all(map(_is_loopback, hosts)),
        insists_on_tls=conninfo.get("sslmode") in INSISTING,
        timeouts=_timeouts(config, file),
    )


def _one_line(value: str, key: str, file: str) -> str:
    """Refuse what would end its line of the server's files, and begin one of its own."""
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
        problem = "holds a control character, which cannot stand in the server's files"
        raise ConfigError(problem, file, key)
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _timeouts(config: Mapping[str, Any], file: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in ("sync_settings", "async_settings"):
        for name, value in (config.get(section) or {}).items():
            if name in TIMEOUTS and isinstance(value, str | int | float):
                text = _one_line(str(value), f"{section}.{name}", file)
                found[name] = max(found.get(name, text), text, key=_for_longest)
    return dict(sorted(found.items()))


_UNITS = {"us": 0.001, "ms": 1.0, "": 1.0, "s": 1e3, "min": 6e4, "h": 3.6e6, "d": 8.64e7}


def milliseconds(value: str) -> float | None:
    """Read a time as PostgreSQL does; `None` where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(us|ms|s|min|h|d|)\s*", value)
    return float(match[1]) * _UNITS[match[2]] if match else None


def _for_longest(value: str) -> float:
    # 0 is no limit at all.
    return milliseconds(value) or float("inf")


# --- the advice ---


def advise(client: Client, reserved: int = RESERVED) -> Advice:
    """Work out the entries for a client."""
    return Advice(client, tuple(_settings(client, reserved)), _hba_line(client))


def _settings(client: Client, reserved: int) -> Iterator[Entry]:
    processes, each = client.processes, client.largest_pool
    # In whole numbers: 1.1 has no exact form, and 110 must not become 111.
    needed = -((processes * each + reserved) * 11 // -10)
    why = f"at least: ({processes} x {each} + {reserved} reserved) + 10 %"
    yield Entry("max_connections", str(needed), why)
    if client.insists_on_tls:
        yield Entry("ssl", "on", "the client insists on TLS")
        yield Entry("ssl_cert_file", "server.crt", "the server's certificate")
        yield Entry("ssl_key_file", "server.key", "its key")
        if client.clientcert:
            yield Entry("ssl_ca_file", "root.crt", "judges clients' certificates")
    for name, value in client.timeouts.items():
        yield Entry(name, value, "as the file sets it")


def _hba_line(client: Client) -> HbaLine:
    if client.local and client.address is None:
        return HbaLine("local", client.database, client.user, None)
    where = str(client.address) if client.address else SAME_HOST if client.loopback else None
    kind = "hostssl" if client.insists_on_tls else "host"
    options = (f"clientcert={client.clientcert}",) if client.clientcert else ()
    return HbaLine(kind, client.database, client.user, where, options=options)
