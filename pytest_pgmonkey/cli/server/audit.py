"""The advice compared with a live server, as far as the role may look. It only reads."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from psycopg import errors
from psycopg.rows import dict_row

from .advice import RESERVED, Advice, Client, Entry, Network, advise, milliseconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from psycopg import Connection

#: Methods that are at least as good as what is recommended.
STRONG = frozenset({"scram-sha-256", "cert", "gss", "sspi"})


@dataclass(frozen=True)
class Finding:
    """One thing that was compared: `ok`, `mismatch`, or `unknown` where it could not be seen."""

    what: str
    recommended: str
    current: str
    status: str


def audit(conn: Connection[Any], client: Client) -> tuple[Advice, list[Finding]]:
    """Compare what a client needs with what the server has."""
    conn.read_only = True
    live = _settings(conn)
    if client.address is None and not client.local:
        client = replace(client, address=_own_address(conn))
    advice = advise(client, int(live.get("superuser_reserved_connections") or RESERVED))
    findings = [_compared(entry, live) for entry in advice.settings]
    findings.append(Finding("pg_hba.conf", str(advice.hba), *_judge_hba(conn, advice)))
    return advice, [*findings, _tls(conn, client)]


# --- settings ---


def _settings(conn: Connection[Any]) -> dict[str, str | None]:
    # Not `setting`: the file's own session settings are applied in this session.
    query = "SELECT name, reset_val, unit FROM pg_catalog.pg_settings"
    return {
        name: f"{value}{unit}" if unit in ("ms", "s", "min") and value else value
        for name, value, unit in conn.execute(query)
    }


def _compared(entry: Entry, live: Mapping[str, str | None]) -> Finding:
    current = live.get(entry.name)
    if current is None:
        return Finding(entry.name, entry.value, "not visible to this role", "unknown")
    return Finding(entry.name, entry.value, current, "ok" if _fits(entry, current) else "mismatch")


def _fits(entry: Entry, current: str) -> bool:
    if entry.name == "max_connections":
        return int(current) >= int(entry.value)
    if entry.name.endswith("_file"):
        return current != ""  # The files may have any name.
    if entry.name.endswith("_timeout"):
        return milliseconds(entry.value) == milliseconds(current)
    return entry.value == current


def _own_address(conn: Connection[Any]) -> Network | None:
    """Give the address that the server sees us come from."""
    row = conn.execute("SELECT pg_catalog.host(pg_catalog.inet_client_addr())").fetchone()
    return ipaddress.ip_network(row[0]) if row and row[0] else None


def _tls(conn: Connection[Any], client: Client) -> Finding:
    query = "SELECT version FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()"
    version = next(conn.execute(query), (None,))[0]
    wanted = "TLS" if client.insists_on_tls else "any"
    fits = version or not client.insists_on_tls
    return Finding("this connection", wanted, version or "no TLS", "ok" if fits else "mismatch")


# --- pg_hba.conf ---


def _judge_hba(conn: Connection[Any], advice: Advice) -> tuple[str, str]:
    try:
        rules = _rules(conn)
    except errors.InsufficientPrivilege:
        return "this role may not read pg_hba_file_rules", "unknown"
    if advice.hba.type != "local" and advice.client.address is None:
        return "the client's address is not known", "unknown"
    groups = _groups(conn, advice.client.user)
    for rule in rules:
        if _applies(rule, advice, groups):
            return _shown(rule), "ok" if _is_good(rule, advice) else "mismatch"
    return "no line lets this client in", "mismatch"


def _rules(conn: Connection[Any]) -> list[dict[str, Any]]:
    query = "SELECT * FROM pg_catalog.pg_hba_file_rules WHERE error IS NULL"
    with conn.cursor(row_factory=dict_row) as cursor:
        rules = cursor.execute(query).fetchall()
    # Included files (PostgreSQL 16) have lines of their own.
    return sorted(rules, key=lambda rule: rule.get("rule_number") or rule["line_number"])


def _groups(conn: Connection[Any], user: str) -> set[str]:
    query = (
        "SELECT g.rolname FROM pg_catalog.pg_roles AS g, pg_catalog.pg_roles AS u "
        "WHERE u.rolname = %s AND pg_catalog.pg_has_role(u.oid, g.oid, 'member')"
    )
    return {name for (name,) in conn.execute(query, [user])}


def _applies(rule: Mapping[str, Any], advice: Advice, groups: set[str]) -> bool:
    client = advice.client
    kinds = {"local": ("local",), "hostssl": ("host", "hostssl", "hostnogssenc")}
    return (
        rule["type"] in kinds.get(advice.hba.type, ("host", "hostnossl", "hostnogssenc"))
        and any(_names_database(name, client, groups) for name in rule["database"])
        and any(_names_user(name, client.user, groups) for name in rule["user_name"])
        and (advice.hba.type == "local" or _holds(rule, client.address))
    )


def _names_database(name: str, client: Client, groups: set[str]) -> bool:
    if name == "sameuser":
        return client.database == client.user
    if name in ("samerole", "samegroup"):
        return client.database in groups
    return name == "all" or _matches(name, client.database)


def _names_user(name: str, user: str, groups: set[str]) -> bool:
    return name == "all" or (name[:1] == "+" and name[1:] in groups) or _matches(name, user)


def _matches(name: str, wanted: str) -> bool:
    if name[:1] != "/":
        return name == wanted
    try:
        return re.search(name[1:], wanted) is not None
    except re.error:
        return False


def _holds(rule: Mapping[str, Any], address: Network | None) -> bool:
    """Tell whether a rule covers all of the client's addresses."""
    where = rule["address"]
    if where == "all":
        return True
    if address is None or where is None:
        return False
    if where in ("samehost", "samenet"):
        return address.is_loopback
    try:
        covered = ipaddress.ip_network(f"{where}/{_prefix(rule['netmask'])}", strict=False)
    except ValueError:
        return False  # A host name.
    return covered.version == address.version and address.subnet_of(covered)  # type: ignore[arg-type]


def _prefix(netmask: str | None) -> int:
    return bin(int(ipaddress.ip_address(netmask or "0.0.0.0"))).count("1")


def _is_good(rule: Mapping[str, Any], advice: Advice) -> bool:
    if rule["auth_method"] not in STRONG:
        return False
    if advice.hba.type == "hostssl" and rule["type"] != "hostssl":
        return False  # Such a line lets the client in without TLS, too.
    wanted = advice.client.clientcert
    if wanted is None or rule["auth_method"] == "cert":
        return True
    options = rule["options"] or []
    return f"clientcert={wanted}" in options or "clientcert=verify-full" in options


def _shown(rule: Mapping[str, Any]) -> str:
    words = [rule["type"], ",".join(rule["database"]), ",".join(rule["user_name"])]
    # LDAP's and RADIUS' passwords are among the options.
    options = [option for option in rule["options"] or [] if option.startswith("clientcert=")]
    words += [rule["address"] or "", rule["auth_method"], *options]
    return f"line {rule['line_number']}: {' '.join(filter(None, words))}"
